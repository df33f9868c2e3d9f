"""The likelihood of a rollout: mean-field, two-times mean-field (2-MF), m-stage, exact.

The true likelihood conditions each token on z_{t-1}, the state that the sampler saw when it drew
it. Computing it takes a denoiser call for each of the T states, too expensive for training. A
*surrogate* scores tokens from fewer states. Boundaries tau_1 < ... < tau_{m-1} cut the rollout into
m stages, and a token unmasked at step t is scored from the state at the last boundary before it:

    log pi^S(o_t | c) = log pi(o_t | c, z_tau),   tau = the largest of 0, tau_1, ... that is < t

    m = 1                  mean-field: every token given z_0, all [MASK] (d1). One call.   [PAPER]
    m = 2                  two-times mean-field, "2-MF": tokens after tau given z_tau, a state that
                           this rollout really visited (DiFFPO). Two calls.                [PAPER]
    a boundary every step  the exact likelihood. T calls.                             [OUR CHOICE]

Only the text is scored: the tokens up to and including the first end token. Whatever a rollout drew
after it is ignored.

`surrogate_logp_by_definition` is this formula as a loop over stages. `surrogate_logp` computes the
same with less work; training uses it.

This file needs torch alone. It requires of a policy and of a rollout:

    policy.mask_id         the id of [MASK]
    policy.hidden          hidden(ids, mask) -> (b, S, D), one denoiser call; mask None: no padding
    policy.token_logp      token_logp(hidden, tokens, temperature, state_index) -> (N,), log-probs
                           of N tokens given M hidden states (M, D): token n is scored from
                           hidden[state_index[n]] or, without state_index, from hidden[n]
    policy.hidden_of_state optional: replaces this file's hidden_of_state, as in
                           models/block_causal.py
    rollout                any dataclass with the fields prompt_ids, prompt_mask, completion,
                           unmask_step, behaviour_logp, token_mask, nfe and temperature
                           (diffusion_policy.Rollout explains them)

`python likelihood.py` shows which token is scored from which state.

Shapes: B rows, P prompt tokens, L completion tokens, S = P + L, m stages, D hidden size; R pairs
(row, stage) that contain a token, U distinct canvases among them, N tokens, M distinct hidden
states from which these are scored. A state z is a partly masked completion. Step t of a row is its
t-th denoiser call.
"""

from dataclasses import make_dataclass, replace
from types import SimpleNamespace

import torch
from torch.nn.functional import pad

# ---- the definition ------------------------------------------------------------------------------


def latent_at(completion, unmask_step, step, mask_id) -> torch.Tensor:
    """The state z_step after `step` denoising steps, where tokens unmasked later are still [MASK].

    completion, unmask_step (B, L), step scalar or (B,) -> (B, L)
    """
    step = torch.as_tensor(step, device=completion.device).reshape(-1, 1)
    return completion.masked_fill(unmask_step > step, mask_id)


def surrogate_logp_by_definition(policy, rollout, boundaries) -> torch.Tensor:
    """log pi^S of every token: one denoiser call per stage, for all rows and positions.

    boundaries (B, m-1) long, sorted -> (B, L), 0 where there is no token
    """
    B, L = rollout.completion.shape
    starts = pad(boundaries, (1, 0))  # (B, m): 0, tau_1, ...; a stage starts after this step
    logp = torch.zeros_like(rollout.behaviour_logp)
    for k in range(starts.shape[1]):
        latent = latent_at(rollout.completion, rollout.unmask_step, starts[:, k], policy.mask_id)
        hidden = hidden_of_state(
            policy, rollout.prompt_ids, rollout.prompt_mask, latent, rollout.completion
        )  # (B, L, D)
        scored = policy.token_logp(
            hidden.flatten(0, 1), rollout.completion.flatten(), rollout.temperature
        ).view(B, L)
        # A later stage overwrites the scores of the tokens after its own boundary.
        is_later = rollout.token_mask & (rollout.unmask_step > starts[:, k : k + 1])
        logp = torch.where(is_later, scored, logp)
    return logp


