"""Is the surrogate's gradient the policy's gradient? Cosines, bias and noise, with intervals.

The exact likelihood (likelihood.py with a boundary at every step) gives the policy gradient: noisy,
since a batch is small, but right on average, if the part that joint training leaves out is left out
everywhere. Every other estimator is compared with it on the same rollouts and advantages:

    m = 1, 2, 4, 8 stages, without weights and with weights capped at C = 1, 2, 5 or not at all
    two random steps scored exactly, times T / 2: as dear as two stages, unbiased, noisier

One batch's gradient g_b misses the true gradient G = E[exact] in two ways. Bias: E[g] points
elsewhere, whatever the batch size. Noise: g_b scatters around E[g], less so in large batches.
Products of *different* batches have independent noise, so their mean tells E[g] apart from it:

    E[g].E[h] is estimated by the mean of g_b.h_b' over b != b'                    (a U-statistic)
    bias      cos(E[g], G)                                         what P -> infinity would reach
    noise     r^2 = (E|g|^2 - |E[g]|^2) / |E[g]|^2                 falls as 1/P, P prompts a step
    cosine of a batch of x P prompts with G, about: bias / sqrt(1 + r^2 / x)

Shapes: N batches, D parameters, B rows, m stages.
"""

from dataclasses import replace
from math import inf

import torch

import likelihood
from diffpo_loss import diffpo_loss, importance_weights
from evaluation.metrics import bootstrap_weights

STAGES = (1, 2, 4, 8)
CAPS = {"no weights": 0, "C = 1": 1, "C = 2": 2, "C = 5": 5, "no cap": inf}
TWO_STEPS = "two steps, x T/2"


def flat_gradients(policy, rollout, advantage, boundaries, caps):
    """{cap's name: the loss's gradient (D,)} of one surrogate, at ratio 1. Rows count 1/L."""
    parameters = [p for p in policy.denoiser.parameters() if p.requires_grad]
    logp = likelihood.surrogate_logp(policy, rollout, boundaries)  # (B, L)
    found = {}
    for name, cap in caps.items():
        weights = importance_weights(logp, rollout.behaviour_logp, cap)
        how = (advantage, weights, rollout.token_mask, 0.2, "canvas")
        loss, _ = diffpo_loss(logp, logp, *how)
        gradient = torch.autograd.grad(loss, parameters, retain_graph=True)
        found[name] = torch.cat([part.flatten() for part in gradient])
    return found


def two_random_steps(rollout, generator):
    """Two random steps of each row, or its only one: boundaries (B, 2) before them, their tokens
    (B, L) bool, and by what their gradient is to be multiplied (B,): T / 2, or 1.
    """
    T, device = rollout.nfe.unsqueeze(1), rollout.nfe.device  # (B, 1)
    key = torch.rand((len(T), max(2, int(T.max()))), generator=generator, device=device)
    key = key.masked_fill(torch.arange(1, key.shape[1] + 1, device=device) > T, -1)
    picked = (key.topk(2, dim=1).indices + 1).minimum(T).sort(dim=1).values  # (B, 2) of 1 to T
    chosen = (rollout.unmask_step.unsqueeze(-1) == picked.unsqueeze(1)).any(-1)  # (B, L)
    return picked - 1, chosen & rollout.token_mask, rollout.nfe / rollout.nfe.clamp(max=2)


def batch_gradients(policy, rollout, advantage, generator):
    """({(m, weights): gradient (D,)}, {m: rows that scoring ran, a completion}) of one batch.

    m is a number of stages, "exact" or TWO_STEPS.
    """
    every = torch.arange(1, int(rollout.nfe.max()) + 1, device=rollout.nfe.device)
    boundaries = {m: likelihood.draw_boundaries(rollout.nfe, m, generator) for m in STAGES}
    boundaries["exact"] = every.expand(len(advantage), -1)
    boundaries[TWO_STEPS], chosen, scale = two_random_steps(rollout, generator)
    found, calls = {}, {}
    for m, where in boundaries.items():
        policy.rows_run, caps = 0, CAPS if m in STAGES else {"no weights": 0}
        what = (rollout, advantage)
        if m == TWO_STEPS:
            what = (replace(rollout, token_mask=chosen), advantage * scale)
        new = flat_gradients(policy, *what, where, caps)
        found |= {(m, name): gradient for name, gradient in new.items()}
        calls[m] = policy.rows_run / len(advantage)
    return found, calls


