"""dose.py: made-up runs whose learning curves and differences are known."""

import json
import random
from dataclasses import replace
from statistics import stdev

import pytest
from small_run import write_results

from config import Config
from evaluation import plots
from experiments import dose
from tasks.registry import TASKS

N = 60
STEPS = 12
TASK = TASKS["chain"].compact
CLUSTERS = len({TASK.key(problem) for problem in TASK.problems("test", N, 0)})


def write_run(folder, seed, curve, solved_share, kl_before=1.4, calls=7.0, ess=0.8, task="chain"):
    """A run that solves curve(step), from 1, in training, and about `solved_share` at its end."""
    folder.mkdir(parents=True)
    config = replace(
        Config(task="chain", model="tiny", max_completion_length=7, steps=STEPS, eval_problems=N),
        seed=seed,
        run_dir=str(folder),
        train_target="policy",
    )
    rng = random.Random(f"{folder.name}")
    each = "".join("01"[rng.random() < solved_share] for _ in range(N))
    rows = [
        {
            "name": name,
            "level": 0.1,
            "step": 0 if name == "base" else STEPS,
            "nfe": 7.0,
            "solved": bits.count("1") / N,
            "solved_each": bits,
            "solved_low": 0.0,
            "solved_high": 1.0,
            "problems": N,
            "clusters": CLUSTERS,
            "length": 7,
            "block_length": 7,
            "decoder": "eb",
            "temperature": 0.0,
            "cache": "none",
            "reward": 0.5,
            "tokens_per_call": 1.0,
            "threshold_mean": 0.1,
            "threshold_std": 0.0,
        }
        for name, bits in (("base", "0" * N), ("trained", each))
    ]
    log = [
        {
            "step": step,
            "solved_mean": curve(step),
            "surrogate_kl": kl_before if step == 1 else 0.5,
            "ess_fraction": ess,
            "nfe_mean": calls,
            "denoiser_rows": 100,
            "reward_mean": curve(step),
            "speed_reward_mean": curve(step),
            "threshold_mean": 0.1,
            "seconds_rollout": 1.0,
            "seconds_update": 1.0,
        }
        for step in range(1, STEPS + 1)
    ]
    write_results(folder, config, log, measured=rows, frontier=rows, nfe=7)
    return str(folder)


@pytest.fixture
def paths(tmp_path):
    """Mean-field rises to 0.48; two stages rise to 0.96, with seeds 0.01 apart."""
    paths = []
    for seed in range(3):
        rows = {
            "mean-field": lambda step: 0.04 * step,
            "two-stage-w": lambda step, seed=seed: 0.08 * step + 0.01 * seed,
            "two-stage": lambda step: 0.08 * step,
        }
        for name, curve in rows.items():
            folder = tmp_path / "blocks-1" / f"{name}-{seed}"
            share = 0.4 if name == "mean-field" else 1.0
            paths.append(write_run(folder, seed, curve, share))
    return paths


def test_curves_ends_and_differences_are_those_worked_by_hand(paths, tmp_path, capsys):
    assert dose.main([*paths, "--out", str(tmp_path / "out")]) == 0
    dose.parse_flags([*paths, "--out", str(tmp_path / "out")])  # its own results may be replaced
    [summary] = json.loads((tmp_path / "out" / "dose.json").read_text())
    assert summary["dose"] == "blocks-1"
    assert summary["calls"] == 7
    assert summary["kl"] == pytest.approx((1.4 + 11 * 0.5) / 12)
    assert summary["kl_before"] == pytest.approx(1.4)
    mean_field = summary["rows"]["mean-field"]
    assert mean_field["sampled"]["mean"] == pytest.approx(0.04 * 11.5)  # of steps 11 and 12
    assert mean_field["area"]["mean"] == pytest.approx(0.04 * 6.5)
    assert mean_field["kl"]["mean"] == pytest.approx(0.5)
    assert mean_field["minus_reference"] is None
    assert mean_field["steps_to_share"] == [None, None, None]
    two = summary["rows"]["two-stage-w"]
    difference = two["minus_reference"]
    assert difference["pairs"] == 3
    assert difference["area"]["mean"] == pytest.approx(0.04 * 6.5 + 0.01)
    half = 4.303 * stdev([0, 0.01, 0.02]) / 3**0.5
    assert difference["area"]["half"] == pytest.approx(half, rel=1e-3)
    assert difference["greedy"]["mean"] == pytest.approx(1 - mean_field["greedy"]["mean"])
    assert 0.05 < difference["greedy"]["half"] < 0.4
    # 90% of 0.93; five steps up to the twelfth solve 0.80 on average, and 0.82 with seed 2.
    assert summary["ceiling"] == pytest.approx(0.08 * 11.5 + 0.01)
    assert two["steps_to_share"] == [None, None, None]
    assert summary["weights_on_two_stages"]["area"]["mean"] == pytest.approx(0.01)
    out = capsys.readouterr().out
    assert "two-stage-w minus mean-field, 3 pairs: sampled +47.0 ± 2.5 above" in out
    assert "two-stage-w minus two-stage, 3 pairs: sampled +1.0 ± 2.5 undecided" in out
    assert (tmp_path / "out" / "dose.png").stat().st_size > 20_000


