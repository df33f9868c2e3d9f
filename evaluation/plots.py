"""Plots of a run, of accuracy against NFE, and of the two stages of a completion.

All are legible without colour: lines differ in style, and points in shape. Names of runs, tasks and
tokens are drawn literally: matplotlib would read a $ as the start of a formula.
"""

import warnings
from contextlib import contextmanager
from textwrap import fill

from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import MaxNLocator

from evaluation.tables import conditions, curves_of, shorten, shorten_name

LINES = (  # colour and style
    ("#1b4f8a", "-"),
    ("#d1662b", "--"),
    ("#3c8d5a", ":"),
    ("#8a5a9e", "-."),
)
INK = {"mec": "black", "linestyle": "none", "zorder": 5, "clip_on": False}  # for single marks
MARKS = {  # for the rows of eval.json, by name; other rows get a diamond
    "base": {"marker": "s", "mfc": "white"},
    "trained": {"marker": "*", "mfc": "black", "markersize": 15},
}


@contextmanager
def no_missing_glyphs():
    """Suppresses warnings about glyphs that the font lacks, which are drawn as boxes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        yield


def save(figure, path):
    with no_missing_glyphs():
        figure.savefig(path, dpi=110, format="png")


def set_labels(legend, labels):
    """Set a legend's labels literally: a $ starts no formula, and a leading _ hides no entry."""
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set_parse_math(False)
        text.set_text(label)


# ---- a run ---------------------------------------------------------------------------------------

PANELS = {  # {metric in metrics.jsonl: (the panel's title, the quantity's name in eval.json)}
    "reward_mean": ("reward (sampled, training)", None),
    "solved_mean": ("solved", "solved"),
    "nfe_mean": ("NFE per completion", "nfe"),
    "threshold_mean": ("threshold γ, nats", "threshold_mean"),
    "surrogate_kl": ("KL(true ‖ surrogate), nats", None),
    "grad_norm": ("gradient norm, unclipped", None),
}


def plot_curves(rows, measured, title, path):
    """curves.png: six metrics of a run, step by step and as a running mean.

    rows      the rows of metrics.jsonl
    measured  the rows of eval.json, possibly none: marks at the first and last step
    title     e.g. the run's name
    path      where to write the plot
    """
    figure = Figure((12, 6.8), layout="constrained")
    last_step = rows[-1]["step"]
    window = max(1, len(rows) // 20)
    for axis, key in zip(figure.subplots(2, 3).flat, PANELS, strict=True):
        label, key_measured = PANELS[key]
        steps = [row["step"] for row in rows if row[key] is not None]
        values = [row[key] for row in rows if row[key] is not None]
        means = []
        for i in range(1, len(values) + 1):
            recent = values[max(0, i - window) : i]
            means.append(sum(recent) / len(recent))
        axis.plot(steps, values, color="0.7", linewidth=1, marker=".", markersize=4)
        axis.plot(
            steps,
            means,
            color=LINES[0][0],
            linewidth=2,
            marker="o" if len(steps) == 1 else None,  # a line of one point is invisible
        )
        for row in measured if key_measured else []:
            step = 0 if row["name"] == "base" else last_step
            mark = MARKS.get(row["name"], {"marker": "D", "mfc": "white"})
            axis.plot(step, row[key_measured], **INK, **mark)
        axis.update_datalim([(0, 0)])  # so that a constant has room above it
        axis.autoscale_view()
        axis.set(title=label, xlabel="step", ylim=(0, None), xlim=(0, 1.03 * last_step))
        axis.xaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10], integer=True))
        axis.grid(alpha=0.3)

    explanation = f"Grey: each step. Blue: the mean of {window} steps."
    if window == 1:
        explanation = "Each step."
    if measured:
        explanation += " Marks: greedy, on held-out problems, before and after training."
        marks = figure.axes[1].lines[2:]  # of "solved"; its first two lines are the curves
        legend = figure.legend(
            marks,
            ["-"] * len(marks),
            loc="outside lower center",
            ncols=len(marks),
            fontsize=11,
        )
        set_labels(legend, [row["name"] for row in measured])
    figure.suptitle(
        f"{shorten(title, 100)}\n{explanation}", x=0.01, ha="left", size=11, parse_math=False
    )
    save(figure, path)


# ---- accuracy against NFE ------------------------------------------------------------------------

