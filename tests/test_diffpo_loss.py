"""diffpo_loss.py: against double loops, finite differences, and the expected reward over every
trajectory of the toy.
"""

import math
from dataclasses import replace

import pytest
import torch
from toy import (
    EOS,
    MASK,
    direct_logp,
    finite_differences,
    generator,
    prompt_of,
    sample,
    to_the_end,
    toy_policy,
    trajectories,
)

from diffpo_loss import (
    clipped,
    diffpo_loss,
    group_advantages,
    importance_weights,
    is_clipped,
    reference_kl,
    row_mean,
    threshold_loss,
    weight_metrics,
)
from likelihood import draw_boundaries, surrogate_logp, unit_weight_tokens
from sampler import ClampedLogNormal

EB = to_the_end("eb", 0.3)
EPS = 0.2


def random_batch(seed=0, rows=6, length=5):
    """logp_new, logp_old, logp_true, logp_reference (B, L) in float64, advantage (B,) of both
    signs, token_mask (B, L).
    """
    g = generator(seed)
    old = -2 * torch.rand((rows, length), generator=g, dtype=torch.double)
    noise = [torch.randn((rows, length), generator=g, dtype=torch.double) for _ in range(3)]
    new, true, reference = (old + 0.4 * x for x in noise)
    advantage = torch.randn(rows, generator=g, dtype=torch.double)
    lengths = torch.randint(1, length + 1, (rows, 1), generator=g)
    return new, old, true, reference, advantage, torch.arange(length) < lengths


def loss_by_loops(new, old, advantage, weights, token_mask, reference, beta, normalise_by):
    total = 0.0
    for i in range(len(new)):
        row = 0.0
        tokens = 0
        for t in range(len(new[i])):
            if token_mask[i][t]:
                a = advantage[i]
                ratio = math.exp(new[i][t] - old[i][t])
                row += weights[i][t] * min(ratio * a, min(max(ratio, 1 - EPS), 1 + EPS) * a)
                if beta:
                    d = reference[i][t] - new[i][t]
                    row -= beta * (math.exp(d) - d - 1)
                tokens += 1
        total += row / (tokens if normalise_by == "text" else len(new[i]))
    return -total / len(new)


def toy_batch(policy, num_stages=2, rows=4, length=4, seed=0, **options):
    """A rollout of two prompts, boundaries (B, m-1), log-probs under the surrogate (B, L) and
    advantages (B,), as training has them.
    """
    rollout = sample(policy, EB, rows, length, ["a b", "b"], seed, **options)
    boundaries = draw_boundaries(rollout.nfe, num_stages, generator(seed + 1))
    reward = torch.rand(2 * rows, generator=generator(seed + 2))
    with torch.no_grad():
        logp = surrogate_logp(policy, rollout, boundaries)
    return rollout, boundaries, logp, group_advantages(reward, rows, scale_rewards=False)


def nudge(policy, size, seed=0):
    """The policy after an update."""
    g = generator(seed)
    with torch.no_grad():
        for p in policy.denoiser.parameters():
            p += size * torch.randn(p.shape, generator=g, dtype=p.dtype)


# ---- advantages and weights ----------------------------------------------------------------------


def test_advantages_by_hand():
    reward = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.5, 0.5, 0.5, 0.5, 0.0, 0.0, 0.0, 1.0])
    expected = torch.tensor([0.5, -0.5, -0.5, 0.5, 0.0, 0.0, 0.0, 0.0, -0.25, -0.25, -0.25, 0.75])
    torch.testing.assert_close(group_advantages(reward, 4, scale_rewards=False), expected)
    of_pairs = group_advantages(reward, 2, scale_rewards=False)
    torch.testing.assert_close(of_pairs[:6], torch.tensor([0.5, -0.5, -0.5, 0.5, 0.0, 0.0]))


