"""Every setting, once: its flag, its default, its limits, and the recipes of other tasks.

    train.py --help     prints them, in groups
    runs/NAME/config.json keeps them: it alone repeats the run

Standard library alone: --help answers before torch is imported, which takes seconds.
"""

import argparse
import functools
import time
from dataclasses import dataclass, field, fields
from math import inf

BEGAN = time.perf_counter()  # of the program: this file is imported first


def flag(default, help, low=-inf, high=None, choices=()):
    """A setting. A number with a lower limit has an upper one too: more is a slip of the finger."""
    high = high or (1_000_000 if isinstance(default, int) else 1e12)
    return field(default=default, metadata=dict(help=help, low=low, high=high, choices=choices))


@dataclass
class Settings:
    """Every field is a flag. Defaults served tiny on countdown; RECIPES has what others change."""

    # run
    task: str = flag("countdown", "countdown, sudoku, gsm8k, math, or FILE.py:NAME; several: A,B")
    model: str = flag("", "tiny, a hub name, or a folder with a checkpoint; default by hardware")
    data: str = flag("", "a JSON-lines file of problems, split 70/10/20; default the task's own")
    run_dir: str = flag("", "a new folder for this run; default runs/TASK-TRAIN-TIME")
    seed: int = flag(0, "of everything that is drawn", 0, 2**63 - 1)
    train: str = flag("joint", "what learns", choices=("policy", "sampler", "joint"))
    steps: int = flag(120, "RL steps, each on a fresh batch of rollouts", 1)
    # rollout
    prompts_per_step: int = flag(32, "P, prompts a step", 1)
    group_size: int = flag(8, "G, completions a prompt", 2)
    length: int = flag(0, "L, tokens a completion; 0: what tiny's form of the task needs", 0)
    prefill: str = flag("", "how every completion is made to begin, e.g. <reasoning>")
    temperature: float = flag(1.0, "of the tokens drawn in rollouts", 0.01)
    block_length: int = flag(0, "tokens a block, done left to right; 0: the whole canvas", 0)
    cache: str = flag("none", "block cache; none is exact", choices=("none", "prefix", "dual"))
    gamma_0: float = flag(0.1, "nats; the entropy threshold that the learned one starts from")
    # objective
    num_stages: int = flag(2, "m, stages of likelihood: 1 mean-field (d1), 2 two-stage", 1, 10**4)
    is_cap: float = flag(1.0, "C, cap of the importance weight; 0: no weights (d1)", 0)
    normalise_by: str = flag("canvas", "a row's sum over L, or |o|", choices=("canvas", "text"))
    clip_eps: float = flag(0.2, "PPO clip range of the ratio; d1 0.5", 1e-6)
    inner_updates: int = flag(1, "mu, optimisation steps per batch of rollouts; d1 8 to 12", 1)
    scale_by_std: bool = flag(True, "divide advantages by their group's std; d1 does not")
    speed_weight: float = flag(0.35, "lambda: the reward is times 1 - lambda * NFE / L", 0, 1)
    prompt_hide_probability: float = flag(0.0, "of a prompt token while scoring; d1 0.15", 0, 1)
    kl_beta: float = flag(0.0, "weight of the KL to the base model; d1 0.04", 0)
    # optimiser
    learning_rate: float = flag(2e-3, "AdamW on the denoiser, constant after warm-up", 0, 1)
    warmup_steps: int = flag(10, "steps over which the learning rate rises from 0", 0)
    grad_clip: float = flag(1.0, "largest norm of the denoiser's gradient", 1e-6)
    weight_decay: float = flag(0.0, "of AdamW on the denoiser; d1 0.1", 0, 1)
    head_learning_rate: float = flag(1e-2, "Adam on the threshold head", 0, 1)
    head_sigma: float = flag(0.5, "spread of log gamma around the head's mean: exploration", 1e-3)
    head_clip_eps: float = flag(0.2, "PPO clip range of the threshold's ratio", 1e-6)
    # memory
    rollout_batch_size: int = flag(0, "rows rolled out at once, in whole groups; 0: all", 0)
    micro_batch_size: int = flag(256, "rows scored at once; changes no gradient", 1)
    lora_rank: int = flag(16, "of the layers' adapter; 0 trains every weight", 0, 10_000)
    lora_alpha: float = flag(32.0, "the adapter is scaled by lora_alpha / lora_rank", 0)
    lora_dropout: float = flag(0.0, "of the adapter's inputs; any is noise in the ratio", 0, 0.9)
    gradient_checkpointing: bool = flag(False, "less memory for a third more work")
    shard: bool = flag(False, "split the layers' weights over torchrun's processes (FSDP2)")
    dtype: str = flag("auto", "of the base", choices=("auto", "float32", "bfloat16", "4bit"))
    # measuring and saving
    eval_problems: int = flag(1000, "held-out problems before and after", 1)
    eval_split: str = flag("test", "tune on validation", choices=("test", "validation"))
    frontier: bool = flag(True, "measure base and trained at five gammas too: frontier.png")
    save_every: int = flag(50, "steps between checkpoints", 1)

    def __post_init__(self):
        for f in fields(self):
            value, (low, high, choices) = getattr(self, f.name), list(f.metadata.values())[1:]
            if type(value) is not f.type and (f.type, type(value)) != (float, int):
                kind = f.type.__name__
                raise ValueError(f"{f.name} = {value!r:.40}: it has to be of type {kind}")
            if choices and value not in choices:
                raise ValueError(f"unknown {f.name} {value!r}: choose one of {', '.join(choices)}")
            if low > -inf and not low <= value <= high:
                limits = f"at least {low} and at most {high}"
                raise ValueError(f"{f.name} = {value!s:.20}: it has to be {limits}")
        if self.prompts_per_step * self.group_size > 1_000_000:
            raise ValueError("prompts_per_step times group_size is over 1000000 completions a step")


