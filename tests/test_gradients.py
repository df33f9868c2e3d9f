"""Gradients compared: the estimators against each other where they must agree, the statistics
against loops and against noise made by hand; and the program.
"""

import json
import math
import re
from dataclasses import replace

import pytest
import torch
from toy import generator, sample, to_the_end, toy_policy

from evaluation import metrics
from experiments import gradients
from tasks.registry import TASKS

EXACT = ("exact", "no weights")
TWO = (gradients.TWO_STEPS, "no weights")


@pytest.fixture(scope="module")
def rollout():
    return sample(toy_policy(), to_the_end("top_k", 1), rows=8)


def advantages(rollout, seed=0):
    return torch.randn(len(rollout.nfe), generator=generator(seed))


def test_with_a_stage_for_every_step_all_estimators_are_the_exact_gradient(rollout):
    estimates, calls = gradients.batch_gradients(
        toy_policy(), rollout, advantages(rollout), generator()
    )
    assert len(estimates) == 5 * 4 + 2
    exact = estimates[EXACT]
    assert exact.norm() > 1e-3
    for (m, weights), g in estimates.items():
        error = ((g - exact).norm() / exact.norm()).item()
        assert (error < 1e-3) == (m in (4, 8, "exact")), (m, weights)  # T is at most 3
    assert calls[1] < calls[2] < calls["exact"] == calls[4] == calls[8]


def test_a_gradient_is_that_of_the_weighted_log_probs(rollout):
    """m = 1 without weights: sum of A log pi over B L, differentiated by one plain call a row."""
    policy = toy_policy()
    A = advantages(rollout)
    none = torch.zeros(len(A), 0, dtype=torch.long)
    by_cap = gradients.flat_gradients(policy, rollout, A, none, gradients.CAPS)
    total = 0
    for row in range(len(A)):
        ids = rollout.prompt_ids[row][rollout.prompt_mask[row]]
        canvas = torch.cat([ids, torch.zeros(3, dtype=torch.long)])  # [MASK] is token 0
        logits = policy.denoiser(input_ids=canvas[None]).logits[0, -3:]
        logp = logits[:, 1:].log_softmax(-1)  # never [MASK]
        drawn = logp.gather(-1, rollout.completion[row][:, None] - 1)[:, 0]
        total = total - A[row] * (drawn * rollout.token_mask[row]).sum() / (3 * len(A))
    parts = torch.autograd.grad(total, list(policy.denoiser.parameters()))
    expected = torch.cat([part.flatten() for part in parts])
    torch.testing.assert_close(by_cap["no weights"], expected, rtol=1e-3, atol=1e-6)
    for name in ("C = 1", "no cap"):
        assert (by_cap[name] - expected).norm() > 1e-3 * expected.norm()


def test_two_random_steps_are_right_on_average(rollout):
    policy = toy_policy()
    A = advantages(rollout)
    every = torch.arange(1, 4).expand(len(A), -1)
    caps = {"no weights": 0}
    exact = gradients.flat_gradients(policy, rollout, A, every, caps)["no weights"]
    each = []
    n = 200
    seeded = generator(1)
    for _ in range(n):
        boundaries, tokens, factor = gradients.two_random_steps(rollout, seeded)
        some = replace(rollout, token_mask=tokens)
        estimate = gradients.flat_gradients(policy, some, A * factor, boundaries, caps)
        each.append(estimate["no weights"])
    each = torch.stack(each)
    mean = each.mean(0)
    noise = (each.var(0).sum() / n).sqrt()  # that of the mean
    assert torch.nn.functional.cosine_similarity(mean, exact, dim=0) > 0.99
    assert (mean - exact).norm() < 2 * noise < 0.17 * exact.norm()


def test_two_random_steps_are_two_of_t_each_equally_likely():
    one = sample(toy_policy(), to_the_end("top_k", 1), rows=1, prompts=["a b"])
    many = one.rows(torch.zeros(6000, dtype=torch.long))
    many = replace(many, nfe=torch.tensor([1, 2, 3]).repeat_interleave(2000))
    boundaries, _, factor = gradients.two_random_steps(many, generator())
    assert factor.tolist() == [1.0] * 4000 + [1.5] * 2000
    picked = boundaries.view(3, 2000, 2)
    assert (picked[0] == 0).all()  # its only step, twice the same
    assert picked[1].unique(dim=0).tolist() == [[0, 1]]
    pairs, counts = picked[2].unique(dim=0, return_counts=True)
    assert pairs.tolist() == [[0, 1], [0, 2], [1, 2]]
    assert (counts - 2000 / 3).abs().max() < 4 * math.sqrt(2000 * 2 / 9)


