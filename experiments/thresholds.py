"""What a threshold that is learned for each prompt is good for: gamma by task and difficulty.

    python -m experiments.claims threshold runs/NAME

First: does the head tell prompts apart? On a run's held-out problems, completed greedily, gamma is
listed by task and by difficulty: the blanks of a sudoku, the inverse operations (- and /) in
countdown's tidiest expression. Then: does it help? One gamma for all problems is the rival. At as
many calls, between the two fixed gammas on either side, how much would it solve? Within one task
of several the rival is a gamma of that task's own. And in what the head was trained for, the reward
times 1 - lambda * NFE / L? (That prices a call of a short completion higher.)

Shapes: N problems, F fixed gammas, K clusters of problems.
"""

from dataclasses import replace
from pathlib import Path
from textwrap import fill
from types import SimpleNamespace

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

import evaluate
from evaluation import metrics, plots
from evaluation.summary import GAMMAS
from models.checkpoints import find_checkpoint, read_json
from tasks import answers, mixture
from training import files

FIXED = (
    0.003,
    0.005,
    0.01,
    0.02,
    0.03,
    0.05,
    0.1,
    0.2,
    0.3,
    0.5,
    1.0,
)  # nats
STAR = plots.MARKS["trained"]
KINDS = {"blanks": "blank cells", "inverse": "inverse operations", "": "no difficulty"}


def difficulty(problem):
    """(kind, number) of a problem: how much there is to find out. ("", None) if we cannot say."""
    if "puzzle" in problem:
        return "blanks", problem["puzzle"].count("0")
    if len(problem.get("numbers", ())) == 3 and "target" in problem:
        reached = answers.solutions(*sorted(problem["numbers"], reverse=True))
        if text := reached.get(problem["target"]):
            return "inverse", text.count("-") + text.count("/")
    return "", None


# ---- statistics ----------------------------------------------------------------------------------


def ranks(values):
    """Ranks from 1; equal values share their mean rank. (N,) -> (N,)"""
    below = (values[:, None] > values).sum(1)
    equal = (values[:, None] == values).sum(1)
    return below + (equal + 1) / 2


def rank_correlation(a, b):
    """Spearman's: that of the ranks. None where one of the two is the same throughout."""
    if len(set(a.tolist())) < 2 or len(set(b.tolist())) < 2:
        return None
    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def variance_shares(values, names, cells):
    """Of the variance of `values`: between tasks, between a task's difficulties, and the rest.

    names, cells: each value's task, and its task with its difficulty. They add up to 1. None where
    all values are the same.
    """
    total = ((values - values.mean()) ** 2).sum()
    if np.ptp(values) == 0:
        return None

    def explained(labels):  # the sum of squares of the groups' means
        groups = [values[[label == one for label in labels]] for one in dict.fromkeys(labels)]
        return sum(len(group) * (group.mean() - values.mean()) ** 2 for group in groups)

    tasks, all_ = explained(names) / total, explained(cells) / total
    return {"tasks": tasks, "difficulties": all_ - tasks, "rest": 1 - all_}


def gain(solved, nfe):
    """How much more the learned gamma solves than one fixed gamma would in as many calls.

    solved, nfe: (F + 1,) means, the learned one's last. Between two fixed gammas, by calls, a line
    is drawn; beyond the last of them their solved share stays as it is.
    """
    order = np.argsort(nfe[:-1], kind="stable")
    return solved[-1] - np.interp(nfe[-1], nfe[:-1][order], solved[:-1][order])


def over_best(objective, _):
    """How much more the learned gamma earns than the best of the fixed ones. (F + 1,) means."""
    return objective[-1] - objective[:-1].max()


def with_interval(gain, first, second, clusters, draws=2000):
    """A gain of means (F + 1, N) and its 95% interval, by a bootstrap over clusters.

    A drawn cluster brings all its problems, as each gamma solved them and with the calls that each
    took. So all gammas are compared on the same problems.
    """
    names = sorted(set(clusters))
    member = np.array([[name == other for other in clusters] for name in names], float)  # (K, N)
    sums = np.concatenate([first, second, np.ones((1, len(clusters)))]) @ member.T  # (2F + 3, K)
    drawn = metrics.bootstrap_weights(len(names), draws).numpy() @ sums.T  # (draws, 2F + 3)
    halves = np.split(drawn[:, :-1] / drawn[:, -1:], 2, axis=1)
    gains = [gain(*means) for means in zip(*halves, strict=True)]
    return gain(first.mean(1), second.mean(1)), *np.quantile(gains, (0.025, 0.975)).tolist()