def hidden_of_state(policy, prompt_ids, prompt_mask, latent, completion) -> torch.Tensor:
    """One denoiser call on prompt and state. Returns the hidden states of the state's positions.

    prompt_ids, prompt_mask (R, P), latent (R, L) -> (R, L, D)

    completion  (R, L); read only if the policy has its own `hidden_of_state`. A block-causal
                denoiser's needs it, since each block attends to the finished blocks before it.
    """
    if hasattr(policy, "hidden_of_state"):
        return policy.hidden_of_state(prompt_ids, prompt_mask, latent, completion)
    L = latent.shape[1]
    ids = torch.cat([prompt_ids, latent], dim=1)  # (R, S)
    mask = None if prompt_mask.all() else pad(prompt_mask, (0, L), value=True)
    return policy.hidden(ids, mask)[:, -L:]


# ---- boundaries ----------------------------------------------------------------------------------


def draw_boundaries(nfe, num_stages, generator=None) -> torch.Tensor:
    """Random boundaries (B, m-1), sorted, distinct, uniform over 1 to T-1.

    Each completion has its own set, drawn afresh for each update (optimiser step) and shared by the
    old and the new policy. [PAPER] Shared, because a ratio of the two has to compare them from the
    same states; afresh, so that over the updates a token is scored from several states.

    They are uniform over the rollout's own steps [RECONSTRUCTED], without step 0, which would give
    mean-field [OUR CHOICE]. If a row has at most m-1 such steps, all become boundaries, which makes
    its likelihood exact; boundaries left over are set to T, after which no token is scored.

    nfe (B,) long, T of each row. Raises ValueError for less than one stage.
    """
    if num_stages < 1:
        raise ValueError(f"num_stages = {num_stages}: a likelihood has at least 1 stage")
    nfe = nfe.unsqueeze(1)  # (B, 1)
    candidates = torch.arange(1, max(int(nfe.max()), num_stages), device=nfe.device)  # (K,)
    key = torch.rand((len(nfe), len(candidates)), generator=generator, device=nfe.device)
    order = key.masked_fill(candidates >= nfe, torch.inf).argsort(dim=1, stable=True)
    picked = candidates[order[:, : num_stages - 1]]  # the smallest keys are a uniform subset
    return picked.minimum(nfe).sort(dim=1).values


def draw_masked_prompt(prompt_mask, num_generations, probability, generator=None) -> torch.Tensor:
    """Choose prompt tokens to mask while scoring, each with this probability, as d1 does.

    There is one draw for each prompt and update, shared by the old and the new policy; otherwise
    their ratio would be noise. A group shares the draw, so that its z_0 is run once; d1 draws for
    each row. [OUR CHOICE]

    prompt_mask (B, P) bool -> (B, P) bool
    """
    prompts = len(prompt_mask) // num_generations
    draw = torch.rand(
        (prompts, prompt_mask.shape[1]), generator=generator, device=prompt_mask.device
    )
    return prompt_mask & (draw < probability).repeat_interleave(num_generations, dim=0)


def unit_weight_tokens(unmask_step, boundaries) -> torch.Tensor:
    """Tokens scored from the state they were drawn from: those unmasked in the first call after a
    boundary (step 1 or tau + 1).

    In exact arithmetic the two policies agree on them, so their importance weight, before its cap,
    is 1, unless a block cache was used: then they were drawn from a stale state.

    unmask_step (B, L), boundaries (B, m-1) -> (B, L) bool
    """
    starts = pad(boundaries, (1, 0))  # (B, m): 0, tau_1, ...
    return (unmask_step.unsqueeze(-1) - 1 == starts.unsqueeze(1)).any(dim=-1)


# ---- the same with less work ---------------------------------------------------------------------