# ---- statistics ----------------------------------------------------------------------------------


def test_products_across_batches_are_a_double_loop_over_different_ones():
    products = torch.rand(5, 5, dtype=torch.double)
    weight = torch.tensor([2, 0, 1, 1, 1], dtype=torch.double)
    drawn = [0, 0, 2, 3, 4]  # the same draw as a list
    pairs = [products[a, b].item() for a in drawn for b in drawn if a != b]
    mean = gradients.mean_across(products, weight)
    assert mean.item() == pytest.approx(sum(pairs) / len(pairs))
    values = torch.rand(5, dtype=torch.double)
    mean = sum(values[b].item() for b in drawn) / 5
    assert gradients.mean(values, weight).item() == pytest.approx(mean)


def made_up(n=300, D=400, angle=0.6, noise=1.5):
    """Batches of an exact and of a biased estimator, of known bias and noise."""
    e = torch.zeros(D)
    g = torch.zeros(D)
    e[0] = 1.0
    g[0] = 2 * math.cos(angle)
    g[1] = 2 * math.sin(angle)
    scatter = torch.randn((2, n, D), generator=generator(3)) / math.sqrt(D)
    return {EXACT: e + noise * scatter[0], (1, "no weights"): g + 2 * noise * scatter[1]}


def test_bias_and_noise_made_by_hand_are_told_apart():
    exact, g = made_up().values()
    gg = (g @ g.T).double()
    ge = (g @ exact.T).double()
    ee = (exact @ exact.T).double()
    value = gradients.statistics(gg, ge, ee, torch.ones(len(g), dtype=torch.double))
    spread = gradients.statistics(gg, ge, ee, metrics.bootstrap_weights(len(g)))
    expected = {
        "bias_cosine": math.cos(0.6),
        "noise": 1.5,
        "norm_ratio": 2.0,
        "true_cosine": math.cos(0.6) / math.sqrt(1 + 1.5**2),
    }
    for name, truth in expected.items():
        low, high = gradients.interval(spread[name], len(g))
        assert low < truth < high and high - low < 0.3, name
        assert value[name].item() == pytest.approx(truth, rel=0.1)
    cosines = torch.nn.functional.cosine_similarity(g, exact)
    assert value["cosine"].item() == pytest.approx(cosines.mean().item(), abs=1e-5)
    errors = (g - exact).norm(dim=1) / exact.norm(dim=1)
    assert value["relative_error"].item() == pytest.approx(errors.mean().item(), abs=1e-4)


def test_a_row_has_every_statistic_and_a_comparison_its_interval():
    estimates = made_up(n=24)
    for m in gradients.STAGES:
        for weights in gradients.CAPS:
            estimates.setdefault((m, weights), estimates[1, "no weights"])
    estimates[TWO] = estimates[EXACT]
    estimates[2, "C = 1"] = estimates[EXACT]
    calls = dict.fromkeys(gradients.STAGES, 1.0) | {"exact": 3.0, gradients.TWO_STEPS: 2.0}
    rows, comparisons = gradients.summarise(estimates, calls)
    row_of = {(row["stages"], row["weights"]): row for row in rows}
    assert row_of[EXACT]["cosine"] == pytest.approx(1) and row_of[EXACT]["calls"] == 3.0
    assert row_of[1, "C = 5"]["cosine_interval"][0] < row_of[1, "C = 5"]["cosine"]
    comparison = {(row["quantity"], *row["of"], *row["against"]): row for row in comparisons}
    low, high = comparison["cosine", 2, "C = 1", 1, "C = 1"]["interval"]
    assert low > 0.5 and high < 1  # exact against a far one
    same = comparison["cosine", 1, "C = 2", 1, "no weights"]
    assert same["difference"] == 0 and same["interval"] == [0, 0]


