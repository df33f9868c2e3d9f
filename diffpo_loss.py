"""The objective of DiFFPO, as pure functions of tensors.

We optimise a *surrogate* policy (likelihood.py), but the samples come from the *true* one
(diffusion_policy.py). So learning is off-policy even at the first update, and every token gets a
truncated importance weight.

    w_t   = min(C, pi_old^S(o_t) / pi_old^true(o_t))    no gradient; capped on one side     [PAPER]
    rho_t = pi_theta^S(o_t) / pi_old^S(o_t)             new over old, the same boundaries   [PAPER]
    J     = mean_i 1/n_i sum_t w_t min(rho_t A_i, clip(rho_t, 1-eps, 1+eps) A_i) [RECONSTRUCTED]

Mean-field learning is J with m = 1 stage and w = 1. Apart from settings (config.py has d1's), d1's
diffu-GRPO differs from that in two ways: it divides by the number of all tokens in a micro-batch,
and it scores at temperature 1, whatever the sampling temperature.

The setting `normalise_by` decides n_i (its "canvas" is the completion's, without the prompt):
    "canvas"  n_i = L for every row: Dr. GRPO's division by a constant. With the exact likelihood,
              w = 1 and advantages not divided by the group's standard deviation, this gives the
              policy gradient up to a factor, except where a token after [EOS] was drawn before a
              token of the text: its influence on the text is missing.               [OUR CHOICE]
    "text"    n_i = |o_i|, the row's own tokens up to [EOS]: GRPO's mean per sequence. A token of a
              short text then counts more than one of a long text, so this is not the policy
              gradient.                                                           [RECONSTRUCTED]

To make several updates on one batch of rollouts, draw boundaries for each update and score all
their logp_old before the first optimiser step; then, update by update, score logp_new and take a
step (train.py).

The reward from which train.py computes advantages is r (1 - lambda T / L): the verifier's r in
[0, 1], reduced by the number of calls. If wrong answers earn something too, a large lambda teaches
the model to hurry (config.py). [OUR CHOICE]

The value of the loss says nothing. At the first update every ratio is 1, and the advantages of a
group sum to 0. What remains is due to the weights' deviation from 1 and, under "canvas", to the
covariance of advantage and length. The gradient is not 0: watch reward and gradient norm, and in
later updates the ratio.

This file needs torch alone. `python diffpo_loss.py` computes one objective token by token.

Shapes: B = prompts x G completions, with the G rows of a prompt adjacent; L completion tokens. An
update is an optimiser step; one batch of rollouts may serve for several updates.
"""

import torch


def group_advantages(reward, num_generations, scale_rewards, std_floor=0.1) -> torch.Tensor:
    """Reward minus its group's mean; with `scale_rewards`, divided by the group's std.

    d1 does not divide [OUR CHOICE: a setting]. If the rewards of a group differ only in speed,
    their std is tiny; without `std_floor` such small differences would become huge advantages.

    reward (B,) float, with the rows of a prompt adjacent -> (B,). Raises ValueError for groups of
    fewer than 2, which have nothing to compare, or if B is not a multiple of num_generations.
    """
    if num_generations < 2 or len(reward) % num_generations:
        raise ValueError(
            f"{len(reward)} rewards in groups of {num_generations}: a group has at least 2"
        )
    groups = reward.view(-1, num_generations)  # (prompts, G)
    # Relative to the group's first reward, equal rewards give advantages of exactly 0, however the
    # mean is rounded. Adam would turn what rounding leaves into a full step.
    groups = groups - groups[:, :1]
    advantage = groups - groups.mean(dim=1, keepdim=True)
    if scale_rewards:
        advantage = advantage / groups.std(dim=1, keepdim=True).clamp(min=std_floor)
    return advantage.flatten()


def importance_weights(logp_surrogate_old, logp_true_old, cap) -> torch.Tensor:
    """w = min(cap, pi_old^S / pi_old^true), without gradient.

    logp_surrogate_old  (B, L) likelihood.surrogate_logp of the old policy
    logp_true_old       (B, L) Rollout.behaviour_logp
    cap                 C; inf: no cap; 0: no weighting, all weights are 1

    Returns (B, L). Raises ValueError for a negative cap.
    """
    if cap < 0:
        raise ValueError(f"cap = {cap}: it has to be at least 0")
    if cap == 0:
        return torch.ones_like(logp_true_old)
    return (logp_surrogate_old - logp_true_old).detach().exp().clamp(max=cap)


