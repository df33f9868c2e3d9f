"""sampler.py: the rules against per-row Python loops, the threshold's distribution against
integrals and frequencies.
"""

import math

import pytest
import torch
from toy import finite_differences, generator

from sampler import (
    ClampedLogNormal,
    Decoder,
    ThresholdHead,
    confidence_threshold,
    entropy_bounded,
    top_k,
)

B, L, HIDDEN = 300, 7, 16


def random_case(seed):
    """Scores (B, L) in steps of 1/8, so full of ties and zeros and with exact sums, and masks
    (B, L) of every density.
    """
    g = generator(seed)
    score = torch.randint(0, 8, (B, L), generator=g) / 8
    masked = torch.rand((B, L), generator=g) < torch.rand((B, 1), generator=g)
    masked[0] = False
    masked[1] = True
    masked[2] = torch.arange(L) == 4  # nothing, everything, one
    score[3] = 0.0
    return score, masked


def positions(selected):
    return [set(row.nonzero().flatten().tolist()) for row in selected]


def masked_positions(masked):
    return [row.nonzero().flatten().tolist() for row in masked]


@pytest.mark.parametrize("k", [1, 2, 3, L, L + 5])
def test_top_k_is_the_k_best_of_a_sorted_list_the_left_ones_of_equals(k):
    confidence, masked = random_case(k)
    rows = zip(confidence.tolist(), masked_positions(masked), strict=True)
    expected = [set(sorted(m, key=lambda i: -c[i])[:k]) for c, m in rows]
    assert positions(top_k(confidence, masked, k)) == expected


@pytest.mark.parametrize("tau", [0.0, 0.25, 0.875, 1.0, "per row"])
def test_confidence_threshold_is_all_above_tau_or_the_best_one(tau):
    confidence, masked = random_case(10)
    per_row = torch.randint(0, 9, (B,), generator=generator(11)) / 8
    taus = per_row if tau == "per row" else torch.full((B,), tau)
    expected = []
    for c, m, t in zip(confidence.tolist(), masked_positions(masked), taus.tolist(), strict=True):
        expected.append({i for i in m if c[i] > t} or set(sorted(m, key=lambda i: -c[i])[:1]))
    selected = confidence_threshold(confidence, masked, taus if tau == "per row" else tau)
    assert positions(selected) == expected


@pytest.mark.parametrize("gamma", [0.0, 0.125, 0.5, 1.0, 2.25, 1e9, math.inf, "per row"])
def test_entropy_bounded_is_the_longest_of_all_prefixes_within_the_budget(gamma):
    entropy, masked = random_case(20)
    per_row = torch.randint(0, 20, (B,), generator=generator(21)) / 8
    gammas = per_row if gamma == "per row" else torch.full((B,), gamma)
    expected = []
    for h, m, budget in zip(
        entropy.tolist(), masked_positions(masked), gammas.tolist(), strict=True
    ):
        ascending = sorted(m, key=lambda i: h[i])
        longest = set()
        for n in range(1, len(m) + 1):
            prefix = ascending[:n]
            if sum(h[i] for i in prefix) - max(h[i] for i in prefix) <= budget:
                longest = set(prefix)
        expected.append(longest)
    selected = entropy_bounded(entropy, masked, gammas if gamma == "per row" else gamma)
    assert positions(selected) == expected


