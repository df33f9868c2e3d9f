"""Gamma by task and difficulty, and its worth: each number against one got another way."""

import json
import random
import statistics
from dataclasses import asdict
from fractions import Fraction
from itertools import permutations, product

import numpy as np
import pytest
import torch
from toy import random_tiny

from config import Config
from diffusion_policy import DiffusionPolicy
from evaluate import evaluate
from evaluation import summary
from experiments import thresholds
from experiments.intervals import interval
from models.prompting import encode_prompts
from sampler import Decoder, ThresholdHead
from tasks import registry
from tasks.registry import TASKS
from training.checkpoint import save_checkpoint
from training.files import write_json
from training.run_folder import create_run


def fewest_inverses(numbers, target):
    """The fewest of - and / in any expression of three numbers that has this value."""
    does = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}
    does["/"] = lambda a, b: a / b if b else Fraction(10**9, 7)  # reaches nothing
    counts = []
    for (a, b, c), first, second in product(permutations(map(Fraction, numbers)), does, does):
        inner = does[first](a, b)
        if target in (does[second](inner, c), does[second](c, inner)):
            counts.append((first in "-/") + (second in "-/"))
    return min(counts)


def test_difficulty_is_the_blanks_or_the_fewest_inverse_operations():
    assert thresholds.difficulty({"numbers": [3, 4, 5], "target": 35}) == ("inverse", 0)
    assert thresholds.difficulty({"puzzle": "0" * 7 + "123412341", "solution": ""}) == ("blanks", 7)
    for problem in TASKS["countdown"].compact.problems("test", 30, 0):
        expected = fewest_inverses(problem["numbers"], problem["target"])
        assert thresholds.difficulty(problem) == ("inverse", expected)
    unknown = ({"question": "?"}, {"numbers": [1, 2]}, {"numbers": [1, 1, 1], "target": 99})
    unknown += ({"numbers": [1, 2, 3, 4], "target": 10},)
    assert {thresholds.difficulty(problem) for problem in unknown} == {("", None)}


def test_the_gain_is_over_the_line_between_the_fixed_gammas_on_either_side():
    nfe, solved = np.array([4.0, 1.0, 2.0, 3.0]), np.array([0.8, 0.2, 0.4, 0.7])  # learned: last
    assert thresholds.gain(solved, nfe) == pytest.approx(0.7 - 0.6)  # halfway from 0.4 to 0.8
    for calls, at_its_end in ((9.0, 0.8), (0.5, 0.2)):
        nfe[-1] = calls
        assert thresholds.gain(solved, nfe) == pytest.approx(0.7 - at_its_end)


def test_the_interval_is_that_of_drawing_whole_clusters_in_a_loop():
    rng, F, N = random.Random(1), 3, 60
    clusters = [f"{i % 11}" for i in range(N)]
    luck = {cluster: rng.random() for cluster in clusters}
    solved = [[float(rng.random() < luck[key]) for key in clusters] for _ in range(F + 1)]
    nfe = [[rng.randint(1, 4) + 2.0 * f for _ in clusters] for f in (0, 1, 2, 0.6)]
    gains, names = [], sorted(set(clusters))
    for _ in range(1500):
        drawn = [i for key in rng.choices(names, k=11) for i in range(N) if clusters[i] == key]
        shares, calls = ([sum(row[i] for i in drawn) / len(drawn) for row in x]
                         for x in (solved, nfe))  # fmt: skip
        t = (calls[3] - calls[0]) / (calls[1] - calls[0])  # the learned one is among these two
        gains.append(shares[3] - shares[0] - min(max(t, 0), 1) * (shares[1] - shares[0]))
    solved, nfe = np.array(solved), np.array(nfe)
    gain, draws = thresholds.gain_at_equal_nfe(solved, nfe, clusters)
    low, high = interval(torch.tensor(draws), 11)
    assert gain == thresholds.gain(solved.mean(1), nfe.mean(1)) and low < gain < high
    # With 11 clusters the percentiles lie sqrt(11 / 10) * 2.228 standard errors out, not 1.96.
    tail = statistics.NormalDist().cdf(-2.337)
    assert (low, high) == pytest.approx(np.quantile(gains, (tail, 1 - tail)).tolist(), abs=0.02)
    # Copies of a problem tell nothing new.
    copies = thresholds.gain_at_equal_nfe(np.tile(solved, 4), np.tile(nfe, 4), clusters * 4)
    assert copies[0] == pytest.approx(gain)
    assert copies[1] == pytest.approx(draws)