def test_advantages_over_the_standard_deviation_but_not_below_the_floor():
    # standard deviations sqrt(2), 0.028, 0
    reward = torch.tensor([1.0, 3.0, 0.98, 1.02, 7.0, 7.0])
    expected = torch.tensor([-1 / math.sqrt(2), 1 / math.sqrt(2), -0.2, 0.2, 0.0, 0.0])
    advantage = group_advantages(reward, 2, scale_rewards=True, std_floor=0.1)
    torch.testing.assert_close(advantage, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale_rewards", [False, True])
def test_equal_rewards_have_advantages_of_exactly_0(scale_rewards):
    """The mean of eight equal numbers may be rounded to another one: of 0.86, to 0.85999995."""
    reward = (torch.arange(1001) / 1000).repeat_interleave(8)  # (8008,)
    assert (reward.view(-1, 8).mean(dim=1) != reward[::8]).any()
    assert (group_advantages(reward, 8, scale_rewards) == 0).all()


@pytest.mark.parametrize("size", [0, 1, 4])
def test_a_group_needs_two_and_the_rewards_must_fill_the_groups(size):
    with pytest.raises(ValueError):
        group_advantages(torch.rand(6), size, scale_rewards=False)


def test_weights_are_the_ratio_capped_from_above_only():
    _, old, true, *_ = random_batch()
    for cap in (0.5, 1.0, 2.0):
        expected = [
            [min(cap, math.exp(s - t)) for s, t in zip(*row, strict=True)]
            for row in zip(old.tolist(), true.tolist(), strict=True)
        ]
        expected = torch.tensor(expected, dtype=torch.double)
        torch.testing.assert_close(importance_weights(old, true, cap), expected)
    assert importance_weights(old, true, 2.0).min() < 0.5
    assert torch.equal(importance_weights(old, true, 0), torch.ones_like(old))
    torch.testing.assert_close(importance_weights(old, true, math.inf), (old - true).exp())
    with pytest.raises(ValueError, match="cap = -1"):
        importance_weights(old, true, -1)


def test_weights_carry_no_gradient():
    _, old, true, *_ = random_batch()
    assert not importance_weights(old.requires_grad_(), true.requires_grad_(), 2.0).requires_grad


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("num_stages", [1, 2, 3])
def test_weights_are_1_for_tokens_right_after_a_boundary_and_differ_elsewhere(
    num_stages, temperature
):
    policy = toy_policy()
    rollout, boundaries, logp, _ = toy_batch(
        policy, num_stages, rows=20, length=6, temperature=temperature
    )
    weights = importance_weights(logp, rollout.behaviour_logp, 10.0)
    starts = torch.nn.functional.pad(boundaries, (1, 0)).tolist()  # (B, m)
    rows = zip(rollout.unmask_step.tolist(), starts, strict=True)
    fresh = torch.tensor([[t - 1 in s for t in steps] for steps, s in rows])
    ones = torch.ones_like(weights)
    unit = weights.where(fresh & rollout.token_mask, 1.0)
    torch.testing.assert_close(unit, ones, rtol=1e-4, atol=1e-4)
    assert (weights[~fresh & rollout.token_mask] - 1).abs().max() > 0.5


def test_with_a_boundary_before_every_step_all_weights_are_1():
    policy = toy_policy()
    rollout, _, logp, _ = toy_batch(policy, num_stages=7, rows=20, length=6)
    weights = importance_weights(logp, rollout.behaviour_logp, 10.0)[rollout.token_mask]
    torch.testing.assert_close(weights, torch.ones_like(weights), rtol=1e-4, atol=1e-4)


# ---- the loss as a function of log-probs ---------------------------------------------------------


@pytest.mark.parametrize("normalise_by", ["text", "canvas"])
@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_loss_is_a_double_loop_over_rows_and_tokens(seed, beta, normalise_by):
    new, old, true, reference, advantage, token_mask = random_batch(seed)
    weights = importance_weights(old, true, 1.5)
    loss, metrics = diffpo_loss(new, old, advantage, weights, token_mask, EPS, normalise_by)
    assert metrics["loss"] == loss.item()
    kl = reference_kl(new, reference, token_mask, normalise_by)
    lists = [x.tolist() for x in (new, old, advantage, weights, token_mask, reference)]
    expected = loss_by_loops(*lists, beta, normalise_by)
    assert (loss + beta * kl).item() == pytest.approx(expected)


def test_its_metrics_are_counted_by_loops():
    new, old, _, _, advantage, token_mask = random_batch(3)
    _, metrics = diffpo_loss(new, old, advantage, torch.ones_like(old), token_mask, EPS, "text")
    tokens = [(i, t) for i, t in token_mask.nonzero().tolist()]
    ratio = {(i, t): math.exp(new[i, t] - old[i, t]) for i, t in tokens}
    too_far = {key: math.copysign(1, r - 1) for key, r in ratio.items() if not 0.8 <= r <= 1.2}
    stuck = [key for key, sign in too_far.items() if sign * advantage[key[0]] > 0]
    assert metrics["ratio_mean"] == pytest.approx(sum(ratio.values()) / len(tokens))
    assert metrics["clip_fraction"] == pytest.approx(len(stuck) / len(tokens))
    assert 0 < len(stuck) < len(tokens)


def test_the_reference_kl_is_a_loop_over_tokens_never_negative_and_0_at_the_reference():
    new, _, _, reference, _, token_mask = random_batch(3)
    totals = {"text": 0.0, "canvas": 0.0}
    for i, is_text in enumerate(token_mask.tolist()):
        d = [(reference[i, t] - new[i, t]).item() for t in range(5) if is_text[t]]
        kl = sum(math.exp(x) - x - 1 for x in d)
        totals["text"] += kl / len(d)
        totals["canvas"] += kl / 5
    for normalise_by, total in totals.items():
        kl = reference_kl(new, reference, token_mask, normalise_by)
        assert kl.item() == pytest.approx(total / len(new)) and total > 0
        assert reference_kl(new, new, token_mask, normalise_by) == 0


def test_the_reference_kl_of_draws_is_on_average_that_of_the_two_distributions():
    g = generator(4)
    n = 20000
    p, q = torch.randn((2, 6), generator=g, dtype=torch.double).log_softmax(-1)
    tokens = torch.multinomial(p.exp(), n, replacement=True, generator=g)
    every = torch.ones((n, 1), dtype=torch.bool)
    kl = reference_kl(p[tokens, None], q[tokens, None], every, normalise_by="text")
    true = (p.exp() * (p - q)).sum().item()
    spread = ((q - p).exp() - (q - p) - 1)[tokens].std().item()
    assert abs(kl.item() - true) < 4 * spread / math.sqrt(n) and true > 0.1


@pytest.mark.parametrize(
    "ratio, advantage, value, slope",
    [
        (1.1, 2, 2.2, 2),
        (1.5, 2, 2.4, 0),
        (0.5, 2, 1.0, 2),
        (0.9, -1, -0.9, -1),
        (0.5, -1, -0.8, 0),
        (1.5, -1, -1.5, -1),
    ],
)
def test_the_clip_of_both_signs_by_hand(ratio, advantage, value, slope):
    ratio = torch.tensor(ratio, requires_grad=True)
    advantage = torch.tensor(advantage)
    out = clipped(ratio, advantage, EPS)
    assert out.item() == pytest.approx(value)
    assert torch.autograd.grad(out, ratio)[0].item() == slope
    assert is_clipped(ratio, advantage, EPS).item() == (slope == 0)


@pytest.mark.parametrize("normalise_by", ["text", "canvas"])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_its_gradient_by_log_probs_is_that_of_finite_differences_and_0_on_padding(
    beta, normalise_by
):
    new, old, true, reference, advantage, token_mask = random_batch(4)
    weights = importance_weights(old, true, 1.5)

    def loss():
        kl = reference_kl(new, reference, token_mask, normalise_by)
        loss, _ = diffpo_loss(new, old, advantage, weights, token_mask, EPS, normalise_by)
        return loss + beta * kl

    new.requires_grad_()
    gradient = torch.autograd.grad(loss(), new)[0].flatten()
    slopes = finite_differences(loss, new, range(new.numel()))
    torch.testing.assert_close(gradient, slopes, rtol=1e-5, atol=1e-7)
    assert (gradient[~token_mask.flatten()] == 0).all() and gradient.any()


def test_only_the_new_log_probs_get_a_gradient():
    new, old, _, reference, advantage, token_mask = random_batch(5)
    for x in (new, old, reference):
        x.requires_grad_()
    weights = importance_weights(old, old + 1, 2.0)
    loss, _ = diffpo_loss(new, old, advantage, weights, token_mask, EPS, "text")
    loss = loss + 0.1 * reference_kl(new, reference, token_mask, "text")
    gradients = torch.autograd.grad(loss, [new, old, reference], allow_unused=True)
    assert gradients[0].any() and gradients[1] is None and gradients[2] is None


def test_a_row_without_tokens_has_the_mean_0_and_the_canvas_counts_all_positions():
    x = torch.tensor([[1.0, 2.0, 9.0], [3.0, 4.0, 5.0]])
    token_mask = torch.tensor([[True, True, False], [False] * 3])
    assert row_mean(x, token_mask, normalise_by="text").tolist() == [1.5, 0.0]
    assert row_mean(x, token_mask, normalise_by="canvas").tolist() == [1.0, 0.0]


def test_a_misspelt_normalisation_is_refused():
    with pytest.raises(ValueError, match="unknown normalise_by 'Text': choose canvas or text"):
        row_mean(torch.ones(2, 3), torch.ones(2, 3) > 0, "Text")


@pytest.mark.parametrize(
    ("normalise_by", "scale_rewards", "value"),
    [("canvas", False, -1 / 12), ("canvas", True, -math.sqrt(2) / 12), ("text", True, 0.0)],
)
def test_at_the_first_update_the_canvas_leaves_the_covariance_of_advantage_and_length(
    normalise_by, scale_rewards, value
):
    """Two rows of 2 and 3 tokens, rewards 0 and 1: on a canvas of 3 the loss is not 0."""
    logp = torch.tensor([[-0.5, -0.2, -0.9], [-0.1, -1.2, -0.3]])
    reward = torch.tensor([0.0, 1.0])
    loss, _ = diffpo_loss(
        logp_new=logp,
        logp_old=logp,
        advantage=group_advantages(reward, 2, scale_rewards),
        weights=torch.ones_like(logp),
        token_mask=torch.tensor([[True, True, False], [True, True, True]]),
        epsilon=EPS,
        normalise_by=normalise_by,
    )
    assert loss.item() == pytest.approx(value, abs=1e-7)


# ---- the loss on the toy, end to end -------------------------------------------------------------


@pytest.mark.parametrize("num_stages", [1, 2])
def test_at_the_first_inner_update_the_ratio_is_1_and_the_gradient_is_not_0(num_stages):
    policy = toy_policy()
    rollout, boundaries, logp_old, advantage = toy_batch(policy, num_stages)
    weights = importance_weights(logp_old, rollout.behaviour_logp, 2.0)
    logp_new = surrogate_logp(policy, rollout, boundaries)
    assert ((logp_new - logp_old).exp() == 1).all()
    loss, metrics = diffpo_loss(
        logp_new, logp_old, advantage, weights, rollout.token_mask, EPS, normalise_by="text"
    )
    rows = zip(advantage, weights, rollout.token_mask, strict=True)
    terms = [(a * w[m].mean()).item() for a, w, m in rows]
    assert loss.item() == pytest.approx(-sum(terms) / len(terms), abs=1e-6)
    assert metrics["ratio_mean"] == pytest.approx(1) and metrics["clip_fraction"] == 0
    loss.backward()
    assert all(p.grad.abs().max() > 1e-4 for p in policy.denoiser.parameters())


@pytest.mark.parametrize("num_stages, beta", [(1, 0.0), (2, 0.0), (2, 0.2), (7, 0.0)])
def test_its_gradient_by_the_denoisers_parameters_is_that_of_finite_differences(num_stages, beta):
    policy = toy_policy(double=True)  # the same weights
    rollout, boundaries, _, advantage = toy_batch(toy_policy(), num_stages, temperature=0.7)
    rollout = replace(rollout, behaviour_logp=rollout.behaviour_logp.double())
    logp_old = surrogate_logp(policy, rollout, boundaries).detach()
    weights = importance_weights(logp_old, rollout.behaviour_logp, 2.0)
    nudge(policy, 0.03)  # so that some ratios are clipped and others are not

    def loss():
        new = surrogate_logp(policy, rollout, boundaries)
        mask = rollout.token_mask
        loss, metrics = diffpo_loss(new, logp_old, advantage.double(), weights, mask, EPS, "text")
        return loss + beta * reference_kl(new, logp_old - 0.1, mask, "text"), metrics

    assert 0 < loss()[1]["clip_fraction"] < 0.9
    loss()[0].backward()
    for seed, p in enumerate(policy.denoiser.parameters()):
        index = torch.randint(0, p.numel(), (2,), generator=generator(seed)).tolist()
        slopes = finite_differences(lambda: loss()[0], p, index)
        torch.testing.assert_close(p.grad.flatten()[index], slopes, rtol=1e-4, atol=1e-6)


def test_over_all_trajectories_the_exact_surrogates_gradient_is_that_of_the_expected_reward():
    sampler = toy_policy()
    policy = toy_policy(double=True)  # the same weights
    sampler.end_ids = policy.end_ids = []  # no token ends the text, so that all tokens count
    rollout = sample(sampler, EB, 27, prompts=["a b"])
    every = trajectories(policy, prompt_of(rollout, 0), 3, EB)
    reward = torch.rand(27, generator=generator(1), dtype=torch.double)
    completion, steps = (torch.tensor(x) for x in zip(*every, strict=True))  # (27, L) each
    logp = torch.tensor(list(every.values()), dtype=torch.double)
    rollout = replace(rollout, completion=completion, unmask_step=steps, nfe=steps.amax(1))
    rollout = replace(rollout, behaviour_logp=logp)
    boundaries = draw_boundaries(rollout.nfe, 4, generator(2))  # a boundary before every step

    # loss = -mean_i 1/3 sum_t A_i rho_it. With A_i = 27 * 3 * p_i * R_i its gradient is minus that
    # of sum_i p_i R_i.
    advantage = 81 * logp.sum(1).exp() * reward
    new = surrogate_logp(policy, rollout, boundaries)
    weights = importance_weights(new, logp, 2.0)
    loss, _ = diffpo_loss(new, new.detach(), advantage, weights, rollout.token_mask, EPS, "text")
    loss.backward()

    def expected_reward():
        values = trajectories(policy, prompt_of(rollout, 0), 3, EB).values()
        pairs = zip(values, reward.tolist(), strict=True)
        return sum(math.exp(sum(logp)) * r for logp, r in pairs)

    for p in list(policy.denoiser.parameters())[::4]:
        index = [p.grad.abs().argmax().item()]
        slope = finite_differences(expected_reward, p, index)
        torch.testing.assert_close(p.grad.flatten()[index], -slope, rtol=1e-4, atol=1e-6)


def name(decoder):
    return f"{decoder.rule}-{decoder.level}-block-{decoder.block_length}"


def reward_gradient(policy, prompt, every, reward):
    """By the denoiser's parameters, of the sum over trajectories of probability times reward, from
    one plain call a state. -> (parameters,)
    """
    called = {}
    expected = 0.0
    for ((completion, steps), logp), r in zip(every.items(), reward.tolist(), strict=True):
        total = 0.0
        for i, t in enumerate(steps):
            if logp[i] == 0:  # never drawn
                continue
            pairs = zip(completion, steps, strict=True)
            state = tuple(MASK if step >= t else token for token, step in pairs)
            if state not in called:
                called[state] = direct_logp(policy, prompt, state)
            total = total + called[state][i, completion[i]]
        expected = expected + r * total.exp()
    return flat_gradient(expected, policy)


def flat_gradient(value, policy):
    gradients = torch.autograd.grad(value, list(policy.denoiser.parameters()))
    return torch.cat([x.flatten() for x in gradients])


def all_trajectories(decoder):
    """Every trajectory of a toy whose texts end at [EOS], as a Rollout in float64 whose token_mask
    is the text, and which of its tokens were drawn, (n, L). With the toy, and its prompt.
    """
    sampler = toy_policy()
    policy = toy_policy(double=True)  # the same weights
    rollout = sample(sampler, decoder, 1, prompts=["a b"])
    every = trajectories(policy, prompt_of(rollout, 0), 3, decoder)
    completion, steps = (torch.tensor(x) for x in zip(*every, strict=True))  # (n, L) each
    logp = torch.tensor(list(every.values()), dtype=torch.double)
    drawn = logp != 0
    end = completion == EOS
    rollout = replace(
        rollout.rows(torch.zeros(len(every), dtype=torch.long)),
        completion=completion,
        unmask_step=steps,
        behaviour_logp=logp,
        nfe=(steps * drawn).amax(1),
        token_mask=(end.cumsum(1) - end.long()) == 0,
    )
    return policy, prompt_of(rollout, 0), every, rollout, drawn


def objective_gradient(policy, rollout, reward, token_mask, normalise_by):
    """Of J's expected value under the enumerated trajectories, with the exact likelihood and w = 1:
    each row's advantage is its reward times n times its probability.
    """
    p = rollout.behaviour_logp.sum(1).exp()
    boundaries = draw_boundaries(rollout.nfe, 4, generator(2))  # a boundary before every step
    new = surrogate_logp(policy, replace(rollout, token_mask=token_mask), boundaries)
    advantage = len(p) * p * reward
    weights = torch.ones_like(new)
    loss, _ = diffpo_loss(new, new.detach(), advantage, weights, token_mask, EPS, normalise_by)
    return flat_gradient(-loss, policy)


def reward_of_texts(rollout):
    """A random number for each different text, (n,): what is behind [EOS] counts nothing."""
    texts = rollout.completion.masked_fill(~rollout.token_mask, MASK)
    index = texts.unique(dim=0, return_inverse=True)[1]
    return torch.rand(len(index), generator=generator(1), dtype=torch.double)[index]


# [EOS] ends the text, and the reward is the text's. What J's gradient is a gradient of depends on
# when the tokens behind [EOS] were drawn, which carry no loss:
#  - With the text's last token, or later. They told the text nothing, and their score is 0 on
#    average, whatever the text. So nothing is lost without them, and with n_i = L the gradient of J
#    is that of the expected reward, over L. So it always is from left to right, or in one step.
#  - Before some token of the text. They changed its distribution, and their part is missing: J's
#    gradient is another one. Summed over all tokens that were drawn it would be the right one.
#  - With n_i = |o_i| it is another one even in the first case.
IN_ORDER = [
    to_the_end("top_k", 1, 1),
    to_the_end("eb", 0.3, 2),
    to_the_end("top_k", 2),
    to_the_end("eb", 5.0),
]
OUT_OF_ORDER = [to_the_end("eb", 0.3), to_the_end("top_k", 1)]


@pytest.mark.parametrize("stop_at_eos", [True, False], ids=["stop-at-eos", "to-the-end"])
@pytest.mark.parametrize("decoder", IN_ORDER + OUT_OF_ORDER, ids=name)
def test_the_canvas_gives_the_gradient_of_the_expected_reward_where_the_text_saw_nothing_behind_eos(
    decoder, stop_at_eos
):
    in_order = decoder in IN_ORDER
    decoder = replace(decoder, stop_at_eos=stop_at_eos)
    policy, prompt, every, rollout, drawn = all_trajectories(decoder)
    text = rollout.token_mask
    steps = rollout.unmask_step
    assert rollout.behaviour_logp.sum(1).exp().sum().item() == pytest.approx(1)
    assert len(set(text.sum(1).tolist())) == 3  # the lengths differ
    before = (drawn & ~text).unsqueeze(2) & text.unsqueeze(1)  # (n, behind [EOS], text)
    before &= steps.unsqueeze(2) < steps.unsqueeze(1)
    assert before.any() != in_order  # what this test calls in order

    for baseline in (0.0, 0.4):
        reward = reward_of_texts(rollout) - baseline  # any baseline has the same gradient
        expected = reward_gradient(policy, prompt, every, reward)
        canvas = 3 * objective_gradient(policy, rollout, reward, text, "canvas")
        all_drawn = 3 * objective_gradient(policy, rollout, reward, drawn, "canvas")
        by_text = 3 * objective_gradient(policy, rollout, reward, text, "text")
        torch.testing.assert_close(all_drawn, expected, rtol=1e-8, atol=1e-10)
        if in_order:
            torch.testing.assert_close(canvas, expected, rtol=1e-8, atol=1e-10)
        else:
            assert cosine(canvas, expected) < 0.995
        assert cosine(by_text, expected) < 0.95


def cosine(a, b):
    return torch.cosine_similarity(a, b, dim=0).item()


@pytest.mark.parametrize("normalise_by", ["text", "canvas"])
@pytest.mark.parametrize("size", [1, 3, 4])
def test_micro_batches_add_up_to_the_gradient_of_the_whole(size, normalise_by):
    policy = toy_policy()
    rollout, boundaries, logp_old, advantage = toy_batch(policy)
    weights = importance_weights(logp_old, rollout.behaviour_logp, 2.0)
    nudge(policy, 0.01)
    gradients = []
    n = len(advantage)
    for width in (n, size):
        policy.denoiser.zero_grad()
        for start in range(0, n, width):
            part = slice(start, start + width)
            rows = rollout.rows(part)
            new = surrogate_logp(policy, rows, boundaries[part])
            loss, _ = diffpo_loss(
                logp_new=new,
                logp_old=logp_old[part],
                advantage=advantage[part],
                weights=weights[part],
                token_mask=rows.token_mask,
                epsilon=EPS,
                normalise_by=normalise_by,
            )
            (loss * len(new) / n).backward()
        gradients.append([p.grad.clone() for p in policy.denoiser.parameters()])
    for whole, summed in zip(*gradients, strict=True):
        torch.testing.assert_close(summed, whole, rtol=1e-4, atol=1e-5)
        assert whole.any()


# ---- the threshold's loss, and the metrics -------------------------------------------------------


def test_the_threshold_loss_is_a_loop_over_rows_and_its_gradient_that_of_finite_differences():
    new, old, *_ = (x[:, 0].clone() for x in random_batch(6, rows=12)[:4])
    advantage = torch.randn(12, generator=generator(7), dtype=torch.double)
    loss, metrics = threshold_loss(new.requires_grad_(), old, advantage, EPS)
    total = 0.0
    ratios = []
    stuck = 0
    for n, o, a in zip(new.tolist(), old.tolist(), advantage.tolist(), strict=True):
        ratios.append(math.exp(n - o))
        total += min(ratios[-1] * a, min(max(ratios[-1], 1 - EPS), 1 + EPS) * a)
        stuck += (ratios[-1] > 1 + EPS and a > 0) or (ratios[-1] < 1 - EPS and a < 0)
    assert loss.item() == pytest.approx(-total / 12) and 0 < stuck < 12
    assert metrics == pytest.approx(
        {
            "threshold_loss": -total / 12,
            "threshold_ratio": sum(ratios) / 12,
            "threshold_clip_fraction": stuck / 12,
        }
    )
    slopes = finite_differences(lambda: threshold_loss(new, old, advantage, EPS)[0], new, range(12))
    torch.testing.assert_close(torch.autograd.grad(loss, new)[0], slopes, rtol=1e-5, atol=1e-7)


def test_climbing_the_threshold_loss_moves_gamma_towards_what_was_rewarded():
    mean = torch.full((400,), -1.0, requires_grad=True)
    distribution = ClampedLogNormal(mean, 0.5, 1e-3, 10.0)
    uniform = torch.rand(distribution.mean.shape, generator=generator(8), dtype=torch.float64)
    gamma = distribution.sample(uniform)
    logp = distribution.log_prob(gamma)
    advantage = (gamma - gamma.mean()).sign()  # large thresholds are good
    loss, metrics = threshold_loss(logp, logp.detach(), advantage, EPS)
    assert metrics["threshold_ratio"] == pytest.approx(1)
    # minus the score of a normal distribution
    expected = -advantage * (gamma.log() + 1.0) / 0.25 / 400
    gradient = torch.autograd.grad(loss, mean)[0]
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
    assert gradient.sum() < 0


@pytest.mark.parametrize("cap", [0, 0.8, 1.3, 100.0])
def test_weight_metrics_are_counted_by_loops(cap):
    _, old, true, _, _, token_mask = random_batch(9, rows=8)
    has_unit_weight = torch.rand(old.shape, generator=generator(10)) < 0.4  # of padding too
    metrics = weight_metrics(old, true, cap, token_mask, has_unit_weight)
    tokens = token_mask.nonzero().tolist()
    log_weight = [(old[i, t] - true[i, t]).item() for i, t in tokens]
    unit = [x for x, (i, t) in zip(log_weight, tokens, strict=True) if has_unit_weight[i, t]]
    raw = [math.exp(x) for x in log_weight]
    used = [min(cap, w) for w in raw] if cap else [1.0] * len(raw)
    assert metrics == pytest.approx(
        {
            "importance_weight_mean": sum(used) / len(used),
            "importance_weight_max": max(raw),
            "capped_weight_fraction": sum(w > cap for w in raw) / len(raw) if cap else 0.0,
            "ess_fraction": sum(used) ** 2 / sum(w * w for w in used) / len(used),
            "surrogate_kl": -sum(log_weight) / len(log_weight),
            "unit_weight_error": math.sqrt(sum(x * x for x in unit) / len(unit)),
        }
    )


def test_an_exact_surrogate_has_no_kl_and_loses_no_sample_and_more_stages_come_nearer():
    policy = toy_policy()
    kl = []
    for num_stages in (1, 2, 7):
        rollout, boundaries, logp, _ = toy_batch(policy, num_stages, rows=400, length=6)
        has_unit_weight = unit_weight_tokens(rollout.unmask_step, boundaries)
        metrics = weight_metrics(
            logp, rollout.behaviour_logp, 2.0, rollout.token_mask, has_unit_weight
        )
        assert metrics["unit_weight_error"] < 1e-5
        kl.append(metrics["surrogate_kl"])
    assert kl[0] > kl[1] > 0.01 and kl[2] == pytest.approx(0, abs=1e-5)
    assert metrics["ess_fraction"] == pytest.approx(1)
    assert metrics["importance_weight_max"] == pytest.approx(1, abs=1e-4)


def test_surrogate_kl_of_mean_field_is_that_of_the_enumerated_trajectories():
    policy = toy_policy()
    n = 3000
    policy.end_ids = []  # no token ends the text, so that all tokens count
    rollout = sample(policy, EB, n, prompts=["a b"])
    with torch.no_grad():
        logp = surrogate_logp(policy, rollout, rollout.nfe.new_zeros(n, 0))
        mean_field = direct_logp(policy, prompt_of(rollout, 0), [MASK] * 3).tolist()  # (L, V)
    p = []
    difference = []
    for (completion, _), true in trajectories(policy, prompt_of(rollout, 0), 3, EB).items():
        p.append(math.exp(sum(true)))
        other = [mean_field[i][token] for i, token in enumerate(completion)]
        difference.append((sum(true) - sum(other)) / 3)
    kl = sum(x * d for x, d in zip(p, difference, strict=True))
    variance = sum(x * d * d for x, d in zip(p, difference, strict=True)) - kl**2
    mask = rollout.token_mask
    estimate = weight_metrics(logp, rollout.behaviour_logp, 2.0, mask, mask)["surrogate_kl"]
    assert abs(estimate - kl) < 4 * math.sqrt(variance / n) and kl > 0.02
