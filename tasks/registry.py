"""The built-in tasks by name, and your own from a file. A new built-in task is a line in TASKS."""

import runpy
from pathlib import Path

from tasks.chain import Chain
from tasks.checked import CheckedTask
from tasks.competition_math import MATH
from tasks.countdown import Countdown
from tasks.gsm8k import GSM8K
from tasks.mixture import TaskMixture
from tasks.splits import ProblemsFromFile
from tasks.sudoku import Sudoku

TASKS = {
    "countdown": Countdown(),
    "sudoku": Sudoku(),
    "gsm8k": GSM8K(),
    "math": MATH(),
    "chain": Chain(),
}
REQUIRED_METHODS = ("problems", "prompt", "reward", "solved")  # task.py explains them
REQUIRED_BY_TINY = ("length", "demonstrations")


def find_task(name):
    """Returns the task called `name`: one of TASKS, or FILE.py:NAME, an instance or a class there.

    Raises a one-line ValueError for an unknown name or a file that does not define such a task.
    """
    if name in TASKS:
        return TASKS[name]

    path, _, attribute = name.rpartition(":")
    if not path.endswith(".py") or not Path(path).is_file():
        choices = f"choose one of {', '.join(TASKS)}, or a FILE.py:NAME that exists"
        raise ValueError(f"unknown task {name!r}: {choices}")
    try:
        namespace = runpy.run_path(path)
        if attribute not in namespace:
            raise NameError(f"{path} defines no {attribute!r}")
        task = namespace[attribute]
        if isinstance(task, type):
            task = task()
        missing = [
            f"no {method}"
            for method in REQUIRED_METHODS
            if not callable(getattr(task, method, None))
        ]
        if missing:
            raise TypeError(", ".join(missing) + ": tasks/task.py lists what a task needs")
    except (Exception, SystemExit) as error:  # the file may do anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(f"task {name!r} cannot be loaded from {path} ({reason})") from None
    return task


def compact_form(task):
    """Returns the form of a task that the tiny model can learn, or raises ValueError."""
    task = getattr(task, "compact", task)
    missing = [f"no {name}" for name in REQUIRED_BY_TINY if not hasattr(task, name)]
    if missing:
        name = getattr(task, "name", type(task).__name__)
        raise ValueError(
            f"{name} has {' and '.join(missing)} for the tiny model: "
            "give --model a LLaDA-class checkpoint"
        )
    return task


def load_task(names, compact, data="", length=0, train_on_all=False):
    """Returns the task of `--task names`; of several names, with commas, a TaskMixture.

    compact: whether the model reads the tiny model's short prompts.
    data: a file of problems that replace the task's own.
    length: the requested number of tokens per completion; 0 for the default.
    train_on_all: whether all problems in `data` are for training.
    Raises ValueError for names, data or a length that do not go together.
    """
    tasks = {}
    for name in names.split(","):
        if name in tasks:
            raise ValueError(f"task {names}: {name} is named twice")
        task = find_task(name)
        task = compact_form(task) if compact else task
        tasks[name] = task if name in TASKS else CheckedTask(task)

    if len(tasks) == 1:
        [task] = tasks.values()
        return ProblemsFromFile(task, data, train_on_all) if data else task

    if data:
        raise ValueError(f"--data {data} is for one task, not for {names}")
    mixture = TaskMixture(tasks, compact=compact)
    if compact and length not in (0, mixture.length):
        raise ValueError(
            f"{names} have their own lengths: leave out --max_completion_length {length}"
        )
    return mixture
