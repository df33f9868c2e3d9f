"""What learning a threshold for each prompt is good for: gamma by task and difficulty.

    python -m experiments.thresholds runs/NAME
    python -m experiments.thresholds runs/NAME-?        and the mean over runs of several seeds

First: does the head tell prompts apart? On a run's held-out problems, completed greedily, gamma is
listed by task and by difficulty: the blanks of a sudoku, the inverse operations (- and /) in
countdown's tidiest expression. Then: does it help? There are two kinds of rivals:

    at equal calls    one gamma for all problems. Interpolating between fixed gammas, how much would
                      it solve in as many calls as the learned gamma takes?
    in the reward     solved x (1 - lambda NFE / L), which gamma was trained for. The rival is the
                      best fixed gamma, one for all problems or one for each task. It is chosen on
                      half of the clusters and scored on the other half, and vice versa: the best
                      of eleven, scored on the problems it was chosen on, would be good by luck too.

Shapes: N problems, F fixed gammas, K clusters of problems.
"""

# ruff: noqa: E402 (flags are checked before torch is imported, which takes seconds)

import sys
import zlib
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
        prog="python -m experiments.thresholds",
        usage="%(prog)s RUN ... [flags]",
        description="""\
What is the learned threshold good for?

Prints the gamma that a run's threshold head gives to held-out problems, by task
and difficulty, and how much more it solves or earns than fixed gammas; for
several runs also the mean.""",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=existing_folder,
        metavar="RUN",
        help="the folder of a run that trained its threshold head",
    )
    add_task_file_flag(parser)
    add_out_flag(parser, "thresholds", content='"reward_gains"', has_plot=False)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    terminal.prepare()
    parse_flags()

from dataclasses import dataclass, replace
from textwrap import fill

import numpy as np
import torch

import evaluate
from evaluation import metrics
from evaluation.options import resolve_options
from evaluation.tables import WIDTH, print_columns, shorten
from experiments.intervals import interval, problem_half_width, spread
from models.checkpoints import find_checkpoint, read_run_config
from models.inputs import bare_name
from tasks import mixture
from tasks.expressions import solutions
from training import files

FIXED_GAMMAS = (0.003, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)  # nats


def difficulty(problem):
    """(kind, number): a problem's difficulty, or ("", None) if it is unknown."""
    if "puzzle" in problem:
        return "blanks", problem["puzzle"].count("0")
    if len(problem.get("numbers", ())) == 3 and "target" in problem:
        expressions = solutions(*sorted(problem["numbers"], reverse=True))
        expression = expressions.get(problem["target"])
        if expression:
            return "inverse", expression.count("-") + expression.count("/")
    return "", None


# ---- measuring -----------------------------------------------------------------------------------


@dataclass
class Measurements:
    """Results on a run's N held-out problems, at F fixed gammas and at the learned one."""

    tasks: list  # N names
    clusters: list  # N
    difficulties: list  # N pairs (kind, number)
    gamma: np.ndarray  # (N,) nats, the learned one
    solved: np.ndarray  # (F + 1, N) of 0 and 1, the learned gamma's last
    nfe: np.ndarray  # (F + 1, N)
    price: np.ndarray  # (N,) lambda / L: what a call costs of a solved problem's reward

    @property
    def reward(self):
        """What each problem earns, (F + 1, N)."""
        return self.solved * (1 - self.price * self.nfe)


def measure(path, task=""):
    """The Measurements of a run. Raises ValueError for one without a learned threshold.

    task: the run's, if it is in a file.
    """
    path = Path(path)
    config = read_run_config(path)
    if config.train_target == "policy":
        raise ValueError(f"{path} learned no threshold: its --train_target was policy")
    if find_checkpoint(path) == path:
        raise ValueError(f"{path} has no checkpoint yet")
    flags = {
        "problems": config.eval_problems,
        "split": config.eval_split,
    }
    if task:
        flags["task"] = task
    options = resolve_options(path, flags)
    policy, task, problems, lengths = evaluate.load(options)
    length = lengths[0]
    [learned] = evaluate.decoders_for(options, length, policy.threshold_head is not None)
    decoders = [replace(learned, level=gamma) for gamma in FIXED_GAMMAS]
    decoders.append(learned)
    all_solved = []
    all_nfe = []
    with policy.remembering_states():  # many canvases come at several thresholds
        for decoder in decoders:
            outcomes = evaluate.generate(
                policy,
                task,
                problems,
                decoder,
                length=length,
                batch_size=256 if policy.compact_prompts else options.batch_size,
            )
            all_solved.append(
                [
                    float(task.solved(problem, text))
                    for problem, text in zip(problems, outcomes.texts, strict=True)
                ]
            )
            all_nfe.append(outcomes.nfe.tolist())
    is_mixture = isinstance(task, mixture.TaskMixture)
    key_of = getattr(task, "key", task.prompt)
    return Measurements(
        tasks=[problem["task"] if is_mixture else options.task for problem in problems],
        clusters=[key_of(problem) for problem in problems],
        difficulties=[difficulty(problem) for problem in problems],
        gamma=np.array(outcomes.threshold.tolist()),  # of the last decoder, the learned one
        solved=np.array(all_solved),
        nfe=np.array(all_nfe),
        price=np.array(
            [
                config.nfe_penalty / mixture.completion_length(task, problem, length)
                for problem in problems
            ]
        ),
    )


