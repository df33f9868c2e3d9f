"""Rollouts from elsewhere: an inference engine's tokens and step map are enough.

Of each completion an engine has to return

    its tokens       as ids, for the whole canvas
    its step map     the step at which each token was unmasked, from 1
    its threshold    gamma, if the engine took it from the threshold head

and it has to draw as the policy does: at the temperature that training scores with, never [MASK],
one step for each denoiser call. Then every state z_t can be rebuilt, and with it the log-probs that
an engine does not return: log pi(o_t | c, z_{t-1}), the exact ones, at T calls. [OUR CHOICE] They
do not contain what the engine approximates by stale caches or fewer bits, so the importance weights
cannot correct for that. EXPERIMENTS.md has a table of engines.

Shapes: B rows, P prompt tokens (left-padded), L completion tokens, S = P + L positions, T steps.
"""

import torch

from diffusion_policy import Rollout, mean_prompt_state
from likelihood import exact_logp


@torch.no_grad()
def rollout_from_steps(
    policy, prompt_ids, prompt_mask, completion, unmask_step, temperature=1.0, threshold=None
):
    """The Rollout of completions that another engine made, as if the policy had made them.

    prompt_ids     (B, P) long, left-padded; prompt_mask (B, P) bool, False on padding
    completion     (B, L) long, its tokens
    unmask_step    (B, L) long, the step map; 0 or less where no token was drawn
    temperature    that the tokens were drawn with
    threshold      (B,) float, gamma in nats; None if the engine's rule has none

    Raises ValueError for a step map with gaps, for a completion with [MASK] in it and, of a
    block-causal denoiser, for a step map that opens a block before those ahead of it are full.
    """
    is_drawn = unmask_step > 0  # (B, L)
    nfe = unmask_step.amax(dim=1)  # (B,)
    steps = torch.arange(1, int(nfe.max()) + 1, device=nfe.device)  # (T,)
    has_step = (unmask_step.unsqueeze(1) == steps.view(1, -1, 1)).any(dim=2)  # (B, T)
    should_have_step = steps <= nfe.unsqueeze(1)  # (B, T)
    if (has_step != should_have_step).any() or (nfe < 1).any():
        raise ValueError("a step map has the steps 1, 2, ... in each row, without a gap")
    if (completion == policy.mask_id)[is_drawn].any():
        raise ValueError("a completion holds [MASK], which is never drawn")
    # What was never drawn is padding, as in DiffusionPolicy.denoise.
    completion = completion.masked_fill(~is_drawn, policy.eos_id)
    unmask_step = torch.where(is_drawn, unmask_step, (nfe + 1).unsqueeze(1))
    if policy.block_size:
        refuse_open_blocks(policy, prompt_mask, unmask_step, is_drawn)

    # The threshold head reads the prompt's states in the first call, when all of o is [MASK].
    all_masked = torch.full_like(completion, policy.mask_id)
    canvas = torch.cat([prompt_ids, all_masked], dim=1)  # (B, S)
    attention_mask = None
    if not prompt_mask.all():
        attention_mask = torch.cat([prompt_mask, torch.ones_like(is_drawn)], dim=1)  # (B, S)
    prompt_state = mean_prompt_state(policy.hidden(canvas, attention_mask), prompt_mask)  # (B, D)
    threshold_logp = torch.zeros(len(nfe), device=nfe.device)
    if threshold is None:
        threshold = torch.full_like(threshold_logp, torch.nan)
    elif policy.threshold_head is not None:
        threshold_logp = policy.threshold_head(prompt_state).log_prob(threshold)

    rollout = Rollout(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        completion=completion,
        unmask_step=unmask_step,
        behaviour_logp=torch.zeros(completion.shape, device=completion.device),
        token_mask=is_drawn,  # for now: everything that was drawn is to be scored
        nfe=nfe,
        threshold=threshold,
        threshold_logp=threshold_logp,
        prompt_state=prompt_state,
        temperature=temperature,
    )
    rollout.behaviour_logp = exact_logp(policy, rollout, states_at_once=1)
    rollout.token_mask = policy.text_mask(completion)
    return rollout


def refuse_open_blocks(policy, prompt_mask, unmask_step, is_drawn):
    """Raises ValueError if a token was drawn while a block before its own still had a mask.

    The likelihood takes those blocks as finished (BlockCausalPolicy.hidden_of_state). An engine
    that counts its blocks from elsewhere than the prompt's first token would be scored wrongly.
    """
    position = torch.arange(unmask_step.shape[1], device=unmask_step.device)
    block = (position + policy.block_offset(prompt_mask).unsqueeze(1)) // policy.block_size
    is_before = block.unsqueeze(1) < block.unsqueeze(2)  # (B, L, L): of each token, those before it
    last_step_before = (unmask_step.unsqueeze(1) * is_before).amax(dim=2)  # (B, L)
    if (is_drawn & (unmask_step <= last_step_before)).any():
        raise ValueError(
            f"a step map fills the blocks of {policy.block_size} tokens of this denoiser one after "
            "the other, counted from the prompt's first token"
        )
