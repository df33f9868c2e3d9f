"""What a run prints of its results: a table of base and trained model, and completions of both."""

from textwrap import fill, wrap

from evaluation.tables import WIDTH, printable, shorten

GAMMAS = (0.01, 0.03, 0.1, 0.3, 1.0)  # of a run's frontier, in nats


def describe_base(row):
    """The base's row in words."""
    solved = f"{row['solved']:.1%} of {problems_in(row)} solved"
    return f"base: {solved}, {row['nfe']:.2f} calls each, at γ {gamma(row)}"


def print_summary(rows, frontier, completions):
    """Print the table of base and trained model, what changed, and three completions of each.

    rows: of eval.json. frontier: of frontier.json. completions: of completions.json.
    """
    base_rows = [row for row in frontier if row["name"] == "base"]
    best = max(base_rows, key=lambda row: (row["solved"], -row["nfe"]))
    table_rows = rows[:1]
    if best["level"] != rows[0]["level"]:
        table_rows.append(best | {"name": "base at its best γ"})
    table_rows += rows[1:]
    print("", *table(table_rows), "", sep="\n")
    for line in describe_results(rows[1], best, has_choice=len(base_rows) > 1):
        print(fill(line, WIDTH, subsequent_indent="  "))
    print("", *describe_completions(completions, rows[0]), "", sep="\n")


def problems_in(row):
    return f"{row['problems']} held-out problem{'s' * (row['problems'] != 1)}"


def gamma(row):
    if row["level"] != "learned":
        return f"{row['level']:g}"
    return f"{row['threshold_mean']:.3f} ±{row['threshold_std']:.3f}"


def percent(row):
    """As it is printed: so that differences are those of what the reader sees."""
    return round(100 * row["solved"], 1)


def calls(row):
    return round(row["nfe"], 2)


def with_tasks(rows):
    """The rows, and below each of a run of several tasks what it says of each task."""
    for row in rows:
        yield row
        for name, part in row.get("tasks", {}).items():
            yield row | part | {"name": f"  {shorten(name.rpartition(':')[2], 22)}"}


def table(rows):
    """The lines of a table of rows of `evaluate`, and below it what all rows share."""
    cells = [("", "γ", "solved, %", "NFE", "tokens")]
    for row in with_tasks(rows):
        interval = f"{100 * row['solved_low']:.1f} to {100 * row['solved_high']:.1f}"
        scores = f"{calls(row):.2f}", f"{row['tokens_per_call']:.2f}"
        cells.append((row["name"], gamma(row), f"{percent(row):.1f} ({interval})", *scores))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for name, *others in cells:
        numbers = map(str.rjust, others, widths[1:])
        yield "  ".join([name.ljust(widths[0]), *numbers])
    row = rows[0]
    block = f", blocks of {row['block_length']}" if row["block_length"] < row["length"] else ""
    parts = row.get("tasks", {"": row}).values()
    lengths = " or ".join(str(n) for n in sorted({part["length"] for part in parts}))
    shared = f"{problems_in(row)} in {row['clusters']} clusters, greedy, {lengths} tokens"
    shared += f" a completion{block}. In brackets: the 95% interval, over clusters. NFE: calls a"
    yield from wrap(shared + " completion. tokens: those that a call unmasks.", WIDTH)


def describe_results(trained, best, has_choice):
    """Two lines on what changed, whatever changed. best: the base at its best gamma.

    has_choice: whether the base was measured at more than one gamma.
    """
    which = "its best γ," if has_choice else "γ"
    gain = percent(trained) - percent(best)
    low = max(trained["solved_low"], best["solved_low"])
    high = min(trained["solved_high"], best["solved_high"])
    overlap = "overlap: within the noise" if low <= high else "do not overlap"
    accuracy = f"{gain:+.1f} points. The 95% intervals {overlap}." if gain else "no change."
    change = round(100 * (calls(trained) / calls(best) - 1))
    speed = "about as many."
    if change:
        speed = f"{abs(change)}% {'more' if change > 0 else 'fewer'}."
    return [
        f"Accuracy: {percent(best)}% (base at {which} {gamma(best)}) to {percent(trained)}% of "
        f"{problems_in(trained)}, {accuracy}",
        f"Speed: {calls(best):.2f} (the same base) to {calls(trained):.2f} calls a completion, "
        f"{speed}",
    ]


def describe_completions(texts, row):
    """The lines of completions.json's rows, cut to the terminal's width."""
    n = len(texts) // 2
    yield f"The first {n} of {problems_in(row)}, greedy, each model at its own γ:"
    for base, trained in zip(texts[:n], texts[n:], strict=True):
        yield shorten(f"  {printable(base['question'])}", WIDTH)
        for one in (base, trained):
            mark = "✓" if one["solved"] else "✗"
            said = f"    {one['name']:7}  {mark} NFE {one['nfe']}  {printable(one['text'])}"
            yield shorten(said, WIDTH)
