"""The plot of compare.py: learning curves and frontiers of groups of runs.

It is legible without colour: groups also differ in line style and marker.
"""

from itertools import accumulate
from statistics import fmean
from textwrap import fill

import numpy
from matplotlib import rc_context
from matplotlib.figure import Figure

from evaluation import plots
from experiments.intervals import spread


def line_style(color, linestyle, marker, fill):
    """The style of a group's line and points. fill None: points have the line's colour."""
    return {
        "color": color,
        "linestyle": linestyle,
        "marker": marker,
        "mfc": fill or color,
        "mec": "black",
        "mew": 0.8,
        "markersize": 8,
        "linewidth": 2,
    }


STYLES = [  # one for each group; they differ without colour too
    line_style("#1b4f8a", "-", "o", None),
    line_style("#d1662b", "--", "s", "white"),
    line_style("#3c8d5a", ":", "D", None),
    line_style("#8a5a9e", "-.", "^", "white"),
    line_style("#b5384a", (0, (8, 2)), "v", None),
    line_style("#2a8c94", (0, (1, 3)), "P", "white"),
    line_style("#7a6a2e", (0, (5, 1, 1, 1, 1, 1)), "X", None),
    line_style("#444444", (0, (10, 2, 2, 2)), "<", "white"),
]
FONT = {"font.size": 13, "axes.titlesize": 13, "legend.fontsize": 13}


def plot_comparison(report, groups, title, path):
    """compare.png: learning by steps and by denoiser rows, the surrogate's error, frontiers."""
    with rc_context(FONT):
        figure = Figure((12, 9), layout="constrained")
        # Above the panels stand the title, and the legend in two columns.
        legend_top = 0.96
        legend_rows = (len(groups) + 2) // 2
        figure.get_layout_engine().set(rect=(0, 0, 1, legend_top - 0.031 * legend_rows - 0.01))
        by_step, by_calls, kl, frontier = figure.subplots(2, 2).flat
        for i, (group, summary) in enumerate(zip(groups, report["groups"], strict=True)):
            draw_learning(by_step, by_calls, kl, i, group)
            draw_points(frontier, i, summary["frontier"])
            if has_learned_threshold(group):
                draw_star(frontier, i, summary)
        base = sorted(report["base"]["frontier"], key=lambda row: (row["nfe"], row["solved"]))
        [base_line] = frontier.plot(
            [row["nfe"] for row in base],
            [row["solved"] for row in base],
            color="0.6",
            linewidth=2,
            marker=".",
            markersize=8,
        )
        by_step.set(xlabel="step", ylabel="solved in training (sampled)")
        by_calls.set(
            xlabel="denoiser rows so far, thousands", ylabel="solved in training (sampled)"
        )
        kl.set(xlabel="step", ylabel="KL(true ‖ surrogate), nats")
        frontier.set(
            xlabel="NFE: denoiser calls per completion", ylabel="solved, held out (greedy)"
        )
        for axis in figure.axes:
            axis.set(xlim=(0, None), ylim=(0, None))
            axis.grid(alpha=0.3)
        for axis in (by_step, by_calls, frontier):  # shares
            axis.set_ylim(0, min(1.02, axis.get_ylim()[1]))
            axis.yaxis.set_major_formatter("{x:.0%}")
        figure.suptitle(
            title,
            x=0.01,
            y=0.985,
            ha="left",
            fontweight="bold",
            fontsize=17,
            in_layout=False,
            parse_math=False,
        )
        lines = [*by_step.lines, base_line]
        legend = figure.legend(
            lines,
            ["-"] * len(lines),
            loc="upper left",
            bbox_to_anchor=(0, legend_top),
            ncols=2,
            handlelength=5,
            frameon=False,
        )
        plots.set_labels(legend, [group["label"] for group in report["groups"]] + ["base"])
        legend.set_in_layout(False)
        figure.supxlabel(fill(footnote(report, groups), 135), fontsize=10, color="0.3")
        plots.save(figure, path)


