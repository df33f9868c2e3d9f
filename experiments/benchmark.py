"""Speed and memory of rollouts and of learning, on random weights.

    OMP_NUM_THREADS=1 python -m experiments.benchmark --shape mid     one shape, on one thread
    python -m experiments.benchmark                              tiny, mid; on a GPU also 8b

    naive          LLaDA's loop: all rows and positions at every step, all logits in float64
    ours           diffusion_policy.py without a cache: the same tokens from the same random numbers
    prefix, dual   the same with this block cache
    learning       one step's updates of a LoRA adapter: the old policy's score, mu inner updates
    d1_logp        d1's log-probs and their gradient: one pass, all logits in float32
    logp_1, _2     those of likelihood.py, with one stage (the same values as d1's) and with two

Each row is measured in its own process, so that peak memory is the row's own. Every rollout unmasks
equally many tokens per step, since a threshold would be meaningless with random weights, which are
never sure. Without a GPU, seconds are CPU seconds. `python -m training.memory` estimates a training
run's GPU memory; `python -m experiments.scaling` measures how time and memory grow with each size.

Shapes: B = P * G rows, L completion tokens, S positions of prompt and completion, V vocabulary
size, D hidden size.
"""

# ruff: noqa: E402 (flags are checked before torch is imported, which takes seconds)

import sys
from dataclasses import dataclass, replace

from config import MODEL_RECIPES, Config
from experiments.command_line import exit_status
from models import terminal
from models.command_line import FlagParser


@dataclass
class Shape:
    """What is measured: a Llama's sizes, and a run's settings."""

    vocabulary: int
    hidden: int
    mlp: int
    layers: int
    heads: int
    key_value_heads: int
    prompt_tokens: int
    tokens_per_step: int  # unmasked in each row of a rollout
    config: Config


SHAPES = {
    "tiny": Shape(
        vocabulary=112,
        hidden=104,
        mlp=312,
        layers=6,
        heads=4,
        key_value_heads=4,
        prompt_tokens=5,
        tokens_per_step=1,
        config=Config(max_completion_length=10, block_length=5, lora_rank=8),
    ),
    # LLaDA's vocabulary and settings on a small model.
    "mid": Shape(
        vocabulary=126464,
        hidden=256,
        mlp=768,
        layers=4,
        heads=4,
        key_value_heads=4,
        prompt_tokens=64,
        tokens_per_step=2,
        config=replace(
            Config(**MODEL_RECIPES["LLaDA"]),
            prompts_per_step=2,
            num_generations=4,
            max_completion_length=128,
            num_iterations=2,
            lora_rank=16,
        ),
    ),
    # LLaDA-8B's sizes, with so few prompts that a GPU measures all five rows in minutes.
    "8b": Shape(
        vocabulary=126464,
        hidden=4096,
        mlp=12288,
        layers=32,
        heads=32,
        key_value_heads=32,
        prompt_tokens=200,
        tokens_per_step=2,
        config=replace(Config(**MODEL_RECIPES["LLaDA"]), prompts_per_step=2, dtype="bfloat16"),
    ),
}
ON_A_CPU = ("tiny", "mid")
METHODS = {  # {method: its block cache}
    "naive": "none",
    "ours": "none",
    "prefix": "prefix",
    "dual": "dual",
    "learning": "dual",
    "d1_logp": "dual",
    "logp_1": "dual",
    "logp_2": "dual",
}
ROLLOUTS = ("naive", "ours", "prefix", "dual")


