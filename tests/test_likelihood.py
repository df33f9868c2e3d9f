"""likelihood.py: every surrogate against plain calls of the denoiser, one row and one state at a
time.
"""

from collections import Counter
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from toy import (
    EOS,
    MASK,
    calls_of,
    chi_square_p,
    direct_logp,
    generator,
    prompt_of,
    random_prompts,
    sample,
    to_the_end,
    toy_policy,
    wide_policy,
)  # fmt: skip

from likelihood import (
    cache_kl,
    draw_boundaries,
    draw_masked_prompt,
    latent_at,
    surrogate_logp,
    surrogate_logp_by_definition,
    unit_weight_tokens,
)
from sampler import Decoder

DECODERS = {
    "eb": to_the_end("eb", 0.3),
    "top_k": to_the_end("top_k", 1),
    "blocks": to_the_end("confidence", 0.7, 2),
}


def by_hand(policy, rollout, boundaries, masked_prompt=None):
    """log pi^S by its definition: for each token the state at the largest of 0 and the boundaries
    that is < t. -> (B, L)
    """
    out = []
    for row, steps in enumerate(rollout.unmask_step.tolist()):
        completion = rollout.completion[row].tolist()
        is_text = rollout.token_mask[row].tolist()
        prompt = prompt_of(rollout, row)
        if masked_prompt is not None:
            is_masked = masked_prompt[row][rollout.prompt_mask[row]].tolist()
            pairs = zip(is_masked, prompt, strict=True)
            prompt = [MASK if masked else token for masked, token in pairs]
        for i, (token, t) in enumerate(zip(completion, steps, strict=True)):
            start = max(tau for tau in [0, *boundaries[row].tolist()] if tau < t)
            pairs = zip(completion, steps, strict=True)
            state = [MASK if step > start else other for other, step in pairs]
            logp = direct_logp(policy, prompt, state, rollout.temperature)[i, token]
            out.append(logp if is_text[i] else torch.tensor(0.0))
    return torch.stack(out).view(rollout.completion.shape)


def every_step(rollout):
    """A boundary before every step. (B, T_max - 1)"""
    return torch.arange(1, rollout.nfe.max()).expand(len(rollout.nfe), -1)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


# ---- states and boundaries -----------------------------------------------------------------------


@pytest.mark.parametrize("stop_at_eos", [False, True])
def test_latent_at_is_what_was_unmasked_by_then(stop_at_eos):
    rollout = sample(toy_policy(), DECODERS["eb"], length=5, stop_at_eos=stop_at_eos)
    completion = rollout.completion.tolist()
    steps = rollout.unmask_step.tolist()
    nfe = rollout.nfe.tolist()
    for step in (0, 1, 2, rollout.nfe, rollout.nfe - 1):
        taus = step.tolist() if torch.is_tensor(step) else [step] * len(nfe)
        expected = [
            [c if s <= tau else MASK for c, s in zip(*row, strict=True)]
            for *row, tau in zip(completion, steps, taus, strict=True)
        ]
        assert latent_at(rollout.completion, rollout.unmask_step, step, MASK).tolist() == expected
    assert (latent_at(rollout.completion, rollout.unmask_step, 0, MASK) == MASK).all()


@pytest.mark.parametrize("num_stages", [1, 2, 3, 6])
def test_boundaries_are_sorted_distinct_inner_steps_and_then_nfe(num_stages):
    nfe = torch.tensor([1, 2, 3, 4, 9, 1, 30])
    for seed in range(30):
        boundaries = draw_boundaries(nfe, num_stages, generator(seed))
        assert boundaries.shape == (len(nfe), num_stages - 1)
        for row, T in zip(boundaries.tolist(), nfe.tolist(), strict=True):
            inner = min(T - 1, num_stages - 1)
            assert row[:inner] == sorted(set(row[:inner])) and set(row[:inner]) <= set(range(1, T))
            assert row[inner:] == [T] * (num_stages - 1 - inner)


@pytest.mark.parametrize("T, num_stages", [(4, 2), (4, 3), (6, 3), (6, 4)])
def test_every_set_of_boundaries_is_equally_likely(T, num_stages):
    n = 3000
    nfe = torch.tensor([T, 9]).repeat(n)  # longer rows in the batch change nothing
    seen = Counter(map(tuple, draw_boundaries(nfe, num_stages, generator(1))[::2].tolist()))
    sets = list(combinations(range(1, T), num_stages - 1))
    assert set(seen) == set(sets)
    assert chi_square_p([seen[s] for s in sets], [n / len(sets)] * len(sets)) > 1e-3


