"""All tasks by name, and your own from a file."""

import runpy
from pathlib import Path

from tasks.competition_math import MATH
from tasks.countdown import Countdown
from tasks.gsm8k import GSM8K
from tasks.mixture import TaskMixture
from tasks.splits import ProblemsFromFile
from tasks.sudoku import Sudoku

TASKS = {"countdown": Countdown(), "sudoku": Sudoku(), "gsm8k": GSM8K(), "math": MATH()}


def find_task(name):
    """The task of a name: one of TASKS, or FILE.py:NAME. Raises ValueError."""
    if name in TASKS:
        return TASKS[name]
    path, _, attribute = name.rpartition(":")
    if not path.endswith(".py") or not Path(path).is_file():
        known = f"choose one of {', '.join(TASKS)}, or a FILE.py:NAME that is there"
        raise ValueError(f"unknown task {name!r}: {known}")
    try:
        task = runpy.run_path(path)[attribute]
        task = task() if isinstance(task, type) else task
        parts = ("problems", "prompt", "reward", "solved")
        if missing := [f"no {part}" for part in parts if not callable(getattr(task, part, None))]:
            raise TypeError(", ".join(missing) + ": tasks.py says what a task has")
    except (Exception, SystemExit) as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(f"task {name!r} cannot be had from {path} ({why})") from None
    return task


def compact_form(task):
    """What the embedded model uses of a task. Raises ValueError where it has no such form."""
    task = getattr(task, "compact", task)
    missing = [f"no {name}" for name in ("length", "demonstrations") if not hasattr(task, name)]
    if missing:
        name, missing = getattr(task, "name", type(task).__name__), " and ".join(missing)
        way_out = "give --model a LLaDA-class checkpoint"
        raise ValueError(f"{name} has {missing} for the tiny model: {way_out}")
    return task


def load_task(names, compact, data="", length=0):
    """The task that --task names, as the tiny model has it if `compact`; with commas, several.

    data: a file of problems. length: tokens of a completion, if asked for. Raises ValueError.
    """
    found = {}
    for name in names.split(","):
        if name in found:
            raise ValueError(f"task {names}: {name} is there twice")
        task = find_task(name)
        task = found[name] = compact_form(task) if compact else task
    if len(found) == 1:
        return ProblemsFromFile(task, data) if data else task
    if data:
        raise ValueError(f"--data {data} is for one task, not for {names}")
    task = TaskMixture(found, compact)
    if compact and length not in (0, task.length):
        raise ValueError(
            f"length = {length}: {names} have a length each: leave out --max_completion_length"
        )
    return task