def parse_flags(arguments=None):
    """The flags as a namespace. Bad flags end the program with status 2."""
    parser = FlagParser(
        prog="python -m experiments.benchmark",
        usage="%(prog)s [flags]",
        description="""\
Measures speed and memory of rollouts and of learning, on random weights.

  naive         LLaDA's loop: every row and position at each step
  ours          diffusion_policy.py without a block cache
  prefix, dual  the same with this block cache
  learning      one training step's updates of a LoRA adapter
  d1_logp       d1's log-probs and their gradient: all logits in float32
  logp_1, _2    those of likelihood.py, with one stage and with two""",
        epilog="""\
columns:
  seconds       for one rollout of the batch, or one step's updates: CPU time,
                or wall time on a GPU
  tokens_per_s  completion tokens that a rollout draws per second
  x_naive       tokens_per_s as a multiple of the naive loop's
  same_tokens   the share of tokens equal to the naive loop's, given the same
                random numbers; a block cache is approximate
  peak_gib      the peak memory of the GPU or, without one, of the process""",
    )
    parser.add_argument(
        "--shape",
        choices=SHAPES,
        help="the model's size [all: tiny and mid; with a GPU 8b too]",
    )
    parser.add_argument(
        "--method",
        choices=METHODS,
        help="measure one row of --shape [tiny] in this process, and print it as JSON",
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    terminal.prepare()
    parse_flags()

import json
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from diffusion_policy import DiffusionPolicy
from likelihood import draw_boundaries, surrogate_logp
from models import lora
from models.device import peak_memory_gib
from models.loading import fuse_norms
from sampler import Decoder
from train import InnerUpdate, update_denoiser

ROOT = Path(__file__).parent.parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROGRAM = ("-m", "experiments.benchmark")
COLUMNS = ("seconds", "tokens_per_s", "x_naive", "same_tokens", "peak_gib")


def make_policy(shape):
    """A policy of LLaDA's architecture with random weights."""
    llama = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        initializer_range=1.28 / shape.hidden**0.5,  # equal spread of logits at any width
        is_causal=False,
    )
    dtype = torch.bfloat16 if shape.config.dtype == "bfloat16" else torch.float32
    torch.manual_seed(0)
    with torch.device(DEVICE):
        denoiser = LlamaForCausalLM._from_config(llama, dtype=dtype).eval()
    fuse_norms(denoiser)  # as load_denoiser does
    tokenizer = SimpleNamespace(chat_template=None, mask_token_id=1, eos_token_id=2)
    return DiffusionPolicy(denoiser, tokenizer)