def chances(rng, learned_ahead, F=11, clusters=60, size=4):
    """(reward, clusters) of problems that all fixed gammas solve alike, the learned one so much
    more often. All gammas share a problem's luck in part, as those of one model do.
    """
    reward = np.zeros((F + 1, clusters * size))
    names = [f"{i // size}" for i in range(clusters * size)]
    ease = rng.normal(size=clusters).repeat(size)
    for gamma in range(F + 1):
        ahead = learned_ahead if gamma == F else 0.0
        solved = ease + rng.normal(size=len(names)) > -ahead
        reward[gamma] = solved
    return reward, names


@pytest.mark.parametrize(("learned_ahead", "gain"), [(0.0, 0.0), (0.5, 0.1381)])
def test_the_gain_over_the_chosen_gamma_is_right_on_average_and_its_interval_covers_it(
    learned_ahead, gain
):
    """A sum of two standard normals exceeds -0.5 with probability 0.6381."""
    rng = np.random.default_rng(0)
    gains = []
    gains_over_the_best = []
    hits = 0
    repeats = 400
    for _ in range(repeats):
        reward, clusters = chances(rng, learned_ahead)
        value, draws = thresholds.gain_over_chosen(
            reward, clusters, groups=["all"] * len(clusters), draws=400
        )
        low, high = thresholds.interval(torch.tensor(draws), 60)
        hits += low <= gain <= high
        gains.append(value)
        shares = reward.mean(axis=1)
        gains_over_the_best.append(shares[-1] - shares[:-1].max())
    assert statistics.fmean(gains) == pytest.approx(gain, abs=0.006)
    # The best of eleven on the problems it is scored on is ahead by luck.
    assert statistics.fmean(gains_over_the_best) < gain - 0.03
    assert 0.935 - 0.022 <= hits / repeats <= 0.965 + 0.022  # two standard errors


def test_each_task_has_a_rival_of_its_own():
    """Two tasks, each of which one of two fixed gammas solves, and the learned one solves both."""
    tasks = ["a", "b"] * 40
    clusters = [f"{i // 4}" for i in range(80)]
    is_a = np.array([task == "a" for task in tasks], float)
    reward = np.stack([is_a, 1 - is_a, np.ones(80)])
    one, _ = thresholds.gain_over_chosen(reward, clusters, ["all"] * 80)
    each, draws = thresholds.gain_over_chosen(reward, clusters, tasks)
    assert one == pytest.approx(0.5)
    assert each == 0
    assert not draws.any()


