"""The likelihood of a rollout: mean-field, two-stage, m-stage, exact. One function, one knob.

The true likelihood of a token is given the state z_{t-1} that the sampler saw when it drew it; scoring all T states takes T
denoiser calls, too dear for training. A surrogate scores from fewer states. Sorted boundaries tau_1 < ... < tau_{m-1} cut the
rollout into m stages, and a token unmasked at step t is scored given the last boundary's state before it:

    log pi^S(o_t | c) = log pi(o_t | c, z_tau),   tau = the largest of 0, tau_1, ..., tau_{m-1} that is < t

    m = 1                  mean-field, d1's: everything given z_0, all [MASK]. One call. [PAPER]
    m = 2                  two-stage, DiFFPO's: tokens after tau are given z_tau, a state really visited. Two calls. [PAPER]
    a boundary every step  the exact likelihood of the text's tokens. T calls. m > 2 as a setting is [OUR CHOICE].

Only the text counts, up to the first [EOS]: what a rollout drew behind it is padding, and carries no loss.

Shapes: B rows, P prompt tokens, L completion tokens, m stages, R the (row, stage) pairs that hold a token.
"""

import torch


def latent_at(completion, unmask_step, step, mask_id):
    """The state z_step after `step` denoising steps: what was unmasked later is still [MASK].

    completion, unmask_step (B, L), step scalar or (B,) -> (B, L)
    """
    step = torch.as_tensor(step, device=completion.device).reshape(-1, 1)
    return completion.masked_fill(unmask_step > step, mask_id)


def draw_boundaries(nfe, num_stages, generator=None):
    """Random stage boundaries (B, m-1), sorted and distinct, uniform over the row's own steps 1 to T-1. [RECONSTRUCTED]

    One set per completion, drawn afresh for each optimisation step, the same for old and new policy. [PAPER]
    A row with fewer than m-1 inner steps gets them all, which makes it exact, and then T: an empty stage.
    """
    if num_stages < 1:
        raise ValueError(f"num_stages = {num_stages}: a likelihood has at least 1 stage")
    nfe = nfe.unsqueeze(1)  # (B, 1)
    inner = torch.arange(1, max(int(nfe.max()), num_stages), device=nfe.device)  # (K,) candidate steps
    key = torch.rand((len(nfe), len(inner)), generator=generator, device=nfe.device).masked_fill(inner >= nfe, torch.inf)
    picked = inner[key.argsort(dim=1, stable=True)[:, : num_stages - 1]]  # (B, m-1): the smallest keys are a uniform subset
    return picked.minimum(nfe).sort(dim=1).values


def draw_prompt_mask(prompt_mask, probability, generator=None):
    """Prompt tokens to hide while scoring, each with the given probability, as d1 does. (B, P) bool -> (B, P) bool

    Draw once per optimisation step and hand the same to old and new policy, or their ratio is noise.
    """
    return prompt_mask & (torch.rand(prompt_mask.shape, generator=generator, device=prompt_mask.device) < probability)


def surrogate_logp(policy, rollout, boundaries, hidden_prompt=None):
    """log pi^S of every token of the rollout under `policy`, at the rollout's temperature and without [MASK], as it was drawn.

    boundaries (B, m-1) sorted long; no columns is mean-field. hidden_prompt (B, P) bool, prompt tokens to replace by [MASK].
    -> (B, L), 0 where there is no token (padding after [EOS]). Differentiable.
    """
    if rollout.temperature <= 0:
        raise ValueError("a greedy rollout has no likelihood to learn from: sample with a temperature above 0")
    # A token's stage is the number of boundaries before its step.
    stage = (rollout.unmask_step.unsqueeze(-1) > boundaries.unsqueeze(1)).sum(-1)  # (B, L) in 0..m-1
    starts = torch.nn.functional.pad(boundaries, (1, 0))  # (B, m): 0, tau_1, ..., the step from whose state a stage is scored
    stages = torch.arange(starts.shape[1], device=stage.device).view(1, -1, 1)
    scored = rollout.token_mask.unsqueeze(1) & (stage.unsqueeze(1) == stages)  # (B, m, L)
    row, k = scored.any(-1).nonzero(as_tuple=True)  # (R,) each: the pairs worth a pass through the denoiser
    scored = scored[row, k]  # (R, L)

    state = latent_at(rollout.completion[row], rollout.unmask_step[row], starts[row, k], policy.mask_id)  # (R, L)
    prompt = rollout.prompt_ids if hidden_prompt is None else rollout.prompt_ids.masked_fill(hidden_prompt, policy.mask_id)
    mask = torch.cat([rollout.prompt_mask[row], torch.ones_like(state, dtype=torch.bool)], dim=1)  # (R, S)
    hidden = policy.hidden(torch.cat([prompt[row], state], dim=1), mask)[:, prompt.shape[1] :]  # (R, L, D)

    # Every token is scored in exactly one stage, so logits exist for one position per token, never for (B, L, V).
    logp = (policy.logits(hidden[scored]) / rollout.temperature).log_softmax(-1)  # (N, V)
    pair, position = scored.nonzero(as_tuple=True)  # (N,) each
    token_logp = logp.gather(-1, rollout.completion[row[pair], position].unsqueeze(-1)).squeeze(-1)
    return torch.zeros_like(rollout.behaviour_logp).index_put((row[pair], position), token_logp)
