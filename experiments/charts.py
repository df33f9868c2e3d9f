"""Plots of what gradients.py and surrogate.py measure, with a column for each state.

All are legible without colour: what differs in colour also differs in marker or line style.
"""

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from evaluation.plots import LINES, save
from experiments.states import EXACT, STAGES, TWO_STEPS

BLUE = LINES[0][0]
ORANGE = LINES[1][0]
GREEN = LINES[2][0]


def by_estimator(rows):
    """{(stages, weights): row}"""
    return {(row["stages"], row["weights"]): row for row in rows}


def state_columns(results, number_of_rows, title):
    """A figure with a column for each state. Returns it and its axes (rows, columns)."""
    width = 2.6 + 4.2 * len(results)
    height = 3.7 * number_of_rows
    figure = Figure((width, height), layout="constrained")
    axes = figure.subplots(number_of_rows, len(results), squeeze=False, sharey="row")
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    for axis, result in zip(axes[0], results, strict=True):
        axis.set_title(result["state"]["name"], loc="left", fontsize=10, parse_math=False)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    return figure, axes


def error_bars(rows, name):
    """A quantity's intervals as errorbar's yerr: distances below and above, 0 if there is none."""
    below = []
    above = []
    for row in rows:
        low, high = row[f"{name}_interval"]
        below.append(0 if low is None else abs(row[name] - low))
        above.append(0 if high is None else abs(row[name] - high))
    return [below, above]


def rollouts_in_words(results):
    """The batches' sizes: "24 batches of P x 8 rollouts a state, P = 32, 16"."""
    state = results[0]["state"]
    batches = state.get("batches") or results[0]["rows"][0]["batches"]
    prompts = ", ".join(dict.fromkeys(str(result["state"]["prompts"]) for result in results))
    return f"{batches} batches of P x {state['num_generations']} rollouts per state, P = {prompts}"


# ---- gradients -----------------------------------------------------------------------------------


def plot_gradients(results, path):
    """gradients.png, from gradients.measure's results, one for each state.

    Above: the cosine with the exact gradient on the same rollouts, against what scoring costs.
    Below: the cosine with the true gradient that bias and noise let a batch of P prompts reach.
    """
    figure, axes = state_columns(
        results, number_of_rows=2, title="Is the surrogate's gradient the policy's gradient?"
    )
    for axis, result in zip(axes[0], results, strict=True):
        draw_cosines(axis, result["rows"])
    for axis, result in zip(axes[1], results, strict=True):
        draw_batch_sizes(axis, result["rows"], prompts=result["state"]["prompts"])
    axes[0, 0].set_ylabel("cosine with the exact gradient,\nsame rollouts")
    axes[1, 0].set_ylabel("cosine with the true gradient")
    # Beside the last column.
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="outside right upper")
    handles, labels = axes[1, 0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="outside right center", handlelength=3)
    figure.supxlabel(
        f"{rollouts_in_words(results)}; bars: 95% intervals, bootstrapped over batches.\n"
        "Below: from bias and noise at that P (dotted), told apart by products of different "
        "batches; all weights, float32.",
        fontsize=8,
        color="0.3",
    )
    save(figure, path)


# How each cap of the weights is drawn in the upper row. Only the first two are joined by lines.
CAP_STYLES = {
    "no weights": {"color": ORANGE, "linestyle": "--", "marker": "o", "mfc": "white"},
    "C = 1": {"color": BLUE, "linestyle": "-", "marker": "o", "mfc": BLUE},
    "C = 2": {"color": "0.45", "linestyle": "none", "marker": "^", "mfc": "white"},
    "C = 5": {"color": "0.45", "linestyle": "none", "marker": "s", "mfc": "white"},
    "no cap": {"color": "0.45", "linestyle": "none", "marker": "x", "mec": "0.45"},
}


def draw_cosines(axis, rows):
    """One state's cosines with the exact gradient: a point for each number of stages and cap."""
    row_of = by_estimator(rows)
    most_calls = max(row["calls"] for row in rows)
    for i, (weights, style) in enumerate(CAP_STYLES.items()):
        points = [row_of[m, weights] for m in STAGES]
        shift = (i - 2) * 0.008 * most_calls  # beside each other
        axis.errorbar(
            [row["calls"] + shift for row in points],
            [row["cosine"] for row in points],
            yerr=error_bars(points, "cosine"),
            label=weights,
            zorder=4,
            capsize=2,
            elinewidth=1,
            markersize=5 if style["linestyle"] == "none" else 6,
            **{"mec": "black"} | style,
        )
    two_steps = row_of[TWO_STEPS, "no weights"]
    axis.errorbar(
        [two_steps["calls"]],
        [two_steps["cosine"]],
        yerr=error_bars([two_steps], "cosine"),
        label="two steps exactly, × T/2",
        marker="D",
        color="black",
        mfc="white",
        linestyle="none",
        capsize=2,
    )
    exact = row_of[EXACT, "no weights"]
    axis.plot(
        exact["calls"],
        1,
        label="exact likelihood",
        marker="*",
        color="black",
        linestyle="none",
        markersize=12,
    )
    axis.axhline(exact["split_half"], label="exact, of two batches", color="0.5", linestyle=":")
    for m in STAGES[:3]:
        place = (row_of[m, "no weights"]["calls"], 1.05)
        axis.annotate(f"m = {m}", place, fontsize=8, ha="center")
    axis.set(xlim=(0, None), ylim=(0, 1.12), xlabel="denoiser calls per completion, to score it")


