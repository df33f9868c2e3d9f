"""The command that makes a base for the tiny model. pretraining.py says how the base is trained.

    python -m models.make_base --out bases/again        bases/tiny again, in about an hour
    python -m models.make_base --task my_task.py:Sums --out bases/sums    a base for your own task

If it is interrupted, the same command continues. All randomness is derived from the seed.

Only light modules are imported here; torch, which takes seconds, is imported in main().
"""

import re
import shlex
import sys
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from models import terminal
from models.command_line import FLAG_TYPES, FlagParser
from tasks.checked import CheckedTask
from tasks.registry import REQUIRED_BY_TINY, TASKS, find_task


def setting(default, help):
    return field(default=default, metadata={"help": help})


@dataclass
class Recipe:
    """How a base is trained. The defaults are for your own task; bases/tiny was made with SHIPPED.

    Raises ValueError for a value out of range.
    """

    steps: int = setting(400, "Steps of the first lesson, on good demonstrations.")
    habit_steps: int = setting(
        100, "Steps of the second lesson, on mostly careless ones, at a tenth of the learning rate."
    )
    careless: float = setting(0.6, "The share of careless demonstrations in the second lesson.")
    batch: int = setting(256, "Demonstrations per step.")
    learning_rate: float = setting(3e-3, "AdamW's peak learning rate; Muon's is five times that.")
    layers: int = setting(6, "The model's transformer layers; with few it needs more calls.")
    seed: int = setting(0, "The seed of all random numbers.")

    def __post_init__(self):
        if self.steps < 1 or self.batch < 1 or self.habit_steps < 0:
            raise ValueError("steps and batch have to be at least 1, habit_steps at least 0")
        if max(self.steps, self.batch, self.habit_steps) > 1_000_000:
            raise ValueError("steps, batch and habit_steps have to be at most a million")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed = {self.seed}: it has to be 0 to {2**63 - 1}")
        if not 1 <= self.layers <= 100:
            raise ValueError(f"layers = {self.layers}: it has to be 1 to 100")
        if not 0 <= self.careless <= 1:
            raise ValueError(f"careless = {self.careless}: it has to be a share from 0 to 1")
        if not 0 < self.learning_rate <= 1:
            raise ValueError(
                f"learning_rate = {self.learning_rate}: it has to be above 0 and at most 1"
            )


# How bases/tiny was made.
SHIPPED = Recipe(steps=8000, habit_steps=600, careless=0.7, batch=128)
SHIPPED_TASKS = "countdown,sudoku"
SHIPPED_TURNS = "5,1"  # countdown is harder

DESCRIPTION = """\
Makes a base for the tiny model: it learns to solve a task from demonstrations,
then falls into careless habits, which RL can correct.

  python -m models.make_base --out bases/again    bases/tiny again, in an hour
  python -m models.make_base --task my_task.py:Sums --out bases/sums

tasks/task.py says what a task needs. If this is interrupted, run the same
command to continue.
"""


def flag_parser():
    parser = FlagParser(
        prog="make_base",
        usage="python -m models.make_base --out FOLDER [--FLAG VALUE] ...",
        description=DESCRIPTION,
    )
    parser.add_argument("--out", required=True, type=Path, help="The folder to make.")
    parser.add_argument(
        "--task",
        default=SHIPPED_TASKS,
        help=f"A name or FILE.py:NAME; several as A,B. The default is {SHIPPED_TASKS}, "
        "with the recipe of bases/tiny.",
    )
    parser.add_argument(
        "--turns",
        help="How many steps each task takes in turn, such as 5,1. The default is 1 for each, "
        f"or {SHIPPED_TURNS} for bases/tiny.",
    )
    for f in fields(Recipe):
        shipped = getattr(SHIPPED, f.name)
        default = f"The default is {f.default}"
        if shipped != f.default:
            default += f", or {shipped} for bases/tiny"
        parser.add_argument(
            f"--{f.name}",
            type=FLAG_TYPES[f.type],
            metavar=f.type.__name__.upper(),
            help=f"{f.metadata['help']} {default}.",
        )
    return parser


def read_turns(text, names):
    """--turns as a list of numbers, one for each task. Raises ValueError."""
    pattern = ",".join(r"[1-9]\d?" for _ in names)
    if not re.fullmatch(pattern, text):
        raise ValueError(
            f"turns {text!r}: it has to be a number of 1 to 99 for each task, such as 5,1"
        )
    return [int(number) for number in text.split(",")]


def find_demonstrated_task(name):
    """The form of a task that tiny can learn. Raises ValueError if there is none."""
    task = find_task(name)
    task = getattr(task, "compact", task)
    missing = [f"no {part}" for part in REQUIRED_BY_TINY if not hasattr(task, part)]
    if missing:
        raise ValueError(
            f"{name} has {' and '.join(missing)}, but a base learns from demonstrations: "
            "tasks/task.py says what a task needs"
        )
    return task if name in TASKS else CheckedTask(task)


def main(arguments=None):
    """The program. Bad flags end it with code 2, before torch is imported."""
    parser = flag_parser()
    options = parser.parse_args(arguments)
    is_shipped = options.task == SHIPPED_TASKS
    names = options.task.split(",")
    try:
        if options.out.exists():
            raise ValueError(f"{options.out} already exists")
        if options.turns is not None:
            turns = read_turns(options.turns, names)
        elif is_shipped:
            turns = read_turns(SHIPPED_TURNS, names)
        else:
            turns = [1 for _ in names]
        changes = {f.name: getattr(options, f.name) for f in fields(Recipe)}
        changes = {name: value for name, value in changes.items() if value is not None}
        recipe = replace(SHIPPED if is_shipped else Recipe(), **changes)
        tasks_in_turn = []
        for name, steps in zip(names, turns, strict=True):
            tasks_in_turn += steps * [find_demonstrated_task(name)]

        from models.pretraining import make  # torch takes seconds to import

        make(options.out, tasks_in_turn, recipe, {"task": options.task, "turns": turns})
    except KeyboardInterrupt:
        parser.exit(130, "\nstopped; run the same command to continue\n")
    except (ValueError, OSError) as error:
        parser.exit(2, f"make_base: {' '.join(str(error).split())}\n")
    model = shlex.quote(str(options.out))
    task = shlex.quote(names[0])
    print(f"made {options.out}. Train it: python train.py --model {model} --task {task}")


if __name__ == "__main__":
    terminal.prepare()
    sys.exit(main())
