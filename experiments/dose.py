"""When does the likelihood matter? Compares estimators at several "doses" of sequential decoding.

    python -m experiments.grids chain                            makes the chain's runs
    python -m experiments.dose runs/chain/{blocks-?,free}/*-?    compares and draws them

A run's folder is DOSE/ROW-SEED. A dose is a task and a way to decode it, for example in blocks of
one number. A row is an estimator; the others are compared with the row "mean-field". Differences
are paired: runs with the same seed train on the same prompts. Their 95% interval is compare.py's:
over seeds and, for the greedy score, over problems too. (A training score already varies with the
problems, since each seed draws others.)

The plot's axes measure how sequential decoding is: the calls per completion, and KL(true ||
mean-field) in nats per token, both averaged over training. The KL in the first rollouts, before
anything is learned, is printed beside them; surrogate.py measures it for any model.
"""

# ruff: noqa: E402 (flags are checked before torch is imported, which takes seconds)

import sys
from pathlib import Path

from experiments.command_line import (
    add_out_flag,
    add_task_file_flag,
    existing_folder,
    exit_status,
)
from models import terminal
from models.command_line import FlagParser


def parse_flags(arguments=None):
    """The flags as a namespace. Bad flags end the program with status 2."""
    parser = FlagParser(
        prog="python -m experiments.dose",
        usage="%(prog)s RUN ... [flags]",
        description="""\
When does the likelihood matter?

Compares the estimators of finished runs, DOSE/ROW-SEED, with mean-field at each
dose (a task and a way of decoding): learning curves, end scores, the
surrogate's error. Plots the differences against how sequential decoding is.""",
        epilog="""\
example:
  python -m experiments.dose runs/chain/{blocks-?,free}/*-?""",
    )
    parser.add_argument(
        "paths",
        nargs="+",
        type=existing_folder,
        metavar="RUN",
        help="the folders of finished runs",
    )
    add_task_file_flag(parser)
    add_out_flag(parser, "dose", content='"weights_on_two_stages"')
    return parser.parse_args(arguments)


if __name__ == "__main__":
    terminal.prepare()
    parse_flags()

from dataclasses import dataclass
from statistics import fmean

from matplotlib.figure import Figure

from evaluation import plots
from evaluation.tables import print_columns
from experiments import compare
from experiments.intervals import spread
from models.inputs import task_files
from training import files

REFERENCE = "mean-field"
# The pairs of rows compared at each dose, in addition to all rows with REFERENCE.
WEIGHTS_ON_TWO_STAGES = ("two-stage-w", "two-stage")
SHARE_OF_CEILING = 0.9
WINDOW = 5  # steps to average when finding where a share of the ceiling is reached


@dataclass
class Dose:
    """All runs of one task, decoded in one way."""

    name: str
    rows: dict  # {name of the row: its runs, by seed}

    @property
    def ceiling(self):
        """The best row's mean solved share at the end of training."""
        return max(fmean(end_score(run) for run in runs) for runs in self.rows.values())


