"""Rollouts from tokens and a step map, against the same made here."""

from dataclasses import fields

import pytest
import torch
from toy import MASK, toy_policy, wide_policy

from diffpo_loss import diffpo_loss, importance_weights
from diffusion_policy import Rollout
from likelihood import draw_boundaries, latent_at, surrogate_logp
from sampler import Decoder, ThresholdHead

DECODERS = [
    Decoder("eb", None), Decoder("eb", 0.3), Decoder("confidence", 0.7), Decoder("top_k", 2),
    Decoder("eb", 0.3, 2), Decoder("eb", None, temperature=0.7, stop_at_eos=True),
]  # fmt: skip


def prompts_of(policy):
    ids = torch.tensor([[4, 5, 6], [0, 4, 6], [5, 5, 5], [0, 0, 7]]).repeat_interleave(8, dim=0)
    return ids, ids > 0


def step_map(rollout):
    """As an engine reports it: 0 where nothing was drawn, and any token there."""
    never = rollout.unmask_step > rollout.nfe.unsqueeze(1)
    tokens = rollout.completion.masked_fill(never, 3)
    return tokens, rollout.unmask_step.masked_fill(never, 0)


@pytest.mark.parametrize("decoder", DECODERS, ids=lambda d: f"{d.rule}-{d.level}-{d.block_length}")
def test_a_rollout_from_its_step_map_is_the_rollout_itself(decoder):
    policy = wide_policy()
    torch.manual_seed(0)
    policy.threshold_head = ThresholdHead(policy.denoiser.config.hidden_size)
    prompts = prompts_of(policy)
    made = policy.rollout(*prompts, 9, decoder, torch.Generator().manual_seed(3))
    gamma = None if decoder.rule != "eb" else made.threshold
    again = Rollout.from_steps(policy, prompts, *step_map(made), decoder.temperature, gamma)
    for field in fields(Rollout):
        ours, theirs = getattr(made, field.name), getattr(again, field.name)
        if field.name == "threshold_logp" and decoder.level is not None:
            continue  # the head did not draw it here
        if not isinstance(ours, torch.Tensor) or not ours.is_floating_point():
            assert torch.equal(torch.as_tensor(ours), torch.as_tensor(theirs)), field.name
        else:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5, equal_nan=True)
    boundaries = draw_boundaries(made.nfe, 2, torch.Generator().manual_seed(1))
    losses = []
    for rollout in (made, again):
        new = surrogate_logp(policy, rollout, boundaries)
        weights = importance_weights(new.detach(), rollout.behaviour_logp, 1.0)
        advantage = torch.linspace(-1, 1, len(new))
        loss, _ = diffpo_loss(new, new.detach(), advantage, weights, rollout.token_mask, 0.2)
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_it_takes_a_call_for_each_step_of_a_row_and_one_for_the_prompts_state():
    policy, prompts = wide_policy(), prompts_of(None)
    made = policy.rollout(*prompts, 9, Decoder("eb", 0.3), torch.Generator().manual_seed(3))
    policy.calls = 0
    Rollout.from_steps(policy, prompts, *step_map(made))
    runs = len(made.nfe)  # for the prompts' states
    for t in range(int(made.nfe.max())):  # equal states of equal prompts are run once
        state = torch.cat([prompts[0], latent_at(made.completion, made.unmask_step, t, MASK)], 1)
        runs += len(state[made.nfe > t].unique(dim=0))
    assert policy.calls == runs


@pytest.mark.parametrize(
    ("steps", "tokens", "says"),
    [
        ([1, 3, 2, 0], [2, 3, 2, 3], None),
        ([1, 3, 3, 0], [2, 3, 2, 3], "without a gap"),
        ([2, 3, 2, 0], [2, 3, 2, 3], "without a gap"),
        ([0, 0, 0, 0], [2, 3, 2, 3], "without a gap"),
        ([1, 3, 2, -1], [2, 3, 2, 3], None),
        ([1, 3, 2, 0], [2, MASK, 2, 3], "never drawn"),
        ([1, 3, 2, 0], [2, 3, 2, MASK], None),
    ],
)
def test_a_step_map_that_no_rollout_has_is_refused(steps, tokens, says):
    policy = toy_policy()
    given = policy, policy.encode(["a b"]), torch.tensor([tokens]), torch.tensor([steps])
    if says:
        with pytest.raises(ValueError, match=says):
            Rollout.from_steps(*given)
    else:
        rollout = Rollout.from_steps(*given)
        assert rollout.nfe.tolist() == [3] and rollout.unmask_step.tolist() == [[1, 3, 2, 4]]
        assert rollout.completion[0, 3] == policy.eos_id and rollout.behaviour_logp[0, 3] == 0