def clipped(ratio, advantage, epsilon) -> torch.Tensor:
    """PPO's clipped objective: moving a ratio further than epsilon from 1 earns nothing more.

    ratio, advantage: any shapes that broadcast -> their common shape
    """
    return torch.minimum(ratio * advantage, ratio.clamp(1 - epsilon, 1 + epsilon) * advantage)


def is_clipped(ratio, advantage, epsilon) -> torch.Tensor:
    """Where clipping sets the gradient to 0. Shapes as in `clipped` -> bool"""
    too_high = (ratio > 1 + epsilon) & (advantage > 0)
    too_low = (ratio < 1 - epsilon) & (advantage < 0)
    return too_high | too_low


def row_mean(x, token_mask, normalise_by) -> torch.Tensor:
    """Each row's sum over its tokens, divided by L ("canvas") or by their number ("text").

    x (B, L), token_mask (B, L) bool -> (B,), 0 for a row without tokens. Raises ValueError for an
    unknown normalise_by.
    """
    if normalise_by not in ("canvas", "text"):
        raise ValueError(f"unknown normalise_by {normalise_by!r}: choose canvas or text")
    n = token_mask.shape[-1]
    if normalise_by == "text":
        n = token_mask.sum(dim=-1).clamp(min=1)
    return (x * token_mask).sum(dim=-1) / n


def diffpo_loss(
    logp_new, logp_old, advantage, weights, token_mask, epsilon, normalise_by
) -> tuple[torch.Tensor, dict]:
    """The denoiser's loss: minus J, a mean over the B rows. Returns (loss, metrics).

    logp_new, logp_old  (B, L) surrogate log-probs of the new and the old policy, same boundaries
    advantage           (B,)
    weights             (B, L) importance weights; all ones for no weighting
    token_mask          (B, L) bool, the tokens that count
    epsilon             PPO's clip range of the ratio
    normalise_by        "canvas" or "text", see above

    No row's term depends on other rows. So the loss of a batch is exactly the mean of its
    micro-batches' losses, weighted by their numbers of rows.
    """
    advantage = advantage.unsqueeze(-1)  # (B, 1)
    ratio = (logp_new - logp_old.detach()).exp()  # (B, L)
    objective = weights * clipped(ratio, advantage, epsilon)
    loss = -row_mean(objective, token_mask, normalise_by).mean()
    tokens = token_mask.sum().clamp(min=1)
    metrics = {
        "ratio_mean": ((ratio * token_mask).sum() / tokens).item(),
        "clip_fraction": (
            (is_clipped(ratio, advantage, epsilon) & token_mask).sum() / tokens
        ).item(),
        "loss": loss.item(),
    }
    return loss, metrics


def reference_kl(logp_new, logp_reference, token_mask, normalise_by) -> torch.Tensor:
    """KL(new || reference) by Schulman's k3 estimate, which is never negative.

    Its value is unbiased if the tokens come from the new policy and the likelihood is exact; its
    gradient is then, in expectation, that of KL(reference || new). With a surrogate it inherits the
    surrogate's error. d1 adds it to the loss, times beta = 0.04; here beta is 0 by default.
    [OUR CHOICE]

    logp_new, logp_reference, token_mask (B, L) -> scalar
    """
    difference = logp_reference.detach() - logp_new
    return row_mean(difference.exp() - difference - 1, token_mask, normalise_by).mean()


def threshold_loss(logp_new, logp_old, advantage, epsilon) -> tuple[torch.Tensor, dict]:
    """The threshold head's loss: PPO's clipped objective, negated, with gamma as the only action.

    It needs no importance weight, since gamma was drawn from the head's own distribution, not
    scored by a surrogate. [OUR CHOICE]

    logp_new, logp_old (B,) log-probs of gamma, advantage (B,) -> (loss, metrics)
    """
    ratio = (logp_new - logp_old.detach()).exp()
    loss = -clipped(ratio, advantage, epsilon).mean()
    metrics = {
        "threshold_loss": loss.item(),
        "threshold_ratio": ratio.mean().item(),
        "threshold_clip_fraction": is_clipped(ratio, advantage, epsilon).float().mean().item(),
    }
    return loss, metrics


