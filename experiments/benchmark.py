"""Speed and memory of rollouts and of learning. Run by hand:

    python -m experiments.benchmark  tiny, mid; with a GPU 0.6b and 8b too
    OMP_NUM_THREADS=1 python -m experiments.benchmark --shape mid  one shape, on one thread
    python -m experiments.benchmark --memory LLaDA-8B --gpu_gib 24 --dtype bfloat16
                                                       what a run takes by arithmetic (memory.py);
                                                       any flag of train.py may follow
    OMP_NUM_THREADS=1 python -m experiments.benchmark --check  that arithmetic beside what it takes

    naive          LLaDA's loop: all rows and positions at every step, all logits in float64
    ours           diffusion_policy.py without a cache: the same tokens by the same random numbers
    prefix, dual   the same with that block cache
    learning       one step's updates of a LoRA adapter: the old policy's score, mu inner updates

Each row is a process of its own, so its peak memory is its own. Every rollout unmasks equally many
tokens a step: random weights are never sure, so a threshold would say nothing.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config

from config import RECIPES, Config, FlagParser, parse_flags
from diffusion_policy import DiffusionPolicy, Rollout
from likelihood import draw_boundaries
from models import loading, lora
from models.checkpoints import reads_compact_prompts
from models.device import peak_memory_gib
from models.tiny import BASE
from sampler import Decoder
from tasks import registry
from train import update_denoiser
from training import distributed, memory, recipe, run_folder

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MID = dict(
    prompts_per_step=2, num_generations=4, max_completion_length=128, num_iterations=2, lora_rank=16
)
HALF = dict(prompts_per_step=8, dtype="bfloat16")  # the naive logits of more would not fit 80 GB
FEWER = HALF | dict(prompts_per_step=2)  # so that a GPU has done all five rows in minutes
SHAPES = {  # (V, D, MLP, layers, heads, key-value heads), prompt tokens, tokens a step, settings
    "tiny": (
        (112, 104, 312, 6, 4),
        5,
        1,
        Config(max_completion_length=10, block_length=5, lora_rank=8),
    ),
    "mid": ((126464, 256, 768, 4, 4), 64, 2, Config(**RECIPES["LLaDA"] | MID)),
    "0.6b": (  # Qwen3-0.6B's sizes, as a Llama
        (151936, 1024, 3072, 28, 16, 8),
        200,
        2,
        Config(**RECIPES["small"] | HALF),
    ),
    "8b": ((126464, 4096, 12288, 32, 32), 200, 2, Config(**RECIPES["LLaDA"] | FEWER)),
}
METHODS = {"naive": "none", "ours": "none", "prefix": "prefix", "dual": "dual", "learning": "dual"}
COLUMNS = ("seconds", "tokens_per_s", "x_naive", "same_tokens", "peak_gib")
# What --check measures: a phase, and settings unlike these.
FEW = dict(
    prompts_per_step=32,
    max_completion_length=64,
    block_length=32,
    micro_batch_size=256,
    num_iterations=2,
)
MANY, FULL = dict(prompts_per_step=128), dict(lora_rank=0)
HALF_BASE = dict(dtype="bfloat16", micro_batch_size=64, prompts_per_step=8)  # slow on a CPU
ONE_STAGE = dict(num_stages=1, prompts_per_step=288, num_generations=2, micro_batch_size=576)
FRUGAL = dict(prompts_per_step=64, micro_batch_size=512, gradient_checkpointing=True)
FRUGAL_STAGE = FRUGAL | ONE_STAGE | dict(prompts_per_step=576, micro_batch_size=1152)
SHARD = dict(
    shard=True, prompts_per_step=4, max_completion_length=16, block_length=16, micro_batch_size=6
)
CHECKS = {
    "rollout": ("rollout", MANY),
    "rollout, dual": ("rollout", MANY | dict(cache="dual")),
    "rollout, full": ("rollout", MANY | FULL),
    "rollout, bfloat16": ("rollout", HALF_BASE | FEW),
    "rollout, bfloat16, dual": ("rollout", HALF_BASE | FEW | dict(cache="dual")),
    "update": ("update", {}),
    "update, m = 1": ("update", ONE_STAGE),
    "update, full": ("update", FULL),
    "update, bfloat16": ("update", HALF_BASE),
    "update, checkpointing": ("update", FRUGAL),
    "update, checkpointing, m = 1": ("update", FRUGAL_STAGE),
    "update, checkpointing, full": ("update", FRUGAL | FULL),
    "update, checkpointing, bfloat16": ("update", FRUGAL | HALF_BASE),
    "rollout, split": ("rollout", SHARD),  # by two processes, and so are the next
    "update, split": ("update", SHARD),
    "update, split, full": ("update", SHARD | FULL),
}
CHECKED = ((2048, 64, 192, 4, 4, 2), 192)  # llama's arguments, prompt tokens
SPLIT = ((128, 1024, 3072, 8, 8), 16)  # those of what is split over two processes: large layers


def llama(V, D, MLP, layers, heads, kv_heads=None):
    """LLaDA's architecture; random weights have logits that spread alike at any width."""
    return LlamaConfig(
        vocab_size=V, hidden_size=D, intermediate_size=MLP, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, initializer_range=1.28 / D**0.5,
        is_causal=False,
    )  # fmt: skip


