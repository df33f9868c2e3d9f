"""Compares groups of runs, with intervals over seeds and test problems.

    python -m experiments.compare runs/A-0 runs/A-1 runs/B-0 runs/B-1
    python -m experiments.compare runs/A-? runs/B-? --title "Two stages learn faster"

Runs that differ only in their seed form a group. A group is named after its runs' folders, without
the seed at their end: A and B above. Differences are relative to the first group. They are paired:
runs with the same seed trained on the same prompts, and all were asked the same test problems. The
95% interval of n pairs has the half-width sqrt(t² s² / n + u² v):

    s²  the variance of the pairs' differences, which other seeds would change; t is Student's, with
        n - 1 degrees of freedom
    v   the variance of the mean difference when clusters of problems are resampled; u is also
        Student's, with one degree of freedom less than there are clusters

It is slightly too wide, since the effect of single runs on single problems is in both terms. A
single pair has no s²: its interval is over problems alone, and holds only for these two runs.
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
        prog="python -m experiments.compare",
        usage="%(prog)s RUN ... [flags]",
        description="""\
Compares finished runs of one task: scores, denoiser calls, learning curves and
frontiers, each as a mean over seeds with its 95% interval, and the differences
from the first group. Runs that differ only in their seed are a group.""",
        epilog="""\
examples:
  python -m experiments.compare runs/A-? runs/B-? --title "B learns faster"
  python -m experiments.compare runs/A-0 runs/A-1 runs/B-0 runs/B-1""",
    )
    parser.add_argument(
        "paths",
        nargs="+",
        type=existing_folder,
        metavar="RUN",
        help="the folders of finished runs, those of the first group first",
    )
    parser.add_argument(
        "--title",
        default="",
        metavar="TEXT",
        help="the plot's title: what it shows, in a sentence [the task's name]",
    )
    add_task_file_flag(parser)
    add_out_flag(parser, "compare", content='"largest_nfe"')
    return parser.parse_args(arguments)


if __name__ == "__main__":
    terminal.prepare()
    parse_flags()

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from statistics import fmean
from textwrap import fill

import torch

from config import Config
from evaluation.metrics import area, bootstrap_weights
from evaluation.summary import GAMMAS, has_results, read_results
from evaluation.tables import WIDTH, conditions, print_columns
from experiments.compare_chart import STYLES, plot_comparison
from experiments.intervals import problem_half_width, spread
from models import inputs
from models.checkpoints import read_run_config, reads_compact_prompts
from models.errors import as_value_error
from tasks import registry
from training import files
from training.logging import read_metrics

# Runs that differ in one of these settings were not asked the same problems.
SHARED_SETTINGS = ("task", "model", "adapter", "data", "eval_split", "eval_problems")
# These are compared by content, wherever the files are (models/inputs.py).
KNOWN_BY_CONTENT = ("task", "model", "adapter", "data")
# The points at which groups are compared, in addition to the gammas.
AS_TRAINED = "as trained"
AREA = "area"


@dataclass
class Run:
    """A finished run, read from its folder."""

    path: Path
    seed: int
    settings: dict  # from config.json, except seed and run_dir
    inputs: dict  # from inputs.json, for KNOWN_BY_CONTENT; {} if it is missing
    log: list  # the rows of metrics.jsonl
    base: list  # the base's rows of `evaluate`, one for each gamma
    points: dict  # the trained model's rows: {AS_TRAINED or a gamma in nats: row}
    scores: dict = field(default_factory=dict)  # solved share at each point, and AREA; in [0, 1]
    drawn_scores: dict = field(default_factory=dict)  # the same in each bootstrap draw, (draws,)

    def mean_of_last_steps(self, metric):
        """The mean of a metric over the last tenth of training."""
        last_rows = self.log[-max(1, len(self.log) // 10) :]
        return fmean(row[metric] for row in last_rows)

    def total(self, metric):
        return sum(row[metric] for row in self.log)


# ---- runs and groups -----------------------------------------------------------------------------


def read_run(path):
    """The Run of a folder. Raises a one-line ValueError if it cannot be compared."""
    path = Path(path)
    with as_value_error(f"{path} is not a run: give folders that train.py made"):
        config = read_run_config(path)
    settings = asdict(config)
    log = read_metrics(path)
    evaluations = []
    frontier = []
    if has_results(path):
        evaluations = read_results(path, "eval")
        frontier = read_results(path, "frontier")
    trained = [row for row in evaluations if row["name"] == "trained"]
    if len(log) < settings["steps"] or not trained:
        raise ValueError(
            f"{path} is not finished ({len(log)} of {settings['steps']} steps): "
            f"{inputs.resume_command(path, config.task)}"
        )
    base_frontier = [row for row in frontier if row["name"] == "base"]
    trained_frontier = [row for row in frontier if row["name"] == "trained"]
    at_fixed_gammas = {row["level"]: row for row in trained_frontier if row["level"] != "learned"}
    points = {AS_TRAINED: trained[0]} | dict(sorted(at_fixed_gammas.items()))
    for key, rows in {"solved_each": points.values(), "denoiser_rows": log}.items():
        if not all(key in row for row in rows):
            raise ValueError(f"{path} is from an older train.py, without {key}: run it again")
    seed = settings.pop("seed")
    settings.pop("run_dir")
    return Run(path, seed, settings, inputs.read_inputs(path) or {}, log, base_frontier, points)


def check_frontier(run):
    """Raises ValueError if a run's base or trained model was not measured at every gamma."""
    for levels in ({row["level"] for row in run.base}, set(run.points)):
        if not set(GAMMAS) <= levels:
            raise ValueError(
                f"{run.path} was not measured at every gamma: make a new run with --frontier true"
            )