def test_a_metric_that_a_run_did_not_log_is_left_out(paths, tmp_path, capsys):
    """d1's settings mask prompts and have no weights, so there is none to show."""
    d1 = write_run(tmp_path / "blocks-1" / "d1-0", 0, lambda step: 0.1, 0.5, ess=None)
    assert dose.main([*paths, d1, "--out", str(tmp_path / "out")]) == 0
    [summary] = json.loads((tmp_path / "out" / "dose.json").read_text())
    assert summary["rows"]["d1"]["ess"] is None
    assert summary["rows"]["d1"]["kl"]["mean"] == pytest.approx(0.5)
    assert "d1 minus mean-field, 1 pairs" in capsys.readouterr().out


def test_the_first_five_steps_that_solve_a_share_are_found(paths):
    [one] = dose.read_doses(paths)
    run = one.rows["two-stage"][0]
    assert dose.steps_to(run, 0.08 * 3) == 5  # steps 1 to 5
    assert dose.steps_to(run, 0.08 * 3 + 0.001) == 6
    assert dose.steps_to(run, 1.0) is None


def test_a_task_in_a_file_is_named_for_its_own_dose_alone(paths, monkeypatch):
    """Runs of built-in tasks beside it need no file, and are not of that task."""
    seen = {}
    monkeypatch.setattr(
        dose.compare,
        "problem_clusters",
        lambda run, task: seen.setdefault(run.settings["task"], task) and None,
    )
    monkeypatch.setattr(dose.compare, "score_runs", lambda *_: None)
    [built_in] = dose.read_doses(paths)
    [own] = dose.read_doses(paths)
    for runs in own.rows.values():
        for run in runs:
            run.settings["task"] = "a.py:A"
    dose.summarise_dose(built_in, task="b.py:A")
    dose.summarise_dose(own, task="b.py:A")
    assert seen == {"chain": "", "a.py:A": "b.py:A"}


def test_what_cannot_be_compared_gets_one_line(paths, tmp_path, capsys):
    alone = [path for path in paths if "mean-field" not in path]
    other_seed = write_run(tmp_path / "other" / "mean-field-0", 0, lambda step: 0.1, 0.5)
    twin = write_run(tmp_path / "more" / "blocks-1" / "mean-field-1", 1, lambda step: 0.1, 0.5)
    for arguments, message in (
        (alone, "blocks-1 has no mean-field-SEED"),
        ([*paths, twin], "has the seed of another run of blocks-1/mean-field"),
        ([other_seed, str(tmp_path / "other")], "is not a run"),
    ):
        assert dose.main([*arguments, "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_doses_are_in_order_and_each_row_has_a_line(paths, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.append(figure))
    more = [
        write_run(
            tmp_path / "free" / f"{name}-{seed}",
            seed,
            curve=lambda step: 0.05 * step,
            solved_share=0.6,
            kl_before=0.3,
            calls=3.0,
        )
        for name in ("mean-field", "two-stage-w")
        for seed in range(2)
    ]
    dose.dose([*paths, *more], tmp_path / "out")
    curves, by_kl, by_calls = figures[0].axes
    assert [len(line.get_xdata()) for line in curves.lines] == [STEPS] * 3
    assert len(by_kl.containers) == len(by_calls.containers) == 2
    figure = figures[0]
    assert "blocks-1 3" in figure.get_supxlabel() and "free 2" in figure.get_supxlabel()
