"""Speed and memory of rollouts and of learning. Run by hand:

    python benchmark.py                                tiny and mid; 8b too where there is a GPU
    OMP_NUM_THREADS=1 python benchmark.py --shape mid  one shape, on one thread

    naive          LLaDA's loop: all rows and positions at every step, all logits in float64
    ours           diffusion_policy.py without a cache: the same tokens by the same random numbers
    prefix, dual   the same with that block cache
    learning       one step's updates of a LoRA adapter: the old policy's score, mu inner updates

Each row is a process of its own, so its peak memory is its own. Every rollout unmasks equally many
tokens a step: random weights are never sure, so a threshold would say nothing.
"""

import json
import subprocess
import sys
import time
from functools import partial
from types import SimpleNamespace

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import models
import runs
from diffusion_policy import DiffusionPolicy
from likelihood import draw_boundaries
from sampler import Decoder
from settings import RECIPES, OneLineParser, Settings
from train import update_denoiser

MID = dict(prompts_per_step=2, group_size=4, length=128, inner_updates=2, lora_rank=16)
HALF = dict(prompts_per_step=8, dtype="bfloat16")  # the naive logits of more would not fit 80 GB
SHAPES = {  # (V, D, MLP, layers, heads), prompt tokens, tokens a step, settings
    "tiny": ((112, 104, 312, 6, 4), 5, 1, Settings(length=10, block_length=5, lora_rank=8)),
    "mid": ((126464, 256, 768, 4, 4), 64, 2, Settings(**RECIPES["LLaDA"] | MID)),
    "8b": ((126464, 4096, 12288, 32, 32), 200, 2, Settings(**RECIPES["LLaDA"] | HALF)),
}
METHODS = {"naive": "none", "ours": "none", "prefix": "prefix", "dual": "dual", "learning": "dual"}
COLUMNS = ("seconds", "tokens_per_s", "x_naive", "same_tokens", "peak_gib")


def make_policy(sizes, dtype, device):
    """LLaDA's architecture with random weights, whose logits spread alike at any width."""
    V, D, MLP, layers, heads = sizes
    config = LlamaConfig(
        vocab_size=V, hidden_size=D, intermediate_size=MLP, num_hidden_layers=layers,
        num_attention_heads=heads, initializer_range=1.28 / D**0.5, is_causal=False,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        denoiser = LlamaForCausalLM._from_config(config, dtype=dtype).eval()
    ids = SimpleNamespace(chat_template=None, mask_token_id=1, eos_token_id=2)
    return DiffusionPolicy(denoiser, ids)


@torch.no_grad()
def naive_rollout(policy, prompts, prompt_mask, length, decoder, generator, group_size):
    """What DiffusionPolicy.rollout draws with top_k and no padding, as LLaDA's loop draws it."""
    (B, P), k, block = prompts.shape, decoder.level, decoder.block_length
    canvas = torch.nn.functional.pad(prompts, (0, length), value=policy.mask_id)  # (B, S)
    for end in range(P + block, P + length + 1, block):
        for _ in range(block // k):
            states = policy.hidden(canvas)
            logits = policy.denoiser.get_output_embeddings()(states).to(torch.float64)  # (B, S, V)
            logits[..., policy.mask_id] = -torch.inf
            confidence = logits.softmax(-1).amax(-1)  # (B, S)
            closed = canvas != policy.mask_id
            closed[:, end:] = True
            index = confidence.masked_fill(closed, -1).topk(k).indices.sort().values  # (B, k)
            chosen = states.take_along_dim(index.unsqueeze(-1), dim=1).flatten(0, 1)
            tokens, _ = policy.draw(chosen, decoder.temperature, generator)
            canvas.scatter_(1, index, tokens.view(B, k))
    return SimpleNamespace(completion=canvas[:, P:])


def measure(shape, method):
    """One row of the table, in this process."""
    sizes, P, per_step, settings = shape
    G, device = settings.group_size, "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, settings.dtype, torch.float32)  # float32: "auto" too
    policy = make_policy(sizes, dtype, device)
    generator = torch.Generator(device).manual_seed(0)
    prompts = torch.randint(3, 100, (settings.prompts_per_step, P)).repeat_interleave(G, dim=0)
    prompts = prompts.to(device)  # (B, P)
    decoder = Decoder("top_k", per_step, settings.block_length, cache=METHODS[method])
    rollout = naive_rollout if method == "naive" else DiffusionPolicy.rollout
    how = (prompts, prompts > 0, settings.length, decoder, generator, G)
    run = partial(rollout, policy, *how)
    if method == "learning":
        sample, rank = run(), settings.lora_rank
        policy.denoiser = models.add_lora(policy.denoiser, rank, settings.lora_alpha)
        if settings.gradient_checkpointing:
            policy.denoiser.gradient_checkpointing_enable({"use_reentrant": False})
        optimizer = torch.optim.AdamW(policy.denoiser.parameters(), lr=settings.learning_rate)
        stages = [(draw_boundaries(sample.nfe, 2, generator), None, 0)] * settings.inner_updates
        how = (None, optimizer, sample, stages, torch.ones_like(sample.threshold), settings)
        run = partial(update_denoiser, policy, *how)
    policy.hidden(prompts[:G])  # the first call of every kernel is slow
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    began, result = time.perf_counter(), run()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    row = {"method": method, "seconds": seconds, "peak_gib": runs.peak_memory_gib()}
    if method != "learning":
        tokens = result.completion
        row |= {"tokens_per_s": tokens.numel() / seconds, "tokens": tokens.tolist()}
    return row


def run_apart(name, method):
    """The row of another process, or why there is none."""
    command = [sys.executable, __file__, "--shape", name, "--method", method]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"method": method, "failed": (done.stderr.strip().splitlines() or ["?"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def compare(rows):
    """The rows, each rollout beside the first, which is naive: how fast, how many equal tokens."""
    tokens = [torch.tensor(row.pop("tokens", [])) for row in rows]
    for row, own in zip(rows[1:], tokens[1:], strict=True):
        if own.numel() and tokens[0].numel():
            row["x_naive"] = row["tokens_per_s"] / rows[0]["tokens_per_s"]
            row["same_tokens"] = (own == tokens[0]).float().mean().item()
    return rows


def main(arguments=None):
    parser = OneLineParser(description="Speed and memory of rollouts and of learning.")
    parser.add_argument("--shape", choices=SHAPES, help="default: all that this machine can")
    parser.add_argument("--method", choices=METHODS, help="one row, in this process, as JSON")
    options = parser.parse_args(arguments)
    if options.method:
        return print(json.dumps(measure(SHAPES[options.shape or "tiny"], options.method)))
    print(f"{'shape':6}{'method':10}" + "".join(f"{key:>13}" for key in COLUMNS))
    for name in [options.shape] if options.shape else [*SHAPES][: 2 + torch.cuda.is_available()]:
        for row in compare([run_apart(name, method) for method in METHODS]):
            known = {key: f"{row[key]:.3f}" for key in COLUMNS if row.get(key) is not None}
            cells = "".join(f"{known.get(key, ''):>13}" for key in COLUMNS)
            print(f"{name:6}{row['method']:10}" + row.get("failed", cells))


if __name__ == "__main__":
    main()
