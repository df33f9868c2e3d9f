"""The runs behind EXPERIMENTS.md, which test each part of DiFFPO, as plain train.py commands.

    python -m experiments.grids grid --list       prints a part's commands
    python -m experiments.grids states grid       makes two parts' runs, two at a time
    python -m experiments.compare runs/grid/sudoku/{two-stage-w,mean-field,d1}-?     compares them

Finished runs are skipped and stopped runs are resumed, so the same command can be repeated.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from models import terminal
from models.command_line import FlagParser, at_least

ROOT = Path(__file__).parent.parent

# How each row differs from the default, DiFFPO: two stages, weights, policy and sampler.
ROWS = {
    "two-stage-w": "--num_stages 2",
    "mean-field": "--num_stages 1 --importance_weight_cap 0",
    "exact": "--num_stages 20 --importance_weight_cap 0",  # its weights would be 1
    "two-stage": "--num_stages 2 --importance_weight_cap 0",
    "mean-field-w": "--num_stages 1",
    "four-stage-w": "--num_stages 4",
    "four-stage": "--num_stages 4 --importance_weight_cap 0",
    "mean-field-policy": "--num_stages 1 --importance_weight_cap 0 --train_target policy",
    "two-stage-w-policy": "--num_stages 2 --train_target policy",
    "sampler": "--train_target sampler",
    "no-price": "--nfe_penalty 0",
    "d1": (
        "--num_stages 1 --importance_weight_cap 0 --train_target policy --nfe_penalty 0"
        " --scale_rewards false --normalise_by text --num_iterations 12 --epsilon 0.5 --beta 0.04"
        " --weight_decay 0.1 --p_mask_prompt 0.15 --max_grad_norm 0.2 --lora_dropout 0.05"
    ),
}
TASKS = {
    "countdown": "--task countdown --eval_problems 1000",
    "sudoku": "--task sudoku --eval_problems 500",  # from only 51 grids, so 1,000 would add little
}

# Each row's learning rate. Three were tried for each: the recipe's, twice and half of it (for d1,
# which makes 12 updates per step, a quarter of these), on validation problems with one seed;
# EXPERIMENTS.md has the scores. Rows marked "as ..." were not tuned and use that row's rate.
LEARNING_RATES = {
    "countdown": {
        "two-stage-w": "2e-3",
        "mean-field": "2e-3",
        "exact": "1e-3",
        "two-stage": "2e-3",
        "mean-field-w": "2e-3",
        "four-stage-w": "2e-3",  # as two-stage-w
        "four-stage": "2e-3",  # as two-stage
        "mean-field-policy": "2e-3",  # as mean-field
        "two-stage-w-policy": "2e-3",  # as two-stage-w
        "sampler": "5e-3",  # the threshold head's
        "no-price": "2e-3",  # as two-stage-w
        "d1": "2.5e-4",
    },
    "sudoku": {
        "two-stage-w": "5e-4",
        "mean-field": "5e-4",
        "exact": "1e-3",
        "two-stage": "1e-3",
        "mean-field-w": "5e-4",
        "four-stage-w": "5e-4",  # as two-stage-w
        "four-stage": "1e-3",  # as two-stage
        "mean-field-policy": "5e-4",  # as mean-field
        "two-stage-w-policy": "5e-4",  # as two-stage-w
        "sampler": "2e-2",  # the threshold head's
        "no-price": "5e-4",  # as two-stage-w
        "d1": "2.5e-4",
    },
}


def row_flags(task, row, seed):
    """The flags of a row of the grid."""
    name = "threshold_learning_rate" if row == "sampler" else "learning_rate"
    rate = LEARNING_RATES[task][row]
    return f"{TASKS[task]} --seed {seed} {ROWS[row]} --{name} {rate}"


# ---- the parts: each yields (folder, flags) for its runs -----------------------------------------


def grid():
    """Every row on countdown and sudoku, five seeds each."""
    for seed in range(5):
        for row in ROWS:
            for task in TASKS:
                yield f"runs/grid/{task}/{row}-{seed}", row_flags(task, row, seed)


def states():
    """Two rows stopped half-way, for gradients.py and surrogate.py."""
    steps = {"countdown": 60, "sudoku": 70}
    for row in ("two-stage-w", "mean-field"):
        for task in TASKS:
            flags = f"{row_flags(task, row, seed=0)} --steps {steps[task]}"
            yield f"runs/states/{task}/{row}-0", flags


def both():
    """Countdown and sudoku in one run, five seeds."""
    for seed in range(5):
        yield f"runs/both/{seed}", f"--task countdown,sudoku --seed {seed} --eval_problems 1000"


def written():
    """The longer task of written.py: three rates, then three seeds."""
    task = "--task experiments/written.py:WrittenCountdown --model bases/written --block_length 8"
    short = "--seed 10 --steps 40 --eval_split validation --eval_problems 200 --frontier false"
    chosen_rates = {
        "two-stage-w": "1e-3",
        "mean-field": "1e-3",
        "two-stage": "2e-3",
        "mean-field-w": "1e-3",
    }
    for rate in ("2e-3", "4e-3", "1e-3"):
        for row in chosen_rates:
            flags = f"{task} {ROWS[row]} --learning_rate {rate} {short}"
            yield f"runs/written-tune/{row}-{rate}", flags
    for seed in range(3):
        for row, rate in chosen_rates.items():
            flags = (
                f"{task} {ROWS[row]} --learning_rate {rate}"
                f" --seed {seed} --steps 64 --eval_problems 500"
            )
            yield f"runs/written/{row}-{seed}", flags


# ---- chain: the cost of the likelihood's error, by how sequential decoding is --------------------

CHAIN = "--task chain --model bases/chain --eval_problems 500 --frontier false"
# A dose is a way of decoding. At blocks of 1 every call writes one number.
DOSES = {
    "blocks-1": "--block_length 1 --train_target policy --nfe_penalty 0",
    "blocks-2": "--block_length 2 --train_target policy --nfe_penalty 0",
    "blocks-3": "--block_length 3 --train_target policy --nfe_penalty 0",
    "free": "--block_length 0 --train_target policy --nfe_penalty 0",
    "joint-2": "--block_length 2",  # the full method: the sampler learns too, and speed counts
}
MAIN_ROWS = ("mean-field", "mean-field-w", "two-stage", "two-stage-w", "exact")
ALL_ROWS = (*MAIN_ROWS, "four-stage-w", "d1")
ROWS_OF_DOSE = {
    "blocks-1": ALL_ROWS,
    "blocks-2": ALL_ROWS,
    "blocks-3": MAIN_ROWS,
    "free": MAIN_ROWS,
    "joint-2": MAIN_ROWS,
}
TRIED_RATES = dict.fromkeys(MAIN_ROWS, ("1e-3", "3e-3", "1e-2"))
TRIED_RATES["four-stage-w"] = TRIED_RATES["two-stage-w"]
TRIED_RATES["d1"] = ("2.5e-4", "7.5e-4", "2.5e-3")  # d1 makes 12 updates per step


# In chain-tune 3e-3 was the best rate for each row. But with it some runs of every estimator, even
# the exact one, fell to chance, so each row has the second best rate, at which none did.
CHAIN_RATES = dict.fromkeys(MAIN_ROWS, "1e-3") | {"four-stage-w": "1e-3", "d1": "7.5e-4"}


def chain_flags(dose, row, rate):
    """The flags of a row of chain's grid, except the seed."""
    return f"{CHAIN} {DOSES[dose]} {ROWS[row]} --learning_rate {rate}"


