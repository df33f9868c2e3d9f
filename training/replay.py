"""Rollouts from elsewhere: an inference engine's tokens and step map are enough.

An engine has to return, of each completion,

    its tokens                          as ids, for the whole canvas
    its step map                        the step at which each token was unmasked, from 1
    gamma                               its threshold, if the engine took that from the head

and to draw them as the policy says: at the temperature that training scores with, [MASK] never, one
step a denoiser call. Then every state z_t can be rebuilt, and with it the log-probs that an engine
does not return: log pi(o_t | c, z_{t-1}), the exact ones, by T calls. [OUR CHOICE] What the engine
approximates, by stale caches or fewer bits, is not in them. So the importance weights cannot
correct for it. EXPERIMENTS.md has a table of engines.

Shapes: B rows, P prompt tokens (left-padded), L completion tokens, T steps.
"""

import torch

from diffusion_policy import Rollout, mean_prompt_state
from likelihood import exact_logp


@torch.no_grad()
def rollout_from_steps(policy, prompts, completion, unmask_step, temperature=1.0, gamma=None):
    """The Rollout of completions that another engine made, as if it had been made here.

    prompts: (prompt_ids, prompt_mask), (B, P) each, from `encode`. completion (B, L) long: its
    tokens. unmask_step (B, L) long: the step map, 0 where no token was drawn. gamma (B,) float, or
    None where the rule has none. Raises ValueError for what no rollout is.
    """
    (prompt_ids, prompt_mask), drawn, nfe = prompts, unmask_step > 0, unmask_step.amax(1)
    steps = torch.arange(1, int(nfe.max()) + 1, device=nfe.device)  # (T,)
    taken = (unmask_step.unsqueeze(1) == steps.view(1, -1, 1)).any(2)  # (B, T)
    if (taken != (steps <= nfe.unsqueeze(1))).any() or (nfe < 1).any():
        raise ValueError("a step map has the steps 1, 2, ... in each row, without a gap")
    if (completion == policy.mask_id)[drawn].any():
        raise ValueError("a completion holds [MASK], which is never drawn")
    completion = completion.masked_fill(~drawn, policy.eos_id)  # what was never drawn is padding
    unmask_step = torch.where(drawn, unmask_step, (nfe + 1).unsqueeze(1))

    # The threshold head reads the prompt's states of the first call, with all of it [MASK].
    start = torch.full_like(completion, policy.mask_id)
    whole = torch.cat([prompt_mask, torch.ones_like(drawn)], dim=1)
    hidden = policy.hidden(torch.cat([prompt_ids, start], dim=1), None if whole.all() else whole)
    prompt_state, gamma_logp = (
        mean_prompt_state(hidden, prompt_mask),
        torch.zeros(len(nfe)).to(hidden),
    )
    if gamma is not None and policy.threshold_head is not None:
        gamma_logp = policy.threshold_head(prompt_state).log_prob(gamma)
    gamma = torch.full_like(gamma_logp, torch.nan) if gamma is None else gamma

    blank = torch.zeros(drawn.shape, device=drawn.device)
    drawn_with = (gamma, gamma_logp, prompt_state, temperature)
    rollout = Rollout(
        prompt_ids, prompt_mask, completion, unmask_step, blank, drawn, nfe, *drawn_with
    )  # for now its text is all that was drawn: those are scored too
    rollout.behaviour_logp = exact_logp(policy, rollout, states_at_once=1)
    rollout.token_mask = policy.text_mask(completion)
    return rollout
