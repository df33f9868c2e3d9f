"""Runs against runs: grouped by their settings, with intervals over seeds and test problems.

    python -m experiments.claims compare runs/A-0 runs/A-1 runs/B-0 runs/B-1

Runs that differ in nothing but the seed are a group. Differences are from the first group. They
are paired: runs of one seed trained on the same prompts, and all were asked the same test problems.
The 95% interval of n pairs reaches sqrt(t² s² / n + 1.96² v) to both sides:
    s²  the variance of their differences, for other seeds; t is Student's, of n - 1 degrees
    v   the variance of the mean difference when clusters of problems are drawn anew
It is a little wide: what single runs do on single problems is in both. One pair has no s². Its
interval is of problems alone, and holds for these two runs only.
"""

from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from statistics import fmean, variance
from textwrap import fill

import numpy
import torch
from matplotlib.figure import Figure

from config import Config
from evaluation import plots
from evaluation.metrics import area, bootstrap_weights
from evaluation.summary import GAMMAS
from evaluation.tables import WIDTH, print_columns
from models import loading
from models.checkpoints import read_json, reads_compact_prompts
from tasks import registry
from training import files

SAME = ("task", "model", "data", "eval_split", "eval_problems")  # else the problems would differ
FIRST = ("num_stages", "importance_weight_cap", "train_target")  # of a label
TRAINED, AREA = "as trained", "area"
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)  # of 1 to 10 degrees


@dataclass
class Run:
    path: Path
    seed: int
    settings: dict  # all but seed and run_dir
    log: list  # the rows of metrics.jsonl
    last: list  # the last tenth of them
    base: list  # rows of `evaluate`, one for each gamma
    points: dict  # the trained model's row: TRAINED, and at each gamma in nats
    scores: dict = field(default_factory=dict)  # solved share at each point, and AREA; in [0, 1]
    drawn: dict = field(default_factory=dict)  # the same for each draw of problems, (draws,)