def test_a_signal_that_noise_hides_has_no_direction():
    draws = torch.linspace(0, 1, 1001, dtype=torch.double)
    draws[:20] = math.nan  # fewer than 2.5%
    low, high = gradients.interval(draws, 1000)
    assert low == pytest.approx(0.02 + 0.025 * 0.98, abs=0.002) and high == pytest.approx(
        0.9755, abs=0.002
    )
    draws[:30] = math.nan
    assert gradients.interval(draws, 1000) == [None, None]


@pytest.mark.parametrize("bias, noise", [(0.9, 1.0), (0.9, 3.0), (0.7, 0.5), (0.7, 1.9)])
def test_the_batch_size_from_which_one_is_better_is_where_the_curves_cross(bias, noise):
    prompts = 32
    answer = gradients.better_from(
        {"bias_cosine": bias, "noise": noise}, {"bias_cosine": 0.8, "noise": 1.5}, prompts
    )

    def cosine(bias, noise, P):
        return bias / math.sqrt(1 + noise**2 * prompts / P)

    def better(P):
        return cosine(bias, noise, P) > cosine(0.8, 1.5, P)

    if answer in ("always", "never"):
        assert {better(2**i) for i in range(-8, 20)} == {answer == "always"}
    else:
        side, P = answer.split()[:2]
        assert better(int(P) * 1.1) == (side == "above")
        assert better(int(P) / 1.1) == (side == "below")


# ---- the program ---------------------------------------------------------------------------------


def test_results_are_printed_written_and_drawn(tmp_path, capsys):
    flags = ["--task", "countdown", "--batches", "4", "--prompts", "4", "--out", str(tmp_path)]
    assert gradients.main(["tiny", *flags]) == 0
    gradients.parse_flags(["tiny", *flags])  # its own results may be replaced
    out = capsys.readouterr().out
    [result] = json.loads((tmp_path / "gradients.json").read_text())
    assert result["state"]["name"] == "countdown, base"
    row_of = {(row["stages"], row["weights"]): row for row in result["rows"]}
    assert len(row_of) == len(gradients.STAGES) * len(gradients.CAPS) + 2
    assert row_of[EXACT]["cosine"] == pytest.approx(1)
    assert row_of[1, "no weights"]["cosine"] < 1
    assert row_of[1, "C = 1"]["batches"] == 4
    assert (tmp_path / "gradients.png").stat().st_size > 20_000
    assert f"{row_of[1, 'C = 1']['cosine']:.3f} (" in out
    assert out.count("m = 2, C = 1: ") >= 2 and "bias" in out


def test_a_signal_that_noise_hides_is_not_printed(capsys):
    estimates = made_up(n=24)
    for m in gradients.STAGES:
        for weights in gradients.CAPS:
            estimates[m, weights] = estimates[1, "no weights"]
    estimates[TWO] = estimates[EXACT]
    calls = dict.fromkeys([*gradients.STAGES, "exact", gradients.TWO_STEPS], 1.0)
    rows, comparisons = gradients.summarise(estimates, calls)
    for row in rows:  # as if its batches' means were nothing but noise
        row["noise"] = math.nan
    state = {"name": "made up", "prompts": 4, "num_generations": 8}
    gradients.print_table({"state": state, "rows": rows, "comparisons": comparisons})
    table = capsys.readouterr().out.splitlines()[3 : 3 + len(rows)]
    assert all(re.search(r" -      -  +no signal", line) for line in table)
    unknown = {"bias_cosine": math.nan, "noise": 1.0}
    known = {"bias_cosine": 0.8, "noise": 1.0}
    assert gradients.better_from(unknown, known, prompts=4) == "no signal"
    assert gradients.better_from(known, unknown, prompts=4) == "no signal"


def test_a_batch_without_a_gradient_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(TASKS["countdown"].compact, "reward", lambda *_: 0.0)
    flags = ["--task", "countdown", "--batches", "4", "--prompts", "1", "--out", str(tmp_path)]
    assert gradients.main(["tiny", *flags]) == 2
    error = capsys.readouterr().err
    assert "all rewards of a batch are equal" in error and error.count("\n") == 1
