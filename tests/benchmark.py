"""Speed and memory of rollouts and of the learning pass. Run by hand:

    python tests/benchmark.py                     tiny and mid; 8b too where there is a GPU
    python tests/benchmark.py --shape 8b          LLaDA-8B's shape with random weights: needs a GPU of 80 GB
    python tests/benchmark.py --shape mid --threads 1 --out benchmark.json

Prints one table and writes it as JSON. Four rollouts of equally many tokens a step (random weights have no confident positions,
so a threshold would say nothing):

    naive    a LLaDA-style loop: the full canvas of all rows through the layers at every step, the logits of all positions in
             float64, a fixed number of steps, no row ever leaves. (LLaDA's also draws Gumbel noise for all of them. Left out
             here, in its favour, so that both draw from the same random numbers.)
    ours     diffusion_policy.py without a cache: the same tokens
    prefix   with the prefix cache      dual     with the dual cache

and one RL step's learning: scoring the old policy, then mu inner updates of a LoRA adapter, 2 stages. `step` is dual and learning
together, one whole RL step.

Every row is a process of its own, so that its peak memory is its own: of the GPU, or of the process where there is none.
TFLOP is what the algorithm asks for: 2 per weight and position, attention included; as much again for a backward pass, since a
frozen base needs no gradients of its weights; and nothing for activations that gradient checkpointing makes twice. Where there is
no GPU the 8b rows are counted on a stand-in that makes the same calls, and nothing is timed.
MFU is TFLOP / seconds / peak: the chip's bfloat16 peak, or on a CPU the rate of a large float32 product, measured first.
"""

import argparse
import copy
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import models
from diffpo_loss import group_advantages
from diffusion_policy import DiffusionPolicy
from likelihood import draw_boundaries
from sampler import Decoder
from train import Settings, update_denoiser

PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}  # dense bfloat16, FLOP/s, the makers' figures
LLADA = {"vocab_size": 126464, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "max_position_embeddings": 4096}
SHAPES = {  # naive_rows: as many as its logits leave room for; mid's initial range makes its logits as spread out as 8b's
    "tiny": {
        "config": {"vocab_size": 116, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4},
        "prompts": 32, "group": 8, "prompt_length": (5, 5), "length": 10, "block": 5, "per_step": 1, "naive_rows": 256,
        "micro_batch": 256, "inner": 1, "rank": 8, "checkpointing": False,
    },
    "mid": {
        "config": LLADA | {"initializer_range": 0.08, "hidden_size": 256, "intermediate_size": 768,
                           "num_hidden_layers": 4, "num_attention_heads": 4},
        "prompts": 2, "group": 4, "prompt_length": (64, 64), "length": 128, "block": 32, "per_step": 2, "naive_rows": 8,
        "micro_batch": 8, "inner": 2, "rank": 16, "checkpointing": True,
    },
    "8b": {
        "config": LLADA | {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 32, "num_attention_heads": 32},
        "prompts": 16, "group": 6, "prompt_length": (190, 210), "length": 256, "block": 32, "per_step": 2, "naive_rows": 48,
        "micro_batch": 12, "inner": 8, "rank": 128, "checkpointing": True,
    },
}  # fmt: skip
METHODS = ("naive", "ours", "prefix", "dual", "learning")


