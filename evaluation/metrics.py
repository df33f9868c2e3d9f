"""From solved problems to numbers: intervals, the area under a frontier, AUP, pass@k."""

from collections import Counter
from math import comb, exp

import torch


def bootstrap_weights(n, draws=2000):
    """How often each of n things is drawn, when n of them are drawn with replacement.

    Returns (draws, n) double, one row for each draw. The draws are the same in every call.
    """
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(n, (draws, n), generator=generator)
    return torch.zeros(draws, n).scatter_add(1, chosen, torch.ones(draws, n)).double()


def cluster_bootstrap_interval(solved, clusters, draws=2000):
    """The 95% interval of a solved share, by a bootstrap over clusters of problems.

    solved    n bools
    clusters  n keys. Problems of one cluster (a multiset of numbers, a solution grid) are solved
              or missed together, so whole clusters are drawn.

    Returns (low, high, number of clusters), the bounds in [0, 1]. If none or all are solved, a
    bootstrap has nothing to vary: then they are Wilson's, as if each cluster were one problem.
    """
    solved_per_cluster = Counter(key for key, hit in zip(clusters, solved, strict=True) if hit)
    problems_per_cluster = Counter(clusters)
    num_clusters = len(problems_per_cluster)
    if len(set(solved)) == 1:
        width = 1.96**2 / (num_clusters + 1.96**2)
        low = 1 - width if solved[0] else 0.0
        high = 1.0 if solved[0] else width
        return low, high, num_clusters
    counts = [(solved_per_cluster[key], size) for key, size in problems_per_cluster.items()]
    counts = torch.tensor(counts, dtype=torch.double)  # (clusters, 2): solved, problems
    totals = (bootstrap_weights(num_clusters, draws) @ counts).float()  # (draws, 2)
    shares = totals[:, 0] / totals[:, 1]  # (draws,)
    low, high = torch.quantile(shares, torch.tensor([0.025, 0.975])).tolist()
    return low, high, num_clusters


def area(rows, largest):
    """The area under a frontier: the solved share, averaged over all budgets of calls. In [0, 1].

    rows     of evaluate.evaluate; "nfe" and "solved" are read
    largest  the largest NFE of all rows that are compared

    A budget b reaches the best solved share of the rows with nfe <= b, and 0 where b is below all
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
    best  the best solved share of all rows that are compared, in [0, 1]

    The points (rho, y) are sorted by rho, the tokens per call; y is the solved share in percent.
    Points with y < y_1 - 5 are dropped, where y_1 is that of the smallest rho. W punishes what
    falls behind the best share. Unlike `area`, AUP has no upper bound: it grows with rho.

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
