"""The objective of DiFFPO, as pure functions of tensors.

What is optimised is a *surrogate* policy (likelihood.py). What was sampled from is the *true* one
(diffusion_policy.py). So this is off-policy learning even at the first update, and it needs
importance sampling: every token carries a truncated weight.

    w_t   = min(C, pi_old^S(o_t) / pi_old^true(o_t))    no gradient; capped on one side     [PAPER]
    rho_t = pi_theta^S(o_t) / pi_old^S(o_t)             new over old, the same boundaries   [PAPER]
    J     = mean_i 1/n_i sum_t w_t min(rho_t A_i, clip(rho_t, 1-eps, 1+eps) A_i) [RECONSTRUCTED]

    mean-field learning (d1's diffu-GRPO) is J with m = 1 stage and w = 1.

At the first inner update rho is 1 everywhere. With advantages that sum to 0 the loss is then about
0, by construction. Its gradient is not: look at reward, ratio and gradient norm, not at the loss.

What n_i is, the setting `normalise_by`:
    "canvas"  n_i = L for every row. With the exact likelihood and w = 1 the gradient of J is, up to
              a factor, that of the expected reward, whatever the lengths, if no token behind [EOS]
              was drawn before one of the text: left to right, or in one step. One that was has
              changed the text, but carries no loss, and its part is missing.          [OUR CHOICE]
    "text"    n_i = |o_i|, the row's own tokens up to [EOS]. A token of a short text then pulls
              harder than one of a long text: another gradient, even then.           [RECONSTRUCTED]

This file needs torch alone. `python diffpo_loss.py` computes one objective token by token.

Shapes: B = prompts x G completions, a prompt's G rows adjacent; L completion tokens.
"""

import torch


def group_advantages(reward, num_generations, scale_rewards=False, std_floor=0.1):
    """Reward minus the mean of the prompt's own group; with `scale_rewards` over the group's std.

    d1 does not divide [OUR CHOICE: a setting]. In a group where only the speed differs the std is
    tiny; without the floor such tiny differences would become huge advantages.
    reward (B,) -> (B,). Raises ValueError for a group of one: it has nothing to compare with.
    """
    if num_generations < 2 or len(reward) % num_generations:
        raise ValueError(
            f"{len(reward)} rewards in groups of {num_generations}: a group is 2 or more"
        )
    groups = reward.view(-1, num_generations)  # (prompts, G)
    advantage = groups - groups.mean(dim=1, keepdim=True)
    if scale_rewards:
        advantage = advantage / groups.std(dim=1, keepdim=True).clamp(min=std_floor)
    return advantage.flatten()


def importance_weights(logp_surrogate_old, logp_true_old, cap):
    """w = min(cap, pi_old^S / pi_old^true), without gradient; cap 0: no weights, all are 1.

    (B, L), (B, L) -> (B, L)
    """
    if not cap:
        return torch.ones_like(logp_true_old)
    return (logp_surrogate_old - logp_true_old).detach().exp().clamp(max=cap)


def clipped(ratio, advantage, epsilon):
    """PPO's pessimistic objective: no reward for moving a ratio further than epsilon from 1."""
    return torch.minimum(ratio * advantage, ratio.clamp(1 - epsilon, 1 + epsilon) * advantage)


def clip_active(ratio, advantage, epsilon):
    """Where the clip has switched the gradient off."""
    too_far_up, too_far_down = ratio > 1 + epsilon, ratio < 1 - epsilon
    return too_far_up & (advantage > 0) | too_far_down & (advantage < 0)


def row_mean(x, token_mask, normalise_by="text"):
    """Each row's sum over its tokens, over their number ("text") or over L ("canvas").

    (B, L) -> (B,), 0 for a row without a token.
    """
    n = token_mask.sum(-1).clamp(min=1) if normalise_by == "text" else token_mask.shape[-1]
    return (x * token_mask).sum(-1) / n


def diffpo_loss(logp_new, logp_old, advantage, weights, token_mask, epsilon, normalise_by="text"):
    """The model's objective J, negated: the mean over the rows given. Returns (loss, metrics).

    logp_new, logp_old, weights (B, L), advantage (B,), token_mask (B, L) bool.
    Each row is normalised by itself. So the loss of a batch is the mean of its micro-batches'
    losses, each counted by its rows, exactly.
    """
    advantage = advantage.unsqueeze(-1)  # (B, 1)
    ratio = (logp_new - logp_old.detach()).exp()  # (B, L)
    objective = weights * clipped(ratio, advantage, epsilon)
    loss = -row_mean(objective, token_mask, normalise_by).mean()
    count = token_mask.sum().clamp(min=1)
    active = clip_active(ratio, advantage, epsilon) & token_mask
    metrics = {
        "ratio_mean": ((ratio * token_mask).sum() / count).item(),
        "clip_fraction": (active.sum() / count).item(),
        "loss": loss.item(),
    }
    return loss, metrics


