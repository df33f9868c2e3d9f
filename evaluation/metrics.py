"""From solved problems to numbers: intervals, the area under a frontier, AUP, pass@k."""

from collections import Counter
from math import comb, exp, log
from statistics import fmean

import torch


def bootstrap_weights(n, draws=2000):
    """How often each of n items is drawn when n are drawn with replacement.

    Returns (draws, n) double, one row for each draw. The draws are the same in every call.
    """
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(n, (draws, n), generator=generator)
    return torch.zeros(draws, n).scatter_add(1, chosen, torch.ones(draws, n)).double()


# Student's t at 95%, of 1 to 10 degrees of freedom.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def students_t(degrees):
    """The half-width at 95%, in standard errors."""
    if degrees <= len(T95):
        return T95[degrees - 1]
    return 1.96 + 2.37 / degrees + 2.8 / degrees**2  # good to 0.2%


def cluster_interval(solved, clusters):
    """The 95% interval of an accuracy whose problems come in clusters.

    solved    n bools
    clusters  n keys. Problems of one cluster (a multiset of numbers, a solution grid) are solved
              or missed together, so K clusters are what was drawn.

    It is Student's t interval, with K - 1 degrees of freedom, for the accuracy's log-odds, because
    the distribution of an accuracy p near 0 or 1 is skewed. With s from cluster_standard_error,

        logit p ± t_{K-1} s / (p (1 - p))

    A bootstrap over clusters is too narrow if clusters are few or nearly all problems are solved.
    In simulation (EXPERIMENTS.md) it covers the true accuracy in 85 to 91% of samples of 12
    clusters, or of 51 clusters with 97% solved; this interval does in 94 to 98%. If only a few
    clusters are ever missed (97%, correlation 0.4 within 51 clusters) it covers 89%, the bootstrap
    85%.

    Returns (low, high, K), with bounds in [0, 1]. If clusters do not differ (none or all are
    solved, or there is only one) the interval is Wilson's, as if each cluster were one problem.
    """
    accuracy = sum(solved) / len(solved)
    K = len(set(clusters))
    standard_error = cluster_standard_error(solved, clusters)
    if standard_error == 0:
        return *wilson_interval(accuracy, K), K
    half = students_t(K - 1) * standard_error / (accuracy * (1 - accuracy))
    log_odds = log(accuracy / (1 - accuracy))
    return 1 / (1 + exp(half - log_odds)), 1 / (1 + exp(-half - log_odds)), K


def mean_interval(values, clusters):
    """The 95% interval of a mean whose problems come in clusters, (low, high).

    values    n numbers, for example the difference between two models' scores on each problem
    clusters  n keys, as for cluster_interval

    It is Student's t interval, mean ± t_{K-1} times the standard error. Returns None if clusters do
    not differ, or there is only one, since the spread is then unknown.
    """
    standard_error = cluster_standard_error(values, clusters)
    if standard_error == 0:
        return None
    mean = sum(values) / len(values)
    half = students_t(len(set(clusters)) - 1) * standard_error
    return mean - half, mean + half


def cluster_standard_error(values, clusters):
    """The standard error of the mean of n values in K clusters; 0 if clusters do not differ.

    With v_k the sum of the n_k values in cluster k and m = sum v / n, its square is

        K / (K - 1) sum_k (v_k - m n_k)^2 / n^2
    """
    size_of_cluster = Counter(clusters)
    sum_of_cluster = dict.fromkeys(size_of_cluster, 0)
    for value, key in zip(values, clusters, strict=True):
        sum_of_cluster[key] += value
    K = len(size_of_cluster)
    n = len(values)
    mean = sum(values) / n
    squares = sum((sum_of_cluster[key] - mean * size) ** 2 for key, size in size_of_cluster.items())
    if K == 1 or squares < 1e-9:
        return 0.0
    return (K / (K - 1) * squares) ** 0.5 / n


def wilson_interval(fraction, n):
    """Wilson's 95% interval of a fraction of n independent problems: (low, high)."""
    z2 = 1.96**2
    centre = (fraction + z2 / (2 * n)) / (1 + z2 / n)
    half = (fraction * (1 - fraction) * z2 / n + z2**2 / (4 * n**2)) ** 0.5 / (1 + z2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def area(rows, largest):
    """The area under a frontier: the accuracy, averaged over all budgets of calls. In [0, 1].

    rows     of evaluate.evaluate; "nfe" and "solved" are read
    largest  the largest NFE of all rows that are compared

    A budget b reaches the best accuracy of the rows with nfe <= b, or 0 if there is none. The area
    is the mean of this over b from 1 to `largest`. It is the integral of a step function, computed
    exactly.
    """
    return sum(share * row["solved"] for row, share in best_within_budgets(rows, largest))


def best_within_budgets(rows, largest):
    """Yields each row that is the best within some budgets, with the share of these budgets.

    Arguments as for `area`. The shares sum to less than 1 if the smallest budgets reach no row.
    """
    if largest <= 1:  # one budget, of one call
        reached = [row for row in rows if row["nfe"] <= 1]
        if reached:
            yield max(reached, key=lambda row: row["solved"]), 1.0
        return
    best = None
    budget = 1.0
    for row in sorted(rows, key=lambda row: row["nfe"]):
        if row["nfe"] >= largest:
            break
        if best is not None:
            yield best, (row["nfe"] - budget) / (largest - 1)
        if best is None or row["solved"] > best["solved"]:
            best = row
        budget = row["nfe"]
    if best is not None:
        yield best, (largest - budget) / (largest - 1)


def aup(rows, best):
    """Accuracy under parallelism, AUP: the score of d3LLM (Qian et al. 2026), reimplemented.

    rows  of evaluate.evaluate; "tokens_per_call" and "solved" are read
    best  the best accuracy of all rows that are compared, in [0, 1]

    The points (rho, y) are sorted by rho, the tokens per call; y is the accuracy in percent.
    Points with y < y_1 - 5 are dropped, where y_1 is that of the smallest rho. W penalises points
    below the best accuracy. Unlike `area`, AUP has no upper bound: it grows with rho.

        AUP = rho_1 y_1 + sum over i > 1 of (rho_i - rho_{i-1}) (y_i W_i + y_{i-1} W_{i-1}) / 2
        W_i = min(exp(-3 (1 - y_i / y_max)), 1)
    """
    points = sorted((row["tokens_per_call"], 100 * row["solved"]) for row in rows)
    points = [(rho, y) for rho, y in points if y >= points[0][1] - 5]
    weighted = [y * min(exp(3 * (y / (100 * best) - 1)), 1) if best else 0.0 for _, y in points]
    total = points[0][0] * points[0][1]
    for i in range(1, len(points)):
        total += (points[i][0] - points[i - 1][0]) * (weighted[i] + weighted[i - 1]) / 2
    return total


def pass_at_k(right, n, k):
    """The chance that at least one of k completions, drawn from a problem's n, is right.

    right: how many of the n are right. Returns a number in [0, 1]. Unbiased for n > k, unlike
    1 - (1 - right / n) ** k (Chen et al. 2021, Codex).
    """
    return 1 - comb(n - right, k) / comb(n, k)


def pass_rates(solved_each, samples):
    """pass@k for each k up to the number of samples of a problem, from a row's "solved_each"."""
    num_solved = []  # of each problem's samples
    for i in range(0, len(solved_each), samples):
        num_solved.append(solved_each[i : i + samples].count("1"))
    rates = {k: fmean(pass_at_k(n, samples, k) for n in num_solved) for k in range(1, samples + 1)}
    return {"problems": len(num_solved), "pass_at_k": rates, "pass_at_n": rates[samples]}