def weight_metrics(logp_surrogate_old, logp_true_old, cap, token_mask, has_unit_weight) -> dict:
    """How large the importance weights are, how many are capped, and how noisy they make the loss.

    logp_surrogate_old, logp_true_old  (B, L)
    cap                                C; 0: no weighting
    token_mask                         (B, L) bool, the tokens that count
    has_unit_weight                    (B, L) bool, see likelihood.unit_weight_tokens

    Returns a dict of floats:

    importance_weight_mean  mean of the capped weights
    importance_weight_max   the largest weight before the cap
    capped_weight_fraction  fraction of weights that the cap lowers by more than rounding
    ess_fraction            effective sample size of the capped weights, (sum w)^2 / sum w^2,
                            divided by the number of tokens: 1 when all weights are equal
    surrogate_kl            KL(true || surrogate) per token in nats, estimated on these tokens
    unit_weight_error       root mean square of log w over the tokens whose weight should be 1: the
                            numerical error, plus a block cache's
    """
    log_weight = (logp_surrogate_old - logp_true_old).double()  # (B, L)
    unit_log_weight = log_weight[token_mask & has_unit_weight]
    log_weight = log_weight[token_mask]  # (N,)
    capped = importance_weights(logp_surrogate_old, logp_true_old, cap)[token_mask].double()
    is_lowered = log_weight.exp() > 1.001 * cap
    return {
        "importance_weight_mean": capped.mean().item(),
        "importance_weight_max": log_weight.exp().max().item(),
        "capped_weight_fraction": is_lowered.double().mean().item() if cap else 0.0,
        "ess_fraction": (capped.sum().square() / capped.square().sum() / len(capped)).item(),
        "surrogate_kl": -log_weight.mean().item(),
        "unit_weight_error": unit_log_weight.square().mean().sqrt().item(),
    }


def example():
    """Two completions of one prompt: the first ends early, the second solves the problem."""
    p_true = torch.tensor([[0.5, 0.8, 0.9], [0.5, 0.4, 0.9]])  # of each token when it was drawn
    p_old = torch.tensor([[0.5, 0.4, 0.9], [0.5, 0.9, 0.3]])  # the surrogate's, before the update
    p_new = torch.tensor([[0.4, 0.4, 0.8], [0.8, 0.9, 0.3]])  # the surrogate's, after it
    token_mask = torch.tensor([[True, True, False], [True, True, True]])
    reward = torch.tensor([0.0, 1.0])
    advantage = group_advantages(reward, num_generations=2, scale_rewards=False)
    weights = importance_weights(p_old.log(), p_true.log(), cap=2.0)
    ratio = p_new / p_old
    terms = weights * clipped(ratio, advantage.unsqueeze(-1), epsilon=0.2)
    print("row token   A    true   old   new  w = min(2, old/true)  new/old  w * clipped")
    for i, t in token_mask.nonzero().tolist():
        cells = [advantage[i], p_true[i, t], p_old[i, t], p_new[i, t]]
        print(f"{i:3} {t:5}", *(f"{x:5.2f}" for x in cells), f"{weights[i, t]:21.2f}", end=" ")
        print(f"{ratio[i, t]:8.2f} {terms[i, t]:12.3f}")
    for normalise_by in ("text", "canvas"):
        rows = row_mean(terms, token_mask, normalise_by)
        loss, _ = diffpo_loss(
            logp_new=p_new.log(),
            logp_old=p_old.log(),
            advantage=advantage,
            weights=weights,
            token_mask=token_mask,
            epsilon=0.2,
            normalise_by=normalise_by,
        )
        print(
            f"{normalise_by}: rows {rows[0]:.3f}, {rows[1]:.3f};",
            f"the loss is minus their mean, {loss:.3f}",
        )


if __name__ == "__main__":
    example()
