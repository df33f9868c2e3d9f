"""The difference between two rows of evaluate.evaluate on the same problems, with its interval.

Whether two intervals overlap does not test their difference. A problem that is hard for one model
is often hard for the other too; in a comparison problem by problem, this part cancels. In
simulation (EXPERIMENTS.md) the paired interval covers the true difference in 93 to 97% of samples,
and detects a difference of 5 points at least three times as often as the rule that intervals must
not overlap.

A row has, for each problem in order: in "solved_each" a 0 or 1; in "nfe_each" its calls; and in
"cluster_each" the number of its cluster. In the last two, spaces separate the numbers.
"""

from math import inf

from evaluation.metrics import area, best_within_budgets, mean_interval

# Rows have the same problems if they agree in these entries, if present, and in the clusters.
SETTINGS_OF_PROBLEMS = ("task", "data", "split", "seed", "samples")


# ---- a row's entries on each problem -------------------------------------------------------------


def number_clusters(clusters):
    """{cluster: its number}, in the order in which the clusters first occur."""
    return {key: number for number, key in enumerate(dict.fromkeys(clusters))}


def describe_problems(solved, clusters, number_of_cluster, nfe=None):
    """A row's entries on its n problems: {name: text}.

    solved, clusters   n bools, n keys
    number_of_cluster  from number_clusters
    nfe                n numbers of calls, or None if they are not known
    """
    entries = {"solved_each": "".join("1" if is_solved else "0" for is_solved in solved)}
    if nfe is not None:
        entries["nfe_each"] = " ".join(str(int(calls)) for calls in nfe)
    entries["cluster_each"] = " ".join(str(number_of_cluster[key]) for key in clusters)
    return entries


def split_each(row, name):
    """The entry `name` of a row, split into one text per problem."""
    return list(row[name]) if name == "solved_each" else row[name].split()


def score_each(row, score):
    """Each problem's score, a list of ints. score: "solved" or "nfe"."""
    return [int(value) for value in split_each(row, f"{score}_each")]


def have_same_problems(rows, score):
    """Whether rows have the same problems and an entry with each problem's score."""
    first = rows[0]
    return all(
        f"{score}_each" in row
        and "cluster_each" in row
        and all(row.get(key) == first.get(key) for key in (*SETTINGS_OF_PROBLEMS, "cluster_each"))
        for row in rows
    )


# ---- intervals of differences --------------------------------------------------------------------


def difference_interval(row, other, score):
    """The 95% interval of a row's mean score minus the other's, paired by problem: (low, high).

    score: "solved" or "nfe". Returns None if the rows have different problems or lack the scores of
    each problem (as an older version's do), or if the spread is unknown.
    """
    if not have_same_problems([row, other], score):
        return None
    return interval_of_differences(
        score_each(row, score),
        score_each(other, score),
        clusters=split_each(row, "cluster_each"),
        largest=1 if score == "solved" else inf,
    )


def area_difference_interval(curve, other, largest):
    """The same for the difference of two frontiers' metrics.area.

    Each row's NFE is taken as fixed, and so is which row is the best within a budget.

    curve, other: lists of rows. largest: the largest NFE of all rows that are compared.
    """
    if not have_same_problems([*curve, *other], "solved"):
        return None
    return interval_of_differences(
        area_each(curve, largest),
        area_each(other, largest),
        clusters=split_each(curve[0], "cluster_each"),
        largest=1,
    )


def interval_of_differences(scores, other_scores, clusters, largest):
    """The interval of the mean of scores - other_scores, n numbers each, cut at ± largest."""
    differences = [
        score - other_score for score, other_score in zip(scores, other_scores, strict=True)
    ]
    interval = mean_interval(differences, clusters)
    if interval is None:
        return None
    low, high = interval
    return max(low, -largest), min(high, largest)


def area_each(rows, largest):
    """Each problem's contribution to the area; their mean is metrics.area.

    It is the problem's score in the row that is best, over all problems, within a budget, averaged
    over budgets.
    """
    areas = [0.0] * len(rows[0]["solved_each"])
    for row, share in best_within_budgets(rows, largest):
        for i, solved in enumerate(score_each(row, "solved")):
            areas[i] += share * solved
    return areas


def edges_in_brackets(edges, scale, digits, unit=""):
    """An interval as text, such as " (25.6 to 32.0)"; "" for None.

    More digits are used if an edge would otherwise be printed as 0, since it matters most whether 0
    is inside.
    """
    if edges is None:
        return ""
    low, high = (0.0 if abs(scale * edge) < 1e-9 else edge for edge in edges)  # -0.0 and rounding
    while any(0 < abs(scale * edge) < 0.5 / 10**digits for edge in (low, high)):
        digits += 1
    return f" ({scale * low:z.{digits}f} to {scale * high:z.{digits}f}{unit})"


# ---- tables of differences -----------------------------------------------------------------------


def difference_table(rows, labels):
    """By how much each row differs from the first: a list of lists of strings, the header first.

    labels: the rows' names. Rows with other problems than the first are left out. There is a column
    for NFE if all rows have it.
    """
    first = rows[0]
    has_calls = all("nfe" in row for row in rows)
    header = [f"minus {labels[0]}", "solved, points"]
    if has_calls:
        header.append("NFE")
    table = [header]
    for row, label in zip(rows[1:], labels[1:], strict=True):
        if not have_same_problems([first, row], "solved"):
            continue
        points = 100 * (row["solved"] - first["solved"])
        interval = difference_interval(row, first, "solved")
        line = [label, f"{points:+z.1f}{edges_in_brackets(interval, scale=100, digits=1)}"]
        if has_calls:
            calls = row["nfe"] - first["nfe"]
            interval = difference_interval(row, first, "nfe")
            line.append(f"{calls:+z.2f}{edges_in_brackets(interval, scale=1, digits=2)}")
        table.append(line)
    return table


def area_difference_table(curves, labels, largest):
    """By how much each frontier's area differs from the first one's, as difference_table.

    curves: lists of rows. labels: their names. largest: as in metrics.area.
    """
    first = curves[0]
    table = [[f"minus {labels[0]}", "area"]]
    for curve, label in zip(curves[1:], labels[1:], strict=True):
        if not have_same_problems([*first, *curve], "solved"):
            continue
        difference = area(curve, largest) - area(first, largest)
        interval = area_difference_interval(curve, first, largest)
        brackets = edges_in_brackets(interval, scale=1, digits=3)
        table.append([label, f"{difference:+z.3f}{brackets}"])
    return table
