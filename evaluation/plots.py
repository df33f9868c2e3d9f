"""Pictures: of a run, and of accuracy against NFE. Each is written aside and renamed.

All are legible without colour: lines differ in style, and points in shape.
"""

import warnings
from contextlib import contextmanager

from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from matplotlib.ticker import MaxNLocator

from evaluation.tables import conditions, curves_of, shorten

RULES = {"eb": "entropy-bounded (γ)", "top_k": "top-k (k)", "confidence": "confidence (τ)"}
MARKERS = {"eb": "o", "top_k": "s", "confidence": "^"}
LINES = (("#1b4f8a", "-"), ("#d1662b", "--"), ("#3c8d5a", ":"), ("#8a5a9e", "-."))

FILLS = {"eb": None, "top_k": "white", "confidence": "0.8"}  # None: the line's colour
INK = dict(mec="black", linestyle="none", zorder=5, clip_on=False)
MARKS = {  # of a row's name in eval.json; any other's is a diamond
    "base": dict(marker="s", mfc="white"),
    "trained": dict(marker="*", mfc="black", markersize=15),
}


@contextmanager
def no_missing_glyphs():
    """A token may be in any script. What the font lacks is a box, and no warning helps."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        yield


def save(figure, path):
    with no_missing_glyphs():
        figure.savefig(path, dpi=110, format="png")


PANELS = {  # of metrics.jsonl: label, and the same in a row of eval.json
    "reward_mean": ("reward (sampled, training)", None),
    "solved_mean": ("solved", "solved"),
    "nfe_mean": ("NFE per completion", "nfe"),
    "threshold_mean": ("threshold γ, nats", "threshold_mean"),
    "surrogate_kl": ("KL(true ‖ surrogate), nats", None),
    "grad_norm": ("gradient norm, unclipped", None),
}


def plot_curves(rows, measured, title, path):
    """curves.png: what metrics.jsonl says, step by step and as a running mean.

    rows: of metrics.jsonl. measured: of eval.json; they are squares and stars, greedy, on held-out
    problems, before and after.
    """
    figure = Figure((12, 6.4), layout="constrained")
    w = max(1, len(rows) // 20)
    panels = zip(figure.subplots(2, 3).flat, PANELS.items(), strict=True)
    for axis, (key, (label, greedy)) in panels:
        steps = [row["step"] for row in rows if row[key] is not None]
        values = [row[key] for row in rows if row[key] is not None]
        spans = [values[max(0, i - w) : i] for i in range(1, len(values) + 1)]
        axis.plot(steps, values, color="0.7", linewidth=1, marker=".", markersize=4)
        means, dot = [sum(span) / len(span) for span in spans], "o" if len(steps) == 1 else None
        axis.plot(steps, means, color=LINES[0][0], linewidth=2, marker=dot)
        for row in measured if greedy else []:
            x = 0 if row["name"] == "base" else rows[-1]["step"]
            mark = MARKS.get(row["name"], dict(marker="D", mfc="white"))
            axis.plot(x, row[greedy], label=row["name"], **INK, **mark)
        axis.set(title=label, xlabel="step", ylim=(0, None), xlim=(0, 1.03 * rows[-1]["step"]))
        axis.xaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10], integer=True))
        axis.grid(alpha=0.3)
    said = f"{title}: each step, and the mean of {w}"
    if measured:
        shown = figure.axes[1].get_legend_handles_labels()
        figure.legend(*shown, loc="outside upper right", ncols=3)
        said += "; marks: greedy, on held-out problems"
    figure.suptitle(said, x=0.01, ha="left", size=11)
    save(figure, path)


# ---- accuracy against NFE ------------------------------------------------------------------------


def plot_frontier(rows, path, title):
    """Solved share against NFE. rows: evaluate's, with a "name" each, of any names and decoders.

    A line for each name and rule, its points by NFE. Bars are the 95% intervals. A star is the
    learned threshold.
    """
    figure = Figure((8, 5.4), layout="constrained")
    axis, curves = figure.subplots(), curves_of(rows)
    names = list(dict.fromkeys(name for name, _ in curves))
    for (name, rule), points in curves.items():
        color, line = LINES[names.index(name) % len(LINES)]
        nfe, share = ([row[key] for row in points] for key in ("nfe", "solved"))
        low = [max(0, row["solved"] - row["solved_low"]) for row in points]
        high = [max(0, row["solved_high"] - row["solved"]) for row in points]
        how = dict(color=color, ecolor=(color, 0.45), elinewidth=1, capsize=2, yerr=[low, high])
        how |= dict(label=f"{name}: {RULES.get(rule, 'learned γ')}", mec="black")
        if rule == "learned":
            how |= dict(marker="*", linestyle="none", markersize=17, mew=1, zorder=5)
            how["mfc"] = (color, "white", "0.8")[names.index(name) % 3]
        else:
            how |= dict(marker=MARKERS[rule], linestyle=line, markersize=6.5, mew=0.8)
            how["mfc"] = FILLS[rule] or color
        axis.errorbar(nfe, share, **how)
    axis.set(xlim=(0, None), ylim=(0, None), xlabel="NFE: denoiser calls a completion")
    axis.set_ylabel("solved")
    axis.yaxis.set_major_formatter("{x:.0%}")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9)
    axis.set_title(title, loc="left", fontweight="bold")
    said = f"{conditions(rows)}. Bars: 95% intervals, bootstrapped over clusters."
    figure.supxlabel(said, fontsize=8, color="0.3")
    save(figure, path)


# ---- completions ---------------------------------------------------------------------------------


def shade(t, T):
    """(background, ink) of call t as RGB in [0, 1]: dark to light, so that grey does as well."""
    rgb = colormaps["viridis"](0.12 + 0.78 * (t - 1) / max(T - 1, 1))[:3]
    return rgb, (1, 1, 1) if 0.3 * rgb[0] + 0.59 * rgb[1] + 0.11 * rgb[2] < 0.5 else (0, 0, 0)


def draw_box(axis, place, word, step, t, T):
    """A token with its call in a corner, or a mask, after call t. What call t took is framed.

    place: x, y and width in pixels; the box is 46 high.
    """
    x, y, width = place
    back, ink = shade(step, T) if step <= t else ((0.955,) * 3, "0.75")
    edge = "black" if step == t else back if step < t else "0.75"
    how = dict(facecolor=back, edgecolor=edge, linewidth=2.6 if step == t else 1.2)
    how |= dict(boxstyle="round,pad=0,rounding_size=7", linestyle="-" if step <= t else "--")
    axis.add_patch(FancyBboxPatch((x, y), width, 46, **how))
    if step > t:
        how = dict(size=8, color="0.6", ha="center", va="center")
        axis.text(x + width / 2, y + 23, "[MASK]", **how)
    else:
        size = min(15, 1.05 * width / max(len(word), 1))
        how = dict(
            color=ink, ha="center", va="center", family="monospace", weight="bold", parse_math=False
        )
        axis.text(x + width / 2, y + 26, word, size=size, **how)
        axis.text(x + width - 6, y + 9, step, size=8, color=ink, ha="right", va="center")


def draw_number(axis, place, value, highest, taken):
    """A bar as long as what the rule read, and the number."""
    x, y, width = place
    axis.add_patch(Rectangle((x, y), width, 6, color="0.93"))
    share = value / max(highest, 1e-9)
    axis.add_patch(Rectangle((x, y), width * share, 6, color="black" if taken else "0.6"))
    weight, color = ("bold", "black") if taken else ("normal", "0.45")
    how = dict(size=10, ha="center", va="center", weight=weight, color=color)
    axis.text(x + width / 2, y + 16, f"{value:.2f}", **how)


def draw_budget(axis, trace, t, y):
    """The entropies that call t read, end to end, lowest first: what starts before gamma, it took.

    gamma stands in the middle. y: pixels from the top.
    """
    left, width, T = 24, 300, len(trace.read)
    gamma = max(trace.level, 1e-9)
    unit = width / 2 / gamma
    for i, before in trace.before(t).items():
        start, end = (min(nats * unit, width) for nats in (before, before + trace.read[t - 1][i]))
        back = shade(t, T)[0] if trace.step[i] == t else "0.94"
        bar = Rectangle((left + start, y), end - start, 14, facecolor=back, edgecolor="white")
        axis.add_patch(bar)
    axis.add_patch(Rectangle((left, y), width, 14, fill=False, edgecolor="0.6", linewidth=0.8))
    axis.plot([left + width / 2] * 2, [y - 5, y + 19], color="black", linewidth=2)
    axis.text(left + width / 2, y - 7, f"γ = {gamma:.2g} nats", size=10, ha="center", va="bottom")
    said = "masks by entropy, end to end: taken if it starts before γ"
    axis.text(left, y + 22, said, size=9, va="top", color="0.35")


def plot_two_stages(stages, path, most=12):
    """From which of two states each token is scored. stages: trace.two_stages; `most` tokens fit.

    The completion is in the middle. An arrow from above: scored from z_0, all masks. An arrow from
    below: scored from z_tau. Below that each token's probability as drawn and as scored.
    """
    words, steps, tau = stages["words"][:most], stages["step"], stages["tau"]
    figure = Figure((8, 4.35), dpi=110)
    axis = figure.add_axes((0, 0, 1, 1), xlim=(0, 800), ylim=(435, 0))
    axis.axis("off")
    title = f"{shorten(stages['prompt'], 36)}   two stages, boundary τ = {tau}"
    axis.text(24, 28, title, size=14, weight="bold", va="center", parse_math=False)
    pitch, T = 682 / len(words), max(steps)
    states = {56: ("$z_0$", "all masks", 0), 146: ("$o$", "completion", T)}
    states[236] = (f"$z_{{{tau}}}$", f"after call {tau}", tau)
    for y, (name, what, t) in states.items():
        axis.text(24, y + 14, name, size=14, va="center")
        axis.text(24, y + 34, what, size=8.5, va="center", color="0.35")
        for i, word in enumerate(words):  # half a call later, nothing is framed as new
            draw_box(axis, (100 + pitch * i, y, pitch - 8), word, steps[i], t + 0.5, T)
    lines = {"as drawn": stages["drawn"], "as scored": stages["scored"]}
    pairs = zip(stages["scored"], stages["drawn"], strict=True)
    lines["weight"] = [scored / drawn for scored, drawn in pairs]
    for row, (name, values) in enumerate(lines.items()):
        y, weight = 310 + 26 * row, "bold" if name == "weight" else "normal"
        axis.text(24, y, name, size=10, va="center", weight=weight)
        for i, value in enumerate(values[: len(words)]):
            x = 100 + pitch * (i + 0.5) - 4
            axis.text(x, y, f"{value:.2f}", size=10, ha="center", va="center", weight=weight)
    for i, start in enumerate(stages["scored_from"][: len(words)]):
        x, (tail, head) = 100 + pitch * (i + 0.5) - 4, ((104, 143) if start == 0 else (234, 195))
        arrow = dict(arrowstyle="-|>", color="black", linewidth=1.6, mutation_scale=13)
        axis.annotate("", (x, head), (x, tail), arrowprops=arrow)
    first = "call 1" if tau == 1 else f"calls 1 to {tau}"
    said = f"Tokens of {first} are scored from $z_0$, later ones from $z_{{{tau}}}$. "
    said += f"Calls 1 and {tau + 1} drew from just these states: their weight is 1.\n"
    said += "weight = as scored / as drawn; training caps it at C."
    said += f" Shown: the first {most} of {len(steps)} tokens." if len(steps) > most else ""
    axis.text(24, 404, said, size=8.5, va="center", color="0.35", linespacing=1.5)
    save(figure, path)
