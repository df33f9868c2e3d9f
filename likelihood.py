"""The likelihood of a rollout: mean-field, two-stage, m-stage, exact. One function, one knob.

The true likelihood of a token is given the state z_{t-1} that the sampler saw when it drew it. All
T states take T denoiser calls, too dear for training. A surrogate scores from fewer states. Sorted
boundaries tau_1 < ... < tau_{m-1} cut the rollout into m stages. A token unmasked at step t is
scored from the last boundary before it:

    log pi^S(o_t | c) = log pi(o_t | c, z_tau),   tau = the largest of 0, tau_1, ... that is < t

    m = 1                  mean-field: all given z_0, all [MASK] (d1). One call.           [PAPER]
    m = 2                  two-stage: tokens after tau are given z_tau, a state that this
                           rollout really visited (DiFFPO). Two calls.                     [PAPER]
    a boundary every step  the exact likelihood. T calls.                             [OUR CHOICE]

Only the text counts, up to the first [EOS]. What a rollout drew behind it is padding.

This file needs torch alone. It asks three things of a policy:
    policy.mask_id                                   the id of [MASK]
    policy.hidden(ids, mask) -> (b, S, D)            one denoiser call; mask None: nothing is padded
    policy.token_logp(hidden, tokens, temperature)   log-probs (N,) of N tokens at states (N, D)
and of a rollout, any dataclass with them: the fields prompt_ids, prompt_mask, completion,
unmask_step, behaviour_logp, token_mask, nfe, temperature (diffusion_policy.Rollout says what each
is). `python likelihood.py` shows which token is scored from which state.

Shapes: B rows, P prompt tokens, L completion tokens, m stages; R pairs (row, stage) that hold a
token, U distinct ones of them.
"""

from dataclasses import make_dataclass, replace
from types import SimpleNamespace

import torch


def latent_at(completion, unmask_step, step, mask_id):
    """The state z_step after `step` denoising steps: what was unmasked later is still [MASK].

    completion, unmask_step (B, L), step scalar or (B,) -> (B, L)
    """
    step = torch.as_tensor(step, device=completion.device).reshape(-1, 1)
    return completion.masked_fill(unmask_step > step, mask_id)


def draw_boundaries(nfe, num_stages, generator=None):
    """Random boundaries (B, m-1), sorted, distinct, uniform over 1 to T-1. [RECONSTRUCTED]

    One set a completion, drawn afresh for each optimisation step, the same for old and new policy.
    [PAPER] A row with fewer than m-1 inner steps uses every one as a boundary, which is exact. Its
    spare boundaries become T and are empty.
    """
    if num_stages < 1:
        raise ValueError(f"num_stages = {num_stages}: a likelihood has at least 1 stage")
    nfe = nfe.unsqueeze(1)  # (B, 1)
    inner = torch.arange(1, max(int(nfe.max()), num_stages), device=nfe.device)  # (K,) candidates
    key = torch.rand((len(nfe), len(inner)), generator=generator, device=nfe.device)
    order = key.masked_fill(inner >= nfe, torch.inf).argsort(dim=1, stable=True)
    picked = inner[order[:, : num_stages - 1]]  # (B, m-1): the smallest keys, a uniform subset
    return picked.minimum(nfe).sort(dim=1).values


