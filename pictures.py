"""Pictures: of a run, and of accuracy against NFE. Each is written aside and renamed."""

from matplotlib.figure import Figure

import runs


def plot_curves(run_dir):
    """curves.png of a run folder: what metrics.jsonl says, step by step and as a running mean."""
    panels = {
        "reward_mean": "reward (sampled, training)", "solved_mean": "solved (sampled, training)",
        "nfe_mean": "NFE per completion", "threshold_mean": "threshold γ, nats",
        "surrogate_kl": "KL(true ‖ surrogate), nats", "grad_norm": "gradient norm, unclipped",
    }  # fmt: skip
    rows, figure = runs.read_lines(run_dir / "metrics.jsonl"), Figure((12, 6), layout="constrained")
    w = max(1, len(rows) // 20)
    for axis, (key, label) in zip(figure.subplots(2, 3).flat, panels.items(), strict=True):
        steps = [row["step"] for row in rows if row[key] is not None]
        values = [row[key] for row in rows if row[key] is not None]
        spans = [values[max(0, i - w) : i] for i in range(1, len(values) + 1)]
        axis.plot(steps, values, color="tab:blue", alpha=0.3, linewidth=1)
        axis.plot(steps, [sum(span) / len(span) for span in spans], color="tab:blue", linewidth=2)
        axis.set(title=label, xlabel="step", ylim=(0, None))
        axis.grid(alpha=0.3)
    figure.suptitle(f"{run_dir.name}, and its mean of {w} steps")
    with runs.replacing(run_dir / "curves.png") as aside:
        figure.savefig(aside, dpi=110, format="png")


def plot_frontier(rows, path, title):
    figure = Figure()
    figure.subplots().scatter([row["nfe"] for row in rows], [row["solved"] for row in rows])
    with runs.replacing(path) as aside:
        figure.savefig(aside, format="png")