# ---- measuring -----------------------------------------------------------------------------------


def measure(path):
    """Every held-out problem at the learned gamma and at the fixed ones. Raises ValueError.

    -> names (of tasks), clusters, difficulties, gamma, N of each; solved, nfe and objective,
    (F + 1, N), the learned gamma's last.
    """
    saved = read_json(Path(path) / "config.json")
    if saved.get("train_target") == "policy":
        raise ValueError(f"{path} learned no threshold: its --train_target was policy")
    if find_checkpoint(path) == Path(path):
        raise ValueError(f"{path} has no checkpoint yet")
    asked = {"problems": saved.get("eval_problems", 1000), "split": saved.get("eval_split", "")}
    options = evaluate.options_for(path, asked)
    policy, task, problems = evaluate.prepare(options)
    (learned,) = evaluate.decoders_for(options, policy.threshold_head is not None)
    size = 256 if policy.compact_prompts else options.batch_size
    solved, nfe, rewards = [], [], []
    for decoder in [*(replace(learned, level=level) for level in FIXED), learned]:
        how = (policy, task, problems, decoder, options.length, size)
        texts, calls, _, gamma = evaluate.generate(*how)
        pairs = list(zip(problems, texts, strict=True))
        solved.append([bool(task.solved(*pair)) for pair in pairs])
        rewards.append([task.reward(*pair) for pair in pairs])
        nfe.append(calls.tolist())
    lengths = [mixture.completion_length(task, problem, options.length) for problem in problems]
    price = saved.get("nfe_penalty", 0.0) * np.array(nfe) / np.array(lengths)
    is_one, key = not isinstance(task, mixture.TaskMixture), getattr(task, "key", task.prompt)
    return SimpleNamespace(
        names=[options.task if is_one else problem["task"] for problem in problems],
        clusters=[key(problem) for problem in problems],
        difficulties=[difficulty(problem) for problem in problems],
        gamma=np.array(gamma.tolist()), solved=np.array(solved, float), nfe=np.array(nfe),
        objective=np.array(rewards) * (1 - price),
    )  # fmt: skip


def summary(found, name, level, places):
    """A row of the table: some problems of one task, of one difficulty or (level None) of all."""
    hits, gamma = found.solved[-1, places], found.gamma[places]
    clusters = [found.clusters[i] for i in places]
    low, high, k = metrics.cluster_bootstrap_interval((hits > 0).tolist(), clusters)
    deciles = np.quantile(gamma, (0.1, 0.9)).tolist()
    return {
        "task": name, "difficulty": level, "problems": len(places), "clusters": k,
        "gamma": gamma.mean(), "gamma_10": deciles[0], "gamma_90": deciles[1],
        "nfe": found.nfe[-1, places].mean(), "solved": hits.mean(), "solved_low": low,
        "solved_high": high,
    }  # fmt: skip


