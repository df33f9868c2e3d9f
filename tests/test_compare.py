"""Runs against runs: made-up folders whose groups, differences and intervals are known."""

import json
import random
import re
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean, stdev

import pytest
import torch
from PIL import Image
from small_run import write_results

from config import Config
from evaluation import plots
from evaluation.metrics import area
from evaluation.summary import GAMMAS
from experiments import compare
from experiments.compare_chart import STYLES
from tasks.registry import TASKS

N = 150
TASK = TASKS["countdown"].compact
K = len({TASK.key(problem) for problem in TASK.problems("test", N, 0)})
assert 1 < K < N


def bits(share, seed=0):
    """A random string of N of 0 and 1."""
    rng = random.Random(f"{share} {seed}")
    return "".join("01"[rng.random() < share] for _ in range(N))


def row(name, level, nfe, each):
    """A row of `evaluate`."""
    return {
        "name": name,
        "level": level,
        "nfe": nfe,
        "solved": each.count("1") / N,
        "solved_each": each,
        "decoder": "eb",
        "temperature": 0.0,
        "length": 10,
        "block_length": 10,
        "cache": "none",
        "problems": N,
        "clusters": K,
        "step": 8,
        "solved_low": 0.0,
        "solved_high": 1.0,
        "tokens_per_call": 3.0,
        "threshold_mean": 0.1,
        "threshold_std": 0.0,
    }


def write_run(folder, seed=0, each=None, more_calls=0.0, calls=100, **settings):
    """A run of 8 steps that solves `each`, a string, at all gammas."""
    folder.mkdir(parents=True)
    config = replace(
        Config(task="countdown", model="tiny", max_completion_length=10, steps=8, eval_problems=N),
        seed=seed,
        run_dir=str(folder),
        **settings,
    )
    each = each or bits(0.5, seed)
    base = [row("base", level, 4 - level, bits(0.2)) for level in GAMMAS]
    trained = [row("trained", level, 3 - level + more_calls, each) for level in GAMMAS]
    learned = [row("trained", "learned", 2.5 + more_calls, each)]
    if config.train_target == "policy":
        learned = [x for x in trained if x["level"] == config.initial_threshold]
    log = [
        {
            "step": step,
            "solved_mean": step / 10,
            "speed_reward_mean": step / 20,
            "surrogate_kl": None if config.train_target == "sampler" else 0.1,
            "denoiser_rows": calls + seed,
            "reward_mean": 0.5,
            "nfe_mean": 3.0,
            "threshold_mean": 0.1,
            "seconds_rollout": 1.0,
            "seconds_update": 1.0,
        }
        for step in range(1, config.steps + 1)
    ]
    measured = base[2:3] + learned
    write_results(folder, config, log, measured=measured, frontier=base + trained, nfe=1)
    return folder


@pytest.fixture
def drawn(monkeypatch):
    """The figures that would have been saved."""
    figures = []
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.append(figure))
    return figures


def compared(paths, out):
    compare.compare(paths, out)
    return json.loads((out / "compare.json").read_text())


# ---- groups --------------------------------------------------------------------------------------

D1 = {
    "num_stages": 1,
    "importance_weight_cap": 0.0,
    "train_target": "policy",
    "epsilon": 0.5,
    "num_iterations": 12,
    "beta": 0.04,
    "scale_rewards": False,
    "normalise_by": "text",
}
SAMPLER = dict(num_stages=1, train_target="sampler")
MANY = [
    "2 stages, C = 1",
    "mean-field, C = 1",
    "3 stages, C = 1",
    "mean-field, C = 1, sampler only",
    "mean-field, no weights, policy only and 5 more",
]
TWINS = [f"{m} stages, C = 1" for m in (2, 3, 4, 5)]
TWINS += [f"mean-field, no weights, policy only, epsilon {eps} and 4 more" for eps in (0.5, 0.4)]
BOTH = ["policy and sampler, nfe_penalty 0.35", "policy only", "nfe_penalty 0.0"]