class CountingPolicy(DiffusionPolicy):
    """Adds up, in `flop`, the floating-point operations that its calls ask of a model of the shape `counted`."""

    flop, counted, rank = 0, None, 0

    def count(self, forward):
        self.flop += forward * (2 if torch.is_grad_enabled() else 1)

    def layers(self, rows, queries, keys):
        D, inner = self.counted["hidden_size"], self.counted["intermediate_size"]
        weights = 4 * D * D + 3 * D * inner + self.rank * (4 * 2 * D + 3 * (D + inner))  # of a layer, its adapter's too
        attention = 2 * keys * D  # twice: scores, and values
        self.count(2 * rows * queries * self.counted["num_hidden_layers"] * (weights + attention))

    def hidden(self, ids, attention_mask=None, cache=None, start=0, stop=None):
        self.layers(len(ids), (ids.shape[1] if stop is None else stop) - start, ids.shape[1])
        return super().hidden(ids, attention_mask, cache, start, stop)

    def head(self, positions):
        self.count(2 * positions * self.counted["vocab_size"] * self.counted["hidden_size"])

    def surety(self, hidden, rule):
        self.head(len(hidden))
        return super().surety(hidden, rule)

    def draw(self, hidden, temperature, generator=None):
        self.head(len(hidden))
        return super().draw(hidden, temperature, generator)

    def token_logp(self, hidden, tokens, temperature):
        self.head(len(hidden))
        return super().token_logp(hidden, tokens, temperature)