def make_policy(config, dtype):
    """A policy with random weights."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        denoiser = LlamaForCausalLM._from_config(config, dtype=dtype).eval()
    ids = SimpleNamespace(chat_template=None, mask_token_id=1, eos_token_id=2)
    return DiffusionPolicy(denoiser, ids)


@torch.no_grad()
def naive_rollout(policy, prompts, prompt_mask, length, decoder, generator, num_generations):
    """What DiffusionPolicy.rollout draws with top_k and no padding, as LLaDA's loop draws it."""
    (B, P), k, block = prompts.shape, decoder.level, decoder.block_length
    chance = policy.draw_uniform(B, length, generator)
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
            uniform = chance.gather(1, index - P).flatten()
            tokens, _ = policy.sample_tokens(chosen, decoder.temperature, uniform)
            canvas.scatter_(1, index, tokens.view(B, k))
    return SimpleNamespace(completion=canvas[:, P:])


def measure(shape, method):
    """One row of the table, in this process."""
    sizes, P, per_step, settings = shape
    G, dtype = settings.num_generations, getattr(torch, settings.dtype, torch.float32)  # "auto" too
    policy = make_policy(llama(*sizes), dtype)
    generator = torch.Generator(DEVICE).manual_seed(0)
    prompts = torch.randint(3, 100, (settings.prompts_per_step, P)).repeat_interleave(G, dim=0)
    prompts = prompts.to(DEVICE)  # (B, P)
    decoder = Decoder("top_k", per_step, settings.block_length, cache=METHODS[method])
    rollout = naive_rollout if method == "naive" else DiffusionPolicy.rollout
    how = (prompts, prompts > 0, settings.max_completion_length, decoder, generator, G)
    run = partial(rollout, policy, *how)
    if method == "learning":
        sample, rank = run(), settings.lora_rank
        policy.denoiser = lora.add_lora(policy.denoiser, rank, settings.lora_alpha)
        if settings.gradient_checkpointing:
            policy.denoiser.gradient_checkpointing_enable({"use_reentrant": False})
        optimizer = torch.optim.AdamW(policy.denoiser.parameters(), lr=settings.learning_rate)
        stages = [(draw_boundaries(sample.nfe, 2, generator), None, 0)] * settings.num_iterations
        how = (None, optimizer, sample, stages, torch.ones_like(sample.threshold), settings)
        run = partial(update_denoiser, policy, *how)
    policy.hidden(prompts[:G])  # the first call of every kernel is slow
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    began, result = time.perf_counter(), run()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    row = {"method": method, "seconds": seconds, "peak_gib": peak_memory_gib()}
    if method != "learning":
        tokens = result.completion
        row |= {"tokens_per_s": tokens.numel() / seconds, "tokens": tokens.tolist()}
    return row


def run_apart(name, method):
    """The row of another process, or why there is none."""
    return apart(method, "--shape", name, "--method", method)