def differs(run, other, name):
    """Whether two runs differ in a setting or, if it names a file, in the file's content."""
    if name in KNOWN_BY_CONTENT and run.inputs and other.inputs:
        is_same = run.inputs[name] == other.inputs[name]
        if name == "task":
            names = [inputs.bare_names(one.settings["task"]) for one in (run, other)]
            is_same = is_same and names[0] == names[1]
        return not is_same
    return run.settings[name] != other.settings[name]


def group_runs(runs):
    """Lists of runs that differ only in their seed, sorted by it. Raises ValueError."""
    first = runs[0]
    groups = {}  # {settings: {seed: run}}
    for run in runs:
        for name in SHARED_SETTINGS:
            if differs(run, first, name):
                raise ValueError(
                    f"{run.path} has {name} = {run.settings[name]!r}, and {first.path} "
                    f"{first.settings[name]!r}: compare runs of one {name}"
                )
        telling = {
            name: value for name, value in run.settings.items() if name not in SHARED_SETTINGS
        }
        group = groups.setdefault(tuple(telling.values()), {})
        if run.seed in group:
            twin = group[run.seed]
            raise ValueError(f"{run.path} has settings and seed of {twin.path}: leave one out")
        group[run.seed] = run
        if len(groups) > len(STYLES):
            raise ValueError(
                f"{run.path} is of group {len(groups)}, but at most {len(STYLES)} fit: leave out "
                "groups"
            )
    return [[group[seed] for seed in sorted(group)] for group in groups.values()]


def labels_of(groups):
    """Each group's label: the name that its runs' folders share, without the seed.

    If a group's folders share no name, or two groups have the same one, the labels say what
    distinguishes their settings.
    """
    names = [shared_name(group) for group in groups]
    by_settings = labels_by_settings([group[0].settings for group in groups])
    return [
        name if name and names.count(name) == 1 else label
        for name, label in zip(names, by_settings, strict=True)
    ]


def shared_name(group):
    """The folders' name without "-SEED" at its end, if all of them share it; else ""."""
    names = {run.path.resolve().name.removesuffix(f"-{run.seed}") for run in group}
    return names.pop() if len(names) == 1 else ""


LIKELIHOOD_SETTINGS = ("num_stages", "importance_weight_cap")
FIRST_SETTINGS = (*LIKELIHOOD_SETTINGS, "train_target")  # first in a label


