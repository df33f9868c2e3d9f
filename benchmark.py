"""Speed and memory of rollouts and of learning. Run by hand:

    python benchmark.py                     tiny and mid; 8b too where there is a GPU
    python benchmark.py --shape 8b          LLaDA-8B's shape, random weights: a GPU of 80 GB
    python benchmark.py --shape mid --threads 1

Each row is a process of its own, so its peak memory is its own. Every rollout unmasks equally many
tokens a step: random weights are never sure, so a threshold would say nothing.

    naive          LLaDA's loop: all rows and positions at every step, all logits in float64
    ours           diffusion_policy.py without a cache: the same tokens by the same random numbers
    prefix, dual   the same with that block cache
    learning       one step's updates of a LoRA adapter: the old policy's score, mu inner updates
"""

import argparse
import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import models
import runs
from diffpo_loss import group_advantages
from diffusion_policy import DiffusionPolicy
from likelihood import draw_boundaries
from sampler import Decoder
from train import Settings, update_denoiser

LLADA = {"vocab_size": 126464, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096}
SHAPES = {  # config: V, hidden, MLP, layers, heads; naive_rows: what its logits leave room for
    "tiny": dict(
        config=(116, 128, 384, 4, 4), prompts=32, group=8, prompt_length=(5, 5), length=10, block=5,
        per_step=1, naive_rows=256, micro_batch=256, inner=1, rank=8, checkpointing=False,
    ),
    "mid": dict(
        config=(126464, 256, 768, 4, 4), prompts=2, group=4, prompt_length=(64, 64), length=128,
        block=32, per_step=2, naive_rows=8, micro_batch=8, inner=2, rank=16, checkpointing=True,
    ),
    "8b": dict(
        config=(126464, 4096, 12288, 32, 32), prompts=16, group=6, prompt_length=(190, 210),
        length=256, block=32, per_step=2, naive_rows=48, micro_batch=12, inner=8, rank=128,
        checkpointing=True,
    ),
}  # fmt: skip
METHODS = ("naive", "ours", "prefix", "dual", "learning")


