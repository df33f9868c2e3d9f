"""The results that a run prints: a table of base and trained model, and completions of both."""

from textwrap import fill, wrap

from evaluation.paired import difference_interval, edges_in_brackets, split_each
from evaluation.tables import WIDTH, count_of, printable, shorten
from models.checkpoints import check_fields, read_rows
from models.inputs import bare_name

GAMMAS = (0.01, 0.03, 0.1, 0.3, 1.0)  # thresholds of a run's frontier, in nats

# ---- reading back what a run has measured --------------------------------------------------------

SCORES = {
    "problems": int,
    "clusters": int,
    "solved": float,
    "solved_low": float,
    "solved_high": float,
    "nfe": float,
    "tokens_per_call": float,
    "threshold_mean": float,
    "threshold_std": float,
}
ROW = SCORES | {
    "name": str,
    "step": int,
    "level": int | float | str,  # a gamma in nats, or "learned"
    "length": int,
    "block_length": int,
}
# Entries on each problem (evaluation/paired.py). The rows of an older version lack some.
EACH = ("solved_each", "nfe_each", "cluster_each")
COMPLETION = {
    "name": str,
    "question": str,
    "text": str,
    "nfe": int,
    "solved": bool,
}
RESULTS = {"eval": ROW, "frontier": ROW, "completions": COMPLETION}


def has_results(run_dir):
    """Whether a run has measured its base: all files of RESULTS are there.

    Raises ValueError if one is broken, so that this is noticed before training.
    """
    if not all((run_dir / f"{name}.json").exists() for name in RESULTS):
        return False
    for name in RESULTS:
        read_results(run_dir, name)
    return True


def read_results(run_dir, name):
    """The rows of a run's eval.json, frontier.json or completions.json. Raises ValueError."""
    path = run_dir / f"{name}.json"
    rows = read_rows(path, RESULTS[name])
    for row in rows:
        check_each(row, where=f"cannot read {path}: {row['name']}")
        parts = row.get("tasks", {})
        check_fields(parts, {}, where=f"cannot read {path}: tasks")
        for task, part in parts.items():
            check_fields(part, SCORES | {"length": int}, where=f"cannot read {path}: {task}")
            check_each(part, where=f"cannot read {path}: {task}")
    if not any(row["name"] == "base" for row in rows):
        raise ValueError(f"cannot read {path} (it has no row of the base)")
    return rows


def check_each(row, where):
    """Raises ValueError unless a row's EACH entries hold one whole number for each problem."""
    keys = [key for key in EACH if key in row]
    check_fields(row, dict.fromkeys(keys, str), where)
    columns = [split_each(row, key) for key in keys]
    if len({len(column) for column in columns}) > 1:
        raise ValueError(f"{where}: {', '.join(keys)} are not of the same number of problems")
    if not all(value.isdecimal() for column in columns for value in column):
        raise ValueError(f"{where}: {', '.join(keys)} are not all whole numbers")


# ---- what is printed -----------------------------------------------------------------------------


def describe_base(row):
    """A line about the base model. row: its row of evaluate.evaluate."""
    return (
        f"base: {row['solved']:.1%} of {count_problems(row)} solved, {row['nfe']:.2f} calls each, "
        f"at γ {gamma_text(row)}"
    )


def print_summary(rows, frontier, completions):
    """Print the table of base and trained model, what changed, and three completions of each.

    rows, frontier, completions: the rows of eval.json, frontier.json and completions.json.
    """
    base_rows = [row for row in frontier if row["name"] == "base"]
    best_base = max(base_rows, key=lambda row: (row["solved"], -row["nfe"]))
    base, *trained_rows = rows
    table_rows = [base]
    if best_base["level"] != base["level"]:
        table_rows.append(best_base | {"name": "base at its best γ"})
    table_rows += trained_rows
    print()
    for line in results_table(table_rows):
        print(line)
    print()
    for line in describe_results(trained_rows[0], best_base, has_choice=len(base_rows) > 1):
        print(fill(line, WIDTH, subsequent_indent="  "))
    print()
    for line in describe_completions(completions, base):
        print(line)
    print()