def labels_by_settings(groups):
    """What distinguishes settings (dicts, no two equal), in words.

    The likelihood and the weights come first, then the values that the fewest groups share: three
    parts, or as many as it takes.
    """
    ordered = dict.fromkeys([*FIRST_SETTINGS, *groups[0]])
    differing = [
        name
        for name in ordered
        if name not in SHARED_SETTINGS and any(group[name] != groups[0][name] for group in groups)
    ]
    all_parts = []
    for group in groups:
        sharing = {name: sum(other[name] == group[name] for other in groups) for name in differing}
        telling = [
            name
            for name in differing
            if name in LIKELIHOOD_SETTINGS or 2 * sharing[name] <= len(groups)
        ]
        telling = telling or differing
        telling.sort(key=lambda name: 0 if name in FIRST_SETTINGS else sharing[name])
        all_parts.append([setting_in_words(name, group) for name in telling] or ["all runs"])
    number = next(
        (n for n in range(3, 9) if len({tuple(parts[:n]) for parts in all_parts}) == len(groups)),
        9,
    )
    labels = []
    for parts in all_parts:
        label = ", ".join(parts[:number])
        if len(parts) > number:
            label += f" and {len(parts) - number} more"
        labels.append(label)
    return labels


def setting_in_words(name, settings):
    value = settings[name]
    if name == "num_stages":
        if value == 1:
            return "mean-field"
        # No completion takes more calls than it has tokens.
        is_exact = value >= settings["max_completion_length"]
        return f"{value} stages (exact)" if is_exact else f"{value} stages"
    if name == "importance_weight_cap":
        return f"C = {value:g}" if value else "no weights"
    if name == "train_target":
        return "policy and sampler" if value == "joint" else f"{value} only"
    return f"{name} {str(value).lower() if isinstance(value, bool) else value}"


def problem_clusters(run, task=""):
    """The cluster of each test problem, (n,), numbered from 0. Recomputed as the run did.

    task: the run's task as given on the command line, needed if it is in a file. Raises ValueError
    if the run's data has changed.
    """
    config = Config(**run.settings)
    if task:
        inputs.verify_task(run.path, task, config.task, run.inputs)
        config.task = task
    else:
        inputs.require_typed_task(run.path, config.task)
    inputs.verify_data(run.path, config.data, run.inputs)
    task = registry.load_task(
        config.task,
        compact=reads_compact_prompts(config.model),
        data=config.data,
        length=config.max_completion_length,
    )
    problems = task.problems(config.eval_split, config.eval_problems, 0)
    key_of = getattr(task, "key", task.prompt)
    keys = [key_of(problem) for problem in problems]
    first_places = torch.tensor([keys.index(key) for key in keys])
    return first_places.unique(return_inverse=True)[1]


# ---- intervals -----------------------------------------------------------------------------------


def areas(shares, nfe, largest):
    """metrics.area for many draws of the shares at once. (points, draws), points -> (draws,)"""
    order = sorted(range(len(nfe)), key=nfe.__getitem__)
    best = shares[order].cummax(dim=0).values
    if largest <= 1:
        return best[-1]
    edges = torch.tensor([nfe[i] for i in order] + [largest], dtype=torch.double)
    return edges.diff() @ best / (largest - 1)


def score_runs(runs, clusters, largest, draws=2000):
    """Fills in the runs' `scores` and `drawn_scores`. Raises ValueError if problems differ.

    clusters  (n,) long: the cluster of each test problem
    largest   the largest NFE of all runs, where areas end

    All runs are scored on the same bootstrap draws of clusters; their NFE is taken as fixed.
    """
    K = int(clusters.max()) + 1
    times_drawn = bootstrap_weights(K, draws).T  # (K, draws)
    cluster_sizes = torch.bincount(clusters).double()
    for run in runs:
        rows = list(run.points.values())
        for row in rows:
            if len(row["solved_each"]) != len(clusters) or row["clusters"] != K:
                raise ValueError(
                    f"{run.path} was asked other problems than the task has now: run it again"
                )
        solved = torch.tensor([[int(bit) for bit in row["solved_each"]] for row in rows]).double()
        hits = torch.zeros(len(rows), K).double().index_add_(1, clusters, solved)
        shares = hits @ times_drawn / (cluster_sizes @ times_drawn)  # (points, draws)
        run.drawn_scores = dict(zip(run.points, shares, strict=True))
        run.drawn_scores[AREA] = areas(shares, [row["nfe"] for row in rows], largest)
        run.scores = {point: row["solved"] for point, row in run.points.items()}
        run.scores[AREA] = area(rows, largest)


