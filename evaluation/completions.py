"""Scoring a file of completions that some model wrote elsewhere, without that model.

    python evaluate.py --completions FILE.jsonl

Each line of the file is JSON: {"task": "gsm8k", "problem": {...}, "text": "..."}.
"""

import json
from collections import defaultdict
from pathlib import Path
from statistics import fmean

from evaluation.metrics import cluster_bootstrap_interval


def score_file(path, tasks):
    """A table of what the completions in a file are worth: lists of strings, the header first.

    tasks: {name: task}. Raises ValueError, naming the line, for anything that is not a completion.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({error})") from None
    scores = defaultdict(list)
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
                scores[row["task"]].append(score(tasks[row["task"]], row["problem"], row["text"]))
            except Exception as error:  # whatever a hand-written line can do to a task
                expected = f'{path}, line {number}: expected {{"task", "problem", "text"}}'
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
                raise ValueError(f"{expected} ({reason})") from None
    if not scores:
        raise ValueError(f"{path} holds no completions")
    table = [["", "completions", "clusters", "solved", "95% interval", "reward", "cells"]]
    for name, rows in scores.items():
        solved = [row["solved"] for row in rows]
        low, high, clusters = cluster_bootstrap_interval(solved, [row["cluster"] for row in rows])
        cells = [row["cells"] for row in rows if row["cells"] is not None]
        table.append([
            name,
            str(len(rows)),
            str(clusters),
            f"{fmean(solved):.1%}",
            f"{low:.1%} to {high:.1%}",
            f"{fmean(row['reward'] for row in rows):.3f}",
            f"{fmean(cells):.1%}" if cells else "",
        ])  # fmt: skip
    return table


def score(task, problem, text):
    """What one completion is worth, as a dict."""
    if not isinstance(text, str):
        raise ValueError("its text is no string")
    return {
        "cluster": task.key(problem),
        "solved": task.solved(problem, text),
        "reward": task.reward(problem, text),
        "cells": task.cells(problem, text) if hasattr(task, "cells") else None,
    }