def results_table(rows):
    """The lines of a table of evaluate.evaluate's rows, then what all rows share.

    If a model has several tasks, its row is followed by a line for each task.
    """
    table = [["", "γ", "solved, %", "NFE", "tokens/call"]]
    for row in rows:
        table.append(table_cells(row["name"], row))
        for task, part in row.get("tasks", {}).items():
            table.append(table_cells(f"  {shorten(bare_name(task), 22)}", row | part))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for name, *numbers in table:
        yield "  ".join([name.ljust(widths[0]), *map(str.rjust, numbers, widths[1:])])

    row = rows[0]
    lengths = {part["length"] for part in row.get("tasks", {"": row}).values()}
    lengths = " or ".join(str(length) for length in sorted(lengths))
    blocks = ""
    if row["block_length"] < row["length"]:
        blocks = f", blocks of {row['block_length']}"
    clusters = count_of(row["clusters"], "cluster")
    yield from wrap(
        f"{count_problems(row)} in {clusters}, greedy, {lengths} tokens a completion{blocks}. In "
        "brackets: the 95% interval, over clusters. NFE: calls per completion.",
        WIDTH,
    )


def table_cells(name, row):
    """One line of the table, a list of strings."""
    interval = f"{100 * row['solved_low']:.1f} to {100 * row['solved_high']:.1f}"
    return [
        name,
        gamma_text(row),
        f"{solved_percent(row):.1f} ({interval})",
        f"{nfe_shown(row):.2f}",
        f"{row['tokens_per_call']:.2f}",
    ]


def describe_results(trained, best_base, has_choice):
    """Two lines on how accuracy and speed changed. With several tasks, also a line for each.

    A difference is followed by its 95% interval, paired by problem. The base's gamma was chosen on
    these very problems, which favours the base a little.

    trained, best_base  rows of evaluate.evaluate; the base's is the one at its best gamma
    has_choice          whether the base was measured at more than one gamma
    """
    at_gamma = "its best γ," if has_choice else "γ"
    lines = [
        f"Accuracy: {solved_percent(best_base)}% (base at {at_gamma} {gamma_text(best_base)}) to "
        f"{solved_percent(trained)}% of {count_problems(trained)}, {gain(trained, best_base)}.",
        f"Speed: {nfe_shown(best_base):.2f} (the same base) to {nfe_shown(trained):.2f} calls per "
        f"completion, {change_of_calls(trained, best_base)}.",
    ]
    for task, part in trained.get("tasks", {}).items():
        base_part = best_base.get("tasks", {}).get(task)
        if base_part is not None:
            changes = f"{gain(part, base_part)}; calls: {change_of_calls(part, base_part)}"
            lines.append(f"{shorten(bare_name(task), 22)}: {changes}.")
    return lines


def gain(trained, base):
    """The difference of two rows' accuracy in points, in words, with its interval."""
    points = solved_percent(trained) - solved_percent(base)
    change = f"{points:+.1f} points" if points else "no change"
    interval = difference_interval(trained, base, "solved")
    return change + edges_in_brackets(interval, scale=100, digits=1)


def change_of_calls(trained, base):
    """The difference of two rows' calls in percent, in words, with its interval in calls."""
    percent = round(100 * (nfe_shown(trained) / nfe_shown(base) - 1))
    change = "about as many"
    if percent:
        change = f"{abs(percent)}% {'more' if percent > 0 else 'fewer'}"
    interval = difference_interval(trained, base, "nfe")
    return change + edges_in_brackets(interval, scale=1, digits=2, unit=" calls")


def describe_completions(completions, row):
    """Lines with what base and trained model wrote for the same problems, of WIDTH columns.

    completions: the rows of completions.json, first the base's and then the trained model's.
    row: any row of eval.json, for the number of problems.
    """
    n = len(completions) // 2
    yield f"The first {n} of {count_problems(row)}, greedy, each model at its own γ:"
    for base, trained in zip(completions[:n], completions[n:], strict=True):
        yield shorten(f"  {printable(base['question'])}", WIDTH)
        for completion in (base, trained):
            mark = "✓" if completion["solved"] else "✗"
            line = f"    {completion['name']:7}  {mark} NFE {completion['nfe']}  "
            yield shorten(line + printable(completion["text"]), WIDTH)


def count_problems(row):
    return count_of(row["problems"], "held-out problem")


def gamma_text(row):
    """A fixed gamma, or the mean and standard deviation of a learned one."""
    if row["level"] != "learned":
        return f"{row['level']:g}"
    return f"{row['threshold_mean']:.3f} σ{row['threshold_std']:.3f}"


def solved_percent(row):
    """Rounded as printed, so that printed differences match the printed numbers."""
    return round(100 * row["solved"], 1)


def nfe_shown(row):
    """Rounded as printed, for the same reason."""
    return round(row["nfe"], 2)