@pytest.mark.parametrize(
    ("groups", "labels"),
    [
        ([{}], ["all runs"]),
        ([dict(learning_rate=1e-3), {}], ["learning_rate 0.001", "learning_rate 0.002"]),
        (
            [dict(num_stages=1, importance_weight_cap=0), {}],
            ["mean-field, no weights", "2 stages, C = 1"],
        ),
        ([dict(num_stages=4), dict(num_stages=20)], ["4 stages", "20 stages (exact)"]),
        ([{}, dict(train_target="policy"), dict(nfe_penalty=0.0)], BOTH),
        ([{}, dict(num_stages=1), dict(num_stages=3), SAMPLER, D1], MANY),
        ([dict(num_stages=m) for m in (2, 3, 4, 5)] + [D1, D1 | dict(epsilon=0.4)], TWINS),
    ],
)
def test_settings_are_told_apart_by_what_differs_and_what_most_share_once(groups, labels):
    settings = [asdict(Config(max_completion_length=10, **group)) for group in groups]
    assert compare.labels_by_settings(settings) == labels


def groups_in(paths):
    return compare.group_runs([compare.read_run(path) for path in paths])


def test_a_group_is_called_as_its_folders_are_without_the_seed(tmp_path):
    paths = [write_run(tmp_path / f"d1-{seed}", seed, **D1) for seed in (0, 12)]
    paths += [write_run(tmp_path / "diffpo", 3)]
    paths += [write_run(tmp_path / "gamma-0.3-1", 1, initial_threshold=0.3)]
    assert compare.labels_of(groups_in(paths)) == ["d1", "diffpo", "gamma-0.3"]


def test_folders_without_a_name_in_common_are_told_apart_by_their_settings(tmp_path):
    paths = [write_run(tmp_path / name, seed) for seed, name in enumerate(("a", "b"))]
    paths += [write_run(tmp_path / f"one-{seed}", seed, num_stages=1) for seed in (0, 1)]
    assert compare.labels_of(groups_in(paths)) == ["2 stages", "one"]
    twins = [write_run(tmp_path / f"{m}" / "x-0", num_stages=m) for m in (1, 3)]
    assert compare.labels_of(groups_in(twins)) == ["mean-field", "3 stages"]


def test_groups_differ_in_more_than_the_seed_and_stand_as_given(tmp_path):
    given = [("b", 2, 2e-3), ("a", 0, 1e-3), ("c", 0, 2e-3), ("d", 1, 1e-3)]
    paths = [write_run(tmp_path / name, seed, learning_rate=lr) for name, seed, lr in given]
    groups = groups_in(paths)
    assert [[run.path.name for run in group] for group in groups] == [["c", "b"], ["a", "d"]]


# ---- what is refused -----------------------------------------------------------------------------


def rewrite(folder, name, change):
    value = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(change(value)))


def strip(rows, key):
    return [{k: v for k, v in row.items() if k != key} for row in rows]


def age(folder):
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    text = "".join(json.dumps(row) + "\n" for row in strip(log, "denoiser_rows"))
    (folder / "metrics.jsonl").write_text(text)


def cut(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:5]))


BROKEN = {
    "is not a run: give folders": lambda x: (x / "config.json").unlink(),
    "is not a run: give": lambda x: (x / "config.json").write_text('{"hidden_size": 3}'),
    r"not finished \(5 of 8 steps\): python train.py --resume": cut,
    r"not finished \(8 of 8": lambda x: rewrite(x, "eval.json", lambda rows: rows[:1]),
    r"not finished": lambda x: (x / "eval.json").unlink(),
    "gamma: make a new run with --frontier true": lambda x: rewrite(
        x, "frontier.json", lambda y: y[:-1]
    ),
    "older train.py, without denoiser_rows": age,
    "without solved_each": lambda x: rewrite(x, "frontier.json", lambda y: strip(y, "solved_each")),
    "has task = 'sudoku', and .*one task": lambda x: rewrite(
        x, "config.json", lambda y: y | {"task": "sudoku"}
    ),
    "has eval_split = 'validation'": lambda x: rewrite(
        x, "config.json", lambda y: y | {"eval_split": "validation"}
    ),
    "has settings and seed of .*good: leave": lambda x: rewrite(
        x, "config.json", lambda y: y | {"seed": 0}
    ),
    "was asked other problems": lambda x: rewrite(
        x, "frontier.json", lambda y: [row | {"solved_each": "01"} for row in y]
    ),
}