def apart(method, *flags):
    # glibc returns freed memory to the system at once, so that a peak is what was asked for.
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    if "--check" in flags:
        env["MALLOC_MMAP_THRESHOLD_"] = "65536"
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2") if "split" in method else ()
    command = [sys.executable, *launcher, __file__, *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
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


# ---- memory by arithmetic ------------------------------------------------------------------------


def config_of(name):
    """The configuration of a built-in shape, a checkpoint folder or a hub name, without weights."""
    if name == "LLaDA-8B":
        return llama(*SHAPES["8b"][0])
    if name == "Qwen3-0.6B":
        return Qwen3Config(
            vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
            num_attention_heads=16, num_key_value_heads=8, tie_word_embeddings=True,
        )  # fmt: skip
    folder = BASE if name == "tiny" else Path(name)
    if not folder.is_dir():
        known = f"{name} is no folder, LLaDA-8B, Qwen3-0.6B or tiny, and the hub has not given it"
        with loading.one_line(known):
            folder = Path(huggingface_hub.hf_hub_download(name, "config.json")).parent
    return loading.read_config(folder)[0]


def show_memory(name, given, prompt_tokens=200, gpu_gib=None, processes=1):
    """Print what a run of this model takes of a process, and the most that fits a GPU.

    given: {flag: value}, of train.py. Raises ValueError.
    """
    if min(prompt_tokens, processes) < 1:
        few = f"prompt_tokens = {prompt_tokens}, processes = {processes}"
        raise ValueError(f"{few}: there has to be 1 at least of either")
    config, compact = config_of(name), name == "tiny" or reads_compact_prompts(name)
    changes = RECIPES.get(given.get("task"), {}) if compact else recipe.recipe_by_size(config)
    settings = Config(**changes | given | {"model": name})
    if not settings.max_completion_length:
        settings.max_completion_length = registry.load_task(settings.task, compact, "", 0).length
    run_folder.check_processes(settings, processes)
    each = f", each of {processes} processes" if processes > 1 else ""
    print(
        f"{name}, {prompt_tokens} prompt tokens, "
        f"{settings.max_completion_length} of a completion{each}, GiB"
    )
    how = {"processes": processes}
    for part, size in memory.budget(config, settings, prompt_tokens, **how).items():
        print(f"{part:16}{size:8.2f}")
    if not gpu_gib:
        return
    print(f"\nThe most that fits {gpu_gib:g} GiB:")
    print(f"{'cache':8}{'micro_batch_size':>18}{'rollout_batch_size':>20}{'peak':>8}")
    for cache in ("none", "prefix", "dual")[: 3 if settings.block_length else 1]:
        try:
            cached = replace(settings, cache=cache)
            most = memory.largest(config, cached, prompt_tokens, gpu_gib, **how)
        except ValueError as error:
            print(f"{cache:8}{error}")
            continue
        peak = memory.budget(config, most, prompt_tokens, **how)["peak"]
        rows = most.rollout_batch_size or "0 (all)"
        print(f"{cache:8}{most.micro_batch_size:>18}{rows:>20}{peak:>8.2f}")


def run_phase(phase, config, prompt_tokens, settings):
    """One rollout, or the updates of one batch of made-up completions."""
    P, G, L, block = (
        prompt_tokens,
        settings.num_generations,
        settings.max_completion_length,
        settings.block_length,
    )
    dtype = getattr(torch, settings.dtype, torch.float32)
    policy, chance = make_policy(config, dtype), torch.Generator(DEVICE).manual_seed(0)
    if settings.lora_rank:
        policy.denoiser = lora.add_lora(policy.denoiser, settings.lora_rank, settings.lora_alpha)
    if settings.shard:  # that the whole model was there before does not count
        distributed.shard_model(policy.denoiser, torch.device(DEVICE))
        Path("/proc/self/clear_refs").write_text("5")
    there = {"device": DEVICE}
    prompts = torch.randint(3, 100, (settings.prompts_per_step, P), **there)
    prompts = prompts.repeat_interleave(G, dim=0)
    mask = torch.ones_like(prompts) > 0
    mask[:G, 0] = False  # one prompt is shorter: batches are padded
    if phase == "rollout":
        # All of a block at once, the most that a call can draw.
        decoder = Decoder("top_k", block, block, cache=settings.cache)
        return distributed.rollout(policy, prompts, mask, L, decoder, chance, G)
    if settings.gradient_checkpointing:
        policy.denoiser.gradient_checkpointing_enable({"use_reentrant": False})
    B, steps = len(prompts), torch.randint(1, 9, (len(prompts), L), generator=chance, **there)
    logp, nfe, one = steps * 0 - 8.0, torch.full((B,), 8, **there), torch.ones(B, **there)
    sample = Rollout(prompts, mask, steps + 3, steps, logp, steps > 0, nfe, one, one, one, 1.0)
    how = {"lr": settings.learning_rate, "foreach": False if settings.shard else None}
    optimizer = torch.optim.AdamW(policy.denoiser.parameters(), **how)
    boundaries = draw_boundaries(sample.nfe, settings.num_stages, chance)
    stages = [(boundaries, None, 0)] * settings.num_iterations  # from the second on, with moments
    return update_denoiser(policy, None, optimizer, sample, stages, one, settings)


def check_memory(name, sizes=None, prompt_tokens=None, **changes):
    """What a phase takes of the GPU or this process, and by memory.py. One phase a process."""
    phase, other = CHECKS[name]
    settings = Config(**FEW | dict(lora_rank=16, dtype="float32") | other | changes)
    usual = SPLIT if settings.shard else CHECKED
    sizes, prompt_tokens = sizes or usual[0], prompt_tokens or usual[1]
    distributed.init()
    small = replace(settings, prompts_per_step=1, num_generations=2, micro_batch_size=2)
    run_phase(phase, llama(128, 16, 16, 1, 2), 8, small)  # what a first call loads does not count
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before, config = peak_memory_gib(), llama(*sizes)
    run_phase(phase, config, prompt_tokens, settings)
    measured = peak_memory_gib() - before
    parts = memory.budget(config, settings, prompt_tokens, DEVICE, distributed.world_size())
    there = ("base", "adapter", *memory.PHASES[0])
    if phase == "update":
        there = (*memory.RESIDENT, *memory.PHASES[1])
    predicted = sum(parts[part] for part in there)
    return {"predicted": predicted, "measured": measured, "ratio": predicted / measured}


def show_check(name):
    """One row of CHECKS as JSON, or all of them as a table, each of a process of its own."""
    if name and ("split" not in name or distributed.is_distributed()):
        return print(json.dumps(check_memory(name)))
    columns = ("predicted", "measured", "ratio")
    print(f"{'GiB':32}" + "".join(f"{key:>11}" for key in columns))
    for check in [name] if name else CHECKS:
        row = apart(check, "--check", check)
        cells = "".join(f"{row[key]:11.3f}" for key in columns) if "ratio" in row else row["failed"]
        print(f"{check:32}{cells}", flush=True)


def main(arguments=None):
    what = "Speed and memory of rollouts and of learning."
    parser = FlagParser(description=what)
    parser.add_argument("--shape", choices=SHAPES, help="default: all that this machine can")
    parser.add_argument("--method", choices=METHODS, help="one row, in this process, as JSON")
    parser.add_argument("--memory", metavar="MODEL", help="LLaDA-8B, Qwen3-0.6B, tiny, a folder...")
    parser.add_argument("--gpu_gib", type=float, help="with --memory: find the most that fits")
    parser.add_argument("--prompt_tokens", type=int, help="with --memory [200]")
    parser.add_argument("--processes", type=int, help="with --memory: of each of so many [1]")
    parser.add_argument("--check", nargs="?", const="", choices=["", *CHECKS], help="or one row")
    options, rest = parser.parse_known_args(arguments)
    how = {name: getattr(options, name) for name in ("prompt_tokens", "gpu_gib", "processes")}
    how = {name: value for name, value in how.items() if value is not None}
    if options.memory is None and (rest or how):
        unfit = [*rest, *(f"--{name}" for name in how)][0]
        parser.error(f"{unfit} is understood only with --memory MODEL")
    if options.memory is not None:
        try:
            return show_memory(options.memory, parse_flags(rest), **how)
        except ValueError as error:
            parser.error(" ".join(str(error).split()))
    if options.check is not None:
        return show_check(options.check)
    if options.method:
        return print(json.dumps(measure(SHAPES[options.shape or "tiny"], options.method)))
    print(f"{'shape':6}{'method':10}" + "".join(f"{key:>13}" for key in COLUMNS))
    every = [*SHAPES] if torch.cuda.is_available() else ["tiny", "mid"]
    for name in [options.shape] if options.shape else every:
        for row in compare([run_apart(name, method) for method in METHODS]):
            known = {key: f"{row[key]:.3f}" for key in COLUMNS if row.get(key) is not None}
            cells = "".join(f"{known.get(key, ''):>13}" for key in COLUMNS)
            print(f"{name:6}{row['method']:10}" + row.get("failed", cells))


if __name__ == "__main__":
    main()