def test_a_batch_of_single_step_rollouts_has_empty_stages():
    nfe = torch.ones(3, dtype=torch.long)
    assert draw_boundaries(nfe, 1).tolist() == [[], [], []]
    assert draw_boundaries(nfe, 2).tolist() == [[1], [1], [1]]
    assert draw_boundaries(nfe, 3).tolist() == [[1, 1], [1, 1], [1, 1]]


def test_prompt_tokens_are_masked_as_often_as_asked_and_padding_never():
    prompt_mask = torch.tensor([[False, True, True], [True, True, True]])
    prompt_mask = prompt_mask.repeat(2000, 1)  # 10000 tokens
    masked = draw_masked_prompt(prompt_mask, 1, 0.15, generator(2))
    assert not (masked & ~prompt_mask).any()
    assert abs(masked.sum().item() / 10000 - 0.15) < 4 * (0.15 * 0.85 / 10000) ** 0.5
    assert not draw_masked_prompt(prompt_mask, 1, 0.0).any()
    assert torch.equal(draw_masked_prompt(prompt_mask, 1, 1.0), prompt_mask)


def test_a_group_shares_its_masked_prompt_tokens_and_other_prompts_have_their_own():
    G = 4
    prompt_mask = torch.arange(40) >= torch.tensor([0, 5, 0]).unsqueeze(1)  # (3, P)
    prompt_mask = prompt_mask.repeat_interleave(G, dim=0)
    masked = draw_masked_prompt(prompt_mask, G, 0.5, generator(3))
    groups = masked.view(3, G, 40)
    assert (groups == groups[:, :1]).all()
    for a, b in combinations(groups[:, 0, 5:], 2):
        assert 0.2 < (a != b).float().mean() < 0.8  # independent: half of them
    assert torch.equal(masked, draw_masked_prompt(prompt_mask, G, 0.5, generator(3)))


@pytest.mark.parametrize("num_stages", [1, 2, 4])
def test_unit_weight_tokens_are_those_of_a_stages_first_step(num_stages):
    policy = toy_policy()
    rollout = sample(policy, DECODERS["top_k"], 20, length=6, stop_at_eos=True)
    boundaries = draw_boundaries(rollout.nfe, num_stages, generator(3))
    expected = []
    for steps, taus in zip(rollout.unmask_step.tolist(), boundaries.tolist(), strict=True):
        start = [max(tau for tau in [0, *taus] if tau < t) for t in steps]
        expected.append([t - 1 == tau for t, tau in zip(steps, start, strict=True)])
    unit = unit_weight_tokens(rollout.unmask_step, boundaries)
    assert unit.tolist() == expected and not unit.all()
    with torch.no_grad():
        log_weight = surrogate_logp(policy, rollout, boundaries) - rollout.behaviour_logp
    weight = log_weight[unit & rollout.token_mask].exp()
    torch.testing.assert_close(weight, torch.ones_like(weight), rtol=0, atol=1e-5)
    assert log_weight[~unit & rollout.token_mask].abs().max() > 0.5


# ---- surrogates against the definition -----------------------------------------------------------


