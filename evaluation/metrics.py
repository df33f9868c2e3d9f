"""From solved problems to numbers: intervals, the area under a frontier, AUP, pass@k."""

from collections import Counter
from math import comb, exp

import torch


def bootstrap_weights(n, draws=2000):
    """How often each of n things is drawn, for each draw of n of them. -> (draws, n) double"""
    chosen = torch.randint(n, (draws, n), generator=torch.Generator().manual_seed(0))
    return torch.zeros(draws, n).scatter_add(1, chosen, torch.ones(draws, n)).double()


def cluster_bootstrap_interval(solved, clusters, draws=2000):
    """The 95% interval of a share by a bootstrap over clusters: (low, high, number of clusters).

    Problems of one cluster (a multiset of numbers, a solution grid) are solved or missed together,
    so whole clusters are drawn. Where none or all are solved a bootstrap knows nothing: then
    Wilson's interval, as if each cluster were one problem. solved: bools; clusters: a key each.
    """
    right = Counter(key for key, hit in zip(clusters, solved, strict=True) if hit)
    size, k = Counter(clusters), len(set(clusters))
    if len(set(solved)) == 1:
        edge = 1.96**2 / (k + 1.96**2)
        return (1 - edge, 1.0, k) if solved[0] else (0.0, edge, k)
    counts = torch.tensor([(right[key], size[key]) for key in size], dtype=torch.double)  # (k, 2)
    hits, total = (bootstrap_weights(k, draws) @ counts).float().T  # (draws,) each
    return (*torch.quantile(hits / total, torch.tensor([0.025, 0.975])).tolist(), k)


def area(rows, largest):
    """The area under a frontier: how much is solved, over all budgets of calls. In [0, 1].

    A budget b reaches the best solved share of the rows with nfe <= b, and 0 where b is below all
    of them. The area is the mean of that over b from 1 to `largest`, the largest NFE of all rows
    that are compared. Steps have exact integrals: nothing is sampled.
    """
    if largest <= 1:
        return max((row["solved"] for row in rows if row["nfe"] <= 1), default=0.0)
    total, best, since = 0.0, 0.0, 1.0
    for row in sorted(rows, key=lambda row: row["nfe"]):
        if row["nfe"] >= largest:
            break
        total += best * (row["nfe"] - since)
        best, since = max(best, row["solved"]), row["nfe"]
    return (total + best * (largest - since)) / (largest - 1)


def aup(rows, best):
    """Accuracy under parallelism, AUP: the score of Qian et al. (2026, d3LLM), written anew.

    Points (rho, y) by rho, the tokens a call; y is the solved share in percent. Points with
    y < y_1 - 5 are dropped, where y_1 is that of the smallest rho. W punishes what falls behind
    the best share of all compared rows, `best`. Unlike `area` it grows with tokens per call.

        AUP = rho_1 y_1 + sum over i > 1 of (rho_i - rho_{i-1}) (y_i W_i + y_{i-1} W_{i-1}) / 2
        W_i = min(exp(-3 (1 - y_i / y_max)), 1)
    """
    points = sorted((row["tokens_per_call"], 100 * row["solved"]) for row in rows)
    points = [(rho, y) for rho, y in points if y >= points[0][1] - 5]
    weighed = [y * min(exp(3 * (y / (100 * best) - 1)), 1) if best else 0.0 for _, y in points]
    total = points[0][0] * points[0][1]
    for i in range(1, len(points)):
        total += (points[i][0] - points[i - 1][0]) * (weighed[i] + weighed[i - 1]) / 2
    return total


def pass_at_k(right, n, k):
    """Whether one of k completions is right, drawn from a problem's n of which `right` are.

    Unbiased where n > k, unlike 1 - (1 - right / n) ** k (Chen et al. 2021, Codex). In [0, 1].
    """
    return 1 - comb(n - right, k) / comb(n, k)
