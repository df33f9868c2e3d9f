"""Tables for the terminal: rows of `evaluate.evaluate`, and the conditions that they share."""

from textwrap import fill

WIDTH = 80  # columns of a terminal

# Settings of a row that can differ between rows: how each is written, and special cases.
CONDITIONS = {
    "task": ("{}", {}),
    "decoder": ("{}", {}),
    "temperature": ("temperature {:g}", {0: "greedy"}),
    "length": ("length {}", {}),
    "block_length": ("blocks of {}", {}),
    "cache": ("{} cache", {"none": "no cache"}),
    "problems": ("{} problems", {}),
    "clusters": ("in {} clusters", {}),
}

# Scores of a row: the column's title, the key that the row must have, and how it is written.
SCORES = (
    ("solved", "solved", "{solved:.1%}"),
    ("pass@N", "pass_at_n", "{pass_at_n:.1%}"),
    ("95% interval", "solved", "{solved_low:.1%} to {solved_high:.1%}"),
    ("cells", "cells", "{cells:.1%}"),
    ("reward", "reward", "{reward:.3f}"),
    ("NFE", "nfe", "{nfe:.2f}"),
    ("tokens/call", "nfe", "{tokens_per_call:.2f}"),
    ("AUP", "aup", "{aup:.1f}"),
)
AUP_EXPLAINED = (
    "AUP: accuracy under parallelism (d3LLM), the area under solved % against tokens per call, "
    "with a penalty below the best accuracy."
)


def conditions(rows):
    """What all rows of `evaluate` share, in words: "greedy, length 10, one block, ..."."""
    words = []
    for key, (form, special) in CONDITIONS.items():
        values = {row.get(key) for row in rows}
        if len(values) > 1 or values == {None}:
            continue
        value = values.pop()
        if key == "block_length" and value == rows[0]["length"]:
            words.append("one block")
            continue
        if key == "length":
            parts = rows[0].get("tasks", {}).values()
            if any(part["length"] < value for part in parts):
                value = f"up to {value}"
        words.append(special.get(value, form.format(value)))
    return ", ".join(words).replace(", in ", " in ")


def print_table(rows):
    """Print rows of `evaluate`: above the table what they share, in it what differs, and scores.

    A score has a column if every row has it. The interval is metrics.cluster_bootstrap_interval's.
    """
    differing = [
        key for key in ("name", "adapter", *CONDITIONS) if len({row.get(key) for row in rows}) > 1
    ]
    columns = {key: f"{{{key}}}" for key in differing} | {"level": "{level}"}
    if any(row["decoder"] == "eb" for row in rows):
        columns["gamma"] = "{gamma}"
    for title, key, form in SCORES:
        if all(key in row for row in rows):
            columns[f"pass@{rows[0]['samples']}" if title == "pass@N" else title] = form
    table = [["" if title == "name" else title for title in columns]]
    for row in rows:
        gamma = ""
        if row["decoder"] == "eb":
            gamma = f"{row['threshold_mean']:.3f} ± {row['threshold_std']:.3f}"
        table.append([form.format(**row, gamma=gamma) for form in columns.values()])
    name = "" if "name" in differing else f"{rows[0]['name']}: "
    print(fill(f"{name}{conditions(rows)}", WIDTH))
    print_columns(table)
    if "AUP" in columns:
        print(fill(AUP_EXPLAINED, WIDTH))


def print_columns(table):
    """Print lists of strings as columns, flush right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(map(str.rjust, line, widths)).rstrip())


def printable(text):
    """Text with control characters escaped: a completion may hold any, and a terminal obeys."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shorten(text, width):
    """Text cut to a width, with an ellipsis where something is missing."""
    return text if len(text) <= width else text[: width - 1] + "…"


def curves_of(rows):
    """{(name, rule): its rows by NFE}; the learned operating points stand apart, as "learned"."""
    curves = {}
    for row in sorted(rows, key=lambda row: row["nfe"]):
        rule = "learned" if row["level"] == "learned" else row["decoder"]
        curves.setdefault((row["name"], rule), []).append(row)
    rules = ["learned", "eb", "top_k", "confidence"]
    names = list(dict.fromkeys(row["name"] for row in rows))
    ordered = sorted(curves, key=lambda curve: (names.index(curve[0]), rules.index(curve[1])))
    return {curve: curves[curve] for curve in ordered}