def test_the_mean_over_runs_has_seeds_and_problems_in_its_interval():
    rng = np.random.default_rng(1)
    runs = []
    for _ in range(3):
        reward, clusters = chances(rng, learned_ahead=0.5, F=2)
        N = len(clusters)
        runs.append(
            thresholds.Measurements(
                tasks=["chain"] * N,
                clusters=clusters,
                difficulties=[("", None)] * N,
                gamma=np.full(N, 0.1),
                solved=reward,
                nfe=np.full(reward.shape, 4.0),
                price=np.full(N, 0.05),
            )
        )
    means = thresholds.mean_gains(runs)
    values = [
        thresholds.gain_over_chosen(0.8 * run.solved, run.clusters, ["all"] * N)[0] for run in runs
    ]
    one_for_all = means["reward x 100 above the best γ for all"]
    assert one_for_all["mean"] == pytest.approx(statistics.fmean(values))
    over_seeds = 4.303 * statistics.stdev(values) / 3**0.5
    assert over_seeds < one_for_all["half"] < over_seeds + 0.1
    at_equal_nfe = means["solved, points above one fixed γ at equal NFE"]
    values = [thresholds.gain(run.solved.mean(1), run.nfe.mean(1)) for run in runs]
    assert at_equal_nfe["mean"] == pytest.approx(statistics.fmean(values))
    runs[1].clusters = runs[1].clusters[::-1]
    with pytest.raises(ValueError, match="not asked the same problems"):
        thresholds.mean_gains(runs)


# ---- a run ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def policy():
    """Random, with a head that gives every prompt its own gamma."""
    head = ThresholdHead(104, initial_threshold=2.0)
    torch.nn.init.normal_(head.linear.weight, generator=torch.Generator().manual_seed(0))
    return DiffusionPolicy(*random_tiny(), head)


@pytest.fixture
def make_run(policy, tmp_path):
    """make_run(setting=value, ...) -> the folder of a run of this policy."""

    def make(**settings):
        create_run(tmp_path / "a", torch.device("cpu"))
        config = Config(**{"eval_problems": 9} | settings)
        write_json(tmp_path / "a" / "config.json", asdict(config))
        save_checkpoint(tmp_path / "a", policy, [], 1)
        return tmp_path / "a"

    return make


@pytest.fixture
def lucky(monkeypatch):
    """A random policy solves nothing: here the length of a text decides."""
    monkeypatch.setattr(thresholds, "FIXED_GAMMAS", (0.5, 8.0))
    for name in ("countdown", "sudoku"):
        solved = lambda self, problem, text: len(text) % 3 == 0  # noqa: E731
        monkeypatch.setattr(type(TASKS[name]), "solved", solved)
        monkeypatch.setattr(type(TASKS[name]), "reward", lambda *_: 0.9)


def test_what_is_reported_of_a_run_of_two_tasks_is_what_evaluate_measures(
    make_run, policy, lucky, tmp_path, capsys
):
    task = registry.load_task("countdown,sudoku", True)
    problems = task.problems("validation", 9, 0)
    rows = []
    for level in (0.5, 8.0, None):
        decoder = Decoder("eb", level, temperature=0.0, stop_at_eos=True, sample_threshold=False)
        rows.append(evaluate(policy, task, problems, decoder, length=19))
    path = make_run(task="countdown,sudoku", max_completion_length=19, eval_split="validation")
    assert thresholds.main([str(path), "--out", str(tmp_path / "out")]) == 0
    thresholds.parse_flags([str(path), "--out", str(tmp_path / "out")])  # it may replace its own
    [report] = json.loads((tmp_path / "out" / "thresholds.json").read_text())
    for point, row in zip(report["frontier"], rows, strict=True):
        assert point["level"] == row["level"]
        assert (point["solved"], point["nfe"]) == pytest.approx((row["solved"], row["nfe"]))
    assert (report["problems"], report["clusters"]) == (9, rows[0]["clusters"])
    learned = report["frontier"][-1]
    shares = np.array([row["solved"] for row in rows])
    calls = np.array([row["nfe"] for row in rows])
    assert report["gain"] == pytest.approx(thresholds.gain(shares, calls))
    assert report["gain_low"] <= report["gain"] <= report["gain_high"]
    for name, part in rows[-1]["tasks"].items():
        whole, *levels = [row for row in report["rows"] if row["task"] == name]
        for key in ("problems", "clusters", "solved", "solved_low", "solved_high", "nfe"):
            assert whole[key] == pytest.approx(part[key]), key
        assert whole["gamma"] == pytest.approx(part["threshold_mean"])
        assert whole["gamma_10"] < whole["gamma"] < whole["gamma_90"]
        assert len(levels) > 1 and sum(row["problems"] for row in levels) == part["problems"]
        mean = sum(row["problems"] * row["gamma"] for row in levels) / part["problems"]
        assert mean == pytest.approx(part["threshold_mean"])
    out = capsys.readouterr().out
    *lines, _ = out.splitlines()
    assert max(map(len, lines)) <= 80 and "thresholds.json" in out
    assert f"At equal NFE ({learned['nfe']:.2f} calls) the learned γ solves" in " ".join(lines)