@pytest.mark.parametrize("message", BROKEN)
def test_what_cannot_be_compared_is_refused_in_a_line_that_names_it(message, tmp_path):
    good = write_run(tmp_path / "good", 0)
    bad = write_run(tmp_path / "bad", 1)
    BROKEN[message](bad)
    with pytest.raises(ValueError, match=message) as error:
        compare.compare([good, bad], tmp_path / "out")
    assert str(error.value).startswith(str(bad)) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_nine_groups_are_one_too_many(tmp_path):
    paths = [write_run(tmp_path / f"{i}", num_stages=i) for i in range(1, 10)]
    assert len(groups_in(paths[:8])) == 8
    with pytest.raises(ValueError, match=f"{paths[8]} is of group 9, but at most 8 fit"):
        groups_in(paths)


# ---- intervals -----------------------------------------------------------------------------------


def test_an_interval_is_students_with_the_problems_part_added():
    three = compare.spread([1.0, 2.0, 4.0], 0.5)  # s² = (16 + 1 + 25) / 9 / 2 = 7 / 3
    assert three == {
        "mean": pytest.approx(7 / 3),
        "half": pytest.approx((4.303**2 * 7 / 9 + 0.5**2) ** 0.5),
    }
    assert compare.spread([1.0, 3.0])["half"] == pytest.approx(12.706)
    assert compare.spread([2.0]) == {"mean": 2.0, "half": None}
    assert compare.spread([2.0], 0.25) == {"mean": 2.0, "half": 0.25}
    for n, t in ((11, 2.228), (12, 2.201), (21, 2.086), (31, 2.042), (101, 1.984)):
        values = [float(i) for i in range(n)]
        expected = t * stdev(values) / n**0.5
        assert compare.spread(values)["half"] == pytest.approx(expected, rel=2e-3)


