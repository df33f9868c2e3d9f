"""Which masked positions to unmask next: three rules, and the learned per-prompt threshold.

At every denoising step the denoiser gives each masked position a distribution over tokens. A rule looks at these
distributions, never at the tokens drawn from them, and selects the positions to unmask. That a selection does not depend
on the draw is what makes the trajectory's probability a product of token probabilities, and so exactly known.

    top_k                  the k most confident                       LLaDA's rule; NFE fixed by k
    confidence_threshold   all that are surer than tau                Fast-dLLM's rule; NFE adapts
    entropy_bounded        as many as share an entropy budget gamma   EB-Sampler (arXiv 2505.24857), the one DiFFPO learns [PAPER]

Shapes: B rows, L positions, D hidden size.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn


def top_k(confidence, masked, k):
    """The k most confident masked positions of each row, all of them where fewer are masked.

    confidence (B, L) float, masked (B, L) bool, k int -> selected (B, L) bool
    """
    order = confidence.masked_fill(~masked, -torch.inf).argsort(dim=-1, descending=True, stable=True)  # (B, L)
    rank = order.argsort(dim=-1)  # the inverse permutation: position -> its place in the order
    return masked & (rank < k)


def confidence_threshold(confidence, masked, tau):
    """Every masked position with confidence above tau, and always the best one: without it a timid row would never end.

    confidence (B, L), masked (B, L) bool, tau scalar or (B,) -> selected (B, L) bool
    """
    tau = torch.as_tensor(tau, device=confidence.device).reshape(-1, 1)
    return masked & (confidence > tau) | top_k(confidence, masked, 1)


def entropy_bounded(entropy, masked, gamma):
    """The longest prefix U of the masked positions, by ascending entropy H, with sum_U H - max_U H <= gamma.

    If tokens are drawn at once from their marginals, the error against drawing them one after the other is at most
    sum_U H - max_U H: the bound is a budget for it. In ascending order max_U H is the last member's own, so what is compared
    with gamma is the sum over the positions *before* it. For the first that is 0, so one position is always selected.

    entropy (B, L) in nats, masked (B, L) bool, gamma scalar or (B,), >= 0 -> selected (B, L) bool
    """
    gamma = torch.as_tensor(gamma, device=entropy.device).reshape(-1, 1)
    ascending, order = entropy.masked_fill(~masked, torch.inf).sort(dim=-1, stable=True)  # (B, L)
    before = torch.cat([torch.zeros_like(ascending[:, :1]), ascending.cumsum(-1)[:, :-1]], dim=-1)  # sum over those before
    return masked & (before <= gamma).gather(-1, order.argsort(dim=-1))


@dataclass(frozen=True)
class Decoder:
    """A rule with its setting, and how far ahead it may look.

    rule           "eb", "confidence" or "top_k"
    setting        gamma in nats, tau in [0, 1], or k; None with "eb" is the threshold head's own gamma for each prompt
    block_length   semi-autoregressive: a row's next block opens when its last one is full, as LLaDA decodes.
                   None is the whole canvas: any masked position may come next.
    """

    rule: str = "eb"
    setting: float | None = 0.1
    block_length: int | None = None

    def __post_init__(self):
        allowed = {"eb": (0, 1e9), "confidence": (0, 1), "top_k": (1, 1e9)}
        if self.rule not in allowed:
            raise ValueError(f"unknown decoder {self.rule!r}: choose one of {', '.join(allowed)}")
        low, high = allowed[self.rule]
        if self.setting is None and self.rule != "eb":
            raise ValueError(f"decoder {self.rule} needs a setting; only eb can be learned")
        if self.setting is not None and not low <= self.setting <= high:
            raise ValueError(f"decoder {self.rule} takes a setting of {low} to {high:g}, not {self.setting}")
        if self.rule == "top_k" and self.setting != int(self.setting):
            raise ValueError(f"decoder top_k takes a whole number of tokens a step, not {self.setting}")
        if self.block_length is not None and (self.block_length < 1 or self.block_length != int(self.block_length)):
            raise ValueError(f"block_length has to be a whole number of tokens, at least 1, not {self.block_length}")

    def open_positions(self, masked):
        """The masked positions of each row's first unfinished block. (B, L) bool -> (B, L) bool"""
        if self.block_length is None:
            return masked
        block = torch.arange(masked.shape[1], device=masked.device) // self.block_length  # (L,)
        first = torch.where(masked, block, masked.shape[1]).amin(dim=-1, keepdim=True)  # (B, 1)
        return masked & (block == first)

    def select(self, entropy, confidence, masked, gamma=None):
        """Positions to unmask, of the masked ones. gamma (B,) replaces the setting where the threshold is learned."""
        if self.rule == "eb":
            return entropy_bounded(entropy, masked, self.setting if gamma is None else gamma)
        if self.rule == "confidence":
            return confidence_threshold(confidence, masked, self.setting)
        return top_k(confidence, masked, int(self.setting))


