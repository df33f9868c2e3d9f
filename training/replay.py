"""Using rollouts of another inference engine: its tokens and step map are enough.

For each completion the engine has to return

    its tokens       as ids, for the whole completion
    its step map     the step at which each token was unmasked, from 1
    its threshold    gamma, if the engine took it from the threshold head

and it has to draw as the policy does: at the temperature at which training scores, never [MASK],
one step per denoiser call. Then every state z_t can be rebuilt, and with it the log-probs that an
engine does not return: the exact log pi(o_t | c, z_{t-1}), in T calls. [OUR CHOICE] These do not
reflect the engine's own approximations (stale caches, fewer bits), so the importance weights cannot
correct for them. EXPERIMENTS.md has a table of engines.

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
    temperature    at which the tokens were drawn
    threshold      (B,) float, gamma in nats; None if the engine's rule has none

    Raises ValueError for a step map with gaps, for a completion that contains [MASK] and, with a
    block-causal denoiser, for a step map that opens a block before all earlier blocks are full.
    """
    is_drawn = unmask_step > 0  # (B, L)
    nfe = unmask_step.amax(dim=1)  # (B,)
    steps = torch.arange(1, int(nfe.max()) + 1, device=nfe.device)  # (T,)
    has_step = (unmask_step.unsqueeze(1) == steps.view(1, -1, 1)).any(dim=2)  # (B, T)
    should_have_step = steps <= nfe.unsqueeze(1)  # (B, T)
    if (has_step != should_have_step).any() or (nfe < 1).any():
        raise ValueError("a step map has to have the steps 1, 2, ... in each row, without a gap")
    if (completion == policy.mask_id)[is_drawn].any():
        raise ValueError("a completion contains [MASK], which is never drawn")
    # Positions where no token was drawn are padding, as in DiffusionPolicy.denoise.
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
        token_mask=is_drawn,  # for now, so that every drawn token is scored
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

    The likelihood assumes that earlier blocks are finished (BlockCausalPolicy.hidden_of_state). So
    it would be wrong for an engine that does not count blocks from the prompt's first token.
    """
    position = torch.arange(unmask_step.shape[1], device=unmask_step.device)
    block = (position + policy.block_offset(prompt_mask).unsqueeze(1)) // policy.block_size
    is_before = block.unsqueeze(1) < block.unsqueeze(2)  # (B, L, L): those in earlier blocks
    last_step_before = (unmask_step.unsqueeze(1) * is_before).amax(dim=2)  # (B, L)
    if (is_drawn & (unmask_step <= last_step_before)).any():
        raise ValueError(
            f"a step map has to fill this denoiser's blocks of {policy.block_size} tokens one by "
            "one, counted from the prompt's first token"
        )