@torch.no_grad()
def naive_rollout(policy, prompt_ids, prompt_mask, length, decoder, generator, temperature):
    """The same draws from the same random numbers as DiffusionPolicy.rollout with top_k, as LLaDA's own sampling loop goes about it."""
    (B, P), k, block = prompt_ids.shape, int(decoder.setting), decoder.block_length
    canvas = torch.cat([prompt_ids, torch.full((B, length), policy.mask_id, device=prompt_ids.device)], dim=1)
    mask = torch.cat([prompt_mask, torch.ones_like(canvas[:, P:], dtype=torch.bool)], dim=1)
    for start in range(P, P + length, block):
        for _ in range(-(-block // k)):
            logits = policy.denoiser(input_ids=canvas, attention_mask=mask).logits.to(torch.float64)  # (B, S, V)
            policy.layers(B, P + length, P + length)
            policy.head(canvas.numel())
            logits[..., policy.mask_id] = -torch.inf
            confidence = logits.softmax(-1).amax(-1)  # (B, S)
            outside = canvas != policy.mask_id
            outside[:, start + block :] = True
            index = confidence.masked_fill(outside, -1).topk(k, dim=-1).indices.sort(-1).values  # (B, k), in the order of positions
            chosen = logits.gather(1, index.unsqueeze(-1).expand(-1, -1, logits.shape[-1])).flatten(0, 1)  # (B * k, V)
            cumulated = (chosen / temperature).softmax(-1).cumsum(-1)
            uniform = torch.rand((len(chosen), 1), generator=generator, dtype=torch.float64, device=chosen.device)
            tokens = torch.searchsorted(cumulated, uniform * cumulated[:, -1:], right=True)
            canvas.scatter_(1, index, tokens.view(B, k))
    return canvas[:, P:]


STAND_IN = {"vocab_size": 116, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def make_policy(shape, device, stand_in=False):
    config = LlamaConfig(is_causal=False, **shape["config"] | (STAND_IN if stand_in else {}))
    torch.manual_seed(0)
    with torch.device(device):
        denoiser = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16 if device == "cuda" else torch.float32).eval()
    V = config.vocab_size
    mask_id, eos_id = (V - 128, V - 383) if V > 500 else (1, 2)  # the first two are LLaDA's
    if stand_in:
        eos_id = -1  # of 126,464 random tokens hardly one is an eos; of 116 it would often be
    policy = CountingPolicy(denoiser, SimpleNamespace(chat_template=None, mask_token_id=mask_id, eos_token_id=eos_id))
    policy.counted = shape["config"]
    return policy


def make_prompts(shape, device, generator):
    """Random prompts, each for its whole group: ids and mask (B, P), left-padded."""
    low, high = shape["prompt_length"]
    lengths = torch.randint(low, high + 1, (shape["prompts"],), generator=generator)
    ids = torch.randint(3, 100, (shape["prompts"], int(lengths.max())), generator=generator)
    mask = torch.arange(ids.shape[1]) >= ids.shape[1] - lengths.unsqueeze(1)
    return (x.repeat_interleave(shape["group"], dim=0).to(device) for x in (ids * mask, mask))


def peak_flops(device):
    """(FLOP/s, what it is): the chip's published figure, or the best of a few large products."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
        known = [peak for chip, peak in PEAKS.items() if chip in name]
        return (known[0] if known else None), f"{name}, bfloat16 peak {known[0] / 1e12:.0f} TFLOP/s" if known else f"{name}, peak not known"
    a, rates = torch.randn(2048, 2048), []
    for _ in range(5):
        began = time.perf_counter()
        a @ a
        rates.append(2 * 2048**3 / (time.perf_counter() - began))
    return max(rates), f"{torch.get_num_threads()} CPU threads, float32 product of 2048 x 2048 at {max(rates) / 1e9:.0f} GFLOP/s"


def measure(shape, method, device, count_only=False):
    """One row of the table, in this process."""
    peak, chip = peak_flops(device)
    policy = make_policy(shape, device, count_only)
    generator = torch.Generator(device).manual_seed(0)
    prompt_ids, prompt_mask = make_prompts(shape, device, torch.Generator().manual_seed(1))
    decoder = Decoder("top_k", shape["per_step"], shape["block"])
    B, L = len(prompt_ids), shape["length"]

    def rollout(cache):
        return policy.rollout(prompt_ids, prompt_mask, L, decoder, generator, 0.9, cache=cache)

    def learn():
        stages = [(draw_boundaries(sample.nfe, 2, generator), torch.zeros_like(prompt_mask)) for _ in range(shape["inner"])]
        update_denoiser(policy, None, optimizer, sample, stages, advantage, settings)

    if method == "learning":
        sample = rollout("dual")
        policy.rank = shape["rank"]
        if not count_only:
            policy.denoiser = models.add_lora(policy.denoiser, shape["rank"], shape["rank"] / 2, 0.05, seed=0)
        settings = Settings(micro_batch_size=shape["micro_batch"], inner_updates=shape["inner"], grad_clip=0.2)
        if shape["checkpointing"]:
            policy.denoiser.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        optimizer = torch.optim.AdamW([p for p in policy.denoiser.parameters() if p.requires_grad], lr=3e-6)
        advantage = group_advantages(torch.rand(B, generator=torch.Generator().manual_seed(2)), shape["group"]).to(device)
    if device == "cuda":  # the first call of every kernel is slow
        policy.hidden(prompt_ids[: shape["group"]])
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    policy.flop = 0
    began = time.perf_counter()
    tokens = None
    if method == "learning":
        learn()
    elif method == "naive":
        parts = [slice(i, i + shape["naive_rows"]) for i in range(0, B, shape["naive_rows"])]
        tokens = torch.cat([naive_rollout(policy, prompt_ids[p], prompt_mask[p], L, decoder, generator, 0.9) for p in parts])
    else:
        tokens = rollout("none" if method == "ours" else method).completion
    if device == "cuda":
        torch.cuda.synchronize()
        memory = torch.cuda.max_memory_allocated() / 2**30
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30
    seconds = time.perf_counter() - began
    if count_only:
        return {"method": method, "rows": B, "failed": "not measured", "tflop": policy.flop / 1e12}
    return {
        "method": method,
        "rows": B,
        "seconds": seconds,
        "tokens_per_s": B * L / seconds if tokens is not None else None,
        "peak_gib": memory,
        "tflop": policy.flop / 1e12,
        "mfu": policy.flop / seconds / peak if peak else None,
        "chip": chip,
        "dtype": str(policy.denoiser.get_input_embeddings().weight.dtype).removeprefix("torch."),
        "inner_updates": shape["inner"] if method == "learning" else None,
        "completions": tokens.tolist() if tokens is not None else None,
    }


def run_apart(name, method, threads):
    """The row of another process, or why there is none."""
    command = [sys.executable, __file__, "--shape", name, "--method", method, "--threads", str(threads)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode:
        return {"method": method, "failed": (result.stderr.strip().splitlines() or ["no message"])[-1][:200]}
    return json.loads(result.stdout.splitlines()[-1])


def with_ratios(rows, same_order):
    """How each rollout compares with the naive one: speed, memory and, where both draw in the same order, the share of equal tokens."""
    completions = [row.pop("completions", None) for row in rows]
    naive = rows[0]
    for row, own in zip(rows[1:], completions[1:], strict=True):
        if own and completions[0]:
            row["speed_ratio"] = row["tokens_per_s"] / naive["tokens_per_s"]
            row["memory_ratio"] = row["peak_gib"] / naive["peak_gib"]
            if same_order:
                row["same_tokens"] = (torch.tensor(own) == torch.tensor(completions[0])).float().mean().item()
    return rows


def whole_step(rows):
    """The row of one RL step: a rollout with the dual cache, and learning from it."""
    dual, learning = (row for row in rows if row["method"] in ("dual", "learning"))
    step = {"method": "step", "rows": dual.get("rows")}
    if "tflop" in dual and "tflop" in learning:
        step["tflop"] = dual["tflop"] + learning["tflop"]
    failed = dual.get("failed") or learning.get("failed")
    if failed:
        return step | {"failed": failed}
    seconds = dual["seconds"] + learning["seconds"]
    mfu = (dual["mfu"] * dual["seconds"] + learning["mfu"] * learning["seconds"]) / seconds if dual["mfu"] and learning["mfu"] else None
    return step | {"seconds": seconds, "peak_gib": max(dual["peak_gib"], learning["peak_gib"]), "mfu": mfu}


def print_table(rows):
    def cell(row, key, form):
        return form.format(row[key]) if row.get(key) is not None else ""

    head = ["shape", "method", "rows", "seconds", "tokens/s", "x naive", "same tokens", "peak GiB", "of naive", "TFLOP", "MFU"]
    keys = [("rows", "{}"), ("seconds", "{:.2f}"), ("tokens_per_s", "{:.1f}"), ("speed_ratio", "{:.2f}"), ("same_tokens", "{:.1%}")]
    keys += [("peak_gib", "{:.2f}"), ("memory_ratio", "{:.0%}"), ("tflop", "{:,.3f}"), ("mfu", "{:.1%}")]
    table = [head]
    for row in rows:
        cells = [cell(row, key, form) for key, form in keys]
        cells[1] = row.get("failed") or cells[1]
        table.append([row["shape"], row["method"], *cells])
    widths = [max(len(line[i]) for line in table) for i in range(len(head))]
    for line in table:
        print("| " + " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) + " |")
        if line is head:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")
    for shape, chip in {row["shape"]: f"{row['dtype']}, {row['chip']}" for row in rows if "chip" in row}.items():
        print(f"{shape}: {chip}")


def main():
    parser = argparse.ArgumentParser(description="Speed and memory of rollouts and of the learning pass.")
    parser.add_argument("--shape", choices=list(SHAPES), help="default: all that this machine can")
    parser.add_argument("--method", choices=METHODS, help="one row, in this process, as JSON")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--out", default="benchmark.json", help="where the table is written as JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    gpu = torch.cuda.is_available()
    if options.method:
        device = "cuda" if gpu and options.shape == "8b" else "cpu"
        print(json.dumps(measure(copy.deepcopy(SHAPES[options.shape]), options.method, device)))
        return
    table = []
    for name in [options.shape] if options.shape else list(SHAPES):
        shape = SHAPES[name]
        if name == "8b" and not gpu:
            rows = [measure(copy.deepcopy(shape), method, "cpu", count_only=True) for method in METHODS]
        else:
            rows = [run_apart(name, method, options.threads) for method in METHODS]
            rows = with_ratios(rows, shape["naive_rows"] >= shape["prompts"] * shape["group"])
        table += [{"shape": name} | row for row in [*rows, whole_step(rows)]]
    print_table(table)
    Path(options.out).write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