class ThresholdHead(nn.Module):
    """The learned sampler: reads the prompt, allots it a threshold gamma(c). One scalar per generation. [PAPER]

    It reads the denoiser's own last hidden states over the prompt, averaged, at the first denoising call, so gamma costs no
    call of its own. The weights start at zero: every prompt starts with the same gamma_0. [OUR CHOICE]
    """

    def __init__(self, hidden_size, gamma_0=0.1, sigma=0.5, floor=1e-3, ceiling=10.0):
        super().__init__()
        if not 0 < floor <= gamma_0 <= ceiling:
            raise ValueError(f"gamma_0 = {gamma_0} is outside its bounds: choose one of {floor} to {ceiling}")
        self.sigma, self.floor, self.ceiling = sigma, floor, ceiling
        # Standardised states times 1/sqrt(D) make the step that Adam takes in log gamma the same for every hidden size.
        self.standardise = nn.LayerNorm(hidden_size, elementwise_affine=False)
        self.linear = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.constant_(self.linear.bias, math.log(gamma_0))

    def forward(self, prompt_state):
        """prompt_state (B, D) -> the distribution of gamma (B,). The states are data here: no gradient reaches the denoiser."""
        state = self.standardise(prompt_state.detach().float()) / math.sqrt(prompt_state.shape[-1])
        return ClampedLogNormal(self.linear(state).squeeze(-1), self.sigma, self.floor, self.ceiling)


class ClampedLogNormal:
    """log gamma ~ Normal(mean, sigma^2), and gamma clamped into [floor, ceiling]. [OUR CHOICE]

    The clamp turns both tails into probability masses at the bounds, and `log_prob` knows it: there it is the log of the
    tail's mass, between them the log of the density.
    """

    def __init__(self, mean, sigma, floor, ceiling):
        self.mean, self.sigma, self.floor, self.ceiling = mean, sigma, floor, ceiling  # mean (B,)
        self.normal = torch.distributions.LogNormal(mean, sigma)

    @torch.no_grad()  # a draw is data: its log_prob must not be differentiated through the draw
    def sample(self, generator=None):
        noise = torch.randn(self.mean.shape, generator=generator, device=self.mean.device)
        return (self.mean + self.sigma * noise).exp().clamp(self.floor, self.ceiling)

    @property
    def median(self):
        return self.mean.exp().clamp(self.floor, self.ceiling)

    def log_prob(self, gamma):
        """gamma (B,) -> (B,)"""
        standard = (gamma.log() - self.mean) / self.sigma
        inside = self.normal.log_prob(gamma)
        at_floor, at_ceiling = torch.special.log_ndtr(standard), torch.special.log_ndtr(-standard)
        return torch.where(gamma <= self.floor, at_floor, torch.where(gamma >= self.ceiling, at_ceiling, inside))

    def entropy(self):
        """Of gamma before the clamp, in nats (B,)."""
        return self.normal.entropy()
