"""The objective of DiFFPO, as pure functions of tensors.

What is optimised is a *surrogate* policy (likelihood.py), what was sampled from is the *true* one (diffusion_policy.py). So
this is off-policy learning even at the first update, and every token carries a truncated importance weight:

    w_t   = min(C, pi_old^S(o_t) / pi_old^true(o_t))        constant in theta; capped on one side only      [PAPER]
    rho_t = pi_theta^S(o_t) / pi_old^S(o_t)                 new over old surrogate, the same boundaries     [PAPER]
    J     = mean_i 1/|o_i| sum_t w_t min(rho_t A_i, clip(rho_t, 1 - eps, 1 + eps) A_i)                      [RECONSTRUCTED]

    d1 (diffu-GRPO) is J with m = 1 stage and w = 1.

At the first inner update rho is 1 everywhere, and with advantages that sum to 0 the loss is about 0 by construction. Its
gradient is not: look at reward, ratio and gradient norm, not at the loss.

Shapes: B = prompts x G completions, a prompt's G rows adjacent; L completion tokens.
"""

import torch


def group_advantages(reward, group_size, scale_by_std=False, std_floor=0.1):
    """Reward minus the mean of the prompt's own group; with `scale_by_std` over the group's standard deviation.

    d1 does not divide [OUR CHOICE: a setting]. The floor keeps a group in which only the speed differs from being blown up.
    reward (B,) -> (B,). Raises ValueError for a group of one, which has nothing to compare with.
    """
    if group_size < 2 or len(reward) % group_size:
        raise ValueError(f"{len(reward)} rewards are no groups of {group_size}: a group needs at least 2 completions")
    groups = reward.view(-1, group_size)  # (prompts, G)
    advantage = groups - groups.mean(dim=1, keepdim=True)
    if scale_by_std:
        advantage = advantage / groups.std(dim=1, keepdim=True).clamp(min=std_floor)
    return advantage.flatten()


def importance_weights(logp_surrogate_old, logp_true_old, cap):
    """w = min(cap, pi_old^S / pi_old^true), without gradient; cap 0 switches weights off (all 1). (B, L), (B, L) -> (B, L)"""
    if not cap:
        return torch.ones_like(logp_true_old)
    return (logp_surrogate_old - logp_true_old).detach().exp().clamp(max=cap)


def clipped(ratio, advantage, clip_eps):
    """PPO's pessimistic objective: no reward for moving a ratio further than clip_eps from 1."""
    return torch.minimum(ratio * advantage, ratio.clamp(1 - clip_eps, 1 + clip_eps) * advantage)


def clip_active(ratio, advantage, clip_eps):
    """Where the clip has switched the gradient off."""
    return (ratio > 1 + clip_eps) & (advantage > 0) | (ratio < 1 - clip_eps) & (advantage < 0)


def token_mean(x, token_mask):
    """The mean over tokens of each row, 0 for a row without any: 1/|o_i| sum_t. (B, L) -> (B,)"""
    return (x * token_mask).sum(-1) / token_mask.sum(-1).clamp(min=1)


def diffpo_loss(logp_new, logp_old, advantage, weights, token_mask, clip_eps, logp_reference=None, kl_beta=0.0):
    """The model's objective, negated, averaged over the rows given. Returns (loss, metrics).

    logp_new, logp_old, weights, logp_reference (B, L), advantage (B,), token_mask (B, L) bool.
    Each row is normalised by its own length, so a batch's loss is the row-weighted mean of its micro-batches' losses, exactly.
    With kl_beta, adds beta times the k3 estimate of KL(new || reference), as d1 does; 0 by default. [OUR CHOICE]
    """
    logp_old = logp_old.detach()
    ratio = (logp_new - logp_old).exp()  # (B, L)
    objective = weights * clipped(ratio, advantage.unsqueeze(-1), clip_eps)
    count = token_mask.sum().clamp(min=1)
    metrics = {
        "ratio_mean": (ratio * token_mask).sum() / count,
        "clip_share": (clip_active(ratio, advantage.unsqueeze(-1), clip_eps) & token_mask).sum() / count,
    }
    if kl_beta:
        difference = logp_reference.detach() - logp_new
        kl = difference.exp() - difference - 1  # k3: unbiased and never negative
        objective = objective - kl_beta * kl
        metrics["reference_kl"] = (kl * token_mask).sum() / count
    loss = -token_mean(objective, token_mask).mean()
    return loss, {name: value.item() for name, value in metrics.items()} | {"loss": loss.item()}


def threshold_loss(logp_new, logp_old, advantage, clip_eps):
    """The sampler's objective: the same clipped ascent on gamma's log-prob, one action per completion. [OUR CHOICE]

    logp_new, logp_old, advantage (B,) -> (loss, metrics). No importance weight: gamma was drawn from just this distribution.
    """
    ratio = (logp_new - logp_old.detach()).exp()
    loss = -clipped(ratio, advantage, clip_eps).mean()
    clip_share = clip_active(ratio, advantage, clip_eps).float().mean()
    return loss, {"threshold_loss": loss.item(), "threshold_ratio": ratio.mean().item(), "threshold_clip_share": clip_share.item()}


def weight_metrics(logp_surrogate_old, logp_true_old, cap, token_mask):
    """What the importance weights do: their size before the cap, how many are capped, and what they leave of the sample.

    (B, L), (B, L), float, (B, L) bool -> dict of floats. `ess_share` is the effective sample size of the weights in use,
    (sum w)^2 / sum w^2, over the number of tokens: 1 when all are equal. `surrogate_kl` estimates KL(true || surrogate) per
    token, in nats, from the rollout's own tokens.
    """
    log_weight = (logp_surrogate_old - logp_true_old)[token_mask].double()  # (N,)
    used = importance_weights(logp_surrogate_old, logp_true_old, cap)[token_mask].double()
    return {
        "is_weight_mean": used.mean().item(),
        "is_weight_max": log_weight.exp().max().item(),
        "is_capped_share": (log_weight.exp() > cap).double().mean().item() if cap else 0.0,
        "ess_share": (used.sum().square() / used.square().sum() / len(used)).item(),
        "surrogate_kl": -log_weight.mean().item(),
    }