LATER = {"rollout_batch_size", "shard"}  # settings that came later: an older run had their default


def settings_of(saved, file):
    """The Settings of a config.json's dict. Raises ValueError for one of another version."""
    if set(saved) | LATER != {f.name for f in fields(Settings)}:
        raise ValueError(f"{file} is not of this train.py: start a new run")
    return Settings(**saved)


# Settings with another default. Sudoku's rows are twice as long, so half as many. Its rewards are
# dense (cells): wrong grids earn too, so a high price of speed would teach it to hurry.
# Both together have 120 turns each, and one price of speed. That is not tuned.
# LLaDA's are d1's where it has them. They are not tuned here: no such model was at hand.
RECIPES = {
    "sudoku": dict(prompts_per_step=16, steps=140, speed_weight=0.15, learning_rate=1e-3),
    "countdown,sudoku": dict(prompts_per_step=24, steps=240, speed_weight=0.25, learning_rate=1e-3),
    "LLaDA": dict(
        prompts_per_step=16, group_size=6, steps=300, length=256, temperature=0.9, block_length=32,
        cache="dual", clip_eps=0.5, inner_updates=8, learning_rate=3e-6, grad_clip=0.2,
        speed_weight=0.25, weight_decay=0.1, head_learning_rate=3e-3, micro_batch_size=12,
        lora_rank=128, lora_alpha=64, gradient_checkpointing=True, eval_problems=256,
        frontier=False,
    ),
}  # fmt: skip
# Of checkpoints under 2 billion parameters, in place of LLaDA's; and what smaller GPUs change of
# either. (python -m experiments.benchmark --memory MODEL --gpu_gib 24 says what fits.)
RECIPES["small"] = RECIPES["LLaDA"] | dict(learning_rate=1e-5, lora_rank=64, rollout_batch_size=24)
RECIPES["48 GB"] = dict(rollout_batch_size=48)
RECIPES["24 GB"] = dict(rollout_batch_size=24, dtype="4bit")
# The groups of --help: the first setting of each, and its name.
GROUPS = {
    "task": "run",
    "prompts_per_step": "rollout",
    "num_stages": "objective",
    "learning_rate": "optimiser",
    "rollout_batch_size": "memory",
    "eval_problems": "measuring and saving",
}
# What may change on --resume.
FREE = (
    "steps", "run_dir", "cache", "micro_batch_size", "gradient_checkpointing", "shard",
    "save_every",
)  # fmt: skip


class OneLineParser(argparse.ArgumentParser):
    """Bad flags get one line, like all other bad input, not a page of usage."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (--help lists all flags)\n")


def true_or_false(text):
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"true or false, not {text!r}")
    return text.lower() == "true"


ABOUT = """\
DiFFPO: reinforcement learning of a masked-diffusion model and of its sampler.

  python train.py --task countdown                a laptop, no GPU, no download
  python train.py --task countdown,sudoku         both, by one model
  python train.py --task my_task.py:MyTask        your own task
  python train.py --resume --run_dir runs/NAME    go on after Ctrl-C or a kill
  python train.py --task gsm8k --model GSAI-ML/LLaDA-8B-Instruct    24 GB GPU

In brackets: the default, and what a recipe has in its place: a task's for tiny,
LLaDA's or the small models', and what a GPU of 24 or 48 GB changes of these.
"""


def described(f):
    """A field's line of --help: what it is, its choices, its defaults."""
    said, choices = f.metadata["help"], ", ".join(f.metadata["choices"])
    said += f": one of {choices}" if choices else ""
    defaults = [] if f.default == "" else [str(f.default)]
    defaults += [f"{name} {recipe[f.name]}" for name, recipe in RECIPES.items() if f.name in recipe]
    return said + (f" [{'; '.join(defaults)}]" if defaults else "")


def read_flags(arguments=None):
    """{name: value} of the flags given, and `resume` and `export` where they are."""
    parser = OneLineParser(
        usage="python train.py [--FLAG VALUE] ...", description=ABOUT, allow_abbrev=False,
        argument_default=argparse.SUPPRESS, formatter_class=functools.partial(
            argparse.RawDescriptionHelpFormatter, width=80, max_help_position=26
        ),
    )  # fmt: skip
    parser.add_argument("--resume", action="store_true", help="go on with the run in --run_dir")
    parser.add_argument("--export", metavar="DIR", help="at the end, write the whole model to DIR")
    for f in fields(Settings):
        if f.name in GROUPS:
            group = parser.add_argument_group(GROUPS[f.name])
        kind = true_or_false if f.type is bool else f.type
        name = f.type.__name__.upper()
        group.add_argument(f"--{f.name}", type=kind, metavar=name, help=described(f))
    return vars(parser.parse_args(arguments))
