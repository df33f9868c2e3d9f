"""Pictures of the claims: of gradients, and of the surrogate's error. Legible without colour."""

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from evaluation.plots import LINES, save
from experiments import gradients

# weights: colour, line, marker, filled
WEIGHTS = {
    "no weights": (LINES[1][0], "--", "o", False),
    "C = 1": (LINES[0][0], "-", "o", True),
    "C = 2": ("0.45", "", "^", False),
    "C = 5": ("0.45", "", "s", False),
    "no cap": ("0.45", "", "x", False),
}


ESTIMATORS = {  # of the lower row: label, colour, line, marker
    (1, "no weights"): ("m = 1, no weights", LINES[1][0], "--", "o"),
    (1, "C = 1"): ("m = 1, C = 1", LINES[1][0], "-", "o"),
    (2, "no weights"): ("m = 2, no weights", LINES[0][0], "--", "s"),
    (2, "C = 1"): ("m = 2, C = 1 (DiFFPO)", LINES[0][0], "-", "s"),
    ("exact", "no weights"): ("exact likelihood", "black", "-", "*"),
    (gradients.TWO_STEPS, "no weights"): ("two steps exactly, × T/2", "0.5", ":", "D"),
}


def key_of(rows):
    return {(row["stages"], row["weights"]): row for row in rows}


def grid_of(found, rows, title):
    """A figure with a column for each state, and its axes (rows, columns)."""
    figure = Figure((2.6 + 4.2 * len(found), 3.7 * rows), layout="constrained")
    axes = figure.subplots(rows, len(found), squeeze=False, sharey="row")
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    for axis, state in zip(axes[0], found, strict=True):
        axis.set_title(state["about"]["name"], loc="left", fontsize=10)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    return figure, axes


def plot_gradients(found, path):
    """Above: cosine with the exact gradient on the same rollouts, against what scoring costs.

    Below: cosine with the true gradient that bias and noise let a batch of P prompts reach.
    found: claims.gradient's, one for each state.
    """
    figure, axes = grid_of(found, 2, "Is the surrogate's gradient the policy's gradient?")
    for (above, below), state in zip(axes.T, found, strict=True):
        draw_cosines(above, state["rows"])
        draw_batch_sizes(below, state["rows"], state["about"]["prompts"])
    axes[0, 0].set_ylabel("cosine with the exact gradient,\nsame rollouts")
    axes[1, 0].set_ylabel("cosine with the true gradient")
    for axis in axes[:, 0]:  # beside the last column
        how = dict(
            fontsize=8, loc="outside right upper" if axis is axes[0, 0] else "outside right center"
        )
        figure.legend(*axis.get_legend_handles_labels(), **how)
    n, G = found[0]["rows"][0]["batches"], found[0]["about"]["num_generations"]
    P = ", ".join(str(state["about"]["prompts"]) for state in found)
    figure.supxlabel(
        f"{n} batches of P x {G} rollouts a state, P = {P}; bars: 95% "
        "intervals, bootstrapped over batches.\nBelow: from bias and noise at that P "
        "(dotted), told apart by products of different batches; all weights, float32.",
        fontsize=8, color="0.3",
    )  # fmt: skip
    save(figure, path)


def errors(rows, name):
    """Bars for errorbar: (2, n) distances to the interval's ends, 0 where there is none."""
    ends = [[row[f"{name}_interval"][i] for row in rows] for i in (0, 1)]
    middle = [row[name] for row in rows]
    pairs = (zip(middle, end, strict=True) for end in ends)
    return [[0 if end is None else abs(at - end) for at, end in pair] for pair in pairs]


def draw_cosines(axis, rows):
    by, widest = key_of(rows), max(row["calls"] for row in rows)
    for i, (name, (color, line, marker, filled)) in enumerate(WEIGHTS.items()):
        points = [by[m, name] for m in gradients.STAGES]
        x = [row["calls"] + (i - 2) * 0.008 * widest for row in points]  # beside each other
        how = dict(color=color, linestyle=line or "none", marker=marker, capsize=2, elinewidth=1)
        how |= dict(mfc=color if filled else "white", mec=color if marker == "x" else "black")
        how |= dict(label=name, markersize=6 if line else 5, yerr=errors(points, "cosine"))
        axis.errorbar(x, [row["cosine"] for row in points], zorder=4, **how)
    control, exact = by[gradients.TWO_STEPS, "no weights"], by["exact", "no weights"]
    how = dict(marker="D", color="black", mfc="white", linestyle="none", capsize=2)
    how |= dict(label="two steps exactly, × T/2", yerr=errors([control], "cosine"))
    axis.errorbar([control["calls"]], [control["cosine"]], **how)
    how = dict(marker="*", color="black", linestyle="none", markersize=12)
    axis.plot(exact["calls"], 1, label="exact likelihood", **how)
    label = "exact, of two batches"
    axis.axhline(exact["split_half"], color="0.5", linestyle=":", label=label)
    for m in gradients.STAGES[:3]:
        where = (by[m, "no weights"]["calls"], 1.05)
        axis.annotate(f"m = {m}", where, fontsize=8, ha="center")
    axis.set(xlim=(0, None), ylim=(0, 1.12), xlabel="denoiser calls a completion, to score it")