def findings(found):
    """All that is said of a run, as JSON can hold it."""
    rows, correlations, kinds, gains = [], {}, {}, {}
    for name in dict.fromkeys(found.names):
        own = [i for i, other in enumerate(found.names) if other == name]
        levels = {}
        for i in own:
            levels.setdefault(found.difficulties[i][1], []).append(i)
        kinds[name] = found.difficulties[own[0]][0] if None not in levels else ""
        rows.append(summary(found, name, None, own))
        clusters = [found.clusters[i] for i in own]
        gains[name] = with_interval(gain, found.solved[:, own], found.nfe[:, own], clusters)
        if kinds[name]:
            rows += [summary(found, name, level, levels[level]) for level in sorted(levels)]
            scale = np.array([found.difficulties[i][1] for i in own])
            correlations[name] = rank_correlation(found.gamma[own], scale)
    cells = list(zip(found.names, found.difficulties, strict=True))
    solved, nfe = found.solved.mean(1).tolist(), found.nfe.mean(1).tolist()
    objective = found.objective.mean(1).tolist()
    points = zip([*FIXED, "learned"], solved, nfe, objective, strict=True)
    keys = ("level", "solved", "nfe", "objective")
    more, low, high = with_interval(gain, found.solved, found.nfe, found.clusters)
    earned = with_interval(over_best, found.objective, found.nfe, found.clusters)
    return {
        "problems": len(found.names), "clusters": len(set(found.clusters)), "kinds": kinds,
        "rows": rows, "rank_correlation": correlations,
        "variance_of_log_gamma": variance_shares(np.log(found.gamma), found.names, cells),
        "frontier": [dict(zip(keys, point, strict=True)) for point in points],
        "objective_gain": earned,
        "gain": more, "gain_low": low, "gain_high": high, "gain_within": gains,
    }  # fmt: skip


# ---- words and a picture -------------------------------------------------------------------------


def short(name):
    return name.rpartition(":")[2]


def table(rows):
    """The lines of the table: of each task all its problems, then each difficulty."""
    cells = [("task", "difficulty", "n", "γ", "10 to 90%", "NFE", "solved, %")]
    for row in rows:
        name, level = "", str(row["difficulty"])
        if row["difficulty"] is None:
            name, level = plots.shorten(short(row["task"]), 12), "all"
        spread = f"{row['gamma_10']:.3f} to {row['gamma_90']:.3f}"
        interval = f"({100 * row['solved_low']:.1f} to {100 * row['solved_high']:.1f})"
        solved = f"{100 * row['solved']:.1f} {interval}"
        gamma, nfe = f"{row['gamma']:.3f}", f"{row['nfe']:.2f}"
        cells.append((name, level, str(row["problems"]), gamma, spread, nfe, solved))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for first, *others in cells:
        numbers = map(str.rjust, others, widths[1:])
        yield "  ".join([first.ljust(widths[0]), *numbers])


def words(found):
    """Lines on what gamma follows, and on what that is worth."""
    for name, r in found["rank_correlation"].items():
        kind = KINDS[found["kinds"][name]]
        said = f"{r:+.2f}" if r is not None else "none, for one of the two is always the same"
        yield f"{short(name)}: rank correlation of γ with difficulty ({kind}): {said}."
    if shares := found["variance_of_log_gamma"]:
        tasks, levels, rest = (f"{round(100 * share)}%" for share in shares.values())
        yield (
            f"Of the variance of log γ {tasks} lies between tasks, {levels} between a task's "
            f"difficulties, {rest} is the rest."
        )
    else:
        yield "γ is the same for every prompt."
    *fixed, learned = found["frontier"]
    calls = [point["nfe"] for point in fixed]
    points = 100 * found["gain"]
    said = f"At equal NFE ({learned['nfe']:.2f} calls) the learned γ solves {abs(points):.1f}"
    said += f" points {'less' if points < 0 else 'more'} than one fixed γ"
    said += f" (95% interval {100 * found['gain_low']:+.1f} to {100 * found['gain_high']:+.1f})."
    if not min(calls) <= learned["nfe"] <= max(calls):
        said += f" No fixed γ takes as many calls: compared with the nearest of {min(calls):.2f}"
        said += f" to {max(calls):.2f}."
    yield said
    best = max(fixed, key=lambda point: point["objective"])
    more, low, high = found["objective_gain"]
    said = f"In what it was trained for, reward × (1 - λ · NFE / L): {learned['objective']:.4f}; "
    said += f"the best fixed γ, {best['level']:g}, has {best['objective']:.4f}. "
    yield f"{said}Difference {more:+.4f} ({low:+.4f} to {high:+.4f})."
    if len(found["gain_within"]) > 1:
        for name, (points, low, high) in found["gain_within"].items():
            interval = f"{100 * low:+.1f} to {100 * high:+.1f}"
            said = f"Within {short(name)}, against one fixed γ of its own: {100 * points:+.1f}"
            yield f"{said} points ({interval})."


