"""Differences of two rows on the same problems: their intervals, by hand and by simulation."""

from statistics import NormalDist, fmean, stdev

import numpy as np
import pytest
import torch

from evaluation import metrics, paired


def row(solved_each, nfe_each, cluster_each, **others):
    """A row of results with what the comparison needs."""
    return {
        "solved": solved_each.count("1") / len(solved_each),
        "nfe": fmean(map(int, nfe_each.split())),
        "solved_each": solved_each,
        "nfe_each": nfe_each,
        "cluster_each": cluster_each,
    } | others


# ---- intervals -----------------------------------------------------------------------------------


def test_with_one_problem_a_cluster_it_is_the_paired_t_interval():
    first = row("11010", "4 2 3 5 5", "0 1 2 3 4")
    second = row("10000", "6 3 3 4 9", "0 1 2 3 4")
    differences = [4 - 6, 2 - 3, 3 - 3, 5 - 4, 5 - 9]
    half = 2.776 * stdev(differences) / 5**0.5  # t of 4 degrees
    mean = fmean(differences)
    interval = paired.difference_interval(first, second, "nfe")
    assert interval == pytest.approx((mean - half, mean + half))
    half = 2.776 * stdev([0, 1, 0, 1, 0]) / 5**0.5
    interval = paired.difference_interval(first, second, "solved")
    assert interval == pytest.approx((0.4 - half, min(1, 0.4 + half)))


def test_problems_of_a_cluster_count_together():
    """Two copies of each problem in its cluster tell nothing new; as clusters of their own they
    would.
    """
    first = row("110100" * 2, "2 2 2 2 2 2 " * 2, "0 1 2 3 4 5 " * 2)
    second = row("010000" * 2, "3 1 2 2 2 2 " * 2, "0 1 2 3 4 5 " * 2)
    single = [row(x["solved_each"][:6], x["nfe_each"][:11], "0 1 2 3 4 5") for x in (first, second)]
    for score in ("solved", "nfe"):
        interval = paired.difference_interval(first, second, score)
        assert interval == pytest.approx(paired.difference_interval(*single, score))
    apart = " ".join(map(str, range(12)))
    low, high = paired.difference_interval(
        first | {"cluster_each": apart}, second | {"cluster_each": apart}, "nfe"
    )
    assert high - low < 0.7 * (interval[1] - interval[0])


ONE = row("0110", "1 2 3 4", "0 1 2 3")
OTHER = row("1111", "2 2 2 2", "0 1 2 3")


@pytest.mark.parametrize(
    "other",
    [
        OTHER | {"cluster_each": "0 1 2 2"},
        OTHER | {"data": "other.csv"},
        {key: value for key, value in OTHER.items() if key != "cluster_each"},
        {key: value for key, value in OTHER.items() if key != "solved_each"},
        row("1001", "2 2 2 2", "0 1 2 3") | {"cluster_each": "0 0 0 0"},
    ],
)
def test_other_problems_or_an_older_row_have_no_interval(other):
    assert paired.difference_interval(ONE, OTHER, "solved") is not None
    assert paired.difference_interval(ONE, other, "solved") is None
    assert paired.difference_interval(other, ONE, "solved") is None
    assert len(paired.difference_table([ONE, other], ["a", "b"])) == 1


def test_where_all_clusters_differ_by_the_same_nothing_is_known_of_the_spread():
    all_solved = row("1111", "1 1 1 1", "0 1 2 3")
    none_solved = row("0000", "2 2 2 2", "0 1 2 3")
    for score in ("solved", "nfe"):
        assert paired.difference_interval(all_solved, none_solved, score) is None
    one_cluster = [x | {"cluster_each": "0 0 0 0"} for x in (ONE, OTHER)]
    assert paired.difference_interval(*one_cluster, "nfe") is None


def simulate(clusters, size, base, trained, in_cluster, between_models, samples, seed=0):
    """Two models of known accuracy on the same problems, measured `samples` times.

    clusters, size  how many clusters, of 1 to 2 size - 1 problems each
    base, trained   the true accuracies
    in_cluster      the correlation of a problem's difficulty with its cluster's others
    between_models  the correlation of its difficulty for one model with that for the other

    A problem is solved if its difficulty, a normal number, is below the quantile of the accuracy.
    Returns the shares of samples in which an interval covers the true difference ("paired", and
    "unpaired", which adds both models' variances), in which there is found to be one (the paired
    interval excludes 0; the two models' intervals do not overlap), and the mean widths.
    """
    rng = np.random.default_rng(seed)
    limits = [[NormalDist().inv_cdf(share)] for share in (base, trained)]
    correlation = np.full((2, 2), between_models)
    np.fill_diagonal(correlation, 1)
    draws = []
    for _ in range(samples):
        sizes = rng.integers(1, 2 * size, clusters)
        cluster_of = np.repeat(np.arange(clusters), sizes)
        of_cluster = rng.multivariate_normal([0, 0], correlation, clusters).T[:, cluster_of]
        of_problem = rng.multivariate_normal([0, 0], correlation, len(cluster_of)).T
        difficulty = in_cluster**0.5 * of_cluster + (1 - in_cluster) ** 0.5 * of_problem
        first, second = (difficulty < limits).astype(int)
        keys = cluster_of.tolist()
        gain = (second - first).mean()
        interval = metrics.mean_interval((second - first).tolist(), keys) or (gain, gain)
        errors = [metrics.cluster_standard_error(x.tolist(), keys) for x in (first, second)]
        unpaired_half = metrics.students_t(clusters - 1) * np.hypot(*errors)
        first_low, first_high, _ = metrics.cluster_interval(first.tolist(), keys)
        second_low, second_high, _ = metrics.cluster_interval(second.tolist(), keys)
        draws.append(
            {
                "paired": interval[0] <= trained - base <= interval[1],
                "unpaired": abs(gain - (trained - base)) <= unpaired_half,
                "paired_width": interval[1] - interval[0],
                "unpaired_width": 2 * unpaired_half,
                "excludes_0": interval[0] > 0 or interval[1] < 0,
                "no_overlap": first_high < second_low or second_high < first_low,
            }
        )
    return {key: float(np.mean([draw[key] for draw in draws])) for key in draws[0]}