# ---- statistics ----------------------------------------------------------------------------------


def gain(solved, nfe):
    """How much more the learned gamma solves than one fixed gamma would in as many calls.

    solved, nfe: (F + 1,) means, the learned gamma's last. Between fixed gammas the solved share is
    interpolated linearly in calls; beyond the outermost ones it is constant.
    """
    order = np.argsort(nfe[:-1], kind="stable")
    rival = np.interp(nfe[-1], nfe[:-1][order], solved[:-1][order])
    return solved[-1] - rival


def gain_at_equal_nfe(solved, nfe, clusters, draws=2000):
    """The gain over all problems, and bootstrap draws of it over clusters: a number, (draws,).

    solved, nfe (F + 1, N), clusters N names. A drawn cluster includes all its problems with their
    results at every gamma, so all gammas are compared on the same problems.
    """
    names = sorted(set(clusters))
    is_member = np.array([[name == cluster for cluster in clusters] for name in names], float)
    times_drawn = metrics.bootstrap_weights(len(names), draws).numpy() @ is_member  # (draws, N)
    number = times_drawn.sum(axis=1, keepdims=True)
    drawn_solved = times_drawn @ solved.T / number  # (draws, F + 1)
    drawn_nfe = times_drawn @ nfe.T / number
    gains = [gain(*means) for means in zip(drawn_solved, drawn_nfe, strict=True)]
    return gain(solved.mean(axis=1), nfe.mean(axis=1)), np.array(gains)


def gain_over_chosen(reward, clusters, groups, draws=2000):
    """How much more the learned gamma earns than the best fixed one, chosen on other problems.

    reward    (F + 1, N), the learned gamma's last
    clusters  N names; their checksums divide them into halves. One half's best gamma is the rival
              on the other half
    groups    N names; each group has its own rival

    Returns the gain, and bootstrap draws of it (draws,), all with the rivals chosen on the sample
    itself. (If each draw chose its own, draws would vary more than the gain does: a 95% interval
    would have 99% coverage.)
    """
    names = sorted(set(clusters))
    times_drawn = metrics.bootstrap_weights(len(names), draws).numpy()
    times_drawn = np.vstack([np.ones(len(names)), times_drawn])  # first the sample itself
    place_of = {name: place for place, name in enumerate(names)}
    weight = times_drawn[:, [place_of[cluster] for cluster in clusters]]  # (1 + draws, N)
    half = np.array([zlib.crc32(f"half {cluster}".encode()) % 2 for cluster in clusters])
    groups = np.array(groups)
    total = np.zeros(len(weight))
    for group in set(groups.tolist()):
        earned = []  # by each half: (1 + draws, F + 1)
        for side in (0, 1):
            is_here = (groups == group) & (half == side)
            earned.append(weight[:, is_here] @ reward[:, is_here].T)
        for here, elsewhere in (earned, earned[::-1]):
            best = elsewhere[0, :-1].argmax()  # chosen on the sample itself, for all draws
            total += here[:, -1] - here[:, best]
    gains = total / weight.sum(axis=1)
    return gains[0], gains[1:]


def summarise(measured, task, level, places):
    """A row of the table: a task's problems of one difficulty, or (level None) all of them.

    places: the problems' indices.
    """
    solved = measured.solved[-1, places]
    gamma = measured.gamma[places]
    low, high, number_of_clusters = metrics.cluster_interval(
        (solved > 0).tolist(), [measured.clusters[i] for i in places]
    )
    return {
        "task": task,
        "difficulty": level,
        "problems": len(places),
        "clusters": number_of_clusters,
        "gamma": gamma.mean(),
        "gamma_10": np.quantile(gamma, 0.1),
        "gamma_90": np.quantile(gamma, 0.9),
        "nfe": measured.nfe[-1, places].mean(),
        "solved": solved.mean(),
        "solved_low": low,
        "solved_high": high,
    }


def report_on(measured):
    """Everything that is reported about a run, a dict for JSON."""
    rows = []
    for task in dict.fromkeys(measured.tasks):
        places = [i for i, name in enumerate(measured.tasks) if name == task]
        by_level = {}
        for i in places:
            by_level.setdefault(measured.difficulties[i][1], []).append(i)
        rows.append(summarise(measured, task, None, places))
        if None not in by_level:
            for level in sorted(by_level):
                rows.append(summarise(measured, task, level, by_level[level]))
    frontier = [
        {"level": level, "solved": solved, "nfe": nfe}
        for level, solved, nfe in zip(
            [*FIXED_GAMMAS, "learned"],
            measured.solved.mean(axis=1).tolist(),
            measured.nfe.mean(axis=1).tolist(),
            strict=True,
        )
    ]
    number_of_clusters = len(set(measured.clusters))
    learned_gain, draws = gain_at_equal_nfe(measured.solved, measured.nfe, measured.clusters)
    low, high = interval(torch.tensor(draws), number_of_clusters)
    gains = {}
    for rival, groups in rivals(measured).items():
        value, draws = gain_over_chosen(measured.reward, measured.clusters, groups)
        edges = interval(torch.tensor(draws), number_of_clusters)
        gains[rival] = {"gain": value, "interval": edges}
    return {
        "problems": len(measured.tasks),
        "clusters": len(set(measured.clusters)),
        "rows": rows,
        "frontier": frontier,
        "gain": learned_gain,
        "gain_low": low,
        "gain_high": high,
        "reward_gains": gains,
    }