def surrogate_logp(policy, rollout, boundaries, masked_prompt=None) -> torch.Tensor:
    """log pi^S of every token under `policy`, at the rollout's temperature.

    [MASK] has probability 0, as in a rollout. This saves work over the definition in three ways: a
    stage runs only the rows that have a token in it; equal canvases are run once; and logits are
    computed only where a token is scored, once per hidden state.

    boundaries     (B, m-1) long, sorted; no columns: mean-field
    masked_prompt  (B, P) bool, prompt tokens to replace by [MASK], or None

    Returns (B, L), 0 where no token is scored. Differentiable. Raises ValueError for a greedy
    rollout: its probabilities are 0 and 1.
    """
    if rollout.temperature <= 0:
        raise ValueError("a greedy rollout has no likelihood: sample with a temperature above 0")
    # A token's stage is the number of boundaries before its step.
    starts = pad(boundaries, (1, 0))  # (B, m): 0, tau_1, ...
    stage = (rollout.unmask_step.unsqueeze(-1) > boundaries.unsqueeze(1)).sum(dim=-1)  # (B, L)
    stages = torch.arange(starts.shape[1], device=stage.device).view(1, -1, 1)
    is_scored = rollout.token_mask.unsqueeze(1) & (stage.unsqueeze(1) == stages)  # (B, m, L)
    row, k = is_scored.any(dim=-1).nonzero(as_tuple=True)  # (R,) each: the pairs to be run
    is_scored = is_scored[row, k]  # (R, L)

    # Each pair's prompt, without the left padding that no row needs, and its state z_tau.
    P = int(rollout.prompt_mask.sum(dim=1).max())
    prompt_ids = rollout.prompt_ids[row, -P:]  # (R, P)
    prompt_mask = rollout.prompt_mask[row, -P:]
    if masked_prompt is not None:
        prompt_ids = prompt_ids.masked_fill(masked_prompt[row, -P:], policy.mask_id)
    completion = rollout.completion[row]  # (R, L)
    latent = latent_at(completion, rollout.unmask_step[row], starts[row, k], policy.mask_id)

    # Equal canvases are run once. z_0 is the same for a whole group, so two stages of G completions
    # run G + 1 canvases, not 2 G. No more can be shared, since attention is bidirectional.
    canvas = torch.cat([prompt_ids, latent, prompt_mask], dim=1)
    if hasattr(policy, "hidden_of_state"):  # it reads the completion too
        canvas = torch.cat([canvas, completion], dim=1)
    distinct, canvas_of_pair = torch.unique(canvas, dim=0, return_inverse=True)  # (U, ...), (R,)
    # Any one of the pairs that share a canvas may stand for all of them.
    pair_of_canvas = torch.zeros(len(distinct), dtype=torch.long, device=row.device)
    pair_of_canvas[canvas_of_pair] = torch.arange(len(row), device=row.device)
    hidden = hidden_of_state(
        policy,
        prompt_ids[pair_of_canvas],
        prompt_mask[pair_of_canvas],
        latent[pair_of_canvas],
        completion[pair_of_canvas],
    )  # (U, L, D)

    # Tokens at one position of equal canvases share a hidden state; its logits are computed once.
    L = latent.shape[1]
    pair, position = is_scored.nonzero(as_tuple=True)  # (N,) each
    state_key, state_index = torch.unique(
        canvas_of_pair[pair] * L + position, return_inverse=True
    )  # (M,), (N,)
    states = hidden[state_key // L, state_key % L]  # (M, D)
    tokens = completion[pair, position]
    logp = policy.token_logp(states, tokens, rollout.temperature, state_index)
    return torch.zeros_like(rollout.behaviour_logp).index_put((row[pair], position), logp)


# ---- the exact likelihood, for measurements ------------------------------------------------------


@torch.no_grad()
def exact_logp(policy, rollout, states_at_once=64) -> torch.Tensor:
    """The exact log-probs of a rollout's tokens, (B, L): there is a boundary at every step.

    Each row is run from T states; one denoiser call runs up to `states_at_once` states of each row.
    """
    T = int(rollout.nfe.max())
    step = rollout.unmask_step
    every_step = torch.arange(1, T + 1, device=step.device).expand(len(step), -1)  # (B, T)
    logp = torch.zeros_like(rollout.behaviour_logp)
    for done in range(0, T, states_at_once):
        is_now = rollout.token_mask & (step > done) & (step <= done + states_at_once)
        if is_now.any():
            logp += surrogate_logp(policy, replace(rollout, token_mask=is_now), every_step)
    return logp


@torch.no_grad()
def cache_kl(policy, rollout, num_states=16, generator=None) -> float:
    """KL(sampling distribution || exact policy) per token in nats: the error of a block cache.

    It is estimated from the rollout's own tokens; without a cache it is 0 up to rounding. Scoring
    all states would take T denoiser calls per row, so only the tokens of `num_states` states, drawn
    at random from all rows, are scored; the estimate is unbiased.
    """
    T = int(rollout.nfe.max())
    step = rollout.unmask_step
    row = torch.arange(len(step), device=step.device).unsqueeze(1)  # (B, 1)
    state_key = row * T + step - 1  # (B, L): one number for each pair of row and step
    all_keys = state_key[rollout.token_mask].unique()
    order = torch.rand(len(all_keys), generator=generator, device=step.device).argsort()
    drawn_keys = all_keys[order[:num_states]]
    is_scored = rollout.token_mask & torch.isin(state_key, drawn_keys)  # (B, L)
    every_step = torch.arange(1, T + 1, device=step.device).expand(len(step), -1)  # (B, T)
    exact = surrogate_logp(policy, replace(rollout, token_mask=is_scored), every_step)
    total = (rollout.behaviour_logp - exact)[is_scored].sum() * len(all_keys) / len(drawn_keys)
    return (total / rollout.token_mask.sum()).item()


# ---- an example ----------------------------------------------------------------------------------


def example():
    """One completion of "2 + 3 =", unmasked in three steps, scored in three ways."""
    vocabulary = ["_", "2", "3", "+", "=", "5", "so", "."]  # _ is [MASK]
    prompt_ids = torch.tensor([[1, 3, 2, 4]])
    completion = torch.tensor([[6, 5, 7]])
    unmask_step = torch.tensor([[2, 1, 3]])
    p_drawn = (3 + unmask_step) / 10
    # A toy policy: the probability of any token is a tenth of the number of unmasked tokens.
    policy = SimpleNamespace(mask_id=0)
    policy.hidden = lambda ids, mask: (ids > 0).sum(1).view(-1, 1, 1).expand(*ids.shape, 1)
    policy.token_logp = lambda hidden, tokens, temperature, index: (hidden[index, 0] / 10).log()
    values = {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_ids > 0,
        "completion": completion,
        "unmask_step": unmask_step,
        "behaviour_logp": p_drawn.log(),
        "token_mask": completion > 0,
        "nfe": unmask_step.amax(dim=1),
        "temperature": 1.0,
    }
    rollout = make_dataclass("Rollout", values)(**values)
    for name, taus in (("mean-field", []), ("two stages, tau = 1", [1]), ("exact", [1, 2])):
        boundaries = torch.tensor([taus], dtype=torch.long)
        p_scored = surrogate_logp(policy, rollout, boundaries).exp()
        print(f"{name}: prompt 2 + 3 =, completion so 5 .")
        for i, step in enumerate(unmask_step[0].tolist()):
            tau = max(tau for tau in [0, *taus] if tau < step)
            latent = latent_at(completion, unmask_step, tau, policy.mask_id)[0]
            print(
                f"  {vocabulary[completion[0, i]]:2} unmasked at step {step}:",
                f"p = {p_scored[0, i]:.1f} from z_{tau} =",
                f"{' '.join(vocabulary[token] for token in latent)},",
                f"{p_drawn[0, i]:.1f} when it was drawn,",
                f"weight {p_scored[0, i] / p_drawn[0, i]:.2f}",
            )


if __name__ == "__main__":
    example()
