"""Scoring a file of completions without the model that wrote them, and writing such a file.

    python evaluate.py --completions FILE.jsonl

Each line of the file is JSON: {"task": "gsm8k", "problem": {...}, "text": "..."}. An optional
"name" says what wrote it; completions with the same name and task are scored together. Other fields
are ignored.
"""

import json
from pathlib import Path
from statistics import fmean

from evaluation.metrics import cluster_interval
from evaluation.paired import describe_problems, difference_table, number_clusters
from models.errors import as_value_error
from models.inputs import bare_name


def append_completions(path, name, task, problems, texts, nfe):
    """Appends completions to a file that score_file reads.

    name                  says what wrote them
    task                  as --task names it; if it names several, each problem names its own
    problems, texts, nfe  lists with one item per completion

    Raises a one-line ValueError if the file cannot be written.
    """
    rows = []
    for problem, text, calls in zip(problems, texts, nfe, strict=True):
        task_name = task
        if "," in task:  # tasks/mixture.py added the name to the problem
            task_name = problem["task"]
            problem = {key: value for key, value in problem.items() if key != "task"}
        rows.append(
            {
                "name": name,
                "task": bare_name(task_name),
                "problem": problem,
                "text": text,
                "nfe": int(calls),
            }
        )
    with as_value_error(f"{path} cannot be written"), open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def score_file(path, tasks):
    """The scores of the completions in a file: a dict for each name and task, in the file's order.

    path   the file's path
    tasks  {name: task}, the tasks that a line may name

    Raises ValueError for a file that cannot be read or is empty, and, naming the line, for
    anything that is not a completion.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({error})") from None
    scores = {}  # {(name, task): their completions' scores}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            name, task_name, score = score_line(line, tasks)
        except OSError:  # not the line's fault: formulas cannot be compared on this machine
            raise
        except Exception as error:  # a hand-written line can make a task raise anything
            expected = f'{path}, line {number}: expected {{"task", "problem", "text"}}'
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
            raise ValueError(f"{expected} ({reason})") from None
        scores.setdefault((name, task_name), []).append(score)
    if not scores:
        raise ValueError(f"{path} holds no completions")
    keys = [score["cluster"] for task_scores in scores.values() for score in task_scores]
    number_of_cluster = number_clusters(keys)
    return [
        summarise(*names, task_scores, number_of_cluster) for names, task_scores in scores.items()
    ]


def score_line(line, tasks):
    """Returns (name, task name, scores) for the completion in a line of JSON; scores is a dict."""
    row = json.loads(line)
    name = row.get("name", "")
    task_name = row["task"]
    problem = row["problem"]
    text = row["text"]
    if task_name not in tasks:
        raise ValueError(f"unknown task {task_name!r}: choose one of {', '.join(tasks)}")
    if not isinstance(text, str) or not isinstance(name, str):
        raise ValueError("text (and name, if given) has to be a string")
    task = tasks[task_name]
    if hasattr(task, "problem_from_row"):
        problem = task.problem_from_row(problem)  # raises for a problem that --data would refuse
    cluster_of = getattr(task, "key", task.prompt)
    score = {
        "cluster": cluster_of(problem),
        "solved": task.solved(problem, text),
        "reward": task.reward(problem, text),
    }
    if hasattr(task, "cells"):
        score["cells"] = task.cells(problem, text)
    return name, task_name, score


def summarise(name, task_name, scores, number_of_cluster):
    """The row of one name and task: means over completions, with the accuracy's interval.

    number_of_cluster: {cluster: its number}, the same for all rows, so that rows with the same
    "cluster_each" have the same problems.
    """
    solved = [score["solved"] for score in scores]
    clusters = [score["cluster"] for score in scores]
    low, high, num_clusters = cluster_interval(solved, clusters)
    row = {
        "name": name,
        "task": task_name,
        "completions": len(scores),
        "clusters": num_clusters,
        "solved": fmean(solved),
        "solved_low": low,
        "solved_high": high,
        "reward": fmean(score["reward"] for score in scores),
    }
    row |= describe_problems(solved, clusters, number_of_cluster)
    if "cells" in scores[0]:
        row["cells"] = fmean(score["cells"] for score in scores)
    return row


def completions_table(rows):
    """The rows of score_file as lists of strings, the header first."""
    table = [["", "completions", "clusters", "solved", "95% interval", "reward", "cells"]]
    for row in rows:
        table.append(
            [
                f"{row['name']} {row['task']}".strip(),
                str(row["completions"]),
                str(row["clusters"]),
                f"{row['solved']:.1%}",
                f"{row['solved_low']:.1%} to {row['solved_high']:.1%}",
                f"{row['reward']:.3f}",
                f"{row['cells']:.1%}" if "cells" in row else "",
            ]
        )
    return table


def completions_differences(rows):
    """Yields a table for each task in score_file's rows: each name against the first one."""
    for task in dict.fromkeys(row["task"] for row in rows):
        rows_of_task = [row for row in rows if row["task"] == task]
        labels = [f"{row['name']} {row['task']}".strip() for row in rows_of_task]
        yield difference_table(rows_of_task, labels)