def rivals(measured):
    """{name of a rival: the group of each problem, N}"""
    return {
        "the best γ for all": ["all"] * len(measured.tasks),
        "the best γ of each task": measured.tasks,
    }


def mean_gains(all_measured):
    """The gains over runs of several seeds, {name: a spread over seeds and problems}.

    Raises ValueError for runs that were not asked the same problems.
    """
    first = all_measured[0]
    if any(measured.clusters != first.clusters for measured in all_measured):
        raise ValueError("the runs were not asked the same problems: compare runs of one task")
    all_pairs = {
        "solved, points above one fixed γ at equal NFE": [
            gain_at_equal_nfe(measured.solved, measured.nfe, measured.clusters)
            for measured in all_measured
        ]
    }
    for rival, groups in rivals(first).items():
        all_pairs[f"reward x 100 above {rival}"] = [
            gain_over_chosen(measured.reward, measured.clusters, groups)
            for measured in all_measured
        ]
    means = {}
    for name, pairs in all_pairs.items():
        draws = np.mean([draws for _, draws in pairs], axis=0)  # the same clusters in each run
        half = problem_half_width(torch.tensor(draws), len(set(first.clusters)))
        means[name] = spread([value for value, _ in pairs], half)
    return means


# ---- the table -----------------------------------------------------------------------------------


def table(rows):
    """Lists of strings: for each task all its problems, then each difficulty."""
    lines = [["task", "difficulty", "n", "γ", "10 to 90%", "NFE", "solved, %"]]
    for row in rows:
        is_whole_task = row["difficulty"] is None
        low = 100 * row["solved_low"]
        high = 100 * row["solved_high"]
        lines.append(
            [
                shorten(bare_name(row["task"]), 12) if is_whole_task else "",
                "all" if is_whole_task else str(row["difficulty"]),
                str(row["problems"]),
                f"{row['gamma']:.3f}",
                f"{row['gamma_10']:.3f} to {row['gamma_90']:.3f}",
                f"{row['nfe']:.2f}",
                f"{100 * row['solved']:.1f} ({low:.1f} to {high:.1f})",
            ]
        )
    return lines


def describe_gain(report):
    """The learned gamma's gain, in a sentence or two."""
    *fixed, learned = report["frontier"]
    calls = [point["nfe"] for point in fixed]
    points = 100 * report["gain"]
    text = (
        f"At equal NFE ({learned['nfe']:.2f} calls) the learned γ solves {abs(points):.1f} points "
        f"{'less' if points < 0 else 'more'} than one fixed γ "
        f"(95% interval {100 * report['gain_low']:+.1f} to {100 * report['gain_high']:+.1f})."
    )
    if not min(calls) <= learned["nfe"] <= max(calls):
        text += (
            " No fixed γ takes that many calls, so it is compared with the nearest of "
            f"{min(calls):.2f} to {max(calls):.2f}."
        )
    return text


def describe_reward_gains(gains):
    """A line for each rival of one run."""
    for rival, row in gains.items():
        low, high = row["interval"]
        edges = "" if low is None else f" (95% interval {100 * low:+.1f} to {100 * high:+.1f})"
        yield (
            f"In reward x 100 the learned γ earns {100 * row['gain']:+.1f}{edges} against {rival}, "
            "chosen on half of the clusters and scored on the other."
        )


# ---- the program ---------------------------------------------------------------------------------


def thresholds(paths, out, task=""):
    """Prints the tables; writes thresholds.json. Raises ValueError."""
    reports = []
    all_measured = []
    for path in paths:
        all_measured.append(measure(path, task))
        reports.append({"run": str(path)} | report_on(all_measured[-1]))
        report = reports[-1]
        print_columns(table(report["rows"]))
        print()
        for sentence in (describe_gain(report), *describe_reward_gains(report["reward_gains"])):
            print(fill(sentence, WIDTH, subsequent_indent="  "))
    if len(paths) > 1:
        print(f"\nMean of {len(paths)} runs, ± half of the 95% interval over seeds and problems:")
        for name, estimate in mean_gains(all_measured).items():
            print(f"  {name}: {100 * estimate['mean']:+.2f} ± {100 * estimate['half']:.2f}")
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    files.write_json(folder / "thresholds.json", reports)
    print("written:", folder / "thresholds.json")


def main(arguments=None):
    """The program. Returns its exit status: 0, 2 (bad input), 130 (Ctrl-C)."""
    options = parse_flags(arguments)
    return exit_status(
        "experiments.thresholds", lambda: thresholds(options.runs, options.out, options.task)
    )


if __name__ == "__main__":
    sys.exit(main())