def draw_batch_sizes(axis, rows, prompts):
    by, factors = key_of(rows), [2 ** (i / 4) for i in range(-12, 33)]  # an eighth to 256 times P
    for i, (key, (label, color, line, marker)) in enumerate(ESTIMATORS.items()):
        row = by[key]
        if row["true_cosine_interval"][0] is None:
            continue  # no signal was found in the noise
        values = [row["bias_cosine"] / (1 + row["noise"] ** 2 / x) ** 0.5 for x in factors]
        wide = 2.2 if key[0] == 2 else 1.3
        axis.plot([prompts * x for x in factors], values, line, color=color, linewidth=wide)
        how = dict(
            color=color, marker=marker, mec="black", capsize=2, yerr=errors([row], "true_cosine")
        )
        how |= dict(
            mfc="white" if line == "--" else color, linestyle=line, linewidth=wide, zorder=4
        )
        axis.errorbar([prompts * 2 ** (0.25 * (i - 2.5))], [row["true_cosine"]], label=label, **how)
    axis.axvline(prompts, color="0.5", linestyle=":", zorder=0)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:.0f}")
    axis.set(ylim=(0, 1.04), xlabel="prompts a step (log scale)")


STAGE_LINES = {
    1: (LINES[1][0], "--", "o"), 2: (LINES[0][0], "-", "s"), 4: (LINES[2][0], "-.", "^"),
    8: ("0.4", ":", "D"),
}  # fmt: skip


def plot_surrogates(found, path):
    """KL by unmasking step; the weights; the effective sample. found: claims.surrogate's."""
    figure, axes = grid_of(found, 3, "How wrong is the surrogate's likelihood?")
    for (top, middle, bottom), state in zip(axes.T, found, strict=True):
        for m, (color, line, marker) in STAGE_LINES.items():
            every = [row for row in state["rows"] if row["stages"] == m]
            rows, whole = [row for row in every if row["step"]], every[0]
            x, y = ([row[key] for row in rows] for key in ("step", "kl"))
            how = dict(color=color, mfc="white", mec="black", markersize=5, capsize=2)
            top.errorbar(
                x,
                y,
                yerr=errors(rows, "kl"),
                linestyle=line,
                marker=marker,
                label=f"m = {m}",
                **how,
            )
            if m > 2:
                continue
            how = dict(color=color, linestyle=line, linewidth=1.8)
            middle.stairs(whole["histogram"], whole["edges"], label=f"m = {m}", **how)
            for name, fill in (("C = 1", color), ("no cap", "white")):
                label, ess = f"m = {m}, {name}", [row[f"ess, {name}"] for row in rows]
                dots = dict(marker=marker, mfc=fill, mec="black", markersize=5)
                bottom.plot(x, ess, linestyle=line, color=color, label=label, **dots)
        top.set(xlabel="unmasking step", ylim=(0, None))
        middle.axvline(0, color="0.5", linewidth=1)
        middle.set(xlabel="log2 of the weight before the cap", yscale="log", xlim=(-6, 3))
        bottom.set(xlabel="unmasking step", ylim=(0, 1.04))
        for axis in (top, bottom):
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0, 0].set_ylabel("KL(true ‖ surrogate),\nnats a token")
    axes[1, 0].set_ylabel("share of tokens (log scale)")
    axes[2, 0].set_ylabel("effective sample, share of tokens")
    for axis in axes[:, -1]:
        axis.legend(fontsize=8)
    about = found[0]["about"]
    figure.supxlabel(
        f"{about['batches']} batches of {about['prompts']} x {about['num_generations']} rollouts"
        " a state; bars: 95% intervals, bootstrapped over prompts. Steps that 1 token in 200 has.\n"
        "The outermost bins hold all beyond them.", fontsize=8, color="0.3",
    )  # fmt: skip
    save(figure, path)
