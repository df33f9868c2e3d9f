"""Which masked positions to unmask next: three rules, and the learned per-prompt threshold.

At every denoising step the denoiser gives each masked position a distribution over tokens. A rule
looks at these distributions and selects the positions to unmask. It never looks at the tokens that
are then drawn. So the probability of a trajectory is a product of token probabilities, and known.

    top_k                 the k most confident                  LLaDA's rule; k fixes the calls
    confidence_threshold  all that are surer than tau           Fast-dLLM's rule
    entropy_bounded       as many as fit an entropy budget      EB-Sampler (arXiv 2505.24857), the
                          gamma, in nats                        one that DiFFPO learns    [PAPER]

This file needs torch alone. `python sampler.py` shows the three rules on one row.

Shapes: B rows, L positions, D hidden size.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

CACHES = ("none", "prefix", "dual")  # block caches of keys and values: denoiser.BlockCache


def top_k(confidence, masked, k):
    """The k most confident masked positions of each row, all of them where fewer are masked.

    confidence (B, L) float, masked (B, L) bool, k int -> selected (B, L) bool
    """
    confidence = confidence.masked_fill(~masked, -torch.inf)
    order = confidence.argsort(dim=-1, descending=True, stable=True)
    rank = order.argsort(dim=-1)  # (B, L) position -> its place in the order
    return masked & (rank < k)


def confidence_threshold(confidence, masked, tau):
    """Every masked position with confidence above tau, and always the best one.

    Without the best one a timid row would never end. (This tau is Fast-dLLM's, a probability. It is
    not likelihood.py's tau, a step.)

    confidence (B, L), masked (B, L) bool, tau scalar or (B,) -> selected (B, L) bool
    """
    tau = torch.as_tensor(tau, device=confidence.device).reshape(-1, 1)
    return masked & (confidence > tau) | top_k(confidence, masked, 1)


def entropy_bounded(entropy, masked, gamma):
    """The longest prefix U of the masked positions, by ascending entropy H, with
    sum_U H - max_U H <= gamma.

    Sort the masked positions by entropy, lowest first. Take each while the entropies *before* it
    sum to at most gamma. Nothing is before the first, so one position is always taken.
    Why this sum: tokens drawn at once, each from its own distribution, miss what they would have
    told each other. The error is at most sum_U H - max_U H, and gamma is the budget for it.

    entropy (B, L) in nats, masked (B, L) bool, gamma scalar or (B,), >= 0 -> selected (B, L) bool
    """
    gamma = torch.as_tensor(gamma, device=entropy.device).reshape(-1, 1)
    ascending, order = entropy.masked_fill(~masked, torch.inf).sort(dim=-1, stable=True)  # (B, L)
    before = torch.cat([torch.zeros_like(ascending[:, :1]), ascending.cumsum(-1)[:, :-1]], dim=-1)
    return masked & (before <= gamma).gather(-1, order.argsort(dim=-1))


@dataclass(frozen=True)
class Decoder:
    """How completions are decoded: a rule, its level, and what surrounds it.

    rule              "eb", "confidence" or "top_k"
    level             gamma in nats, tau in [0, 1], or k; None with "eb": the head's gamma(c)
    block_length      tokens a block: the next one opens when the last is full, as LLaDA decodes;
                      None: any masked position may come next
    temperature       of the tokens that are drawn; 0 is greedy
    cache             block cache: none (exact), prefix or dual
    stop_at_eos       end a row once all up to an end token is unmasked: the rest is padding
    sample_threshold  draw gamma(c) from the head's distribution (training); False: its median
    """

    rule: str = "eb"
    level: float | None = 0.1
    block_length: int | None = None
    temperature: float = 1.0
    cache: str = "none"
    stop_at_eos: bool = False
    sample_threshold: bool = True

    def __post_init__(self):
        allowed = {"eb": (0, 1e9), "confidence": (0, 1), "top_k": (1, 1e9)}
        rule, level, block, cache = self.rule, self.level, self.block_length, self.cache
        if rule not in allowed:
            raise ValueError(f"unknown decoder {rule!r}: choose one of {', '.join(allowed)}")
        low, high = allowed[rule]
        if level is None and rule != "eb":
            raise ValueError(f"decoder {rule} needs a level; only eb can be learned")
        if level is not None and not low <= level <= high:
            raise ValueError(f"decoder {rule} takes a level of {low} to {high:g}, not {level}")
        for name, value in {
            "block_length": block,
            "level": level if rule == "top_k" else None,
        }.items():
            if value is not None and (value < 1 or value != int(value)):
                raise ValueError(f"{name} = {value}: it has to be a whole number, at least 1")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature = {self.temperature}: it has to be at least 0")
        if cache not in CACHES:
            raise ValueError(f"unknown cache {cache!r}: choose one of {', '.join(CACHES)}")
        if cache != "none" and block is None:
            raise ValueError(f"the {cache} cache works block by block: give a block_length")

    def open_positions(self, masked):
        """The masked positions of each row's first unfinished block. (B, L) bool -> (B, L) bool"""
        if self.block_length is None:
            return masked
        block = torch.arange(masked.shape[1], device=masked.device) // self.block_length  # (L,)
        first = torch.where(masked, block, masked.shape[1]).amin(dim=-1, keepdim=True)  # (B, 1)
        return masked & (block == first)

    def select(self, entropy, confidence, masked, gamma=None):
        """Positions to unmask, of the masked ones. gamma (B,) replaces the level where learned."""
        if self.rule == "eb":
            return entropy_bounded(entropy, masked, self.level if gamma is None else gamma)
        if self.rule == "confidence":
            return confidence_threshold(confidence, masked, self.level)
        return top_k(confidence, masked, int(self.level))


class ThresholdHead(nn.Module):
    """The learned sampler: it reads the prompt and allots it a threshold gamma(c). [PAPER]

    It reads the denoiser's own last hidden states over the prompt, averaged, at the first denoiser
    call. So gamma costs no call of its own. Its weights start at zero: every prompt starts with the
    same initial_threshold. [OUR CHOICE]
    """

    def __init__(self, hidden_size, initial_threshold=0.1, sigma=0.5, floor=1e-3, ceiling=10.0):
        super().__init__()
        if not 0 < floor <= initial_threshold <= ceiling:
            raise ValueError(
                f"initial_threshold = {initial_threshold}: it has to be within {floor} to {ceiling}"
            )
        self.sigma, self.floor, self.ceiling = sigma, floor, ceiling
        self.standardise = nn.LayerNorm(hidden_size, elementwise_affine=False)
        self.linear = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.constant_(self.linear.bias, math.log(initial_threshold))

    def forward(self, prompt_state):
        """prompt_state (B, D) -> the distribution of gamma (B,). No gradient reaches the denoiser.

        Adam moves each of the D weights by about the learning rate, so log gamma moves by the rate
        times the sum of |state|. Divided by D that sum is the same for every width: about 8.
        """
        state = self.standardise(prompt_state.detach().float()) * (10 / prompt_state.shape[-1])
        mean = self.linear(state).squeeze(-1)
        return ClampedLogNormal(mean, self.sigma, self.floor, self.ceiling)


class ClampedLogNormal:
    """log gamma ~ Normal(mean, sigma^2), and gamma clamped into [floor, ceiling]. [OUR CHOICE]

    The clamp gathers each tail's probability at a bound. `log_prob` knows it: at a bound it is the
    log of the tail's mass, between them the log of the density.
    """

    def __init__(self, mean, sigma, floor, ceiling):  # mean (B,)
        self.mean, self.sigma, self.floor, self.ceiling = mean, sigma, floor, ceiling
        self.normal = torch.distributions.LogNormal(mean, sigma)

    @torch.no_grad()  # a draw is data: its log_prob must not be differentiated through the draw
    def sample(self, chance):
        """gamma (B,) by inversion, from uniform numbers (B,) in [0, 1)."""
        noise = torch.special.ndtri(chance).to(self.mean.dtype)
        return (self.mean + self.sigma * noise).exp().clamp(self.floor, self.ceiling)

    @property
    def median(self):
        return self.mean.exp().clamp(self.floor, self.ceiling)

    def log_prob(self, gamma):
        """gamma (B,) -> (B,)"""
        standard = (gamma.log() - self.mean) / self.sigma
        at_floor, at_ceiling = torch.special.log_ndtr(standard), torch.special.log_ndtr(-standard)
        between = self.normal.log_prob(gamma)
        above_floor = torch.where(gamma >= self.ceiling, at_ceiling, between)
        return torch.where(gamma <= self.floor, at_floor, above_floor)


def example():
    """Four masked positions and one that is unmasked already."""
    p = torch.tensor([0.99, 0.6, 0.9, 0.7, 1.0])  # of each position's likelier token, of two
    entropy = torch.special.entr(p) + torch.special.entr(1 - p)
    print("position         ", *(f"{i:5}" for i in range(5)), "(unmasked)")
    print("confidence       ", *(f"{x:5.2f}" for x in p.tolist()))
    print("entropy, nats    ", *(f"{x:5.2f}" for x in entropy.tolist()))
    for rule, level in [("top_k", 2), ("confidence", 0.8), ("eb", 0.0), ("eb", 0.1), ("eb", 0.4)]:
        selected = Decoder(rule, level).select(entropy[None], p[None], torch.arange(5)[None] < 4)
        print(f"{rule:>10} {level:<6}", *("    x" if x else "    ." for x in selected[0]))
    print("eb 0.4 takes 0 (nothing before it), 2 (0.06 before), 3 (0.38 before); 1 has 0.99 before")


if __name__ == "__main__":
    example()