@pytest.mark.parametrize(
    ("clusters", "size", "base", "trained"),
    [(12, 10, 0.2, 0.5), (51, 10, 0.5, 0.55), (51, 10, 0.97, 0.97), (303, 3, 0.5, 0.55)],
)
def test_the_paired_interval_covers_the_true_difference_as_often_as_it_says(
    clusters, size, base, trained
):
    measured = simulate(clusters, size, base, trained, 0.1, between_models=0.6, samples=500)
    # 95 ± 1.5%, and two standard errors of this simulation
    assert 0.95 - 0.015 - 0.019 <= measured["paired"] <= 0.95 + 0.015 + 0.019
    assert measured["unpaired"] > measured["paired"]
    assert measured["paired_width"] < 0.9 * measured["unpaired_width"]
    assert measured["excludes_0"] >= measured["no_overlap"]


# ---- areas ---------------------------------------------------------------------------------------


def frontier(rng, shares, nfe, cluster_each):
    """Rows at several NFE, of problems whose clusters go together."""
    clusters = [int(key) for key in cluster_each.split()]
    luck = rng.random(max(clusters) + 1)[clusters] / 2
    rows = []
    for share, calls in zip(shares, nfe, strict=True):
        bits = rng.random(len(clusters)) < share + luck - 0.25
        solved_each = "".join(str(int(bit)) for bit in bits)
        rows.append(row(solved_each, "1 " * len(clusters), cluster_each) | {"nfe": calls})
    return rows


def test_the_interval_of_an_area_is_that_of_drawing_whole_clusters():
    rng = np.random.default_rng(0)
    cluster_each = " ".join(str(i % 60) for i in range(300))
    curve = frontier(rng, [0.4, 0.55, 0.7], [2.0, 3.5, 5.0], cluster_each)
    other = frontier(rng, [0.35, 0.3, 0.6], [1.5, 3.0, 6.0], cluster_each)
    largest = 6.0
    for rows in (curve, other):
        assert fmean(paired.area_each(rows, largest)) == pytest.approx(metrics.area(rows, largest))
    low, high = paired.area_difference_interval(curve, other, largest)
    difference = metrics.area(curve, largest) - metrics.area(other, largest)
    assert (low + high) / 2 == pytest.approx(difference)

    times_drawn = metrics.bootstrap_weights(60, draws=1000)[:, [i % 60 for i in range(300)]]
    drawn = []
    for weight in times_drawn:
        areas = []
        for rows in (curve, other):
            bits = [torch.tensor([int(bit) for bit in x["solved_each"]]).double() for x in rows]
            redrawn = [
                {"nfe": x["nfe"], "solved": (bit @ weight / weight.sum()).item()}
                for x, bit in zip(rows, bits, strict=True)
            ]
            areas.append(metrics.area(redrawn, largest))
        drawn.append(areas[0] - areas[1])
    half = metrics.students_t(59) * stdev(drawn) * (60 / 59) ** 0.5
    assert (high - low) / 2 == pytest.approx(half, rel=0.1)


# ---- tables --------------------------------------------------------------------------------------


def test_the_table_has_each_difference_with_its_interval_and_leaves_out_other_problems():
    third = row("1111", "1 1 1 1", "0 0 1 2")
    header, line = paired.difference_table([ONE, OTHER, third], ["a", "b", "c"])
    half = 3.182 * stdev([1, 0, -1, -2]) / 2
    assert header == ["minus a", "solved, points", "NFE"]
    assert line[0] == "b" and line[1].startswith("+50.0 (")
    assert line[2] == f"-0.50 ({-0.5 - half:.2f} to {-0.5 + half:.2f})"
    without_calls = [
        {key: x[key] for key in ("solved", "solved_each", "cluster_each")} for x in (ONE, OTHER)
    ]
    assert paired.difference_table(without_calls, ["a", "b"]) == [header[:2], line[:2]]


def test_an_edge_near_0_shows_on_which_side_it_is():
    assert paired.edges_in_brackets((-0.0001, 0.0334), scale=100, digits=1) == " (-0.01 to 3.34)"
    assert paired.edges_in_brackets((-0.02, 0.0), scale=100, digits=1) == " (-2.0 to 0.0)"
    assert paired.edges_in_brackets((0.0004, 0.02), scale=1, digits=2) == " (0.0004 to 0.0200)"
    assert paired.edges_in_brackets((-1e-12, 0.5), scale=1, digits=2) == " (0.00 to 0.50)"


def test_the_same_answers_differ_by_nothing():
    assert paired.difference_table([ONE, ONE], ["a", "b"])[1] == ["b", "+0.0", "+0.00"]
    (_, line) = paired.area_difference_table([[ONE], [ONE]], ["a", "b"], largest=9.0)
    assert line == ["b", "+0.000"]