def chain_tune():
    """Three rates for each row on chain; one seed, validation problems."""
    for dose in ("blocks-1", "blocks-2"):
        for row in ALL_ROWS:
            for rate in TRIED_RATES[row]:
                flags = f"{chain_flags(dose, row, rate)} --seed 10 --eval_split validation"
                yield f"runs/chain-tune/{dose}/{row}-{rate}", flags


def chain():
    """The estimators on chain, decoded in five ways, five seeds each."""
    for seed in range(5):
        for dose, rows in ROWS_OF_DOSE.items():
            for row in rows:
                flags = chain_flags(dose, row, CHAIN_RATES[row])
                yield f"runs/chain/{dose}/{row}-{seed}", f"{flags} --seed {seed}"


def doses():
    """The policy alone on countdown, sudoku and written, three seeds."""
    written = (
        "--task experiments/written.py:WrittenCountdown --model bases/written --block_length 8 "
        "--steps 40 --eval_problems 500"
    )
    for task, flags in (TASKS | {"written": written}).items():
        for seed in range(3):
            for row in ("mean-field", "two-stage", "two-stage-w", "exact"):
                rate = "1e-3" if task == "written" else LEARNING_RATES[task][row]
                yield (
                    f"runs/doses/{task}/{row}-{seed}",
                    f"{flags} --seed {seed} {ROWS[row]} --train_target policy "
                    f"--nfe_penalty 0 --learning_rate {rate} --frontier false",
                )


def lengths():
    """Chains of 4, 8, 12 numbers; make their bases first; three seeds."""
    for dose in ("blocks-1", "blocks-2"):
        for length in (4, 8, 12):
            task = (
                f"--task experiments/chains.py:chain{length} --model bases/chain{length} "
                "--prompts_per_step 16 --steps 60 --eval_problems 500 --frontier false"
            )
            for seed in range(3):
                for row in ("mean-field", "two-stage", "two-stage-w", "four-stage-w", "exact"):
                    yield (
                        f"runs/lengths/chain{length}-{dose}/{row}-{seed}",
                        f"{task} {DOSES[dose]} {ROWS[row]} --learning_rate {CHAIN_RATES[row]} "
                        f"--seed {seed}",
                    )