def draw_thresholds(axis, rows, kinds):
    """Each task's gamma by difficulty: its mean, and a bar from the 10th to the 90th percentile."""
    x, labels, edges = 0, {}, []
    for i, (name, kind) in enumerate(kinds.items()):
        own = [row for row in rows if row["task"] == name]
        own = own[1:] or own  # the first is of all its problems
        places = range(x, x + len(own))
        x += len(own) + 1
        for place, row in zip(places, own, strict=True):
            level = "all" if row["difficulty"] is None else row["difficulty"]
            labels[place] = f"{level}\n({row['problems']})"
        gamma = np.array([[row[key] for row in own] for key in ("gamma", "gamma_10", "gamma_90")])
        edges.append(gamma)
        bars = np.maximum(0, [gamma[0] - gamma[1], gamma[2] - gamma[0]])
        color, line = plots.LINES[i % 4]
        how = dict(marker="os^D"[i % 4], mfc="white" if i % 2 else color, linestyle=line, capsize=3)
        label = f"{short(name)}: {KINDS[kind]}"
        axis.errorbar(places, gamma[0], bars, color=color, mec="black", label=label, **how)
    low, high = (edge(np.concatenate(edges, axis=1)) for edge in (np.min, np.max))
    axis.set(yscale="log", ylim=(low / 1.6, high * 1.6), ylabel="learned threshold γ, nats")
    ticks = [m * 10.0**e for e in range(-4, 2) for m in (1, 2, 3, 5, 7)]
    axis.yaxis.set(major_locator=FixedLocator(ticks), minor_locator=NullLocator())
    axis.yaxis.set_major_formatter("{x:g}")
    axis.set_xticks(list(labels), labels.values(), fontsize=8)
    axis.set_xlabel("difficulty (number of problems)")
    axis.set_title("γ: mean, and 10th to 90th percentile", loc="left", size=10)


def draw_frontier(axis, points):
    """Solved share against calls, all problems together: fixed gammas, and the learned one."""
    *fixed, learned = points
    line = sorted(fixed, key=lambda point: point["nfe"])
    nfe, solved = ([point[key] for point in line] for key in ("nfe", "solved"))
    axis.plot(nfe, solved, "o--", color="0.4", mfc="white", mec="black", label="one γ for all")
    for point in fixed:
        if point["level"] in (*GAMMAS, FIXED[0]):
            where = dict(xytext=(5, -11), textcoords="offset points", fontsize=8)
            axis.annotate(f"{point['level']:g}", (point["nfe"], point["solved"]), **where)
    label = "learned γ, one for each prompt"
    axis.plot(learned["nfe"], learned["solved"], label=label, **plots.INK | STAR)
    axis.set(xlabel="NFE: denoiser calls a completion", ylabel="solved")
    axis.yaxis.set_major_formatter("{x:.1%}")
    axis.margins(x=0.1, y=0.15)
    axis.set_title("all problems together; numbers: the fixed γ", loc="left", size=10)


def draw(said, path, title):
    figure = Figure((11, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_thresholds(left, said["rows"], said["kinds"])
    draw_frontier(right, said["frontier"])
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=9)
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    interval = f"{100 * said['gain_low']:+.1f} to {100 * said['gain_high']:+.1f}"
    note = f"n = {said['problems']} held-out problems in {said['clusters']} clusters, greedy. The "
    note += f"learned γ against one fixed γ at equal NFE: {100 * said['gain']:+.1f} points solved "
    note += f"(95% interval {interval}, over clusters)."
    figure.supxlabel(note, fontsize=8, color="0.3")
    plots.save(figure, path)


def thresholds(path, out):
    """Says it, and writes out/thresholds.json and out/thresholds.png. Raises ValueError."""
    path, out = Path(path), Path(out)
    said = {"run": str(path), **findings(measure(path))}
    out.mkdir(parents=True, exist_ok=True)
    print(*table(said["rows"]), "", sep="\n")
    print(*(fill(line, 80, subsequent_indent="  ") for line in words(said)), sep="\n")
    files.write_json(out / "thresholds.json", said)
    draw(said, out / "thresholds.png", f"{path.name}: what the learned γ follows, and its worth")
    print("written:", out / "thresholds.png", out / "thresholds.json")