@pytest.mark.parametrize("stop_at_eos", [False, True], ids=["to-the-end", "stop-at-eos"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("decoder", DECODERS.values(), ids=DECODERS)
@pytest.mark.parametrize("num_stages", [1, 2, 3])
def test_m_stages_are_the_definition_computed_by_hand(
    num_stages, decoder, temperature, stop_at_eos
):
    policy = toy_policy()
    options = {"temperature": temperature, "stop_at_eos": stop_at_eos}
    rollout = sample(policy, decoder, 3, length=5, **options)  # prompts are left-padded
    boundaries = draw_boundaries(rollout.nfe, num_stages, generator(3))
    with torch.no_grad():
        close(surrogate_logp(policy, rollout, boundaries), by_hand(policy, rollout, boundaries))


@pytest.mark.parametrize("stop_at_eos", [False, True], ids=["to-the-end", "stop-at-eos"])
@pytest.mark.parametrize("decoder", DECODERS.values(), ids=DECODERS)
@pytest.mark.parametrize("num_stages", [1, 2, 3, 6])
def test_the_loop_over_stages_and_the_fast_version_agree_in_values_and_gradients(
    num_stages, decoder, stop_at_eos
):
    policy = toy_policy(double=True)  # the same weights
    # Prompts are left-padded, and rows end early.
    rollout = sample(toy_policy(), decoder, 4, length=5, temperature=0.7, stop_at_eos=stop_at_eos)
    rollout = replace(rollout, behaviour_logp=rollout.behaviour_logp.double())
    assert not rollout.prompt_mask.all() and not rollout.token_mask.all()
    boundaries = draw_boundaries(rollout.nfe, num_stages, generator(7))
    # (B, L), so that nothing cancels
    weights = torch.randn(rollout.completion.shape, generator=generator(8), dtype=torch.double)
    parameters = list(policy.denoiser.parameters())
    results = []
    for score in (surrogate_logp, surrogate_logp_by_definition):
        logp = score(policy, rollout, boundaries)
        results.append([logp, *torch.autograd.grad((weights * logp).sum(), parameters)])
    for fast, loop in zip(*results, strict=True):
        torch.testing.assert_close(fast, loop, rtol=0, atol=1e-6)
        assert loop.abs().max() > 0.1


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("decoder", DECODERS.values(), ids=DECODERS)
def test_a_boundary_before_every_step_recovers_the_rollouts_own_log_probs(decoder, temperature):
    policy = toy_policy()
    for stop_at_eos in (False, True):
        rollout = sample(
            policy, decoder, length=6, temperature=temperature, stop_at_eos=stop_at_eos
        )
        logp = surrogate_logp(policy, rollout, every_step(rollout))
        close(logp, rollout.behaviour_logp * rollout.token_mask)
        # more stages than steps are exact too
        drawn = draw_boundaries(rollout.nfe, int(rollout.nfe.max()) + 2, generator())
        close(surrogate_logp(policy, rollout, drawn), logp)


def test_a_boundary_at_0_and_one_at_nfe_are_mean_field():
    policy = toy_policy()
    rollout = sample(policy, DECODERS["eb"], length=5)
    mean_field = surrogate_logp(policy, rollout, rollout.nfe.new_zeros(len(rollout.nfe), 0))
    close(surrogate_logp(policy, rollout, rollout.nfe.new_zeros(len(rollout.nfe), 1)), mean_field)
    close(surrogate_logp(policy, rollout, rollout.nfe.unsqueeze(1)), mean_field)


@pytest.mark.parametrize("num_stages", [1, 3])
def test_masked_prompt_tokens_are_masks_in_the_prompt(num_stages):
    policy = toy_policy()
    rollout = sample(policy, DECODERS["eb"], 3, length=4)
    boundaries = draw_boundaries(rollout.nfe, num_stages, generator(4))
    masked_prompt = draw_masked_prompt(rollout.prompt_mask, 1, 0.5, generator(5))
    with torch.no_grad():
        logp = surrogate_logp(policy, rollout, boundaries, masked_prompt)
        close(logp, by_hand(policy, rollout, boundaries, masked_prompt))
        other = surrogate_logp(policy, rollout, boundaries)
        close(surrogate_logp(policy, rollout, boundaries, torch.zeros_like(masked_prompt)), other)
    assert (logp - other).abs().max() > 0.1


def test_the_denoiser_sees_what_it_saw_in_the_rollout_and_never_a_token_that_was_not_drawn():
    policy = toy_policy()
    seen = []

    def note(_, args, options):
        seen.append(options["input_ids"])

    policy.denoiser.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
    rollout = sample(policy, DECODERS["top_k"], 1, length=6, prompts=["a b"] * 20, stop_at_eos=True)
    never = rollout.unmask_step > rollout.nfe.unsqueeze(1)  # (B, L)
    assert never.any()
    visited = {tuple(ids) for call in seen for ids in call.tolist()}
    seen.clear()
    surrogate_logp(policy, rollout, every_step(rollout))
    scored = {tuple(ids) for call in seen for ids in call.tolist()}
    assert len(seen) == 1 and scored <= visited
    for row in range(len(never)):  # its own states are among the scored ones, and hold masks there
        one = rollout.rows(slice(row, row + 1))
        seen.clear()
        surrogate_logp(policy, one, every_step(one))
        assert (torch.cat(seen)[:, 2:][:, never[row]] == MASK).all()
        assert (one.completion[0, never[row]] == EOS).all()


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_a_greedy_rollout_has_no_likelihood(temperature):
    policy = toy_policy()
    rollout = sample(policy, DECODERS["eb"], temperature=0.0)
    with pytest.raises(ValueError):
        surrogate_logp(policy, replace(rollout, temperature=temperature), every_step(rollout))


# ---- what is saved -------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_scoring_runs_equal_canvases_once_and_so_what_a_group_shares(stages):
    policy = wide_policy()
    G = 5
    ids, mask = (x.repeat_interleave(G, dim=0) for x in random_prompts(6, 6))
    rollout = policy.rollout(ids, mask, 12, to_the_end("top_k", 2), generator(2))
    boundaries = draw_boundaries(rollout.nfe, stages, generator(0))
    calls = calls_of(policy)
    policy.rows_run = 0
    surrogate_logp(policy, rollout, boundaries)
    states = set()
    for row, taus in enumerate(boundaries.tolist()):
        for low, high in zip([0, *taus], [*taus, 99], strict=True):
            one = rollout.rows(slice(row, row + 1))
            step = rollout.unmask_step[row]
            if ((step > low) & (step <= high) & rollout.token_mask[row]).any():
                state = latent_at(one.completion, one.unmask_step, low, policy.mask_id)
                states.add((row // G, *state[0].tolist()))
    assert calls == [(len(states), 18, False)] and policy.rows_run == len(states)
    assert len(states) <= 2 + 2 * G * (stages - 1)  # z_0 once a group


def test_prompts_that_differ_in_their_padding_alone_are_not_shared():
    policy = wide_policy()
    ids = random_prompts(6)[0].expand(2, -1)
    mask = torch.ones((2, 6), dtype=torch.bool)
    mask[1, 0] = False  # the same ids: only the mask says that row 1 has a token less
    rollout = policy.rollout(ids, mask, 4, to_the_end("top_k", 4), generator(2))
    rollout.completion[1] = rollout.completion[0]
    mean_field = torch.zeros((2, 0), dtype=torch.long)
    logp = surrogate_logp(policy, rollout, mean_field)
    close(logp, surrogate_logp_by_definition(policy, rollout, mean_field))
    assert (logp[0] - logp[1]).abs().max() > 1e-3


def test_scoring_pads_no_further_than_the_rows_at_hand_need():
    policy = wide_policy()
    rollout = policy.rollout(*random_prompts(30, 6, 6), 12, to_the_end("top_k", 2), generator(2))
    calls = calls_of(policy)
    surrogate_logp(policy, rollout.rows(slice(1, 3)), draw_boundaries(rollout.nfe[1:], 1))
    assert calls == [(2, 18, False)]


# ---- what a block cache costs --------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_what_a_cache_costs_is_measured_against_the_exact_policy(cache):
    policy = wide_policy()
    (ids, mask) = random_prompts(6, 6, 5)
    exact, cached = (
        policy.rollout(
            ids, mask, 12, to_the_end("top_k", 2, 6, temperature=0.9, cache=c), generator(4)
        )
        for c in ("none", cache)
    )
    assert abs(cache_kl(policy, exact)) < 1e-4
    with torch.no_grad():
        true = surrogate_logp(policy, cached, torch.arange(1, 7).expand(3, -1))
    expected = (cached.behaviour_logp - true)[cached.token_mask].mean().item()
    assert cache_kl(policy, cached, num_states=99) == pytest.approx(expected)
    assert abs(expected) > 1e-3


@pytest.mark.parametrize("stop_at_eos", [False, True])
def test_what_a_cache_costs_is_estimated_without_bias_from_a_few_states(stop_at_eos):
    policy = wide_policy()
    (ids, mask) = random_prompts(6, 6, 5)
    decoder = Decoder("eb", 2.0, 6, 0.9, cache="dual", stop_at_eos=stop_at_eos)
    rollout = policy.rollout(ids, mask, 12, decoder, generator(4))
    pairs = {
        (row, step)
        for row, steps in enumerate(
            rollout.unmask_step.masked_fill(~rollout.token_mask, 0).tolist()
        )
        for step in steps
        if step > 0
    }
    exact = cache_kl(policy, rollout, num_states=len(pairs))
    calls = calls_of(policy)
    draws = torch.tensor(
        [cache_kl(policy, rollout, num_states=4, generator=generator(seed)) for seed in range(300)]
    )
    assert all(rows <= 4 for rows, _, _ in calls) and len(pairs) > 12
    assert abs(exact) > 1e-3 and draws.std() > 1e-3
    assert abs(draws.mean() - exact) < 4 * draws.std() / len(draws) ** 0.5


@pytest.mark.parametrize("num_states", [2, 64])
def test_of_a_rollout_that_drew_on_the_exact_policy_a_cache_costs_nothing(num_states):
    rollout = sample(toy_policy(), DECODERS["eb"], 10, length=6, stop_at_eos=True)
    assert abs(cache_kl(toy_policy(), rollout, num_states)) < 1e-5