@torch.no_grad()
def naive_rollout(policy, prompt_ids, length, decoder, generator):
    """Draws what DiffusionPolicy.rollout draws with top_k and no padding, but as LLaDA's loop does.

    prompt_ids (B, P) long -> completion (B, L) long. The block length has to be a multiple of k.
    """
    B, P = prompt_ids.shape
    k = decoder.level
    uniform = policy.draw_uniform(B, length, generator)  # (B, L + 1)
    canvas = torch.nn.functional.pad(prompt_ids, (0, length), value=policy.mask_id)  # (B, S)
    for block_end in range(P + decoder.block_length, P + length + 1, decoder.block_length):
        for _ in range(decoder.block_length // k):
            hidden = policy.hidden(canvas)  # (B, S, D)
            logits = policy.denoiser.get_output_embeddings()(hidden).to(torch.float64)  # (B, S, V)
            logits[..., policy.mask_id] = -torch.inf
            confidence = logits.softmax(dim=-1).amax(dim=-1)  # (B, S)
            is_closed = canvas != policy.mask_id
            is_closed[:, block_end:] = True
            best = confidence.masked_fill(is_closed, -1).topk(k).indices
            position = best.sort().values  # (B, k)
            states = hidden.take_along_dim(position.unsqueeze(-1), dim=1)  # (B, k, D)
            tokens, _ = policy.sample_tokens(
                states.flatten(0, 1),
                decoder.temperature,
                uniform=uniform.gather(1, position - P).flatten(),
            )
            canvas.scatter_(1, position, tokens.view(B, k))
    return canvas[:, P:]


def measure(shape, method):
    """One row of the table, measured in this process: a dict for JSON."""
    config = shape.config
    policy = make_policy(shape)
    generator = torch.Generator(DEVICE).manual_seed(0)
    prompts = torch.randint(3, 100, (config.prompts_per_step, shape.prompt_tokens))
    prompt_ids = prompts.repeat_interleave(config.num_generations, dim=0).to(DEVICE)  # (B, P)
    decoder = Decoder(
        rule="top_k",
        level=shape.tokens_per_step,
        block_length=config.block_length,
        temperature=1.0,
        cache=METHODS[method],
        stop_at_eos=False,  # every rollout draws all L tokens
    )

    def rollout():
        return policy.rollout(
            prompt_ids,
            prompt_mask=torch.ones_like(prompt_ids, dtype=torch.bool),
            length=config.max_completion_length,
            decoder=decoder,
            generator=generator,
        )

    def work():  # the timed part
        if method == "naive":
            return naive_rollout(
                policy, prompt_ids, config.max_completion_length, decoder, generator=generator
            )
        return rollout().completion

    if method == "learning":
        work = prepare_updates(config, policy, rollout(), generator)
    if "logp" in method:
        work = prepare_log_probs(config, policy, rollout(), method, generator)
    clock = time.perf_counter if DEVICE == "cuda" else time.process_time
    policy.hidden(prompt_ids[: config.num_generations])  # the first call of a kernel is slow
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    began = clock()
    tokens = work()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    seconds = clock() - began
    row = {"method": method, "seconds": seconds, "peak_gib": peak_memory_gib()}
    if method in ROLLOUTS:
        row["tokens_per_s"] = tokens.numel() / seconds
        row["tokens"] = tokens.tolist()
    return row


def prepare_updates(config, policy, rollout, generator):
    """Adds an adapter to the policy. Returns a function that makes one step's updates."""
    policy.denoiser = lora.add_lora(policy.denoiser, config.lora_rank, config.lora_alpha)
    if config.gradient_checkpointing:
        policy.denoiser.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(policy.denoiser.parameters(), lr=config.learning_rate)
    boundaries = draw_boundaries(rollout.nfe, config.num_stages, generator)
    update = InnerUpdate(boundaries, masked_prompt=None, dropout_seed=0)

    def updates():
        update_denoiser(
            config,
            policy,
            reference=None,
            optimizer=optimizer,
            rollout=rollout,
            advantage=torch.ones_like(rollout.threshold),
            updates=[update] * config.num_iterations,
        )

    return updates


def d1_logp(policy, rollout):
    """d1's log-probs of all tokens, (B, L): from all [MASK], all (B, L, V) logits in float32."""
    B, L = rollout.completion.shape
    canvas = torch.nn.functional.pad(rollout.prompt_ids, (0, L), value=policy.mask_id)
    hidden = policy.hidden(canvas)[:, -L:]  # (B, L, D)
    logits = policy.denoiser.get_output_embeddings()(hidden).float()
    logits[..., policy.mask_id] = -torch.inf
    logp = -torch.nn.functional.cross_entropy(
        logits.flatten(0, 1) / rollout.temperature, rollout.completion.flatten(), reduction="none"
    )
    return logp.view(B, L)


def prepare_log_probs(config, policy, rollout, method, generator):
    """Adds an adapter to the policy. Returns a function that computes the log-probs of all tokens
    and their gradient, and returns the log-probs.
    """
    policy.denoiser = lora.add_lora(policy.denoiser, config.lora_rank, config.lora_alpha)
    stages = 2 if method == "logp_2" else 1
    boundaries = draw_boundaries(rollout.nfe, stages, generator)

    def log_probs():
        if method == "d1_logp":
            logp = d1_logp(policy, rollout)
        else:
            logp = surrogate_logp(policy, rollout, boundaries)
        logp.sum().backward()
        return logp.detach()

    return log_probs


# ---- the table -----------------------------------------------------------------------------------


def run_apart(shape_name, method):
    """The row, measured in its own process, or {"method", "failed": the last error line}."""
    done = subprocess.run(
        [sys.executable, *PROGRAM, "--shape", shape_name, "--method", method],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        errors = done.stderr.strip().splitlines() or ["?"]
        return {"method": method, "failed": errors[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def compare_with_naive(rows):
    """Adds to each rollout's row its speed and token agreement relative to the first, naive row.

    Removes the tokens from the rows, and returns them.
    """
    tokens = [torch.tensor(row.pop("tokens", [])) for row in rows]
    for row, own_tokens in zip(rows[1:], tokens[1:], strict=True):
        if own_tokens.numel() and tokens[0].numel():
            row["x_naive"] = row["tokens_per_s"] / rows[0]["tokens_per_s"]
            row["same_tokens"] = (own_tokens == tokens[0]).float().mean().item()
    return rows


def print_line(shape_name, row):
    """A line of the table: a row's figures, or why there are none."""
    figures = "".join(f"{row[key]:13.3f}" if key in row else " " * 13 for key in COLUMNS)
    print(f"{shape_name:6}{row['method']:10}" + row.get("failed", figures), flush=True)


def run(options):
    """Measures what the options ask for, and prints it."""
    if options.method:
        print(json.dumps(measure(SHAPES[options.shape or "tiny"], options.method)))
        return
    shape_names = SHAPES if torch.cuda.is_available() else ON_A_CPU
    if options.shape:
        shape_names = [options.shape]
    print(f"{'shape':6}{'method':10}" + "".join(f"{key:>13}" for key in COLUMNS))
    for shape_name in shape_names:
        rows = [run_apart(shape_name, method) for method in METHODS]
        for row in compare_with_naive(rows):
            print_line(shape_name, row)


def main(arguments=None):
    """The program. Returns its exit status: 0, or 130 (Ctrl-C)."""
    options = parse_flags(arguments)
    return exit_status("experiments.benchmark", lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
