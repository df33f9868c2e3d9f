"""The likelihood of a rollout: mean-field, two-stage, m-stage, exact. One function, one knob.

The true likelihood of a token is given the state z_{t-1} that the sampler saw when it drew it; scoring all T states takes T
denoiser calls, too dear for training. A surrogate scores from fewer states. Sorted boundaries tau_1 < ... < tau_{m-1} cut the
rollout into m stages, and a token unmasked at step t is scored given the last boundary's state before it:

    log pi^S(o_t | c) = log pi(o_t | c, z_tau),   tau = the largest of 0, tau_1, ..., tau_{m-1} that is < t

    m = 1                  mean-field, d1's: everything given z_0, all [MASK]. One call. [PAPER]
    m = 2                  two-stage, DiFFPO's: tokens after tau are given z_tau, a state really visited. Two calls. [PAPER]
    a boundary every step  the exact likelihood of the text's tokens. T calls. m > 2 as a setting is [OUR CHOICE].

Only the text counts, up to the first [EOS]: what a rollout drew behind it is padding, and carries no loss.

Shapes: B rows, P prompt tokens, L completion tokens, m stages, R the (row, stage) pairs that hold a token, U the distinct ones.
"""

import torch

from diffusion_policy import unique_rows


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

    # Only as much left padding as these rows need, and no attention mask where they need none.
    P = int(rollout.prompt_mask.sum(dim=1).max())
    prompt, prompt_mask = rollout.prompt_ids[:, -P:], rollout.prompt_mask[:, -P:]
    if hidden_prompt is not None:
        prompt = prompt.masked_fill(hidden_prompt[:, -P:], policy.mask_id)
    state = latent_at(rollout.completion[row], rollout.unmask_step[row], starts[row, k], policy.mask_id)  # (R, L)
    ids = torch.cat([prompt[row], state], dim=1)  # (R, S)
    mask = torch.cat([prompt_mask[row], torch.ones_like(state, dtype=torch.bool)], dim=1)  # (R, S)
    # Equal inputs are run once. z_0 is the same for a prompt's whole group, so two stages of G completions are G + 1 passes, not
    # 2 G. This is all that can be shared exactly: attention is bidirectional, and another state changes every hidden state.
    first, copy = unique_rows(torch.cat([ids, mask], dim=1))  # (U,), (R,)
    hidden = policy.hidden(ids[first], None if prompt_mask.all() else mask[first])[:, P:]  # (U, L, D)

    # Every token is scored in exactly one stage, so logits exist for one position per token, never for (B, L, V).
    pair, position = scored.nonzero(as_tuple=True)  # (N,) each
    token = rollout.completion[row[pair], position]
    token_logp = policy.token_logp(hidden[copy[pair], position], token, rollout.temperature)
    return torch.zeros_like(rollout.behaviour_logp).index_put((row[pair], position), token_logp)


@torch.no_grad()
def cache_kl(policy, rollout):
    """KL(what was drawn from || the exact policy) per token in nats, estimated from the rollout's own tokens: what a block cache costs.

    Without a cache the two are the same and this is 0 up to rounding. T calls a row, so give it few rows.
    """
    every_step = torch.arange(1, int(rollout.nfe.max()) + 1, device=rollout.nfe.device).expand(len(rollout.nfe), -1)  # (B, T)
    exact = surrogate_logp(policy, rollout, every_step)
    return (rollout.behaviour_logp - exact)[rollout.token_mask].mean().item()
