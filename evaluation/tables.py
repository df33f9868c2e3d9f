"""Tables for the terminal: rows of evaluate.evaluate, and the settings they share."""

from textwrap import fill

from evaluation.paired import difference_table

WIDTH = 80  # columns of a terminal
NAME_WIDTH = 28  # of a run's name in a table

# Settings that can differ from row to row. Those that all rows share are printed above the table.
SETTINGS = (
    "task",
    "decoder",
    "temperature",
    "length",
    "block_length",
    "cache",
    "problems",
    "clusters",
)
AUP_EXPLAINED = (
    "AUP: accuracy under parallelism (d3LLM), the area under solved % against tokens per call, "
    "with a penalty below the best accuracy."
)
DIFFERENCES_EXPLAINED = "In brackets: 95% intervals, paired by problem, over clusters."


def print_table(rows):
    """Print rows of evaluate.evaluate: first the settings they share, then a table of the rest.

    Below it is printed by how much each row differs from the first, if both have the same problems.

    Each row has a "name" in addition to what `evaluate` returns. A score has a column if every row
    has it.
    """
    differing = [
        key for key in ("name", "adapter", *SETTINGS) if len({row.get(key) for row in rows}) > 1
    ]
    cells_of_rows = [table_cells(row, differing, rows) for row in rows]
    header = ["" if title == "name" else title for title in cells_of_rows[0]]
    shared = conditions(rows)
    if "name" not in differing:
        shared = f"{rows[0]['name']}: {shared}"
    print(fill(shared, WIDTH))
    print_columns([header, *(list(cells.values()) for cells in cells_of_rows)])
    if "AUP" in header:
        print(fill(AUP_EXPLAINED, WIDTH))
    labels = []
    for cells in cells_of_rows:
        texts = [cells[key] for key in (*differing, "level")]
        labels.append(" ".join(text for text in texts if text))
    print_differences(difference_table(rows, labels))


def print_differences(table):
    """Print a table of evaluation/paired.py, unless nothing can be compared."""
    if len(table) > 1:
        print()
        print_columns(table)
        print(fill(DIFFERENCES_EXPLAINED, WIDTH))


def table_cells(row, differing, rows):
    """One row of the table, {title: text}. All `rows` together decide which columns there are."""
    cells = {key: shorten_name(str(row[key]), NAME_WIDTH) for key in differing}
    cells["level"] = str(row["level"])
    if any(other["decoder"] == "eb" for other in rows):
        cells["gamma"] = ""
        if row["decoder"] == "eb":
            cells["gamma"] = f"{row['threshold_mean']:.3f} σ {row['threshold_std']:.3f}"
    cells["solved"] = f"{row['solved']:.1%}"
    if all("pass_at_n" in other for other in rows):
        cells[f"pass@{row['samples']}"] = f"{row['pass_at_n']:.1%}"
    cells["95% interval"] = f"{row['solved_low']:.1%} to {row['solved_high']:.1%}"
    if all("cells" in other for other in rows):
        cells["cells"] = f"{row['cells']:.1%}"
    cells["reward"] = f"{row['reward']:.3f}"
    cells["NFE"] = f"{row['nfe']:.2f}"
    cells["tokens/call"] = f"{row['tokens_per_call']:.2f}"
    if all("aup" in other for other in rows):
        cells["AUP"] = f"{row['aup']:.1f}"
    return cells


def print_columns(table):
    """Print a list of lists of strings, the header first, as right-aligned columns."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(map(str.rjust, line, widths)).rstrip())


def conditions(rows):
    """What all rows of evaluate.evaluate share, in words: "greedy, length 10, one block, ..."."""
    phrases = []
    for setting in SETTINGS:
        values = {row.get(setting) for row in rows}
        if len(values) == 1 and values != {None}:
            phrases.append(describe_setting(setting, values.pop(), rows[0]))
    return ", ".join(phrases).replace(", in ", " in ")


def describe_setting(setting, value, row):
    """One setting in words. row: a row that has it, whose other settings can affect the words."""
    if setting == "temperature":
        return "greedy" if value == 0 else f"temperature {value:g}"
    if setting == "length":
        lengths_of_tasks = [part["length"] for part in row.get("tasks", {}).values()]
        is_largest = any(length < value for length in lengths_of_tasks)
        return f"length up to {value}" if is_largest else f"length {value}"
    if setting == "block_length":
        return "one block" if value == row["length"] else f"blocks of {value}"
    if setting == "cache":
        return "no cache" if value == "none" else f"{value} cache"
    if setting == "problems":
        return count_of(value, "problem")
    if setting == "clusters":
        return f"in {count_of(value, 'cluster')}"
    return str(value)


def count_of(number, noun):
    """A number and what it counts: 1 problem, 2 problems."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def curves_of(rows):
    """Group rows by name and rule, for one line each: {(name, rule): rows, sorted by NFE}.

    Rows with a learned threshold form a curve of their own, with the rule "learned". Curves are in
    the order of the names, then of the rules below.
    """
    rules = ["learned", "eb", "top_k", "confidence"]
    names = list(dict.fromkeys(row["name"] for row in rows))
    curves = {(name, rule): [] for name in names for rule in rules}
    for row in sorted(rows, key=lambda row: row["nfe"]):
        rule = "learned" if row["level"] == "learned" else row["decoder"]
        curves[row["name"], rule].append(row)
    return {curve: points for curve, points in curves.items() if points}


def printable(text):
    """Text with control characters escaped: a completion may contain any of them."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shorten(text, width):
    """Text of at most `width` characters; an ellipsis stands for the rest."""
    return text if len(text) <= width else text[: width - 1] + "…"


def shorten_name(name, width):
    """A name cut in the middle to at most `width` characters, since runs differ at the end."""
    if len(name) <= width:
        return name
    head = width // 2
    tail = width - 1 - head
    return f"{name[:head]}…{name[len(name) - tail :]}"