def draw_prompt_mask(prompt_mask, num_generations, probability, generator=None):
    """Prompt tokens to hide while scoring, each with this probability, as d1 does.

    One draw a prompt: a group shares its canvas. One draw an optimisation step, the same for old
    and new policy, or their ratio would be noise. (B, P) bool -> (B, P) bool
    """
    shape = (len(prompt_mask) // num_generations, prompt_mask.shape[1])
    draw = torch.rand(shape, generator=generator, device=prompt_mask.device)
    return prompt_mask & (draw < probability).repeat_interleave(num_generations, dim=0)


def scored_as_drawn(unmask_step, boundaries):
    """Tokens that are scored from the very state they were drawn from: steps 1 and tau + 1.

    Their importance weight is 1 in exact arithmetic. (B, L), (B, m-1) -> (B, L) bool
    """
    starts = torch.nn.functional.pad(boundaries, (1, 0))  # (B, m): 0, tau_1, ...
    return (unmask_step.unsqueeze(-1) - 1 == starts.unsqueeze(1)).any(-1)


def unique_rows(rows):
    """(R, S) -> first (U,), an index of each distinct row, copy (R,): rows[first][copy] == rows."""
    _, copy = torch.unique(rows, dim=0, return_inverse=True)
    index = torch.arange(len(rows), device=rows.device)
    first = torch.full_like(index, len(rows)).scatter_reduce(0, copy, index, "amin")
    return first[first < len(rows)], copy


def surrogate_logp(policy, rollout, boundaries, hidden_prompt=None):
    """log pi^S of every token under `policy`, at the rollout's temperature and without [MASK].

    boundaries (B, m-1) long, sorted; no columns: mean-field. hidden_prompt (B, P) bool: prompt
    tokens to replace by [MASK]. -> (B, L), 0 where there is no token (padding after [EOS]).
    Differentiable. Raises ValueError for a greedy rollout: its probabilities are 0 and 1.
    """
    if rollout.temperature <= 0:
        raise ValueError("a greedy rollout has no likelihood: sample with a temperature above 0")
    # Each token's stage is the number of boundaries before its step.
    stage = (rollout.unmask_step.unsqueeze(-1) > boundaries.unsqueeze(1)).sum(-1)  # (B, L) 0..m-1
    starts = torch.nn.functional.pad(boundaries, (1, 0))  # (B, m): the step each stage starts from
    stages = torch.arange(starts.shape[1], device=stage.device).view(1, -1, 1)
    scored = rollout.token_mask.unsqueeze(1) & (stage.unsqueeze(1) == stages)  # (B, m, L)
    row, k = scored.any(-1).nonzero(as_tuple=True)  # (R,) each: the pairs worth a denoiser call
    scored = scored[row, k]  # (R, L)

    # Each pair's canvas: the prompt, with no more left padding than these rows need, and z_tau.
    P = int(rollout.prompt_mask.sum(dim=1).max())
    prompt, prompt_mask = rollout.prompt_ids[:, -P:], rollout.prompt_mask[:, -P:]
    if hidden_prompt is not None:
        prompt = prompt.masked_fill(hidden_prompt[:, -P:], policy.mask_id)
    steps, start = rollout.unmask_step[row], starts[row, k]
    state = latent_at(rollout.completion[row], steps, start, policy.mask_id)  # (R, L)
    ids = torch.cat([prompt[row], state], dim=1)  # (R, S)
    mask = torch.cat([prompt_mask[row], torch.ones_like(state, dtype=torch.bool)], dim=1)

    # Equal canvases are run once. z_0 is the same for a whole group: two stages of G completions
    # are G + 1 passes, not 2 G. No more can be shared, since attention looks both ways.
    first, copy = unique_rows(torch.cat([ids, mask], dim=1))  # (U,), (R,)
    mask = None if prompt_mask.all() else mask[first]
    hidden = policy.hidden(ids[first], mask)[:, P:]  # (U, L, D)

    # Each token is scored in one stage: logits for one position a token, never for (B, L, V).
    pair, position = scored.nonzero(as_tuple=True)  # (N,) each
    token = rollout.completion[row[pair], position]
    logp = policy.token_logp(hidden[copy[pair], position], token, rollout.temperature)
    return torch.zeros_like(rollout.behaviour_logp).index_put((row[pair], position), logp)


@torch.no_grad()
def exact_logp(policy, rollout, states_at_once=64):
    """The exact log-probs of a rollout's tokens: a boundary at every step. -> (B, L)

    It takes T denoiser passes a row, `states_at_once` of each row together.
    """
    T, logp = int(rollout.nfe.max()), torch.zeros_like(rollout.behaviour_logp)
    every_step = torch.arange(1, T + 1, device=rollout.nfe.device).expand(len(rollout.nfe), -1)
    for done in range(0, T, states_at_once):
        step = rollout.unmask_step
        now = rollout.token_mask & (step > done) & (step <= done + states_at_once)
        if now.any():
            logp += surrogate_logp(policy, replace(rollout, token_mask=now), every_step)
    return logp


def cache_kl(policy, rollout, states_at_once=64):
    """KL(what was drawn from || the exact policy) per token in nats: what a block cache costs.

    Estimated from the rollout's own tokens; without a cache 0 up to rounding. Give it few rows.
    """
    exact = exact_logp(policy, rollout, states_at_once)
    return (rollout.behaviour_logp - exact)[rollout.token_mask].mean().item()


def example():
    """One completion of "2 + 3 =", unmasked in three steps, scored in three ways."""
    words = ["_", "2", "3", "+", "=", "5", "so", "."]  # _ is [MASK]
    ids, steps = torch.tensor([[1, 3, 2, 4, 6, 5, 7]]), torch.tensor([[2, 1, 3]])
    policy = SimpleNamespace(mask_id=0)  # a toy: the more tokens it sees, the surer it is
    policy.hidden = lambda ids, mask: (ids > 0).sum(1).view(-1, 1, 1).expand(*ids.shape, 1)
    policy.token_logp = lambda hidden, tokens, temperature: (hidden[:, 0] / 10).log()
    names = (
        "prompt_ids prompt_mask completion unmask_step behaviour_logp token_mask nfe temperature"
    )
    prompt, text, true = ids[:, :4], ids[:, 4:], (3 + steps) / 10
    values = (prompt, prompt > 0, text, steps, true.log(), text > 0, steps.amax(1), 1.0)
    rollout = make_dataclass("Rollout", names.split())(*values)
    for name, taus in (("mean-field", []), ("two stages, tau = 1", [1]), ("exact", [1, 2])):
        p = surrogate_logp(policy, rollout, torch.tensor([taus], dtype=torch.long)).exp()
        print(f"{name}: prompt 2 + 3 =, completion so 5 .")
        for i, step in enumerate(steps[0].tolist()):
            tau = max(tau for tau in [0, *taus] if tau < step)
            state = " ".join(words[w] for w in latent_at(text, steps, tau, 0)[0])
            said = f"{p[0, i]:.1f}, drawn with {true[0, i]:.1f}, weight {p[0, i] / true[0, i]:.2f}"
            print(f"  {words[text[0, i]]:2} of step {step} from z_{tau} = {state}: {said}")


if __name__ == "__main__":
    example()
