"""surrogate.py: its tables are those of loops, its KL is the one that training logs."""

import json
import math
from pathlib import Path

import pytest
import torch

import likelihood
from diffpo_loss import weight_metrics
from experiments import surrogate
from experiments.states import State

TINY = Path(__file__).resolve().parent.parent / "bases" / "tiny"


def test_kl_and_effective_sample_by_step_are_those_of_loops():
    draw = torch.Generator().manual_seed(0)
    step = torch.randint(1, 4, (3000,), generator=draw)
    group = torch.arange(3000) // 10
    log_weight = -0.1 * step + 0.2 * torch.randn(3000, generator=draw, dtype=torch.double)
    rows = {row["step"]: row for row in surrogate.by_step(step, group, log_weight, 2)}
    assert sorted(rows) == [0, 1, 2, 3]
    for t, row in rows.items():
        here = [w for s, w in zip(step.tolist(), log_weight.tolist(), strict=True) if t in (0, s)]
        assert row["tokens"] == len(here)
        assert row["kl"] == pytest.approx(-sum(here) / len(here), rel=1e-6)
        used = [min(math.exp(w), 1) for w in here]
        ess = sum(used) ** 2 / sum(x * x for x in used) / len(used)
        assert row["ess, C = 1"] == pytest.approx(ess)
        low, high = row["kl_interval"]  # tokens are independent here: 1.96 standard errors
        width = 2 * 1.96 * torch.tensor(here).std().item() / len(here) ** 0.5
        assert high - low == pytest.approx(width, rel=0.15)
    assert rows[0]["slope"] == pytest.approx(0.1, abs=0.01)
    low, high = rows[0]["slope_interval"]
    assert low < 0.1 < high and high - low < 0.05
    assert sum(rows[0]["histogram"]) == pytest.approx(1)


def test_a_step_that_hardly_any_token_has_is_left_out():
    step = torch.tensor([1] * 999 + [2])
    rows = surrogate.by_step(step, torch.arange(1000), torch.zeros(1000).double(), 1)
    assert [row["step"] for row in rows] == [0, 1]


def test_where_all_is_unmasked_at_once_no_growth_is_reported(capsys):
    rows = []
    for m in surrogate.STAGES:
        rows += surrogate.by_step(
            torch.ones(40, dtype=torch.long), torch.arange(40), torch.zeros(40).double(), m
        )
    state = {"name": "at once", "batches": 4, "prompts": 10, "num_generations": 1}
    surrogate.print_table({"state": state, "rows": rows})
    assert "with its step" not in capsys.readouterr().out


def test_the_surrogates_kl_is_the_one_that_training_logs():
    state = State("tiny", "countdown", prompts=4)
    result = surrogate.measure(state, batches=4, seed=0)
    kl_of_all = {row["stages"]: row["kl"] for row in result["rows"] if row["step"] == 0}
    total = 0
    count = 0
    for seed in range(4):
        rollout = state.sample_batch(seed).rollout
        no_boundaries = torch.zeros(len(rollout.nfe), 0, dtype=torch.long)
        with torch.no_grad():
            logp = likelihood.surrogate_logp(state.policy, rollout, no_boundaries)
        mask = rollout.token_mask
        n = int(mask.sum())
        metrics = weight_metrics(
            logp, rollout.behaviour_logp, cap=1.0, token_mask=mask, has_unit_weight=mask
        )
        total += n * metrics["surrogate_kl"]
        count += n
    assert kl_of_all[1] == pytest.approx(total / count, rel=1e-4)
    assert kl_of_all[1] > kl_of_all[2] > kl_of_all[8] == pytest.approx(0, abs=0.05)


@pytest.mark.parametrize(
    ("kl", "scatter", "meaning"),
    [
        (0.15, 0.05, "near, as on countdown and a block-causal chain"),
        (0.66, 0.05, "near, as on countdown and a block-causal chain"),
        (1.4, 0.05, "far, as on chain,"),
        (2.8, 0.05, "both far, as on chains of 8 numbers"),
        (0.8, 0.05, "between countdown (below 0.7)"),
        (0.68, 0.5, "between countdown (below 0.7)"),  # its interval reaches beyond what is near
        (0.92, 0.5, "between countdown (below 0.7)"),
    ],
)
def test_the_last_line_says_how_far_mean_field_is_and_what_that_meant(kl, scatter, meaning):
    draw = torch.Generator().manual_seed(0)
    group = torch.arange(400) // 4
    step = torch.ones(400, dtype=torch.long)
    noise = scatter * torch.randn(400, generator=draw, dtype=torch.double)
    noise -= noise.mean()
    rows = surrogate.by_step(step, group, noise - kl, 1)
    rows += surrogate.by_step(step, group, noise - kl / 2, 2)
    line = surrogate.reading(rows)
    low, high = rows[0]["kl_interval"]
    assert low < kl < high
    assert line.startswith(f"Mean-field is {kl:.2f} nats per token ({low:.2f} to {high:.2f}) from")
    assert f"two stages are {kl / 2:.2f}: {meaning}" in line
    assert ("sudoku (0.15), where m = 2 ended 4 to 6 points" in line) == meaning.startswith("near")
    assert line.count("\n") == 0


def test_results_are_printed_written_and_drawn(tmp_path, capsys):
    flags = ["--task", "countdown", "--batches", "4", "--prompts", "2", "--out", str(tmp_path)]
    assert surrogate.main([str(TINY), *flags]) == 0
    surrogate.parse_flags([str(TINY), *flags])  # its own results may be replaced
    out = capsys.readouterr().out
    assert "countdown, base: 4 batches of 2 prompts x 8" in out
    [result] = json.loads((tmp_path / "surrogate.json").read_text())
    row = next(row for row in result["rows"] if row["stages"] == 1 and row["step"] == 2)
    assert f"{row['kl']:.3f} ±" in out
    assert surrogate.reading(result["rows"]) in out
    assert (tmp_path / "surrogate.png").stat().st_size > 20_000
