"""How a rollout's and an update's time and memory grow with each size, on small random weights.

    OMP_NUM_THREADS=1 python -m experiments.scaling              all sizes, on the CPU
    OMP_NUM_THREADS=1 python -m experiments.scaling --size V     one of them

One size is varied at a time. The exponent is the slope between the last two points on log-log axes:
1 means linear. Only attention may grow faster, with L. Each point is measured in its own process,
so that peak memory is its own; seconds are CPU seconds.

Shapes: B rows, L completion tokens, V vocabulary size, T denoiser calls of a row, m stages.
"""

# ruff: noqa: E402 (flags are checked before torch is imported, which takes seconds)

import sys
from dataclasses import dataclass, replace

from experiments.command_line import exit_status
from models import terminal
from models.command_line import FlagParser


@dataclass
class Sizes:
    """What one point measures."""

    L: int = 64
    V: int = 1000
    B: int = 16
    T: int = 16
    m: int = 2


POINTS = {
    "L": (64, 128, 256, 512, 1024),
    "V": (1000, 8000, 32000, 126464),
    "B": (8, 32, 128, 512),
    "T": (4, 8, 16, 32, 64),
    "m": (1, 2, 4, 8),
}
PARTS = ("rollout", "update")


def parse_flags(arguments=None):
    """The flags as a namespace. Bad flags end the program with status 2."""
    parser = FlagParser(
        prog="python -m experiments.scaling",
        usage="%(prog)s [flags]",
        description="How a rollout's and an update's time and memory grow with L, V, B, T and m.",
    )
    parser.add_argument("--size", choices=POINTS, help="the size to vary [all, one by one]")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    terminal.prepare()
    parse_flags()

import math
import multiprocessing
import time

import torch

from config import Config
from diffusion_policy import Rollout
from experiments.benchmark import Shape, make_policy
from likelihood import draw_boundaries, surrogate_logp
from models.device import peak_memory_gib
from sampler import Decoder

GROUP = 4  # completions per prompt


def measure(sizes, part):
    """(CPU seconds, additional GiB) for one part: a rollout or an update."""
    shape = Shape(
        vocabulary=sizes.V,
        hidden=128,
        mlp=384,
        layers=2,
        heads=4,
        key_value_heads=4,
        prompt_tokens=16,
        tokens_per_step=sizes.L // sizes.T,
        config=Config(dtype="float32"),
    )
    policy = make_policy(shape)
    policy.denoiser.lm_head.requires_grad_(False)  # as under LoRA
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, 100, (sizes.B // GROUP, shape.prompt_tokens), generator=generator)
    prompt_ids = prompts.repeat_interleave(GROUP, dim=0)  # (B, P)
    at_start = peak_memory_gib()
    began = time.process_time()
    if part == "rollout":
        decoder = Decoder("top_k", shape.tokens_per_step, stop_at_eos=False)
        policy.rollout(prompt_ids, prompt_ids > 0, sizes.L, decoder, generator)
    else:
        rollout = random_rollout(sizes, prompt_ids, generator)
        boundaries = draw_boundaries(rollout.nfe, sizes.m, generator)
        surrogate_logp(policy, rollout, boundaries).sum().backward()
    return time.process_time() - began, peak_memory_gib() - at_start


def random_rollout(sizes, prompt_ids, generator):
    """A Rollout of random tokens in a random order, the same number in each of T steps."""
    B = len(prompt_ids)
    order = torch.rand((B, sizes.L), generator=generator).argsort(dim=1)  # (B, L)
    return Rollout(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_ids > 0,
        completion=torch.randint(3, sizes.V, (B, sizes.L), generator=generator),
        unmask_step=1 + order // (sizes.L // sizes.T),
        behaviour_logp=torch.zeros(B, sizes.L),
        token_mask=torch.ones((B, sizes.L), dtype=torch.bool),
        nfe=torch.full((B,), sizes.T),
        threshold=torch.full((B,), torch.nan),
        threshold_logp=torch.zeros(B),
        prompt_state=torch.zeros(B, 1),
        temperature=1.0,
    )


def measure_apart(sizes, part):
    """What `measure` returns, from a process of its own."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(measure, (sizes, part))


def exponent(sizes, values):
    """The slope between the last two points on log-log axes."""
    return math.log(values[-1] / values[-2]) / math.log(sizes[-1] / sizes[-2])


def run(options):
    """Measures and prints the lines for each size that is varied."""
    for name, values in POINTS.items():
        if options.size not in (None, name):
            continue
        for part in PARTS:
            if name == "m" and part == "rollout":
                continue  # it has no stages
            points = [measure_apart(replace(Sizes(), **{name: value}), part) for value in values]
            for label, column in zip(("seconds", "GiB"), zip(*points, strict=True), strict=True):
                cells = "".join(f"{cell:9.3f}" for cell in column)
                slope = exponent(values, [max(cell, 1e-3) for cell in column])
                title = f"{name} = {', '.join(map(str, values))}"
                print(f"{title:34}{part:8}{label:8}{cells}  exponent {slope:.2f}", flush=True)


def main(arguments=None):
    """The program. Returns its exit status: 0, or 130 (Ctrl-C)."""
    options = parse_flags(arguments)
    return exit_status("experiments.scaling", lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
