"""The experiment behind EXPERIMENTS.md: what each part of DiFFPO does, as plain train.py commands.

    python -m experiments.grids grid --list       prints a part's commands
    python -m experiments.grids states grid       makes their runs, two at a time, one thread each

A run that is finished is skipped, one that was stopped goes on: type the same command again. What
they say: python -m experiments.claims compare runs/grid/sudoku/*
"""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

from config import FlagParser

ROWS = {  # what a row changes of the default, which is DiFFPO
    "two-stage-w": "--num_stages 2",
    "mean-field": "--num_stages 1 --importance_weight_cap 0",
    "exact": "--num_stages 20 --importance_weight_cap 0",  # weights are 1
    "two-stage": "--num_stages 2 --importance_weight_cap 0",
    "mean-field-w": "--num_stages 1",
    "four-stage-w": "--num_stages 4",
    "four-stage": "--num_stages 4 --importance_weight_cap 0",
    "mean-field-policy": "--num_stages 1 --importance_weight_cap 0 --train_target policy",
    "two-stage-w-policy": "--num_stages 2 --train_target policy",
    "sampler": "--train_target sampler",
    "no-price": "--nfe_penalty 0",
    "d1": "--num_stages 1 --importance_weight_cap 0 --train_target policy --nfe_penalty 0"
    " --scale_rewards false --normalise_by text --num_iterations 12 --epsilon 0.5 --beta 0.04"
    " --weight_decay 0.1 --p_mask_prompt 0.15 --max_grad_norm 0.2 --lora_dropout 0.05",
}
MAIN = ("two-stage-w", "mean-field", "two-stage", "mean-field-w")
TASKS = {  # 500 sudoku problems say as much as 1,000: they are of 51 grids
    "countdown": "--task countdown --eval_problems 1000",
    "sudoku": "--task sudoku --eval_problems 500",
}
VALIDATION = "--eval_split validation --eval_problems 300"
# Three learning rates for each row: the recipe's, twice and half of it. d1 makes 12 updates a step.
RATES = {"countdown": ("2e-3", "4e-3", "1e-3"), "sudoku": ("1e-3", "2e-3", "5e-4")}
TUNED = ("two-stage-w", "mean-field", "exact", "two-stage", "mean-field-w", "d1", "sampler")
OTHER_RATES = {"d1": ("5e-4", "1e-3", "2.5e-4"), "sampler": ("1e-2", "2e-2", "5e-3")}
# What that chose, where it is not the first; and whose rate the rows have that were not tuned.
CHOSEN = {
    ("countdown", "exact"): "1e-3", ("countdown", "d1"): "2.5e-4",
    ("countdown", "sampler"): "5e-3", ("sudoku", "two-stage-w"): "5e-4",
    ("sudoku", "mean-field"): "5e-4", ("sudoku", "mean-field-w"): "5e-4",
    ("sudoku", "d1"): "2.5e-4", ("sudoku", "sampler"): "2e-2",
    ("written", "two-stage-w"): "1e-3", ("written", "mean-field"): "1e-3",
    ("written", "mean-field-w"): "1e-3",
}  # fmt: skip
LIKE = {
    "four-stage-w": "two-stage-w", "four-stage": "two-stage", "no-price": "two-stage-w",
    "mean-field-policy": "mean-field", "two-stage-w-policy": "two-stage-w",
}  # fmt: skip


def rate(row, value):
    return f"--{'threshold_' * (row == 'sampler')}learning_rate {value}"


def run(part, task, row, seed, more=""):
    """(folder, flags) of a run of a row, at the rate that tuning chose."""
    first = OTHER_RATES.get(row, RATES[task])[0]
    chosen = rate(row, CHOSEN.get((task, LIKE.get(row, row)), first))
    flags = f"{TASKS[task]} --seed {seed} {ROWS[row]} {chosen} {more}"
    return f"runs/{part}/{task}/{row}-{seed}", flags.split()


def tune():
    """Every rate, one seed, on validation problems."""
    for i, row, task in product(range(3), TUNED, TASKS):
        value = OTHER_RATES.get(row, RATES[task])[i]
        flags = f"--task {task} --seed 10 {ROWS[row]} {rate(row, value)} {VALIDATION}"
        yield f"runs/tune/{task}/{row}-{value}", flags.split()