def differences(group, reference):
    """Group minus reference, paired by seed: a dict for the area and each point that both have."""
    pairs = [
        (run, other)
        for run in group
        for other in reference
        if run.seed == other.seed and run is not other
    ]
    if not pairs:
        return []
    [clusters] = {row["clusters"] for row in group[0].points.values()}
    rows = []
    for point in group[0].scores:
        if point not in reference[0].scores:
            continue
        drawn = torch.stack(
            [run.drawn_scores[point] - other.drawn_scores[point] for run, other in pairs]
        )
        solved = spread(
            [run.scores[point] - other.scores[point] for run, other in pairs],
            problem_half_width(drawn.mean(dim=0), clusters),
        )
        nfe = None
        if point != AREA:
            nfe = spread(
                [run.points[point]["nfe"] - other.points[point]["nfe"] for run, other in pairs]
            )
        verdict = "undecided"
        if abs(solved["mean"]) > solved["half"]:
            verdict = "above" if solved["mean"] > 0 else "below"
        rows.append(
            {
                "point": point,
                "seeds": [run.seed for run, _ in pairs],
                "mean": solved["mean"],
                "half": solved["half"],
                "verdict": verdict,
                "nfe": nfe,
            }
        )
    return rows


@dataclass
class Column:
    """A figure of a run, and its column in the table."""

    title: str
    value: Callable  # Run -> float
    scale: float
    digits: int


COLUMNS = {
    "solved": Column("solved, %", lambda run: run.scores[AS_TRAINED], scale=100, digits=1),
    "nfe": Column("NFE", lambda run: run.points[AS_TRAINED]["nfe"], scale=1, digits=2),
    "area": Column("area, %", lambda run: run.scores[AREA], scale=100, digits=1),
    "sampled": Column(
        "sampled, %", lambda run: run.mean_of_last_steps("solved_mean"), scale=100, digits=1
    ),
    "speed_reward": Column(
        "reward", lambda run: run.mean_of_last_steps("speed_reward_mean"), scale=1, digits=3
    ),
    "calls": Column(
        "rows, k",
        lambda run: sum(row["denoiser_rows"] for row in run.log) / 1000,
        scale=1,
        digits=0,
    ),
}


def summarise_group(label, group, reference, gammas):
    """What is reported about a group, a dict for JSON: each figure as a spread over its runs."""
    summary = {
        "label": label,
        "runs": [str(run.path) for run in group],
        "seeds": [run.seed for run in group],
        "settings": group[0].settings,
    }
    for name, column in COLUMNS.items():
        summary[name] = spread([column.value(run) for run in group])
    summary["frontier"] = [
        {
            "level": gamma,
            "nfe": spread([run.points[gamma]["nfe"] for run in group]),
            "solved": spread([run.points[gamma]["solved"] for run in group]),
        }
        for gamma in gammas
    ]
    summary["differences"] = differences(group, reference)
    return summary


# ---- the tables ----------------------------------------------------------------------------------


def in_words(estimate, scale=100, digits=1, sign=""):
    """A spread as text: the mean and, if known, ± the half-width."""
    mean = f"{scale * estimate['mean']:{sign}.{digits}f}"
    if estimate["half"] is None:
        return mean
    return f"{mean} ± {scale * estimate['half']:.{digits}f}"