@torch.no_grad()
def naive_rollout(policy, prompt_ids, prompt_mask, length, decoder, generator):
    """The draws of DiffusionPolicy.rollout with top_k, as LLaDA's own loop goes about it."""
    (B, P), k, block = prompt_ids.shape, int(decoder.level), decoder.block_length
    masks = torch.full((B, length), policy.mask_id, device=prompt_ids.device)
    canvas = torch.cat([prompt_ids, masks], dim=1)  # (B, S)
    mask = torch.cat([prompt_mask, torch.ones_like(masks, dtype=torch.bool)], dim=1)
    for start in range(P, P + length, block):
        for _ in range(-(-block // k)):
            states = policy.hidden(canvas, mask)
            logits = policy.denoiser.get_output_embeddings()(states).to(torch.float64)  # (B, S, V)
            logits[..., policy.mask_id] = -torch.inf
            confidence = logits.softmax(-1).amax(-1)  # (B, S)
            outside = canvas != policy.mask_id
            outside[:, start + block :] = True
            index = confidence.masked_fill(outside, -1).topk(k, dim=-1).indices.sort(-1).values
            chosen = logits.gather(1, index.unsqueeze(-1).expand(-1, -1, logits.shape[-1]))
            cumulated = (chosen.flatten(0, 1) / decoder.temperature).softmax(-1).cumsum(-1)
            how = {"generator": generator, "dtype": torch.float64, "device": canvas.device}
            point = torch.rand((B * k, 1), **how) * cumulated[:, -1:]
            canvas.scatter_(1, index, torch.searchsorted(cumulated, point, right=True).view(B, k))
    return canvas[:, P:]


def make_policy(shape, device):
    V, D, MLP, layers, heads = shape["config"]
    config = LlamaConfig(
        is_causal=False, hidden_size=D, intermediate_size=MLP, num_hidden_layers=layers,
        num_attention_heads=heads, tie_word_embeddings=V < 500,
        initializer_range=0.08 if D == 256 else 0.02,  # so that mid's logits spread as 8b's do
        **LLADA | {"vocab_size": V},
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        denoiser = LlamaForCausalLM._from_config(config, dtype=dtype).eval()
    mask_id, eos_id = (V - 128, V - 383) if V > 500 else (1, 2)  # the first two are LLaDA's
    ids = SimpleNamespace(chat_template=None, mask_token_id=mask_id, eos_token_id=eos_id)
    return DiffusionPolicy(denoiser, ids)


def make_prompts(shape, device):
    """Random prompts, each for its whole group: ids and mask (B, P), left-padded."""
    generator, (low, high) = torch.Generator().manual_seed(1), shape["prompt_length"]
    lengths = torch.randint(low, high + 1, (shape["prompts"],), generator=generator)
    P = int(lengths.max())
    ids = torch.randint(3, 100, (shape["prompts"], P), generator=generator)
    mask = torch.arange(P) >= P - lengths.unsqueeze(1)
    return (x.repeat_interleave(shape["group"], dim=0).to(device) for x in (ids * mask, mask))


def learner(policy, shape, sample, generator):
    """What does one step's updates of an adapter, on the rollout `sample`."""
    policy.denoiser = models.add_lora(policy.denoiser, shape["rank"], shape["rank"] / 2)
    settings = Settings(micro_batch_size=shape["micro_batch"], lora_rank=shape["rank"])
    if shape["checkpointing"]:
        policy.denoiser.gradient_checkpointing_enable({"use_reentrant": False})
    parameters = [p for p in policy.denoiser.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=3e-6)
    reward = torch.rand(len(sample.nfe), generator=torch.Generator().manual_seed(2))
    advantage = group_advantages(reward, shape["group"]).to(sample.nfe.device)
    stages = [(draw_boundaries(sample.nfe, 2, generator), None, u) for u in range(shape["inner"])]
    how = (None, optimizer, sample, stages, advantage, settings)
    return lambda: update_denoiser(policy, *how)


def measure(shape, method, device):
    """One row of the table, in this process."""
    policy, (ids, mask) = make_policy(shape, device), make_prompts(shape, device)
    generator, L = torch.Generator(device).manual_seed(0), shape["length"]

    def rollout(cache):
        decoder = Decoder("top_k", shape["per_step"], shape["block"], 0.9, cache)
        return policy.rollout(ids, mask, L, decoder, generator, shape["group"])

    def naive():
        decoder, n = Decoder("top_k", shape["per_step"], shape["block"], 0.9), shape["naive_rows"]
        parts = zip(ids.split(n), mask.split(n), strict=True)
        return torch.cat([naive_rollout(policy, *part, L, decoder, generator) for part in parts])

    if method == "learning":
        run = learner(policy, shape, rollout("dual"), generator)
    elif method == "naive":
        run = naive
    else:
        run = lambda: rollout("none" if method == "ours" else method).completion  # noqa: E731
    policy.hidden(ids[: shape["group"]])  # the first call of every kernel is slow
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    result = run()
    if device == "cuda":
        torch.cuda.synchronize()
    row = {"method": method, "seconds": time.perf_counter() - began}
    row |= {"peak_gib": runs.peak_memory_gib(), "dtype": str(policy.denoiser.dtype)}
    if torch.is_tensor(result):
        row |= {"tokens_per_s": result.numel() / row["seconds"], "tokens": result.tolist()}
    return row


def run_apart(name, method, threads):
    """The row of another process, or why there is none."""
    command = [sys.executable, __file__, "--shape", name, "--method", method, "--threads", threads]
    environment = os.environ | {"OMP_NUM_THREADS": threads}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode:
        return {"method": method, "failed": (result.stderr.strip().splitlines() or ["?"])[-1]}
    return json.loads(result.stdout.splitlines()[-1])


def compare(rows):
    """Each rollout with its ratios to the naive one, and a last row: one RL step, with dual."""
    tokens = [torch.tensor(row.pop("tokens", [])) for row in rows]
    for row, own in zip(rows[1:4], tokens[1:4], strict=True):
        if own.shape == tokens[0].shape and own.numel():
            row["x_naive"] = row["tokens_per_s"] / rows[0]["tokens_per_s"]
            row["same_tokens"] = (own == tokens[0]).float().mean().item()
    step = {"method": "step"}
    if "seconds" in rows[3] and "seconds" in rows[4]:
        step["seconds"] = rows[3]["seconds"] + rows[4]["seconds"]
    return [*rows, step]


def main():
    parser = argparse.ArgumentParser(description="Speed and memory of rollouts and of learning.")
    parser.add_argument("--shape", choices=list(SHAPES), help="default: all that this machine can")
    parser.add_argument("--method", choices=METHODS, help="one row, in this process, as JSON")
    parser.add_argument("--threads", default=str(torch.get_num_threads()), help="CPU threads")
    options, gpu = parser.parse_args(), torch.cuda.is_available()
    torch.set_num_threads(int(options.threads))
    if options.method:
        device = "cuda" if gpu and options.shape == "8b" else "cpu"
        print(json.dumps(measure(SHAPES[options.shape], options.method, device)))
        return
    keys = ("seconds", "tokens_per_s", "x_naive", "same_tokens", "peak_gib")
    print(f"{'shape':6}{'method':10}" + "".join(f"{key:>13}" for key in keys))
    for name in [options.shape] if options.shape else [*SHAPES][: 3 if gpu else 2]:
        rows = compare([run_apart(name, method, options.threads) for method in METHODS])
        for row in rows:
            cells = "".join(f"{row[key]:13.3f}" if row.get(key) else " " * 13 for key in keys)
            print(f"{name:6}{row['method']:10}" + row.get("failed", cells))
        chip = torch.cuda.get_device_name() if gpu else f"CPU, {options.threads} threads"
        print(f"{name}: {rows[0].get('dtype')}, {chip}")


if __name__ == "__main__":
    main()
