"""Two rows of evaluate.evaluate on the same problems: their difference, with its interval.

Whether two intervals overlap is no test of the difference. A problem that is hard for one model is
often hard for the other as well; compared problem by problem, that part cancels. In simulation
(EXPERIMENTS.md) the paired interval covers the true difference in 93 to 97% of samples, and detects
a difference of 5 points at least three times as often as the rule that the two must not overlap.

A row says of each problem, in order: "solved_each", a 0 or 1; "nfe_each", its calls; and
"cluster_each", the number of its cluster. The last two have spaces between the numbers.
"""

from math import inf

from evaluation.metrics import area, best_within_budgets, mean_interval

# Rows that agree in these, as far as they have them, and in the clusters have the same problems.
SETTINGS_OF_PROBLEMS = ("task", "data", "split", "seed", "samples")


# ---- what a row says of each problem -------------------------------------------------------------


def number_clusters(clusters):
    """{cluster: its number}, in the order in which the clusters first occur."""
    return {key: number for number, key in enumerate(dict.fromkeys(clusters))}


def describe_problems(solved, clusters, number_of_cluster, nfe=None):
    """A row's entries on each of its n problems: {name: text}.

    solved, clusters   n bools, n keys
    number_of_cluster  of number_clusters
    nfe                n numbers of calls, or None if they are not known
    """
    entries = {"solved_each": "".join("1" if is_solved else "0" for is_solved in solved)}
    if nfe is not None:
        entries["nfe_each"] = " ".join(str(int(calls)) for calls in nfe)
    entries["cluster_each"] = " ".join(str(number_of_cluster[key]) for key in clusters)
    return entries


def split_each(row, name):
    """The entry `name` of a row, taken apart: a text for each problem."""
    return list(row[name]) if name == "solved_each" else row[name].split()


def score_each(row, score):
    """What each problem scored, "solved" or "nfe": a list of ints."""
    return [int(value) for value in split_each(row, f"{score}_each")]


def have_same_problems(rows, score):
    """Whether rows have the same problems, and say of each what it scored."""
    first = rows[0]
    return all(
        f"{score}_each" in row
        and "cluster_each" in row
        and all(row.get(key) == first.get(key) for key in (*SETTINGS_OF_PROBLEMS, "cluster_each"))
        for row in rows
    )


# ---- intervals of differences --------------------------------------------------------------------


def difference_interval(row, other, score):
    """The 95% interval of a row's mean score less the other's, paired by problem: (low, high).

    score: "solved" or "nfe". None if the rows do not have the same problems or do not say what each
    one scored (an older version's do not), or if nothing is known of the spread.
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
    """The same of metrics.area, for two frontiers.

    Each row's NFE stays as it is, and so does which row is the best within a budget.

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
    """What each problem adds to the area; the mean is metrics.area.

    It is the problem's score in the row that is the best within a budget for all problems together,
    averaged over budgets.
    """
    areas = [0.0] * len(rows[0]["solved_each"])
    for row, share in best_within_budgets(rows, largest):
        for i, solved in enumerate(score_each(row, "solved")):
            areas[i] += share * solved
    return areas


def edges_in_brackets(edges, scale, digits, unit=""):
    """An interval in print, " (25.6 to 32.0)"; nothing if there is none.

    It has more digits where an edge would else be printed as 0: whether 0 is inside matters most.
    """
    if edges is None:
        return ""
    low, high = (0.0 if abs(scale * edge) < 1e-9 else edge for edge in edges)  # what rounding left
    while any(0 < abs(scale * edge) < 0.5 / 10**digits for edge in (low, high)):
        digits += 1
    return f" ({scale * low:z.{digits}f} to {scale * high:z.{digits}f}{unit})"


# ---- tables of differences -----------------------------------------------------------------------


def difference_table(rows, labels):
    """By how much each row differs from the first, as lists of strings, the header first.

    labels: n names of the rows. Rows that do not have the first one's problems are left out. NFE
    has a column if all rows have it.
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
