"""Rollouts from tokens and a step map, against the same made here."""

from dataclasses import fields

import pytest
import torch
from toy import MASK, generator, to_the_end, toy_policy, wide_policy

from diffpo_loss import diffpo_loss, importance_weights
from diffusion_policy import Rollout
from likelihood import draw_boundaries, latent_at, surrogate_logp
from models.prompting import encode_prompts
from sampler import Decoder, ThresholdHead
from training.replay import rollout_from_steps

DECODERS = [
    to_the_end("eb", None),
    to_the_end("eb", 0.3),
    to_the_end("confidence", 0.7),
    to_the_end("top_k", 2),
    to_the_end("eb", 0.3, 2),
    Decoder("eb", None, temperature=0.7, stop_at_eos=True),
]


def four_groups():
    """prompt_ids and prompt_mask, (32, 3): four prompts, eight rows each."""
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
    prompt_ids, prompt_mask = four_groups()
    made = policy.rollout(prompt_ids, prompt_mask, 9, decoder, generator(3))
    completion, unmask_step = step_map(made)
    again = rollout_from_steps(
        policy,
        prompt_ids,
        prompt_mask,
        completion=completion,
        unmask_step=unmask_step,
        temperature=decoder.temperature,
        threshold=made.threshold if decoder.rule == "eb" else None,
    )
    for field in fields(Rollout):
        ours = getattr(made, field.name)
        theirs = getattr(again, field.name)
        if field.name == "threshold_logp" and decoder.level is not None:
            continue  # the head did not draw it here
        if not isinstance(ours, torch.Tensor) or not ours.is_floating_point():
            assert torch.equal(torch.as_tensor(ours), torch.as_tensor(theirs)), field.name
        else:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5, equal_nan=True)
    boundaries = draw_boundaries(made.nfe, 2, generator(1))
    losses = []
    for rollout in (made, again):
        new = surrogate_logp(policy, rollout, boundaries)
        weights = importance_weights(new.detach(), rollout.behaviour_logp, 1.0)
        advantage = torch.linspace(-1, 1, len(new))
        loss, _ = diffpo_loss(
            new, new.detach(), advantage, weights, rollout.token_mask, 0.2, normalise_by="text"
        )
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_it_takes_a_call_for_each_step_of_a_row_and_one_for_the_prompts_state():
    policy = wide_policy()
    prompt_ids, prompt_mask = four_groups()
    made = policy.rollout(prompt_ids, prompt_mask, 9, to_the_end("eb", 0.3), generator(3))
    completion, unmask_step = step_map(made)
    policy.rows_run = 0
    rollout_from_steps(policy, prompt_ids, prompt_mask, completion, unmask_step)
    rows = len(made.nfe)  # for the prompts' states
    for t in range(int(made.nfe.max())):  # equal states of equal prompts are run once
        state = latent_at(made.completion, made.unmask_step, t, MASK)
        canvas = torch.cat([made.prompt_ids, state], dim=1)
        rows += len(canvas[made.nfe > t].unique(dim=0))
    assert policy.rows_run == rows


@pytest.mark.parametrize(
    ("steps", "tokens", "message"),
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
def test_a_step_map_that_no_rollout_has_is_refused(steps, tokens, message):
    policy = toy_policy()
    prompt_ids, prompt_mask = encode_prompts(policy, ["a b"])
    completion = torch.tensor([tokens])
    unmask_step = torch.tensor([steps])
    if message:
        with pytest.raises(ValueError, match=message):
            rollout_from_steps(policy, prompt_ids, prompt_mask, completion, unmask_step)
    else:
        rollout = rollout_from_steps(policy, prompt_ids, prompt_mask, completion, unmask_step)
        assert rollout.nfe.tolist() == [3] and rollout.unmask_step.tolist() == [[1, 3, 2, 4]]
        assert rollout.completion[0, 3] == policy.eos_id and rollout.behaviour_logp[0, 3] == 0