def end_steps(run):
    """The log's rows for the end of training, its last sixth."""
    return run.log[-max(1, len(run.log) // 6) :]


def end_score(run):
    """The solved share of rollouts, sampled, at the end of training."""
    return fmean(row["solved_mean"] for row in end_steps(run))


def spread_at_end(runs, metric):
    """The spread of a metric's mean at the end of training; None if it was not logged.

    (A run that masks prompts and uses no weights does not compute metrics that only the log needs.)
    """
    values = [[row[metric] for row in end_steps(run)] for run in runs]
    if any(None in of_run for of_run in values):
        return None
    return spread([fmean(of_run) for of_run in values])


def mean_over_training(run, metric):
    return fmean(row[metric] for row in run.log)


def curve_area(run):
    """The mean solved share of rollouts over all of training."""
    return mean_over_training(run, "solved_mean")


def greedy_score(run):
    return run.points[compare.AS_TRAINED]["solved"]


def steps_to(run, share):
    """The first step at which the last WINDOW steps solve `share` on average, or None."""
    solved = [row["solved_mean"] for row in run.log]
    for end in range(WINDOW, len(solved) + 1):
        if fmean(solved[end - WINDOW : end]) >= share:
            return end
    return None


def read_doses(paths):
    """The runs as Doses, in the order of the paths. Raises a one-line ValueError."""
    doses = {}
    for path in paths:
        run = compare.read_run(path)
        if run.settings["train_target"] == "sampler":
            raise ValueError(f"{path} trained only its sampler: there is no estimator to compare")
        row = run.path.resolve().name.removesuffix(f"-{run.seed}")
        dose = run.path.resolve().parent.name
        runs = doses.setdefault(dose, Dose(dose, {})).rows.setdefault(row, [])
        if any(run.seed == other.seed for other in runs):
            raise ValueError(f"{path} has the seed of another run of {dose}/{row}: leave one out")
        runs.append(run)
    for dose in doses.values():
        if REFERENCE not in dose.rows:
            raise ValueError(f"{dose.name} has no {REFERENCE}-SEED to compare the others with")
        for runs in dose.rows.values():
            runs.sort(key=lambda run: run.seed)
        known = [name for name in STYLES if name in dose.rows]
        others = [name for name in dose.rows if name not in STYLES]
        dose.rows = {name: dose.rows[name] for name in [*known, *others]}
    return list(doses.values())


# ---- figures -------------------------------------------------------------------------------------


def paired_differences(runs, reference, score):
    """score(run) - score(other) for each pair of runs with the same seed."""
    by_seed = {run.seed: run for run in reference}
    return [score(run) - score(by_seed[run.seed]) for run in runs if run.seed in by_seed]


def difference(runs, reference):
    """How much more one row solves than another, a dict for JSON; None without a common seed."""
    [*greedy] = (
        row for row in compare.differences(runs, reference) if row["point"] == compare.AS_TRAINED
    )
    if not greedy:
        return None
    return {
        "pairs": len(greedy[0]["seeds"]),
        "sampled": spread(paired_differences(runs, reference, end_score)),
        "area": spread(paired_differences(runs, reference, curve_area)),
        "greedy": {"mean": greedy[0]["mean"], "half": greedy[0]["half"]},
    }


def summarise_dose(dose, task=""):
    """What is reported about a dose, a dict for JSON. task: the runs' task, if it is in a file."""
    all_runs = [run for runs in dose.rows.values() for run in runs]
    if not task_files(all_runs[0].settings["task"]):
        task = ""  # it belongs to other doses
    largest = max(run.points[compare.AS_TRAINED]["nfe"] for run in all_runs)
    compare.score_runs(all_runs, compare.problem_clusters(all_runs[0], task), largest)
    reference = dose.rows[REFERENCE]
    share = SHARE_OF_CEILING * dose.ceiling
    rows = {}
    for name, runs in dose.rows.items():
        reached = [steps_to(run, share) for run in runs]
        rows[name] = {
            "seeds": [run.seed for run in runs],
            "learning_rate": runs[0].settings["learning_rate"],
            "sampled": spread([end_score(run) for run in runs]),
            "area": spread([curve_area(run) for run in runs]),
            "greedy": spread([greedy_score(run) for run in runs]),
            "nfe": spread([run.points[compare.AS_TRAINED]["nfe"] for run in runs]),
            "kl": spread_at_end(runs, "surrogate_kl"),
            "ess": spread_at_end(runs, "ess_fraction"),
            "steps_to_share": reached,
            "curve": [
                spread([run.log[step]["solved_mean"] for run in runs])
                for step in range(min(len(run.log) for run in runs))
            ],
            "minus_reference": None if name == REFERENCE else difference(runs, reference),
        }
    weights = None
    if set(WEIGHTS_ON_TWO_STAGES) <= set(dose.rows):
        weights = difference(*(dose.rows[name] for name in WEIGHTS_ON_TWO_STAGES))
    return {
        "dose": dose.name,
        "task": reference[0].settings["task"],
        "model": reference[0].settings["model"],
        "steps": reference[0].settings["steps"],
        "ceiling": dose.ceiling,
        "calls": fmean(mean_over_training(run, "nfe_mean") for run in all_runs),
        "kl": fmean(mean_over_training(run, "surrogate_kl") for run in reference),
        "kl_before": fmean(run.log[0]["surrogate_kl"] for run in reference),
        "rows": rows,
        "weights_on_two_stages": weights,
    }


# ---- the table -----------------------------------------------------------------------------------


def print_dose(summary):
    """Prints the table of one dose, and each row's differences."""
    print(
        f"\n{summary['dose']}: {summary['calls']:.2f} calls per completion in training. "
        f"KL(true || mean-field): {summary['kl_before']:.3f} nats per token before it, "
        f"{summary['kl']:.3f} in it"
    )
    table = [["", "n", "rate", "sampled, %", "area, %", "greedy, %", "NFE", "KL", "ESS", "steps"]]
    for name, row in summary["rows"].items():
        reached = [step for step in row["steps_to_share"] if step is not None]
        steps = f"{fmean(reached):.0f}" if reached else "never"
        if len(reached) < len(row["seeds"]):
            steps += f" ({len(reached)} of {len(row['seeds'])})"
        table.append(
            [
                name,
                str(len(row["seeds"])),
                f"{row['learning_rate']:g}",
                compare.in_words(row["sampled"]),
                compare.in_words(row["area"]),
                compare.in_words(row["greedy"]),
                compare.in_words(row["nfe"], scale=1, digits=2),
                compare.in_words(row["kl"], scale=1, digits=2) if row["kl"] else "",
                compare.in_words(row["ess"], scale=1, digits=2) if row["ess"] else "",
                steps,
            ]
        )
    print_columns(table)
    for name, row in summary["rows"].items():
        if row["minus_reference"]:
            print(describe_difference(f"{name} minus {REFERENCE}", row["minus_reference"]))
    if summary["weights_on_two_stages"]:
        names = " minus ".join(WEIGHTS_ON_TWO_STAGES)
        print(describe_difference(names, summary["weights_on_two_stages"]))


COLUMNS = f"""
sampled: solved share of rollouts in the last sixth of training. area: the same
over all steps, the learning curve's area. greedy: held-out problems. KL(true ||
surrogate) in nats per token, and ESS of the weights, at the end of training.
steps: until {WINDOW} steps reach {SHARE_OF_CEILING:.0%} of the best row's sampled share (in
how many of the runs).
±: half of the 95% interval over seeds; for greedy differences over problems too."""


def describe_difference(title, row):
    parts = [
        f"{name} {compare.in_words(row[name], sign='+')} {verdict(row[name])}"
        for name in ("sampled", "area", "greedy")
    ]
    return f"{title}, {row['pairs']} pairs: {'; '.join(parts)}"


def verdict(estimate):
    if estimate["half"] is None or abs(estimate["mean"]) <= estimate["half"]:
        return "undecided"
    return "above" if estimate["mean"] > 0 else "below"


# ---- the picture ---------------------------------------------------------------------------------

BLUE, ORANGE, GREEN, *_ = (line[0] for line in plots.LINES)
# How rows are drawn; rows not listed are not drawn. Mean-field is the zero line on the right.
STYLES = {
    "mean-field": {"label": "mean-field", "color": ORANGE, "linestyle": "--", "marker": "o"},
    "mean-field-w": {
        "label": "mean-field, weights",
        "color": "0.4",
        "linestyle": ":",
        "marker": "x",
    },
    "two-stage": {"label": "two stages", "color": GREEN, "linestyle": "-.", "marker": "^"},
    "two-stage-w": {
        "label": "two stages, weights (DiFFPO)",
        "color": BLUE,
        "linestyle": "-",
        "marker": "s",
    },
    "exact": {"label": "exact likelihood", "color": "black", "linestyle": "-", "marker": "*"},
}


LABEL_ROWS = 5  # the doses' names are staggered in this many rows, since doses may be close


def plot(summaries, path, title):
    """dose.png: learning curves where the KL is largest, and the differences at all doses."""
    summaries = sorted(summaries, key=lambda summary: summary["kl"])
    figure = Figure((14, 4.6), layout="constrained")
    curves, by_kl, by_calls = figure.subplots(1, 3)
    draw_curves(curves, summaries[-1])
    draw_differences(by_kl, summaries, x="kl")
    draw_differences(by_calls, summaries, x="calls")
    by_kl.set(
        xlabel="KL(true ‖ mean-field) in training, nats per token",
        ylabel="learning curve's area,\npoints above mean-field's",
    )
    by_calls.set(xlabel="calls per completion in training")
    handles, labels = curves.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", handlelength=4, fontsize=9)
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold", parse_math=False)
    counts = ", ".join(
        f"{summary['dose']} {len(summary['rows'][REFERENCE]['seeds'])}" for summary in summaries
    )
    figure.supxlabel(
        f"Number of seeds: {counts}. solved: share of rollouts, sampled; left: mean over seeds. "
        "Bars: 95% intervals of paired differences, over seeds.",
        fontsize=8,
        color="0.3",
    )
    plots.save(figure, path)


def draw_curves(axis, summary):
    """The learning curves of one dose."""
    for name, style in STYLES.items():
        if name not in summary["rows"]:
            continue
        curve = summary["rows"][name]["curve"]
        steps = range(1, len(curve) + 1)
        solved = [point["mean"] for point in curve]
        axis.plot(
            steps,
            solved,
            **style,
            markevery=(3, 10),
            mfc="white",
            mec=style["color"],
        )
    axis.set(xlabel="step", ylabel="solved", ylim=(0, 1.02), xlim=(0, None))
    axis.yaxis.set_major_formatter("{x:.0%}")
    axis.grid(alpha=0.3)
    axis.set_title(summary["dose"], loc="left", size=10)


def draw_differences(axis, summaries, x):
    """The area of each row's learning curve above mean-field's, against a figure of the dose.

    A line joins the doses of one task and model.
    """
    axis.axhline(0, color=ORANGE, linestyle="--", linewidth=1.5)
    in_order = sorted(summaries, key=lambda summary: summary[x])
    width = in_order[-1][x] - in_order[0][x] or 1
    kinds = dict.fromkeys((summary["task"], summary["model"]) for summary in in_order)
    for i, (name, style) in enumerate(STYLES.items()):
        for kind in kinds:
            points = [
                (summary[x], summary["rows"][name]["minus_reference"]["area"])
                for summary in in_order
                if (summary["task"], summary["model"]) == kind
                and summary["rows"].get(name, {}).get("minus_reference")
            ]
            if not points:
                continue
            axis.errorbar(
                [place + (i - 2.5) * 0.008 * width for place, _ in points],  # beside each other
                [100 * area["mean"] for _, area in points],
                yerr=[100 * (area["half"] or 0) for _, area in points],
                **style,
                mfc="white",
                mec=style["color"],
                capsize=2,
                elinewidth=1,
            )
    for i, summary in enumerate(in_order):
        axis.annotate(
            summary["dose"],
            (summary[x], 0.98 - 0.055 * (i % LABEL_ROWS)),
            xycoords=("data", "axes fraction"),
            fontsize=8,
            ha="center",
            va="top",
        )
    low, high = axis.get_ylim()
    axis.set_ylim(low, high + 0.4 * (high - low))  # room for the names of the doses
    axis.margins(x=0.12)
    axis.grid(alpha=0.3)


# ---- the program ---------------------------------------------------------------------------------


def dose(paths, out, task=""):
    """Prints the tables; writes dose.json and dose.png into a folder. Raises ValueError.

    task: the runs' task, if it is in a file.
    """
    summaries = []
    for one_dose in read_doses(paths):
        summaries.append(summarise_dose(one_dose, task))
        print_dose(summaries[-1])
    print(COLUMNS)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    files.write_json(folder / "dose.json", summaries)
    plot(
        summaries,
        folder / "dose.png",
        title="The likelihood matters where mean-field is far from the policy",
    )
    print("written:", folder / "dose.json", folder / "dose.png")


def main(arguments=None):
    """The program. Returns its exit status: 0, 2 (bad input), 130 (Ctrl-C)."""
    options = parse_flags(arguments)
    return exit_status("experiments.dose", lambda: dose(options.paths, options.out, options.task))


if __name__ == "__main__":
    sys.exit(main())