RULES = {
    "learned": "learned γ",
    "eb": "entropy-bounded (γ)",
    "top_k": "top-k (k)",
    "confidence": "confidence (τ)",
}
MARKERS = {"learned": "*", "eb": "o", "top_k": "s", "confidence": "^"}
FILLS = {"eb": None, "top_k": "white", "confidence": "0.8"}  # None: the line's colour


def plot_frontier(rows, path, title):
    """frontier.png: accuracy against NFE, a line for each name and rule.

    rows   rows of evaluate.evaluate, each with a "name", for any names and decoders
    title  what the plot shows, or the run's name

    Bars are the 95% intervals. A star is a learned threshold.
    """
    figure = Figure((8, 5.6), layout="constrained")
    axis = figure.subplots()
    curves = curves_of(rows)
    names = list(dict.fromkeys(name for name, _ in curves))
    rules = [rule for rule in RULES if any(curve[1] == rule for curve in curves)]
    labels = []
    for (name, rule), points in curves.items():
        # Lines differ by name; those of a single name by rule.
        index = names.index(name) if len(names) > 1 else rules.index(rule)
        color, line = LINES[index % len(LINES)]
        labels.append(curve_label(name, rule, names, rules))
        is_star = rule == "learned"
        axis.errorbar(
            x=[row["nfe"] for row in points],
            y=[row["solved"] for row in points],
            yerr=[
                [max(0, row["solved"] - row["solved_low"]) for row in points],
                [max(0, row["solved_high"] - row["solved"]) for row in points],
            ],
            label=labels[-1],
            color=color,
            linestyle="none" if is_star else line,
            linewidth=2,
            marker=MARKERS[rule],
            markersize=19 if is_star else 8,
            mfc=(color, "white", "0.8")[index % 3] if is_star else FILLS[rule] or color,
            mec="black",
            mew=1 if is_star else 0.8,
            ecolor=(color, 0.45),
            elinewidth=1.5,
            capsize=3,
            zorder=5 if is_star else 2,
        )
    axis.set(xlim=(0, None), ylim=(0, None))
    axis.set_xlabel("NFE: denoiser calls per completion", size=13)
    axis.set_ylabel("solved", size=13)
    axis.tick_params(labelsize=12)
    axis.yaxis.set_major_formatter("{x:.0%}")
    axis.grid(alpha=0.3)
    if len(labels) <= 4:
        legend = axis.legend(axis.containers, ["-"] * len(labels), fontsize=12)
    else:
        legend = figure.legend(
            axis.containers,
            ["-"] * len(labels),
            loc="outside lower center",
            ncols=2,
            fontsize=10,
        )
    set_labels(legend, labels)

    # The caption is between title and axes.
    caption = fill(conditions(rows), 95) + "\nBars: 95% intervals, over clusters of problems"
    axis.annotate(
        caption,
        xy=(0, 1),
        xycoords="axes fraction",
        xytext=(0, 6),
        textcoords="offset points",
        va="bottom",
        size=10,
        color="0.35",
        parse_math=False,
    )
    lines_of_caption = caption.count("\n") + 1
    axis.set_title(
        fill(title, 54),
        loc="left",
        size=15,
        weight="bold",
        pad=10 + 13 * lines_of_caption,
        parse_math=False,
    )
    save(figure, path)


def curve_label(name, rule, names, rules):
    """What distinguishes a curve from the others: its name, its rule, or both."""
    parts = []
    if len(names) > 1:
        parts.append(shorten_name(name, 24 if len(rules) > 2 else 40))
    if len(names) == 1 or rule == "learned" or len({*rules} - {"learned"}) > 1:
        parts.append(RULES[rule])
    return ", ".join(parts)


# ---- completions ---------------------------------------------------------------------------------


def shade(t, T):
    """(background, ink) for call t of T, as RGB in [0, 1]: dark to light, even in greyscale."""
    red, green, blue = colormaps["viridis"](0.12 + 0.78 * (t - 1) / max(T - 1, 1))[:3]
    is_dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
    ink = (1, 1, 1) if is_dark else (0, 0, 0)
    return (red, green, blue), ink


