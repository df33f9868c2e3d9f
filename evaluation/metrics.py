"""From solved problems to numbers: intervals, the area under a frontier, AUP, pass@k."""

from collections import Counter
from math import comb, exp, log

import torch


def bootstrap_weights(n, draws=2000):
    """How often each of n things is drawn, when n of them are drawn with replacement.

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

    It is Student's, with K - 1 degrees, of the accuracy's log-odds, since an accuracy near 0 or 1
    is skewed. With h_k problems solved of n_k in cluster k and the accuracy p = sum h / n,

        var p   = K / (K - 1) sum_k (h_k - p n_k)^2 / n^2
        logit p ± t_{K-1} sqrt(var p) / (p (1 - p))

    A bootstrap over clusters is too narrow where they are few or nearly all problems are solved. In
    simulation (EXPERIMENTS.md) it covers the true accuracy in 85 to 90% of samples of 12 clusters,
    and of 51 with 97% solved; this one in 94 to 98% of them. Where hardly any cluster but a few is
    ever missed (97%, correlation 0.4 within 51 clusters) it covers 89%, the bootstrap 85%.

    Returns (low, high, K), the bounds in [0, 1]. Where clusters do not differ (none or all are
    solved, or there is one) the interval is Wilson's, as if each cluster were one problem.
    """
    solved_per_cluster = Counter(key for key, hit in zip(clusters, solved, strict=True) if hit)
    problems_per_cluster = Counter(clusters)
    K = len(problems_per_cluster)
    n = len(solved)
    accuracy = sum(solved_per_cluster.values()) / n
    squares = sum(
        (solved_per_cluster[key] - accuracy * size) ** 2
        for key, size in problems_per_cluster.items()
    )
    if K == 1 or squares < 1e-9:
        return *wilson_interval(accuracy, K), K
    standard_error = (K / (K - 1) * squares) ** 0.5 / n
    half = students_t(K - 1) * standard_error / (accuracy * (1 - accuracy))
    log_odds = log(accuracy / (1 - accuracy))
    return 1 / (1 + exp(half - log_odds)), 1 / (1 + exp(-half - log_odds)), K


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

    A budget b reaches the best accuracy of the rows with nfe <= b, and 0 where b is below all
    of them. The area is the mean of that over b from 1 to `largest`. The integral of a step
    function is exact: nothing is sampled.
    """
    if largest <= 1:
        return max((row["solved"] for row in rows if row["nfe"] <= 1), default=0.0)
    total = 0.0
    best = 0.0
    budget = 1.0
    for row in sorted(rows, key=lambda row: row["nfe"]):
        if row["nfe"] >= largest:
            break
        total += best * (row["nfe"] - budget)
        best = max(best, row["solved"])
        budget = row["nfe"]
    return (total + best * (largest - budget)) / (largest - 1)


def aup(rows, best):
    """Accuracy under parallelism, AUP: the score of d3LLM (Qian et al. 2026), written anew.

    rows  of evaluate.evaluate; "tokens_per_call" and "solved" are read
    best  the best accuracy of all rows that are compared, in [0, 1]

    The points (rho, y) are sorted by rho, the tokens per call; y is the accuracy in percent.
    Points with y < y_1 - 5 are dropped, where y_1 is that of the smallest rho. W punishes what
    falls behind the best accuracy. Unlike `area`, AUP has no upper bound: it grows with rho.

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
    """The chance that one of k completions is right, if k of a problem's n completions are drawn.

    right: how many of the n are right. Returns a number in [0, 1]. Unbiased for n > k, unlike
    1 - (1 - right / n) ** k (Chen et al. 2021, Codex).
    """
    return 1 - comb(n - right, k) / comb(n, k)