def grid():
    """Every row, five seeds."""
    for seed, row, task in product(range(5), ROWS, TASKS):
        yield run("grid", task, row, seed)


def large():
    """Four times the prompts a step, three seeds: less noise, the same bias."""
    sizes = (("sudoku", 64), ("countdown", 128))
    for (task, prompts), seed, row in product(sizes, range(3), MAIN):
        yield run("large", task, row, seed, f"--prompts_per_step {prompts} --steps 80")


def caps():
    """Other caps and the other normalisation, two seeds; C = 1 and 1/L are the grid's."""
    for seed in range(2):
        for task in TASKS:
            for name, more in {
                "cap-2": "--importance_weight_cap 2",
                "cap-5": "--importance_weight_cap 5",
                "cap-none": "--importance_weight_cap 1e9",
                "text": "--normalise_by text",
            }.items():  # fmt: skip
                _, flags = run("caps", task, "two-stage-w", seed, more)
                yield f"runs/caps/{task}/{name}-{seed}", flags


def states():
    """Half-way to two of the grid's ends, for claims.py gradient and surrogate."""
    for row, (task, steps) in product(MAIN[:2], (("countdown", 60), ("sudoku", 70))):
        yield run("states", task, row, 0, f"--steps {steps}")


def both():
    """Both tasks in one run, five seeds."""
    for seed in range(5):
        flags = f"--task countdown,sudoku --seed {seed} --eval_problems 1000"
        yield f"runs/both/{seed}", flags.split()


def written():
    """A longer task, from its own base (written.py): every rate, one seed; then three seeds."""
    task = "--task experiments/written.py:WrittenCountdown --model bases/written --block_length 8"
    short = "--seed 10 --steps 40 --eval_split validation --eval_problems 200 --frontier false"
    for value, row in product(RATES["countdown"], MAIN):
        flags = f"{task} {ROWS[row]} {rate(row, value)} {short}"
        yield f"runs/written-tune/{row}-{value}", flags.split()
    for seed, row in product(range(3), MAIN):
        chosen = rate(row, CHOSEN.get(("written", row), RATES["countdown"][0]))
        flags = f"{task} {ROWS[row]} {chosen} --seed {seed} --steps 64 --eval_problems 500"
        yield f"runs/written/{row}-{seed}", flags.split()


PARTS = {part.__name__: part for part in (tune, grid, large, caps, states, both, written)}


def is_finished(folder):
    try:
        return json.loads((folder / "eval.json").read_text())[-1]["name"] != "base"
    except (OSError, ValueError, LookupError):
        return False


def make(folder, flags):
    """One run, from its start or from where it was stopped. -> what to say of it"""
    folder = Path(folder)
    if is_finished(folder):
        return f"{folder}: finished before"
    if (folder / "config.json").exists():
        flags = ["--resume"]
    else:
        shutil.rmtree(folder, ignore_errors=True)
    log = folder.parent.with_name(f"{folder.parent.name}.logs") / f"{folder.name}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "train.py", *flags, "--run_dir", str(folder)]
    with open(log, "w", encoding="utf-8") as file:
        how = {"stdout": file, "stderr": subprocess.STDOUT, "cwd": Path(__file__).parent.parent}
        done = subprocess.run(command, **how, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return f"{folder}: {'done' if done.returncode == 0 else f'failed, {log} says why'}"


def main(arguments=None):
    how = {"usage": "python -m experiments.grids PART ... [--jobs N] [--list]"}
    parser = FlagParser(description=__doc__.split("\n")[0], **how)
    parser.add_argument("parts", nargs="+", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time [2]")
    parser.add_argument("--list", action="store_true", help="print the commands, run nothing")
    options = parser.parse_args(arguments)
    found = [pair for part in options.parts for pair in PARTS[part]()]
    if options.list:
        for folder, flags in found:
            print("python train.py", *flags, "--run_dir", folder)
        return
    pool = ThreadPoolExecutor(max(1, options.jobs))
    try:
        for said in pool.map(lambda pair: make(*pair), found):
            print(said, flush=True)
    except KeyboardInterrupt:  # the runs hear it too, and save
        pool.shutdown(cancel_futures=True)
        print("\nstopped; the same command goes on")
        return 130


if __name__ == "__main__":
    sys.exit(main())