def has_learned_threshold(group):
    return group[0].settings["train_target"] != "policy"


def footnote(report, groups):
    """What the plot's marks mean, and what its groups share."""
    seeds = [
        f"n = {len(group)} (seed {', '.join(str(run.seed) for run in group)})" for group in groups
    ]
    if len(set(seeds)) > 1:
        seeds = ["In the legend's order: " + "; ".join(seeds)]
    gammas = ", ".join(str(gamma) for gamma in report["gammas"])
    star = ""
    if any(has_learned_threshold(group) for group in groups):
        star = "; star: the learned γ"
    return (
        f"{seeds[0]}. Curves: running means over a twentieth of the steps, then means over seeds. "
        "Bands and bars: 95% t intervals of that mean at each point, none if n = 1. "
        f"Below right: γ fixed at {gammas} nats{star}. {report['conditions']}."
    )


def draw_learning(by_step, by_calls, kl, i, group):
    """Group i's curves in the first three panels."""
    solved = [running_mean(run.log, "solved_mean") for run in group]
    surrogate_kl = [running_mean(run.log, "surrogate_kl") for run in group]
    steps = range(1, len(group[0].log) + 1)
    calls = [
        [number / 1000 for number in accumulate(row["denoiser_rows"] for row in run.log)]
        for run in group
    ]
    shared_calls = numpy.linspace(
        max(curve[0] for curve in calls), min(curve[-1] for curve in calls), len(steps)
    )
    solved_by_calls = [
        numpy.interp(shared_calls, run_calls, run_solved)
        for run_calls, run_solved in zip(calls, solved, strict=True)
    ]
    draw_curve(by_step, i, steps, solved)
    draw_curve(by_calls, i, shared_calls, solved_by_calls)
    if all(surrogate_kl):  # it is unknown if only the sampler learns
        draw_curve(kl, i, steps, surrogate_kl)


def running_mean(log, metric):
    """A metric's mean over a twentieth of the steps, at each step; [] if it has no values."""
    values = [row[metric] for row in log if row[metric] is not None]
    width = max(1, len(log) // 20)
    return [fmean(values[max(0, t - width) : t]) for t in range(1, len(values) + 1)]


def draw_curve(axis, i, x, curves):
    """The mean of group i's curves, one for each run, with a band for its interval."""
    spreads = [spread(values) for values in zip(*curves, strict=True)]
    mean = [at["mean"] for at in spreads]
    half = [at["half"] or 0 for at in spreads]
    # So that no group's markers hide another's.
    first_marker = i * len(mean) // 64
    marker_distance = max(1, len(mean) // 8)
    axis.plot(
        x,
        mean,
        markevery=(first_marker, marker_distance),
        clip_on=False,
        **STYLES[i],
    )
    axis.fill_between(
        x,
        [m - h for m, h in zip(mean, half, strict=True)],
        [m + h for m, h in zip(mean, half, strict=True)],
        color=STYLES[i]["color"],
        alpha=0.12,
        linewidth=0,
    )


def draw_points(axis, i, points, zorder=3):
    """Group i's solved share against NFE: means over its runs, with bars for their intervals."""
    axis.errorbar(
        [point["nfe"]["mean"] for point in points],
        [point["solved"]["mean"] for point in points],
        xerr=[point["nfe"]["half"] or 0 for point in points],
        yerr=[point["solved"]["half"] or 0 for point in points],
        elinewidth=1,
        zorder=zorder,
        **STYLES[i],
    )


def draw_star(axis, i, summary):
    """The learned gamma's point: a star with the group's marker inside."""
    axis.plot(
        summary["nfe"]["mean"],
        summary["solved"]["mean"],
        "*",
        markersize=24,
        mfc="white",
        mec="black",
        zorder=4,
    )
    draw_points(axis, i, [summary], zorder=5)