def draw_token(axis, x, y, width, token, step, t, T):
    """Draw a position after call t of T: its token with its call in a corner, or a mask.

    step: the call that unmasked the token; if it is call t, the box is framed. x, y: the upper left
    corner in pixels; width: in pixels. The box is 46 pixels high.
    """
    is_mask = step > t
    if is_mask:
        background = (0.955, 0.955, 0.955)
        edge = "0.75"
    else:
        background, ink = shade(step, T)
        edge = "black" if step == t else background
    axis.add_patch(
        FancyBboxPatch(
            (x, y),
            width,
            46,
            boxstyle="round,pad=0,rounding_size=7",
            facecolor=background,
            edgecolor=edge,
            linewidth=2.6 if step == t else 1.2,
            linestyle="--" if is_mask else "-",
        )
    )
    if is_mask:
        axis.text(x + width / 2, y + 23, "[MASK]", size=8, color="0.6", ha="center", va="center")
        return
    axis.text(
        x + width / 2,
        y + 26,
        token,
        size=min(15, 1.05 * width / max(len(token), 1)),
        color=ink,
        ha="center",
        va="center",
        family="monospace",
        weight="bold",
        parse_math=False,
    )
    axis.text(x + width - 6, y + 9, str(step), size=8, color=ink, ha="right", va="center")


def plot_two_stages(stages, path, cap=1.0, most=12):
    """two_stages.png: from which of two states each token of a completion is scored.

    stages  traces.TwoStages
    cap     C, the cap of the importance weights
    most    how many tokens to show at most

    The completion is in the middle row. An arrow from above means that a token is scored from z_0,
    all masks; an arrow from below, from z_tau. Below that are each token's probability as drawn and
    as scored, and its weight before and after the cap.
    """
    tokens = stages.tokens[:most]
    tau = stages.tau
    T = max(stages.unmask_step)
    figure = Figure((8, 4.9), dpi=110)
    axis = figure.add_axes((0, 0, 1, 1), xlim=(0, 800), ylim=(490, 0))  # y counts from the top
    axis.axis("off")
    axis.text(
        24,
        28,
        f"{shorten(stages.prompt, 36)}   two stages, boundary τ = {tau}",
        size=14,
        weight="bold",
        va="center",
        parse_math=False,
    )

    pitch = 682 / len(tokens)
    middles = [100 + pitch * (i + 0.5) - 4 for i in range(len(tokens))]
    for y, symbol, description, t in (
        (56, "$z_0$", "all masks", 0),
        (146, "$o$", "completion", T),
        (236, f"$z_{{{tau}}}$", f"after call {tau}", tau),
    ):
        axis.text(24, y + 14, symbol, size=14, va="center")
        axis.text(24, y + 34, description, size=8.5, va="center", color="0.35")
        for i, token in enumerate(tokens):
            draw_token(
                axis,
                x=100 + pitch * i,
                y=y,
                width=pitch - 8,
                token=token,
                step=stages.unmask_step[i],
                t=t + 0.5,  # half a call later, so that no token is framed as new
                T=T,
            )

    for x, start in zip(middles, stages.scored_from, strict=False):
        tail, head = (104, 143) if start == 0 else (234, 195)
        axis.annotate(
            "",
            xy=(x, head),
            xytext=(x, tail),
            arrowprops={
                "arrowstyle": "-|>",
                "color": "black",
                "linewidth": 1.6,
                "mutation_scale": 13,
            },
        )

    ratios = [scored / drawn for scored, drawn in zip(stages.scored, stages.drawn, strict=True)]
    for y, name, values in (
        (310, "as drawn", stages.drawn),
        (336, "as scored", stages.scored),
        (362, "ratio", ratios),
        (388, "weight w", [min(cap, ratio) for ratio in ratios]),
    ):
        emphasis = "bold" if name == "weight w" else "normal"
        axis.text(24, y, name, size=10, va="center", weight=emphasis)
        for x, value in zip(middles, values, strict=False):
            axis.text(x, y, f"{value:.2f}", size=10, ha="center", va="center", weight=emphasis)

    calls = "call 1" if tau == 1 else f"calls 1 to {tau}"
    explanation = (
        f"Tokens of {calls} are scored from $z_0$, later ones from $z_{{{tau}}}$.\n"
        f"Calls 1 and {tau + 1} drew from exactly these states: their weight is 1.\n"
        f"ratio = as scored / as drawn; w = min(C, ratio), here with C = {cap:g}."
    )
    if len(stages.tokens) > most:
        explanation += f" Shown: the first {most} of {len(stages.tokens)} tokens."
    axis.text(24, 446, explanation, size=9.5, va="center", color="0.35", linespacing=1.5)
    verdict = "✓ solved" if stages.solved else "✗ not solved"
    axis.text(776, 428, verdict, size=12, weight="bold", ha="right", va="center")
    save(figure, path)
