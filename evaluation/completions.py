"""Scoring a file of completions that some model wrote elsewhere, without that model.

    python evaluate.py --completions FILE.jsonl

Each line of the file is JSON: {"task": "gsm8k", "problem": {...}, "text": "..."}.
"""

import json
from pathlib import Path
from statistics import fmean

from evaluation.metrics import cluster_interval


def score_file(path, tasks):
    """What the completions in a file are worth: a dict for each task, in the file's order.

    path   of the file, JSON lines
    tasks  {name: task}, those that a line may name

    Raises ValueError for a file that cannot be read or is empty, and, naming the line, for
    anything that is not a completion.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({error})") from None
    scores = {}  # {task: its completions' scores}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            name, score = score_line(line, tasks)
        except OSError:  # no fault of the line: what compares formulas cannot run here
            raise
        except Exception as error:  # whatever a hand-written line can do to a task
            expected = f'{path}, line {number}: expected {{"task", "problem", "text"}}'
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
            raise ValueError(f"{expected} ({reason})") from None
        scores.setdefault(name, []).append(score)
    if not scores:
        raise ValueError(f"{path} holds no completions")
    return [summarise(name, task_scores) for name, task_scores in scores.items()]


def score_line(line, tasks):
    """Returns (task name, the scores of the completion in this line of JSON, a dict)."""
    row = json.loads(line)
    name = row["task"]
    problem = row["problem"]
    text = row["text"]
    if name not in tasks:
        raise ValueError(f"unknown task {name!r}: choose one of {', '.join(tasks)}")
    if not isinstance(text, str):
        raise ValueError("text has to be a string")
    task = tasks[name]
    problem = task.problem_from_row(problem)  # raises for one that --data would refuse
    score = {
        "cluster": task.key(problem),
        "solved": task.solved(problem, text),
        "reward": task.reward(problem, text),
    }
    if hasattr(task, "cells"):
        score["cells"] = task.cells(problem, text)
    return name, score


def summarise(name, scores):
    """The row of one task: means over its completions, and the interval of the solved share."""
    solved = [score["solved"] for score in scores]
    clusters = [score["cluster"] for score in scores]
    low, high, num_clusters = cluster_interval(solved, clusters)
    row = {
        "task": name,
        "completions": len(scores),
        "clusters": num_clusters,
        "solved": fmean(solved),
        "solved_low": low,
        "solved_high": high,
        "reward": fmean(score["reward"] for score in scores),
    }
    if "cells" in scores[0]:
        row["cells"] = fmean(score["cells"] for score in scores)
    return row


def completions_table(rows):
    """The rows of score_file as lists of strings, the header first."""
    table = [["", "completions", "clusters", "solved", "95% interval", "reward", "cells"]]
    for row in rows:
        table.append(
            [
                row["task"],
                str(row["completions"]),
                str(row["clusters"]),
                f"{row['solved']:.1%}",
                f"{row['solved_low']:.1%} to {row['solved_high']:.1%}",
                f"{row['reward']:.3f}",
                f"{row['cells']:.1%}" if "cells" in row else "",
            ]
        )
    return table