def reference_kl(logp_new, logp_reference, token_mask, normalise_by="text"):
    """KL(new || reference), the k3 estimate: unbiased and never negative. (B, L) x 3 -> scalar

    d1 adds it to the loss, times beta = 0.04; here beta is 0 by default. [OUR CHOICE]
    """
    difference = logp_reference.detach() - logp_new
    return row_mean(difference.exp() - difference - 1, token_mask, normalise_by).mean()


def threshold_loss(logp_new, logp_old, advantage, epsilon):
    """The sampler's objective: clipped ascent on gamma's log-prob, one action a completion.

    logp_new, logp_old, advantage (B,) -> (loss, metrics). No importance weight: gamma was drawn
    from just this distribution. [OUR CHOICE]
    """
    ratio = (logp_new - logp_old.detach()).exp()
    loss = -clipped(ratio, advantage, epsilon).mean()
    metrics = {
        "threshold_loss": loss.item(),
        "threshold_ratio": ratio.mean().item(),
        "threshold_clip_fraction": clip_active(ratio, advantage, epsilon).float().mean().item(),
    }
    return loss, metrics


def weight_metrics(logp_surrogate_old, logp_true_old, cap, token_mask, must_be_1):
    """What the importance weights do: their size, how many are capped, what sample they leave.

    (B, L), (B, L), float, (B, L) bool, (B, L) bool -> dict of floats. `capped_weight_fraction`
    counts weights that the cap lowers by more than rounding: with C = 1 many are 1 already.
    `ess_fraction` is the effective sample size of the capped weights, (sum w)^2 / sum w^2, over the
    number of tokens: 1 when all are equal. `surrogate_kl` estimates KL(true || surrogate) per
    token, in nats, from the rollout's own tokens. `unit_weight_error` is the root mean square of
    log w over tokens whose weight is exactly 1 but for rounding (likelihood.scored_as_drawn): the
    error bar of the numerics, and with a block cache of the cache.
    """
    log_weight = (logp_surrogate_old - logp_true_old).double()  # (B, L)
    used = importance_weights(logp_surrogate_old, logp_true_old, cap)[token_mask].double()  # (N,)
    unit, log_weight = log_weight[token_mask & must_be_1], log_weight[token_mask]
    return {
        "importance_weight_mean": used.mean().item(),
        "importance_weight_max": log_weight.exp().max().item(),
        "capped_weight_fraction": (log_weight.exp() > 1.001 * cap).double().mean().item()
        if cap
        else 0.0,
        "ess_fraction": (used.sum().square() / used.square().sum() / len(used)).item(),
        "surrogate_kl": -log_weight.mean().item(),
        "unit_weight_error": unit.square().mean().sqrt().item(),
    }


def example():
    """Two completions of one prompt; the second one solved it, the first one ends early."""
    p_true = torch.tensor([[0.5, 0.8, 0.9], [0.5, 0.4, 0.9]])  # when it was drawn
    p_old = torch.tensor([[0.5, 0.4, 0.9], [0.5, 0.9, 0.3]])  # the surrogate's, before the update
    p_new = torch.tensor([[0.4, 0.4, 0.8], [0.8, 0.9, 0.3]])  # the surrogate's, now
    token_mask = torch.tensor([[True, True, False], [True, True, True]])
    advantage = group_advantages(torch.tensor([0.0, 1.0]), num_generations=2)
    weights, ratio = importance_weights(p_old.log(), p_true.log(), cap=2.0), p_new / p_old
    terms = weights * clipped(ratio, advantage.unsqueeze(-1), epsilon=0.2)
    print("row token   A    true   old   new  w = min(2, old/true)  new/old  w * clipped")
    for i, t in token_mask.nonzero().tolist():
        cells = (advantage[i], p_true[i, t], p_old[i, t], p_new[i, t])
        print(f"{i:3} {t:5}", *(f"{x:5.2f}" for x in cells), f"{weights[i, t]:21.2f}", end=" ")
        print(f"{ratio[i, t]:8.2f} {terms[i, t]:12.3f}")
    for by in ("text", "canvas"):
        rows = row_mean(terms, token_mask, by)
        logps = (p_new.log(), p_old.log())
        loss, _ = diffpo_loss(*logps, advantage, weights, token_mask, 0.2, by)
        print(f"{by}: rows {rows[0]:.3f}, {rows[1]:.3f}; the loss is minus their mean, {loss:.3f}")


if __name__ == "__main__":
    example()
