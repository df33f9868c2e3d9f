"""Intervals, areas, AUP and pass@k, against the same got by hand or by counting."""

import math
import random
from itertools import combinations

import pytest

from evaluation import metrics


def test_the_interval_of_problems_that_have_nothing_in_common_is_about_wilsons():
    # Newcombe (1998), table I: 81 of 263; to a point
    solved = [True] * 81 + [False] * 182
    clusters = [str(i) for i in range(263)]
    low, high, num_clusters = metrics.cluster_interval(solved, clusters)
    assert low == pytest.approx(0.2553, abs=0.01)
    assert high == pytest.approx(0.3662, abs=0.01)
    assert num_clusters == 263


def test_problems_of_a_cluster_count_together():
    solved = [i % 3 == 0 for i in range(60)]
    clusters = [str(i) for i in range(60)]
    apart = metrics.cluster_interval(solved, clusters)
    together = metrics.cluster_interval(solved * 16, clusters * 16)
    assert together == apart  # sixteen copies tell nothing new
    naive = metrics.cluster_interval(solved * 16, [str(i) for i in range(960)])
    assert naive[1] - naive[0] < 0.3 * (apart[1] - apart[0])


@pytest.mark.parametrize(
    ("num_clusters", "cluster_size", "share"),
    [(12, 10, 0.5), (12, 10, 0.8), (51, 20, 0.8), (51, 10, 0.97), (303, 3, 0.5), (303, 3, 0.97)],
)
def test_the_interval_covers_the_true_share_as_often_as_it_says(num_clusters, cluster_size, share):
    """Each cluster's own share is drawn around the true one, so that problems go together."""
    rng = random.Random(0)
    strength = 9.0  # a correlation of 1 / (1 + 9) within a cluster
    repeats = 600
    hits = 0
    for _ in range(repeats):
        solved = []
        clusters = []
        for cluster in range(num_clusters):
            own_share = rng.betavariate(strength * share, strength * (1 - share))
            size = rng.randint(1, 2 * cluster_size - 1)
            solved += [rng.random() < own_share for _ in range(size)]
            clusters += [cluster] * size
        low, high, _ = metrics.cluster_interval(solved, clusters)
        hits += low <= share <= high
    # 95 ± 1.5%, and two standard errors of this simulation
    assert 0.95 - 0.015 - 0.018 <= hits / repeats <= 0.95 + 0.015 + 0.018


@pytest.mark.parametrize(("solved", "low", "high"), [(False, 0, 0.1611), (True, 0.8389, 1)])
def test_where_none_or_all_are_solved_the_interval_is_wilsons(solved, low, high):  # 0 of 20
    interval = metrics.cluster_interval([solved] * 40, [str(i % 20) for i in range(40)])
    assert interval == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4), 20)


def point(nfe, solved, tokens_per_call=0):
    """A row of a frontier."""
    return {"nfe": nfe, "solved": solved, "tokens_per_call": tokens_per_call}


def test_the_area_is_the_mean_of_the_best_within_each_budget():
    # budgets 1 to 2: nothing; 2 to 4: 0.2; 4 to 5: 0.5, and the worse, dearer point adds nothing
    rows = [point(4, 0.5), point(2, 0.2), point(5, 0.3)]
    assert metrics.area(rows, 5) == pytest.approx((2 * 0.2 + 1 * 0.5) / 4)
    assert metrics.area(rows, 9) == pytest.approx((2 * 0.2 + 5 * 0.5) / 8)
    assert metrics.area(rows, 3) == pytest.approx(0.2 / 2)  # what costs more is not reached
    budgets = [1 + 8 * (i + 0.5) / 8000 for i in range(8000)]
    reached = [max([x["solved"] for x in rows if x["nfe"] <= b], default=0) for b in budgets]
    assert metrics.area(rows, 9) == pytest.approx(sum(reached) / 8000)
    assert metrics.area([point(1, 0.7)], 1) == 0.7 and metrics.area([], 1) == 0
    assert metrics.area([point(1, 1.0)], 6) == 1  # all solved in one call


def test_aup_is_the_formula_worked_by_hand():
    # the last point is over 5 points worse
    rows = [point(5, 0.40, 2), point(10, 0.38, 1), point(2, 0.20, 5)]
    below = 38 * math.exp(-3 * 0.05)  # W(38) with y_max 40
    assert metrics.aup(rows, 0.40) == pytest.approx(1 * 38 + (2 - 1) * (40 + below) / 2)
    worse = 40 * math.exp(-1.5) + 38 * math.exp(-3 * 42 / 80)  # where another run reaches 80
    assert metrics.aup(rows, 0.80) == pytest.approx(38 + worse / 2)
    assert metrics.aup([point(3, 0.5, 4)], 0.5) == 200
    assert metrics.aup(rows[:1], 0.4) == 80
    assert metrics.aup([point(3, 0, 4), point(2, 0, 5)], 0) == 0  # nothing is solved at all


@pytest.mark.parametrize(
    ("n", "right", "k"), [(5, 2, 1), (5, 2, 3), (6, 1, 2), (4, 0, 2), (3, 3, 2)]
)
def test_pass_at_k_is_the_share_of_all_choices_of_k_that_hold_a_right_one(n, right, k):
    chosen = list(combinations([True] * right + [False] * (n - right), k))
    assert metrics.pass_at_k(right, n, k) == pytest.approx(sum(map(any, chosen)) / len(chosen))


def test_bootstrap_weights_draw_n_of_n_and_are_the_same_in_every_call():
    weights = metrics.bootstrap_weights(7, draws=50)
    assert weights.shape == (50, 7) and (weights.sum(dim=1) == 7).all()
    assert (weights == weights.round()).all() and (
        weights == metrics.bootstrap_weights(7, 50)
    ).all()