def read_run(path):
    """A finished run of a folder. Raises ValueError, one line, for what cannot be compared."""
    path, rows = Path(path), {}
    with loading.one_line(f"{path} is no run: give folders that train.py made"):
        settings = asdict(Config(**read_json(path / "config.json")))
    log, steps = files.read_log(path / "metrics.jsonl"), settings["steps"]
    for file in (path / "eval.json", path / "frontier.json"):
        for row in read_json(file) if file.exists() else []:
            rows.setdefault((file.stem, row["name"]), []).append(row)
    if len(log) < steps or ("eval", "trained") not in rows:
        done = f"{path} is not finished ({len(log)} of {steps} steps)"
        raise ValueError(f"{done}: python train.py --resume --run_dir {path}")
    base, trained = (rows.get(("frontier", name), []) for name in ("base", "trained"))
    if any(not {*GAMMAS} <= {row["level"] for row in half} for half in (base, trained)):
        raise ValueError(f"{path} was not measured at all gammas: run it with --frontier true")
    fixed = {row["level"]: row for row in trained if row["level"] != "learned"}
    points = {TRAINED: rows["eval", "trained"][0]} | dict(sorted(fixed.items()))
    needs = {"solved_each": points.values(), "denoiser_rows": log}
    if lacks := [key for key, found in needs.items() if not all(key in row for row in found)]:
        raise ValueError(f"{path} is of an older train.py, without {lacks[0]}: run it anew")
    seed, _ = settings.pop("seed"), settings.pop("run_dir")
    return Run(path, seed, settings, log, log[-max(1, steps // 10) :], base, points)


def grouped(found):
    """Lists of runs that differ in their seed alone, by seed. Raises ValueError."""
    groups, first = {}, found[0]
    for run in found:
        for name in SAME:
            if (one := run.settings[name]) != (other := first.settings[name]):
                has = f"{run.path} has {name} = {one!r}, and {first.path} {other!r}"
                raise ValueError(f"{has}: compare runs of one {name}")
        group = groups.setdefault(tuple(run.settings.values()), {})
        twin = group.setdefault(run.seed, run)
        if twin is not run:
            raise ValueError(f"{run.path} has settings and seed of {twin.path}: leave one out")
        if len(groups) > len(STYLES):
            raise ValueError(f"{run.path} begins group {len(groups)}: {len(STYLES)} are the most")
    return [[group[seed] for seed in sorted(group)] for group in groups.values()]


def spoken(name, settings):
    """A setting in words."""
    value = settings[name]
    if name == "num_stages":
        exact = (
            " (exact)" if value >= settings["max_completion_length"] else ""
        )  # no completion takes more calls
        return "mean-field" if value == 1 else f"{value} stages{exact}"
    if name == "importance_weight_cap":
        return f"C = {value:g}" if value else "no weights"
    if name == "train_target":
        return "policy and sampler" if value == "joint" else f"{value} only"
    return f"{name} {str(value).lower() if isinstance(value, bool) else value}"


def labels_of(groups):
    """What tells groups (their settings, no two the same) apart: likelihood and weights, then what
    most do not share, the rarest first; three parts, or as many as it takes.
    """
    parts, names = [], dict.fromkeys([*FIRST, *groups[0]])
    names = [name for name in names if any(group[name] != groups[0][name] for group in groups)]
    for group in groups:
        like = {name: sum(other[name] == group[name] for other in groups) for name in names}
        told = [name for name in names if name in FIRST[:2] or 2 * like[name] <= len(groups)]
        told = sorted(told or names, key=lambda name: 0 if name in FIRST else like[name])
        parts.append([spoken(name, group) for name in told] or ["all runs"])
    most = next((m for m in range(3, 9) if len({tuple(x[:m]) for x in parts}) == len(parts)), 9)
    rest = [f" and {len(told) - most} more" if len(told) > most else "" for told in parts]
    return [", ".join(told[:most]) + more for told, more in zip(parts, rest, strict=True)]


def clusters_of(run):
    """The cluster of each test problem, from 0 on: (n,). Made again as run_folder.prepare did."""
    made = Config(**run.settings)
    task = registry.load_task(
        made.task, reads_compact_prompts(made.model), made.data, made.max_completion_length
    )
    problems = task.problems(made.eval_split, made.eval_problems, 0)
    keys = [getattr(task, "key", task.prompt)(problem) for problem in problems]
    return torch.tensor([keys.index(key) for key in keys]).unique(return_inverse=True)[1]


# ---- intervals -----------------------------------------------------------------------------------


def spread(values, v=None):
    """The mean of some values and its 95% half-width, None if nothing is known of it. v: what the
    choice of problems adds to the mean's variance; None for no such part.
    """
    df, square = len(values) - 1, None if v is None else 1.96**2 * v
    if df:
        t = T95[df - 1] if df <= len(T95) else 1.96 + 2.37 / df + 2.8 / df**2  # good to 0.2%
        square = t**2 * variance(values) / len(values) + (square or 0.0)
    return {"mean": fmean(values), "half": None if square is None else square**0.5}


def areas(shares, nfe, largest):
    """scores.area for many draws of the shares at once. (points, draws), (points) -> (draws,)"""
    order = sorted(range(len(nfe)), key=nfe.__getitem__)
    best = shares[order].cummax(dim=0).values
    if largest <= 1:
        return best[-1]
    edges = torch.tensor([nfe[i] for i in order] + [largest], dtype=torch.double)
    return edges.diff() @ best / (largest - 1)


def score(found, clusters, largest, draws=2000):
    """Fills `scores` and `drawn` of all runs, by the same draws; NFE stays as it is. ValueError."""
    k = int(clusters.max()) + 1
    times = bootstrap_weights(k, draws).T  # (k, draws)
    sizes = torch.bincount(clusters).double()
    for run in found:
        rows = run.points.values()
        if {(len(row["solved_each"]), row["clusters"]) for row in rows} != {(len(clusters), k)}:
            raise ValueError(f"{run.path} was asked other problems than are made now: run it anew")
        solved = torch.tensor([[int(bit) for bit in row["solved_each"]] for row in rows]).double()
        hits = torch.zeros(len(rows), k).double().index_add_(1, clusters, solved)
        shares = hits @ times / (sizes @ times)  # (points, draws)
        run.drawn = dict(zip(run.points, shares, strict=True))
        run.drawn[AREA] = areas(shares, [row["nfe"] for row in rows], largest)
        run.scores = {at: row["solved"] for at, row in run.points.items()}
        run.scores[AREA] = area(rows, largest)


def differences(group, reference):
    """Group minus reference: a dict for each point that both have, and for the area."""
    pairs = [(a, b) for a in group for b in reference if a.seed == b.seed and a is not b]
    for at in [at for at in group[0].scores if at in reference[0].scores] if pairs else []:
        v = torch.stack([a.drawn[at] - b.drawn[at] for a, b in pairs]).mean(dim=0).var().item()
        found = spread([a.scores[at] - b.scores[at] for a, b in pairs], v)
        said = "above" if found["mean"] > 0 else "below"
        said = said if abs(found["mean"]) > found["half"] else "undecided"
        nfe = [a.points[at]["nfe"] - b.points[at]["nfe"] for a, b in pairs if at != AREA]
        found |= {"said": said, "nfe": spread(nfe) if nfe else None}
        yield {"at": at, "seeds": [a.seed for a, _ in pairs]} | found


FIGURES = {  # of a run; the title, scale and digits of their column
    "solved": (lambda run: run.scores[TRAINED], "solved, %", 100, 1),
    "nfe": (lambda run: run.points[TRAINED]["nfe"], "NFE", 1, 2),
    "area": (lambda run: run.scores[AREA], "area, %", 100, 1),
    "sampled": (lambda run: fmean(x["solved_mean"] for x in run.last), "sampled, %", 100, 1),
    "speed_reward": (lambda run: fmean(x["speed_reward_mean"] for x in run.last), "reward", 1, 3),
    "calls": (lambda run: sum(x["denoiser_rows"] for x in run.log) / 1000, "calls, k", 1, 0),
}


def summary(label, group, reference, gammas):
    """What is told of a group: each figure a spread over its runs, and what differs."""
    said = {"label": label, "seeds": [run.seed for run in group], "settings": group[0].settings}
    said |= {name: spread([of(run) for run in group]) for name, (of, *_) in FIGURES.items()}
    said |= {"runs": [str(run.path) for run in group], "frontier": []}
    for at in gammas:
        point = {x: spread([run.points[at][x] for run in group]) for x in ("nfe", "solved")}
        said["frontier"].append({"level": at} | point)
    return said | {"differences": list(differences(group, reference))}


# ---- the picture ---------------------------------------------------------------------------------

MORE = (("#b5384a", (0, (8, 2))), ("#2a8c94", (0, (1, 3))), ("#7a6a2e", (0, (5, 1, 1, 1, 1, 1))))
LINES = (*plots.LINES, *MORE, ("#444444", (0, (10, 2, 2, 2))))
STYLES = [  # of each group: told apart without colour too
    dict(color=color, linestyle=line, marker=marker, mfc=fill, mec="black", mew=0.8, markersize=6)
    for (color, line), marker, fill in zip(LINES, "osD^vPX<", (None, "white") * 4, strict=True)
]


def draw_curves(axes, i, group, label):
    """Group i in the first three panels: means over its runs, and a band for their intervals."""

    def smooth(run, key):  # over a twentieth of the steps, as in curves.png; [] without values
        values, w = [x[key] for x in run.log if x[key] is not None], max(1, len(run.log) // 20)
        return [fmean(values[max(0, t - w) : t]) for t in range(1, len(values) + 1)]

    solved, kl = ([smooth(run, key) for run in group] for key in ("solved_mean", "surrogate_kl"))
    calls = [[x / 1000 for x in accumulate(x["denoiser_rows"] for x in r.log)] for r in group]
    grid = numpy.linspace(max(x[0] for x in calls), min(x[-1] for x in calls), len(calls[0]))
    by_calls = [numpy.interp(grid, *pair) for pair in zip(calls, solved, strict=True)]
    steps = range(1, len(calls[0]) + 1)
    for axis, x, curves in zip(axes, (steps, grid, steps), (solved, by_calls, kl), strict=False):
        y = [spread(values) for values in zip(*curves, strict=True)]
        apart = (i * len(y) // 64, max(1, len(y) // 8))  # no group's markers hide another's
        if y:  # no KL is known where the sampler alone learns
            how = dict(label=label, markevery=apart, clip_on=False) | STYLES[i]
            axis.plot(x, [at["mean"] for at in y], **how)
            edges = ([at["mean"] + sign * (at["half"] or 0) for at in y] for sign in (-1, 1))
            axis.fill_between(x, *edges, color=STYLES[i]["color"], alpha=0.12, linewidth=0)


def draw_frontier(axis, i, points, star=False):
    """Group i's points, means over its runs; a star has the group's marker inside."""
    x, y = ([point[key] for point in points] for key in ("nfe", "solved"))
    xy = [[found["mean"] for found in values] for values in (x, y)]
    xerr, yerr = ([found["half"] or 0 for found in values] for values in (x, y))
    if star:
        axis.plot(*xy, "*", markersize=18, mfc="white", mec="black", zorder=4)
    axis.errorbar(*xy, yerr, xerr, elinewidth=1, zorder=5 if star else 3, **STYLES[i])


def plot(report, groups, path):
    """compare.png: learning by steps and by denoiser calls, the surrogate's error, frontiers."""
    figure = Figure((12, 9), layout="constrained")
    axes = [*figure.subplots(2, 2).flat]
    for i, (group, said) in enumerate(zip(groups, report["groups"], strict=True)):
        draw_curves(axes, i, group, said["label"])
        draw_frontier(axes[3], i, said["frontier"])
        if group[0].settings["train_target"] != "policy":
            draw_frontier(axes[3], i, [said], star=True)
    base = sorted((row["nfe"], row["solved"]) for row in report["base"]["frontier"])
    axes[3].plot(*zip(*base, strict=True), color="0.6", marker=".", label="base")
    for axis, x, y in (
        (axes[0], "step", "solved in training (sampled)"),
        (axes[1], "denoiser calls so far, thousands of rows", "solved, as on the left"),
        (axes[2], "step", "KL(true ‖ surrogate), nats a token"),
        (axes[3], "NFE: denoiser calls a completion", "solved, held-out problems (greedy)"),
    ):
        axis.set(xlabel=x, ylabel=y, xlim=(0, None), ylim=(0, None))
        axis.grid(alpha=0.3)
        if axis is not axes[2]:  # shares
            axis.set_ylim(0, min(1.02, axis.get_ylim()[1]))
            axis.yaxis.set_major_formatter("{x:.0%}")
    pairs = zip(*(axis.get_legend_handles_labels() for axis in axes[::3]), strict=True)
    figure.legend(*(a + b for a, b in pairs), loc="outside upper right", ncols=2, handlelength=5)
    figure.suptitle(report["task"].rpartition(":")[2], x=0.01, ha="left", fontweight="bold")
    n = [f"n = {len(x)} (seed {str([run.seed for run in x])[1:-1]})" for x in groups]
    n = n[0] if len({*n}) == 1 else "In the legend's order: " + "; ".join(n)
    said = f"{n}. Curves: running means over a twentieth of the steps, then the mean over seeds. "
    said += "Bands and bars: 95% t intervals of that mean at each point, none where n = 1. Below "
    said += f"right: γ fixed at {str(report['gammas'])[1:-1]} nats; star: the learned γ."
    figure.supxlabel(fill(f"{said} {report['conditions']}.", 170), fontsize=8, color="0.3")
    plots.save(figure, path)


# ---- what is told --------------------------------------------------------------------------------


def compare(paths, out):
    """Prints the tables; writes compare.json and compare.png into the folder `out`. ValueError."""
    found = [read_run(path) for path in paths]
    groups, first = grouped(found), found[0]
    rows = [row for run in found for row in [*run.base, *run.points.values()]]
    largest = max(row["nfe"] for row in rows)
    score(found, clusters_of(first), largest)
    gammas = sorted(set.intersection(*({*run.points} - {TRAINED} for run in found)))
    report = {name: first.settings[name] for name in SAME}
    report |= {"conditions": plots.conditions(rows), "gammas": gammas, "largest_nfe": largest}
    frontier = [{key: row[key] for key in ("level", "solved", "nfe")} for row in first.base]
    report["base"] = {"area": area(first.base, largest), "frontier": frontier}
    labels = zip(labels_of([group[0].settings for group in groups]), groups, strict=True)
    report["groups"] = [summary(*pair, groups[0], gammas) for pair in labels]
    (out := Path(out)).mkdir(parents=True, exist_ok=True)
    files.write_json(out / "compare.json", report)
    plot(report, groups, out / "compare.png")
    tell(report)
    print("written:", out / "compare.json", out / "compare.png")


def shown(found, scale=100, digits=1, sign=""):
    """A spread in print: the mean, and ± the half-width where there is one."""
    half = "" if found["half"] is None else f" ± {scale * found['half']:.{digits}f}"
    return f"{scale * found['mean']:{sign}.{digits}f}{half}"


def tell(report):
    """Prints both tables, and what their figures are."""
    base, (first, *others) = report["base"], report["groups"]
    best = max(base["frontier"], key=lambda row: (row["solved"], -row["nfe"]))
    print(fill(f"{report['task']}, {report['eval_split']}: {report['conditions']}", WIDTH) + "\n")
    table = [["", "n", *(title for _, title, *_ in FIGURES.values())]]
    scores = f"{100 * best['solved']:.1f}", f"{best['nfe']:.2f}", f"{100 * base['area']:.1f}"
    table.append([f"base at its best γ, {best['level']:g}", "", *scores, "", "", ""])
    for said in report["groups"]:
        figures = [shown(said[name], *how) for name, (_, _, *how) in FIGURES.items()]
        table.append([said["label"], str(len(said["seeds"])), *figures])
    print_columns(table)
    said = "n: seeds; ± half of the 95% interval over them, none for one. area: mean solved share"
    said += f" over budgets of 1 to {report['largest_nfe']:.2f} calls. sampled, reward (with speed)"
    said += ": the last tenth of training. calls: rows through the denoiser in training, thousands."
    print(fill(f"{said} The base is the first run's.", WIDTH) + "\n")
    table = [[f"less {first['label']}", "pairs", "at", "points", "", "NFE"]]
    for said in others:
        if not said["differences"]:
            table.append([said["label"], "0", "", "", "no seed in common", ""])
        for row in said["differences"]:
            at = row["at"] if isinstance(row["at"], str) else f"γ {row['at']:g}"
            nfe = shown(row["nfe"], 1, 2, "+") if row["nfe"] else ""
            figures = at, shown(row, sign="+"), row["said"], nfe
            name = said["label"] if row["at"] == TRAINED else ""
            table.append([name, str(len(row["seeds"])), *figures])
    if others:
        print_columns(table)
        said = "points: of solved share or area, ± over seeds and clusters of problems; of one pair"
        said += " over problems alone, for these two runs only. NFE: ± over seeds."
        print(fill(said, WIDTH) + "\n")