def print_report(report):
    """Prints both tables, with explanations of their figures."""
    print(fill(f"{report['task']}, {report['eval_split']}: {report['conditions']}", WIDTH) + "\n")
    print_columns(group_table(report))
    print(
        fill(
            "n: number of seeds; ±: half of the 95% interval over them (none for one seed). area: "
            f"mean solved share over budgets of 1 to {report['largest_nfe']:.2f} calls. sampled, "
            "reward (with the NFE penalty): over the last tenth of training. rows: denoiser rows "
            "run in training, thousands. The base is the first run's.",
            WIDTH,
        )
        + "\n"
    )
    if len(report["groups"]) > 1:
        print_columns(difference_table(report["groups"]))
        print(
            fill(
                "points: of solved share or area, ± over seeds and clusters of problems (for a "
                "single pair over problems alone, valid for these two runs only). NFE: ± over "
                "seeds.",
                WIDTH,
            )
            + "\n"
        )


def group_table(report):
    """The figures of the base and of each group: lists of strings."""
    base = report["base"]
    best = max(base["frontier"], key=lambda row: (row["solved"], -row["nfe"]))
    table = [["", "n", *(column.title for column in COLUMNS.values())]]
    table.append(
        [
            f"base at its best γ, {best['level']:g}",
            "",
            f"{100 * best['solved']:.1f}",
            f"{best['nfe']:.2f}",
            f"{100 * base['area']:.1f}",
            "",
            "",
            "",
        ]
    )
    for group in report["groups"]:
        figures = [
            in_words(group[name], scale=column.scale, digits=column.digits)
            for name, column in COLUMNS.items()
        ]
        table.append([group["label"], str(len(group["seeds"])), *figures])
    return table


def difference_table(groups):
    """By how much each later group differs from the first: lists of strings."""
    first, *others = groups
    table = [[f"minus {first['label']}", "pairs", "at", "points", "", "NFE"]]
    for group in others:
        if not group["differences"]:
            table.append([group["label"], "0", "", "", "no seed in common", ""])
        for row in group["differences"]:
            point = row["point"]
            table.append(
                [
                    group["label"] if point == AS_TRAINED else "",
                    str(len(row["seeds"])),
                    point if isinstance(point, str) else f"γ {point:g}",
                    in_words(row, sign="+"),
                    row["verdict"],
                    in_words(row["nfe"], scale=1, digits=2, sign="+") if row["nfe"] else "",
                ]
            )
    return table


# ---- the program ---------------------------------------------------------------------------------


def compare(paths, out, title="", task=""):
    """Prints the tables; writes compare.json and compare.png into a folder. Raises ValueError.

    task: the runs' task, if it is in a file.
    """
    runs = [read_run(path) for path in paths]
    for run in runs:
        check_frontier(run)
    groups = group_runs(runs)
    first = runs[0]
    all_rows = [row for run in runs for row in [*run.base, *run.points.values()]]
    largest = max(row["nfe"] for row in all_rows)
    score_runs(runs, problem_clusters(first, task), largest)
    gammas = sorted(set.intersection(*(set(run.points) - {AS_TRAINED} for run in runs)))
    report = {name: first.settings[name] for name in SHARED_SETTINGS}
    report["conditions"] = conditions(all_rows)
    report["gammas"] = gammas
    report["largest_nfe"] = largest
    report["base"] = {
        "area": area(first.base, largest),
        "frontier": [
            {"level": row["level"], "solved": row["solved"], "nfe": row["nfe"]}
            for row in first.base
        ],
    }
    report["groups"] = [
        summarise_group(label, group, reference=groups[0], gammas=gammas)
        for label, group in zip(labels_of(groups), groups, strict=True)
    ]
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    files.write_json(folder / "compare.json", report)
    task_name = inputs.bare_name(report["task"])
    plot_comparison(report, groups, title or task_name, folder / "compare.png")
    print_report(report)
    print("written:", folder / "compare.json", folder / "compare.png")


def main(arguments=None):
    """The program. Returns its exit status: 0, 2 (bad input), 130 (Ctrl-C)."""
    options = parse_flags(arguments)
    return exit_status(
        "experiments.compare",
        lambda: compare(options.paths, options.out, options.title, options.task),
    )


if __name__ == "__main__":
    sys.exit(main())