def made(seed, each, nfe=(2.0,)):
    """A run of some points, without files."""
    n = len(each[0])
    points = {
        at: dict(nfe=calls, solved=x.count("1") / n, solved_each=x, clusters=n // 2)
        for at, (calls, x) in enumerate(zip(nfe, each, strict=True))
    }
    return compare.Run(
        Path(f"{seed}"), seed, settings={}, inputs={}, log=[], base=[], points=points
    )


def test_problems_are_drawn_by_clusters_and_runs_of_a_seed_are_paired():
    """Clusters of two problems: the variance of a mean of k drawn of them is known."""
    rng, clusters = random.Random(0), torch.arange(80) // 2
    ours, theirs = (
        [made(seed, ["".join(rng.choice("01") for _ in range(80))]) for seed in (0, 1, 2)]
        for _ in range(2)
    )
    compare.score_runs(ours + theirs, clusters, largest=3.0)
    [difference, _] = compare.differences(ours, theirs[::-1])
    each = [
        [[int(x) for x in run.points[0]["solved_each"]] for run in group]
        for group in (ours, theirs)
    ]
    by_seed = [fmean(a) - fmean(b) for a, b in zip(*each, strict=True)]
    of_cluster = []
    for c in range(40):
        hits = [sum(bits[2 * c] + bits[2 * c + 1] for bits in group) for group in each]
        of_cluster.append((hits[0] - hits[1]) / 6)
    mean = fmean(of_cluster)
    v = sum((x - mean) ** 2 for x in of_cluster) / 40 / 40
    assert difference["mean"] == pytest.approx(mean) == pytest.approx(fmean(by_seed))
    expected = (4.303**2 * stdev(by_seed) ** 2 / 3 + 1.96**2 * v) ** 0.5
    assert difference["half"] == pytest.approx(expected, rel=0.05)
    [alone, _] = compare.differences(ours[:1], theirs)
    assert alone["seeds"] == [0]
    assert alone["half"] < difference["half"]
    assert alone["nfe"]["half"] is None


@pytest.mark.parametrize("nfe", [(3.0, 1.0, 2.0, 2.0), (1.0, 1.0, 1.0, 1.0), (1.5, 4.0, 2.5, 6.0)])
def test_areas_of_many_draws_are_those_of_evaluate(nfe):
    shares = torch.rand(4, 50, generator=torch.Generator().manual_seed(0)).double()
    for largest in (max(nfe), max(nfe) + 1):
        for i, value in enumerate(compare.areas(shares, nfe, largest).tolist()):
            rows = [dict(nfe=x, solved=y) for x, y in zip(nfe, shares[:, i].tolist(), strict=True)]
            assert value == pytest.approx(area(rows, largest))


def test_areas_are_paired():
    """Of budgets from 1 to 5 calls, half are within reach of 3, three quarters of 2."""
    ours = made(0, ["11001100", "11110000"], (3, 4))
    theirs = made(0, ["11001100", "1" * 8], (2, 5))
    compare.score_runs([ours, theirs], torch.arange(8) // 2, largest=5.0)
    difference = compare.differences([ours], [theirs])[-1]
    assert difference["point"] == "area"
    assert difference["nfe"] is None
    assert difference["mean"] == pytest.approx(0.5 * (2 - 3) / 4)
    v = (ours.drawn_scores["area"] - theirs.drawn_scores["area"]).var().item()
    assert difference["half"] == pytest.approx(3.182 * (v * 4 / 3) ** 0.5)  # of 4 clusters
    assert v > 0
    first = theirs.drawn_scores[0] * 3 / 4  # the second costs the whole budget
    assert torch.allclose(theirs.drawn_scores["area"], first)


# ---- the tables ----------------------------------------------------------------------------------


def three(folder, name, change, **others):
    """Three runs whose answers are some that all share, changed by some of their own."""
    paths = []
    for seed in (0, 1, 2):
        each = "".join(map(change, bits(0.4, "all"), bits(0.7, f"{name} {seed}")))
        paths.append(write_run(folder / f"{name}-{seed}", seed, each, **others))
    return paths


def test_a_planted_difference_is_found_and_none_is_undecided(tmp_path, drawn, capsys):
    paths = three(tmp_path, "reference", lambda x, rare: x)
    paths += three(tmp_path, "better", max, num_stages=1, more_calls=0.25)
    paths += three(tmp_path, "worse", lambda x, rare: min(x, "10"[int(rare)]), num_stages=3)
    for seed in (0, 1, 2):
        paths.append(
            write_run(tmp_path / f"{seed}", seed, bits(0.4, f"other {seed}"), num_stages=4)
        )
    report = compared(paths, tmp_path / "out")
    out = capsys.readouterr().out
    better, worse, same = (group["differences"] for group in report["groups"][1:])
    assert report["groups"][0]["differences"] == []
    points = ["as trained", *GAMMAS, "area"]
    for rows, verdict in ((better, "above"), (worse, "below"), (same, "undecided")):
        assert [row["point"] for row in rows] == points
        assert {row["verdict"] for row in rows[:-1]} == {verdict}
    assert [x["nfe"]["mean"] for x in better[:-1]] == pytest.approx([0.25] * 6)
    assert 0 < abs(same[0]["mean"]) < same[0]["half"]
    for text in ("minus reference", "above  +0.25 ± 0.00", "below  +0.00", "  undecided  +0.00"):
        assert text in out
    assert "± over seeds and clusters" in out and "written:" in out


def test_the_table_says_what_the_logs_and_rows_say(tmp_path, drawn, capsys):
    paths = [write_run(tmp_path / f"run-{seed}", seed, bits(0.5)) for seed in (0, 1)]
    report = compared(paths, tmp_path / "out")
    (group,) = report["groups"]
    assert group["seeds"] == [0, 1] and group["runs"] == [str(path) for path in paths]
    assert group["solved"] == {"mean": pytest.approx(bits(0.5).count("1") / N), "half": 0}
    assert group["sampled"]["mean"] == pytest.approx(0.8)
    assert group["speed_reward"]["mean"] == pytest.approx(0.4)
    assert group["calls"]["mean"] == pytest.approx((800 + 808) / 2 / 1000)
    assert report["largest_nfe"] == 4 - 0.01
    base = [dict(nfe=4 - level, solved=bits(0.2).count("1") / N) for level in GAMMAS]
    assert report["base"]["area"] == pytest.approx(area(base, 4 - 0.01))
    out = capsys.readouterr().out
    assert "minus" not in out and "base at its best γ, 1 " in out and "run  2" in out


def test_only_the_seeds_that_both_have_are_paired(tmp_path, drawn, capsys):
    paths = [write_run(tmp_path / f"a-{seed}", seed) for seed in (0, 1, 2)]
    paths += [write_run(tmp_path / f"b-{seed}", seed, num_stages=1) for seed in (1, 2, 7)]
    paths += [write_run(tmp_path / "c9", 9, num_stages=3)]
    report = compared(paths, tmp_path / "out")
    assert report["groups"][1]["differences"][0]["seeds"] == [1, 2]
    out = capsys.readouterr().out
    assert re.search(r"^ +b +2  as trained", out, re.M) and re.search(r"^ +c9 +0 ", out, re.M)
    assert report["groups"][2]["differences"] == [] and "no seed in common" in out


# ---- the picture ---------------------------------------------------------------------------------


def test_the_picture_shows_each_group_apart_and_says_how_many_seeds(tmp_path, drawn):
    paths = [write_run(tmp_path / f"a{seed}", seed) for seed in (0, 1, 2)]
    paths += [write_run(tmp_path / f"b{seed}", seed, train_target="policy") for seed in (0, 1, 2)]
    paths += [write_run(tmp_path / f"c{seed}", seed, train_target="sampler") for seed in (0, 1, 2)]
    report = compared(paths, tmp_path / "out")
    (figure,) = drawn
    footnote = " ".join(figure.get_supxlabel().split())
    assert "n = 3 (seed 0, 1, 2). Curves" in footnote and "95% t intervals" in footnote
    assert "star: the learned γ" in footnote
    assert f"{N} problems in {K} clusters" in footnote and figure.get_suptitle() == "countdown"
    (legend,) = figure.legends
    labels = [group["label"] for group in report["groups"]]
    assert [text.get_text() for text in legend.get_texts()] == [*labels, "base"]
    steps, calls, kl, frontier = figure.axes
    assert all(axis.get_xlim()[0] == axis.get_ylim()[0] == 0 for axis in figure.axes)
    assert all(axis.get_xlabel() and axis.get_ylabel() for axis in figure.axes)
    assert [len(axis.lines) for axis in (steps, calls, kl)] == [3, 3, 2]  # the sampler has no KL
    assert steps.lines[0].get_ydata() == pytest.approx([step / 10 for step in range(1, 9)])
    assert calls.lines[0].get_xdata()[[0, -1]] == pytest.approx([0.102, 0.8])  # the cheapest ends
    assert len(steps.collections) == 3  # bands
    stars = [line for line in frontier.lines if line.get_marker() == "*"]
    assert len(stars) == 2 and stars[0].get_xydata()[0][0] == 2.5  # none for the policy alone
    line = frontier.containers[0][0].get_xydata()
    shares = [fmean(bits(0.5, seed).count("1") / N for seed in (0, 1, 2))] * 5
    assert line[:, 0] == pytest.approx([3 - level for level in GAMMAS])
    assert line[:, 1] == pytest.approx(shares)


def test_the_title_is_the_callers_and_a_fixed_gamma_has_no_star(tmp_path, drawn):
    paths = [write_run(tmp_path / f"a-{seed}", seed, train_target="policy") for seed in (0, 1)]
    out = ["--out", str(tmp_path / "out")]
    assert compare.main([*map(str, paths), "--title", "It learns", *out]) == 0
    compare.parse_flags([*map(str, paths), *out])  # its own results may be replaced
    [figure] = drawn
    assert figure.get_suptitle() == "It learns"
    assert "star" not in figure.get_supxlabel()
    assert not [line for line in figure.axes[3].lines if line.get_marker() == "*"]


def test_styles_are_told_apart_without_colour():
    looks = [{(x["marker"],) for x in STYLES}, {x["linestyle"] for x in STYLES}]
    assert [len(look) for look in looks] == [8, 8]


def test_the_picture_is_written_and_one_seed_has_no_band(tmp_path):
    paths = [write_run(tmp_path / f"{i}", 3, num_stages=i) for i in (1, 2)]
    compare.compare(paths, tmp_path / "out")
    assert Image.open(tmp_path / "out" / "compare.png").size == (1320, 990)
    assert sorted(x.name for x in (tmp_path / "out").iterdir()) == ["compare.json", "compare.png"]