# ---- statistics ----------------------------------------------------------------------------------


def mean(values, weight):
    """The mean over batches, each as often as a bootstrap drew it. (N,), (..., N) -> (...)"""
    return (weight * values).sum(-1) / weight.sum(-1)


def across(products, weight):
    """The mean of g_b.h_b' over b != b'. products (N, N), weight (..., N) -> (...)"""
    own = (weight.square() * products.diagonal()).sum(-1)
    total = torch.einsum("...b,bc,...c->...", weight, products, weight) - own
    return total / (weight.sum(-1).square() - weight.square().sum(-1))


def statistics(gg, ge, ee, weight):
    """What an estimator g is worth beside the exact e; their products (N, N) over the batches.

    weight (..., N) -> a dict of (...) tensors: of the sample for ones, else of bootstrap draws.
    """
    own, exact = gg.diagonal(), ee.diagonal()
    apart = gg / torch.outer(own, own).sqrt()
    found = {
        "cosine": mean(ge.diagonal() / (own * exact).sqrt(), weight),
        "relative_error": mean(
            ((own - 2 * ge.diagonal() + exact).clamp(min=0) / exact).sqrt(), weight
        ),
        "norm_ratio": mean((own / exact).sqrt(), weight),
        "split_half": across(apart, weight),
    }
    signal, true = across(gg, weight), across(ee, weight)
    found["bias_cosine"] = across(ge, weight) / (signal * true).sqrt()
    found["noise"] = ((mean(own, weight) - signal) / signal).sqrt()
    found["true_cosine"] = found["bias_cosine"] / (1 + found["noise"].square()).sqrt()
    return found


def interval(draws):
    """[low, high] at 95%; [None, None] where more than 2.5% of the draws have a signal that noise
    hides, which then has no direction.
    """
    known = draws.isfinite()
    if known.double().mean() < 0.975:
        return [None, None]
    draws = draws[known]
    return torch.quantile(draws, torch.tensor([0.025, 0.975], dtype=draws.dtype)).tolist()


PAIRS = [("cosine", (2, w), (1, w)) for w in CAPS]
PAIRS += [("cosine", (m, w), (m, "no weights")) for m in (1, 2) for w in CAPS if CAPS[w]]
PAIRS += [("true_cosine", (2, "C = 1"), (m, "no weights")) for m in (1, 2, "exact", TWO_STEPS)]
PAIRS += [("true_cosine", (2, "C = 1"), (1, "C = 1"))]


def summarise(gradients, calls):
    """From N batches' gradients {(m, weights): (N, D)}: (rows, comparisons), dicts for JSON.

    A row has the statistics of one estimator, each with NAME_interval; a comparison the difference
    of one of them between two estimators, on the same batches. The bootstrap is over batches.
    """
    exact = gradients["exact", "no weights"]
    one, draws = torch.ones(len(exact), dtype=torch.double), bootstrap_weights(len(exact))
    ee, rows, found, compared = (exact @ exact.T).double(), [], {}, []
    for (m, weights), g in gradients.items():
        products = ((g @ g.T).double(), (g @ exact.T).double(), ee)
        value, spread = (statistics(*products, weight) for weight in (one, draws))
        found[m, weights] = value, spread
        row = {"stages": m, "weights": weights, "calls": calls[m], "batches": len(exact)}
        for name in value:
            row |= {name: value[name].item(), f"{name}_interval": interval(spread[name])}
        rows.append(row)
    for name, first, second in PAIRS:
        (value, spread), (base, base_spread) = found[first], found[second]
        row = {"quantity": name, "of": first, "against": second}
        row["difference"] = (value[name] - base[name]).item()
        compared.append(row | {"interval": interval(spread[name] - base_spread[name])})
    return rows, compared


def better_from(one, other, prompts):
    """Where row `one` points closer to the true gradient than `other`: "always", "never", or
    "above N prompts a step" or "below" it. From bias and noise at `prompts` a step.
    """
    a, b = one["bias_cosine"] ** 2, other["bias_cosine"] ** 2
    quieter = a * other["noise"] ** 2 - b * one["noise"] ** 2  # one has less noise for its signal
    if (a > b) == (quieter > 0):
        return "always" if a > b else "never"
    return f"{'above' if a > b else 'below'} {prompts * -quieter / (a - b):.0f} prompts a step"