def block_causal():
    """Block-causal attention on chain; make its bases; three seeds."""
    # Its base: cp -r bases/chain bases/chain-causal-2, and add "block_size": 2 to its config.json.
    for seed in range(3):
        for size in (2, 3):
            task = CHAIN.replace("bases/chain", f"bases/chain-causal-{size}")
            for row in ("mean-field", "two-stage", "two-stage-w", "exact"):
                yield (
                    f"runs/block-causal/causal-{size}/{row}-{seed}",
                    f"{task} {DOSES[f'blocks-{size}']} --cache dual {ROWS[row]} "
                    f"--learning_rate {CHAIN_RATES[row]} --seed {seed}",
                )


def gamma():
    """Chain and countdown in one run; make their base; five seeds."""
    for seed in range(5):
        yield (
            f"runs/gamma/{seed}",
            "--task chain,countdown --model bases/chain-countdown --prompts_per_step 24 "
            f"--steps 160 --eval_problems 1000 --seed {seed}",
        )


# Remedies against the drift of mean-field learning over many updates on one batch.
ROWS_OF_INNER = {
    "mean-field": ROWS["mean-field"],
    "mean-field-w": ROWS["mean-field-w"],
    "mean-field-kl": f"{ROWS['mean-field']} --beta 0.04",
    "two-stage": ROWS["two-stage"],
    "two-stage-w": ROWS["two-stage-w"],
}


def inner():
    """1 to 12 updates on each batch of rollouts of chain, three seeds."""
    # All rows have the same rate, so that they move equally far, and half as many steps.
    for updates in (1, 12, 4, 8):
        for seed in range(3):
            for row, flags in ROWS_OF_INNER.items():
                yield (
                    f"runs/inner/updates-{updates}/{row}-{seed}",
                    f"{CHAIN} {DOSES['blocks-2']} {flags} --num_iterations {updates} "
                    f"--learning_rate 1e-3 --steps 30 --seed {seed}",
                )


PARTS = {
    "grid": grid,
    "states": states,
    "both": both,
    "written": written,
    "chain-tune": chain_tune,
    "chain": chain,
    "doses": doses,
    "lengths": lengths,
    "block-causal": block_causal,
    "gamma": gamma,
    "inner": inner,
}

# ---- making the runs -----------------------------------------------------------------------------


def is_finished(folder):
    """Whether a run's folder has the trained model's scores."""
    try:
        return json.loads((folder / "eval.json").read_text())[-1]["name"] != "base"
    except (OSError, ValueError, LookupError):
        return False


def make_run(folder, flags):
    """Makes or resumes one run. Returns a line that says what it did."""
    folder = Path(folder)
    if is_finished(folder):
        return f"{folder}: finished before"
    arguments = flags.split()
    if (folder / "config.json").exists():
        task = arguments[arguments.index("--task") + 1]
        arguments = ["--resume", "--task", task]
    log_file = folder.parent.with_name(f"{folder.parent.name}.logs") / f"{folder.name}.txt"
    log_file.parent.mkdir(parents=True, exist_ok=True)
    with open(log_file, "a", encoding="utf-8") as log:  # "a": another program may be writing to it
        done = subprocess.run(
            [sys.executable, "train.py", *arguments, "--run_dir", str(folder)],
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    if done.returncode:
        return f"{folder}: failed, see {log_file}"
    return f"{folder}: done"


def parse_flags(arguments=None):
    """The flags as a namespace. Bad flags end the program with status 2."""
    descriptions = "\n".join(f"  {name:13}{part.__doc__}" for name, part in PARTS.items())
    parser = FlagParser(
        prog="python -m experiments.grids",
        usage="%(prog)s PART ... [flags]",
        description=f"""\
Makes the training runs behind EXPERIMENTS.md, or lists their commands. Finished
runs are skipped, stopped runs are resumed.

parts:
{descriptions}""",
    )
    parser.add_argument(
        "parts", nargs="+", choices=PARTS, metavar="PART", help=f"one or more of {', '.join(PARTS)}"
    )
    parser.add_argument(
        "--jobs",
        type=at_least(1),
        default=2,
        metavar="INT",
        help="how many runs to make at a time [2]",
    )
    parser.add_argument(
        "--list", action="store_true", help="print the commands without running them"
    )
    return parser.parse_args(arguments)


def main(arguments=None):
    """The program. Returns its exit status: 0, or 130 (Ctrl-C)."""
    options = parse_flags(arguments)
    runs = [run for part in options.parts for run in PARTS[part]()]
    if options.list:
        for folder, flags in runs:
            print("python train.py", flags, "--run_dir", folder)
        return 0
    pool = ThreadPoolExecutor(options.jobs)
    try:
        for line in pool.map(lambda run: make_run(*run), runs):
            print(line, flush=True)
    except KeyboardInterrupt:  # the runs receive it too, and save
        pool.shutdown(cancel_futures=True)
        print("\nstopped; run the same command to continue")
        return 130
    return 0


if __name__ == "__main__":
    terminal.prepare()
    sys.exit(main())