# How each estimator is drawn in the lower row.
ESTIMATOR_STYLES = {
    (1, "no weights"): {
        "label": "m = 1, no weights",
        "color": ORANGE,
        "linestyle": "--",
        "linewidth": 1.3,
        "marker": "o",
        "mfc": "white",
    },
    (1, "C = 1"): {
        "label": "m = 1, C = 1",
        "color": ORANGE,
        "linestyle": "-",
        "linewidth": 1.3,
        "marker": "o",
        "mfc": ORANGE,
    },
    (2, "no weights"): {
        "label": "m = 2, no weights",
        "color": BLUE,
        "linestyle": "--",
        "linewidth": 2.2,
        "marker": "s",
        "mfc": "white",
    },
    (2, "C = 1"): {
        "label": "m = 2, C = 1 (DiFFPO)",
        "color": BLUE,
        "linestyle": "-",
        "linewidth": 2.2,
        "marker": "s",
        "mfc": BLUE,
    },
    (EXACT, "no weights"): {
        "label": "exact likelihood",
        "color": "black",
        "linestyle": "-",
        "linewidth": 1.3,
        "marker": "*",
        "mfc": "black",
    },
    (TWO_STEPS, "no weights"): {
        "label": "two steps exactly, × T/2",
        "color": "0.5",
        "linestyle": ":",
        "linewidth": 1.3,
        "marker": "D",
        "mfc": "0.5",
    },
}


def draw_batch_sizes(axis, rows, prompts):
    """One state's cosines with the true gradient, for an eighth to 256 times `prompts` per step."""
    row_of = by_estimator(rows)
    factors = [2 ** (i / 4) for i in range(-12, 33)]
    for i, (estimator, style) in enumerate(ESTIMATOR_STYLES.items()):
        row = row_of[estimator]
        if row["true_cosine_interval"][0] is None:
            continue  # its signal is lost in noise
        cosines = [row["bias_cosine"] / (1 + row["noise"] ** 2 / x) ** 0.5 for x in factors]
        sizes = [prompts * x for x in factors]
        # Small markers along the curve identify it without colour.
        axis.plot(
            sizes,
            cosines,
            markevery=(16 + i, 8),
            **style | {"label": None, "mec": "black", "mew": 0.6, "markersize": 4},
        )
        # The measured point, beside the others.
        axis.errorbar(
            [prompts * 2 ** (0.25 * (i - 2.5))],
            [row["true_cosine"]],
            yerr=error_bars([row], "true_cosine"),
            mec="black",
            capsize=2,
            zorder=4,
            **style,
        )
    axis.axvline(prompts, color="0.5", linestyle=":", zorder=0)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:.0f}")
    axis.set(ylim=(0, 1.04), xlabel="prompts per step (log scale)")


# ---- the surrogate -------------------------------------------------------------------------------

# How each number of stages is drawn.
STAGE_STYLES = {
    1: {"color": ORANGE, "linestyle": "--", "marker": "o"},
    2: {"color": BLUE, "linestyle": "-", "marker": "s"},
    4: {"color": GREEN, "linestyle": "-.", "marker": "^"},
    8: {"color": "0.4", "linestyle": ":", "marker": "D"},
}


def plot_surrogates(results, path):
    """surrogate.png, from surrogate.measure's results, one for each state.

    From above: the KL by unmasking step; the weights' distribution; the effective sample.
    """
    figure, axes = state_columns(
        results, number_of_rows=3, title="How wrong is the surrogate's likelihood?"
    )
    for column, result in zip(axes.T, results, strict=True):
        for m in STAGES:
            # The first row of m stages is that of all tokens.
            all_tokens, *steps = [row for row in result["rows"] if row["stages"] == m]
            draw_kl(column[0], m, steps)
            if m <= 2:
                draw_histogram(column[1], m, all_tokens)
                draw_effective_sample(column[2], m, steps)
        column[0].set(xlabel="unmasking step", ylim=(0, None))
        column[1].axvline(0, color="0.5", linewidth=1)
        column[1].set(xlabel="log2 of the weight before the cap", yscale="log", xlim=(-6, 3))
        column[2].set(xlabel="unmasking step", ylim=(0, 1.04))
        for axis in (column[0], column[2]):
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0, 0].set_ylabel("KL(true ‖ surrogate),\nnats per token")
    axes[1, 0].set_ylabel("share of tokens (log scale)")
    axes[2, 0].set_ylabel("effective sample, share of tokens")
    for axis in axes[:, -1]:
        axis.legend(fontsize=8, handlelength=3)
    figure.supxlabel(
        f"{rollouts_in_words(results)}; bars: 95% intervals, bootstrapped over prompts.\n"
        "Only steps with at least 1 token in 200. The outermost bins include all beyond them.",
        fontsize=8,
        color="0.3",
    )
    save(figure, path)


def draw_kl(axis, stages, steps):
    axis.errorbar(
        [row["step"] for row in steps],
        [row["kl"] for row in steps],
        yerr=error_bars(steps, "kl"),
        label=f"m = {stages}",
        mfc="white",
        mec="black",
        markersize=5,
        capsize=2,
        **STAGE_STYLES[stages],
    )


def draw_histogram(axis, stages, all_tokens):
    axis.stairs(
        all_tokens["histogram"],
        all_tokens["edges"],
        label=f"m = {stages}",
        color=STAGE_STYLES[stages]["color"],
        linestyle=STAGE_STYLES[stages]["linestyle"],
        linewidth=1.8,
    )


def draw_effective_sample(axis, stages, steps):
    for cap, fill in (("C = 1", STAGE_STYLES[stages]["color"]), ("no cap", "white")):
        axis.plot(
            [row["step"] for row in steps],
            [row[f"ess, {cap}"] for row in steps],
            label=f"m = {stages}, {cap}",
            mfc=fill,
            mec="black",
            markersize=5,
            **STAGE_STYLES[stages],
        )