@pytest.mark.parametrize("block_length", [None, 1, 2, 3, 5, L, L + 3])
def test_open_positions_are_the_masks_of_each_rows_first_unfinished_block(block_length):
    _, masked = random_case(50)
    expected = []
    for m in masked_positions(masked):
        size = block_length or L
        blocks = [
            set(range(start, start + size)) for start in range(0, L, size)
        ]  # the last may be cut
        expected.append(next((set(m) & block for block in blocks if set(m) & block), set()))
    opened = Decoder(block_length=block_length).open_positions(masked)
    assert positions(opened) == expected
    if block_length == 2:
        assert (
            len({min(row) // 2 for row in expected if row}) == 4
        )  # rows stand in different blocks


@pytest.mark.parametrize("block_length", [1, 2, 3])
@pytest.mark.parametrize("offset", [1, 3, 7])
def test_the_last_positions_are_open_too_if_blocks_begin_in_the_prompt(block_length, offset):
    masked = torch.zeros(2, L, dtype=torch.bool)
    masked[0, L - 1] = True  # the other row has no mask left
    decoder = Decoder(block_length=block_length)
    assert torch.equal(decoder.open_positions(masked, torch.full((2,), offset)), masked)


@pytest.mark.parametrize(
    "rule, level, block_length",
    [
        ("entropy", 0.1, None),
        ("eb", -0.1, None),
        ("eb", math.nan, None),
        ("confidence", None, None),
        ("confidence", -0.1, None),
        ("confidence", 1.1, None),
        ("top_k", None, None),
        ("top_k", 0, None),
        ("top_k", 1.5, None),
        ("eb", 0.1, 0),
    ],
)
def test_a_decoder_refuses_what_makes_no_sense(rule, level, block_length):
    with pytest.raises(ValueError):
        Decoder(rule, level, block_length)


@pytest.mark.parametrize("temperature", [-0.1, math.inf, math.nan])
def test_a_decoder_refuses_a_temperature_that_is_none(temperature):
    with pytest.raises(ValueError, match="temperature"):
        Decoder("eb", 0.1, temperature=temperature)


def test_a_cache_needs_blocks_and_has_to_be_known():
    with pytest.raises(ValueError, match="block_length"):
        Decoder("top_k", 1, cache="dual")
    with pytest.raises(ValueError, match="prefix"):
        Decoder("top_k", 1, 2, cache="half")


def test_a_decoders_select_is_its_rule_and_a_learned_gamma_replaces_the_level():
    entropy, masked = random_case(60)
    confidence = 1 - entropy
    gamma = torch.rand(B, generator=generator(61))
    for decoder, learned, expected in (
        (Decoder("top_k", 2.0), None, top_k(confidence, masked, 2)),
        (Decoder("confidence", 0.5), None, confidence_threshold(confidence, masked, 0.5)),
        (Decoder("eb", 0.4), None, entropy_bounded(entropy, masked, 0.4)),
        (Decoder("eb", None), gamma, entropy_bounded(entropy, masked, gamma)),
    ):
        selected = decoder.select(entropy, confidence, masked, gamma=learned)
        assert torch.equal(selected, expected)


# ---- the learned threshold -----------------------------------------------------------------------


def random_head(seed=0, **options):
    head = ThresholdHead(HIDDEN, **options)
    with torch.no_grad():
        head.linear.weight.normal_(std=0.8, generator=generator(seed))
    return head


def test_a_new_head_gives_every_prompt_the_median_gamma_0():
    head = ThresholdHead(HIDDEN, initial_threshold=0.37)
    distribution = head(torch.randn((50, HIDDEN), generator=generator(0)))
    torch.testing.assert_close(distribution.median, torch.full((50,), 0.37))
    uniform = torch.rand(20001, generator=generator(1), dtype=torch.float64)
    draws = head(torch.zeros(20001, HIDDEN)).sample(uniform)
    error = 1.25 * 0.5 / math.sqrt(20001)  # a median's standard error
    assert abs(draws.log().median().item() - math.log(0.37)) < 4 * error


@pytest.mark.parametrize(
    "initial_threshold, floor, ceiling",
    [(1e-4, 1e-3, 10.0), (11.0, 1e-3, 10.0), (0.1, 0.0, 10.0), (math.nan, 1e-3, 10.0)],
)
def test_a_head_refuses_a_start_outside_its_bounds(initial_threshold, floor, ceiling):
    with pytest.raises(ValueError):
        ThresholdHead(HIDDEN, initial_threshold, floor=floor, ceiling=ceiling)


def test_a_heads_median_is_its_linear_layer_on_the_standardised_state():
    head = random_head(initial_threshold=0.5)
    state = torch.randn((9, HIDDEN), generator=generator(2))
    weights = head.linear.weight[0].tolist()
    for row, median in zip(state.tolist(), head(state).median.tolist(), strict=True):
        mean = sum(row) / HIDDEN
        std = math.sqrt(sum((x - mean) ** 2 for x in row) / HIDDEN + 1e-5)
        terms = [w * (x - mean) / std for w, x in zip(weights, row, strict=True)]
        log_gamma = sum(terms) * 10 / HIDDEN + math.log(0.5)
        assert median == pytest.approx(min(max(math.exp(log_gamma), 1e-3), 10.0), rel=1e-4)


def test_sampled_gammas_stay_within_the_bounds_and_reach_both():
    head = random_head(floor=0.05, ceiling=0.3, sigma=1.0)
    uniform = torch.rand(2000, generator=generator(4), dtype=torch.float64)
    gamma = head(torch.randn((2000, HIDDEN), generator=generator(3))).sample(uniform)
    assert gamma.min().item() == pytest.approx(0.05) and gamma.max().item() == pytest.approx(0.3)
    assert 0.2 < ((gamma > 0.051) & (gamma < 0.299)).float().mean() < 0.8


@pytest.mark.parametrize("rate", [1e-3, 1e-2])
def test_one_step_of_adam_moves_log_gamma_as_far_in_a_wide_model_as_in_a_narrow_one(rate):
    moves = []
    old_moves = []
    for D in (64, 4096):
        head = ThresholdHead(D)
        state = torch.randn((1, D), generator=generator(9))
        optimiser = torch.optim.Adam(head.parameters(), lr=rate)
        before = head(state).mean
        before.sum().backward()
        optimiser.step()
        moves.append((head(state).mean - before).item())
        # Adam's first step is the rate for every weight, with its gradient's sign. Under the old
        # scaling, 1 / sqrt(D), log gamma moved by this.
        standard = (state - state.mean()) / state.std(correction=0)
        old_moves.append(-rate * (standard.abs().sum().item() / math.sqrt(D) + 1))
        assert moves[-1] == pytest.approx(-rate * (10 * standard.abs().mean().item() + 1), rel=1e-2)
    assert moves[1] == pytest.approx(moves[0], rel=0.1)
    assert abs(old_moves[1]) > 5 * abs(old_moves[0])


@pytest.mark.parametrize("mean, sigma", [(-2.0, 0.5), (0.3, 1.5), (-8.0, 1.0), (3.0, 0.7)])
def test_the_density_and_the_two_atoms_sum_to_1(mean, sigma):
    floor = 1e-3
    ceiling = 10.0
    distribution = ClampedLogNormal(torch.tensor([mean], dtype=torch.double), sigma, floor, ceiling)
    gamma = torch.linspace(math.log(floor), math.log(ceiling), 20001, dtype=torch.double)[
        1:-1
    ].exp()
    density = torch.trapezoid(distribution.log_prob(gamma).exp(), gamma)
    bounds = torch.tensor([floor, ceiling], dtype=torch.double)
    atoms = distribution.log_prob(bounds).exp().sum()
    assert (density + atoms).item() == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize("floor, ceiling", [(0.1, 0.6), (0.25, 1.0), (0.05, 0.35)])
def test_atoms_are_the_frequencies_of_the_bounds_and_the_density_that_of_a_bin_between(
    floor, ceiling
):
    n = 40000
    mean = math.log(0.3)
    sigma = 0.8
    distribution = ClampedLogNormal(torch.full((n,), mean), sigma, floor, ceiling)
    gamma = distribution.sample(torch.rand(n, generator=generator(5), dtype=torch.float64))
    p = distribution.log_prob(gamma).exp()
    for bound in (floor, ceiling):
        at_bound = torch.isclose(gamma, torch.tensor(bound))
        share = at_bound.double().mean().item()
        atom = p[at_bound][0].item()
        assert abs(share - atom) < 4 * math.sqrt(atom * (1 - atom) / n)
    middle = math.sqrt(floor * ceiling)
    width = 0.1 * math.sqrt(floor * ceiling)
    density = distribution.log_prob(torch.full((n,), middle))[0].exp().item()
    expected = density * width  # a bin's probability, nearly
    share = ((gamma - middle).abs() < width / 2).double().mean().item()
    assert abs(share - expected) < 4 * math.sqrt(expected / n) + 0.01 * expected


@pytest.mark.parametrize(
    "gamma",
    [[0.05, 0.1, 0.3], [1e-3, 2.0, 0.4], [1e-3, 2.0, 2.0]],
    ids=["between", "both", "at bounds"],
)
def test_the_gradient_of_log_prob_is_that_of_finite_differences_at_the_bounds_too(gamma):
    head = random_head(initial_threshold=0.5, ceiling=2.0, sigma=1.0)
    gamma = torch.tensor(gamma)
    state = torch.randn((3, HIDDEN), generator=generator(7))

    def total():
        return head(state).log_prob(gamma).double().sum()

    total().backward()
    for parameter, index in ((head.linear.weight, range(6)), (head.linear.bias, [0])):
        slopes = finite_differences(total, parameter, index, eps=1e-2)
        torch.testing.assert_close(
            parameter.grad.flatten()[: len(index)], slopes, rtol=0.01, atol=2e-3
        )


def test_no_gradient_reaches_the_prompt_state():
    state = torch.randn((3, HIDDEN), generator=generator(8), requires_grad=True)
    log_prob = random_head()(state).log_prob(torch.tensor([0.1, 0.2, 0.3]))
    assert torch.autograd.grad(log_prob.sum(), state, allow_unused=True)[0] is None