def test_gamma_is_the_heads_median_of_each_prompt(make_run, policy, lucky):
    measured = thresholds.measure(make_run(task="countdown"))
    task = TASKS["countdown"].compact
    problems = task.problems("test", 9, 0)
    assert measured.tasks == ["countdown"] * 9
    assert measured.clusters == [task.key(problem) for problem in problems]
    for problem, gamma in zip(problems, measured.gamma, strict=True):
        ids, mask = encode_prompts(policy, [task.prompt(problem)])
        canvas = torch.cat([ids, torch.full((1, 10), policy.mask_id)], dim=1)
        with torch.no_grad():
            states = policy.hidden(canvas, None)[:, : ids.shape[1]]
            assert gamma == pytest.approx(policy.threshold_head(states.mean(1)).median.item(), 1e-3)
    assert np.ptp(measured.gamma) > 0.01


def test_no_canvas_is_run_at_two_thresholds(make_run, lucky, monkeypatch):
    canvases = []
    hidden = DiffusionPolicy.hidden

    def recorded(policy, ids, *arguments, **options):
        canvases.extend(map(tuple, ids.tolist()))
        return hidden(policy, ids, *arguments, **options)

    monkeypatch.setattr(DiffusionPolicy, "hidden", recorded)
    measured = thresholds.measure(make_run(task="countdown"))
    assert 0 < len(canvases) == len(set(canvases)) < measured.nfe.sum()


def test_a_task_without_difficulty_has_one_row_and_nfe_beyond_the_fixed_ones_is_reported():
    F = len(thresholds.FIXED_GAMMAS)
    measured = thresholds.Measurements(
        tasks=["own.py:Sums"] * 4,
        clusters=list("abcd"),
        difficulties=[("", None)] * 4,
        gamma=np.full(4, 0.1),
        solved=np.zeros((F + 1, 4)),
        nfe=np.array([[5.0] * 4] * F + [[9.0] * 4]),
        price=np.full(4, 0.05),
    )
    report = thresholds.report_on(measured)
    [row] = report["rows"]
    assert (row["task"], row["difficulty"], row["nfe"]) == ("own.py:Sums", None, 9)
    assert thresholds.table(report["rows"])[1][:4] == ["Sums", "all", "4", "0.100"]
    worth = thresholds.describe_gain(report)
    assert "0.0 points more" in worth
    assert "No fixed γ takes that many calls, so it is compared with the nearest of 5.00" in worth
    assert set(summary.GAMMAS) <= set(thresholds.FIXED_GAMMAS)


def test_what_learned_no_threshold_is_refused_in_a_line(make_run, tmp_path):
    with pytest.raises(ValueError, match="nothing holds no run: it has no config.json"):
        thresholds.thresholds([tmp_path / "nothing"], tmp_path / "out")
    path = make_run(task="countdown", train_target="policy")
    with pytest.raises(ValueError, match="learned no threshold: its --train_target was policy"):
        thresholds.thresholds([path], tmp_path / "out")
    folder = make_run(task="countdown")
    for name in ("checkpoint", "checkpoint.old"):
        if (folder / name).exists():
            (folder / name).rename(tmp_path / name)
    with pytest.raises(ValueError, match="has no checkpoint yet"):
        thresholds.thresholds([path], tmp_path / "out")
    assert not (tmp_path / "out").exists()
