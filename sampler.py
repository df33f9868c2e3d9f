"""Which masked positions to unmask next: three rules, and the learned per-prompt threshold.

At every denoising step the denoiser gives each masked position a distribution over tokens. A rule
reads these distributions and selects the positions to unmask. It never sees the tokens that are
then drawn, so the probability of a rollout is a product of token probabilities, which a rollout
records.

    top_k                 the k most confident positions        LLaDA's rule; k sets the number of
                                                                denoiser calls
    confidence_threshold  all with a confidence above tau       Fast-dLLM's rule
    entropy_bounded       as many as fit into an entropy        EB-Sampler (arXiv 2505.24857); gamma
                          budget of gamma nats                  is what DiFFPO learns     [PAPER]

Confidence is the probability of a position's most likely token.

This file needs torch alone. `python sampler.py` shows the three rules on one row.

Shapes: B rows, L positions of a completion, D hidden size.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

CACHES = ("none", "prefix", "dual")  # block caches of keys and values (denoiser.BlockCache)


def top_k(confidence, masked, k) -> torch.Tensor:
    """The k most confident masked positions of each row; all of them if fewer are masked.

    confidence (B, L) float, masked (B, L) bool, k int -> selected (B, L) bool
    """
    confidence = confidence.masked_fill(~masked, -torch.inf)
    order = confidence.argsort(dim=-1, descending=True, stable=True)
    rank = order.argsort(dim=-1)  # (B, L): a position's place in that order
    return masked & (rank < k)


def confidence_threshold(confidence, masked, tau) -> torch.Tensor:
    """Every masked position with confidence above tau, and always the most confident one.

    Without the most confident one, a low-confidence row would never finish. (This tau is
    Fast-dLLM's, a probability. The tau of likelihood.py is something else: a step.)

    confidence (B, L), masked (B, L) bool, tau scalar or (B,) -> selected (B, L) bool
    """
    tau = torch.as_tensor(tau, device=confidence.device).reshape(-1, 1)
    return masked & (confidence > tau) | top_k(confidence, masked, 1)


def entropy_bounded(entropy, masked, gamma) -> torch.Tensor:
    """The longest prefix U of the masked positions, sorted by ascending entropy H, for which
    sum_U H - max_U H <= gamma.

    Sort the masked positions by entropy, lowest first, and select each as long as the entropies
    *before* it sum to at most gamma. None come before the first, so one is always selected.

    Why this sum: tokens drawn at once, each from its own distribution, are treated as independent.
    The error this makes, the KL from their joint distribution to the product of the marginals, is
    sum_U H less the joint entropy. The latter is at least max_U H, the largest marginal's, so the
    error is at most sum_U H - max_U H, which gamma bounds. (The bound holds for the distributions
    whose entropies are given. The policy's are those at temperature 1; if it draws at another
    temperature, the rule is a heuristic.)

    entropy (B, L) in nats, masked (B, L) bool, gamma scalar or (B,), >= 0 -> selected (B, L) bool
    """
    gamma = torch.as_tensor(gamma, device=entropy.device).reshape(-1, 1)
    ascending, order = entropy.masked_fill(~masked, torch.inf).sort(dim=-1, stable=True)  # (B, L)
    before = torch.cat([torch.zeros_like(ascending[:, :1]), ascending.cumsum(-1)[:, :-1]], dim=-1)
    return masked & (before <= gamma).gather(-1, order.argsort(dim=-1))


@dataclass(frozen=True)
class Decoder:
    """How completions are decoded: a rule, its level, blocks, cache and temperature.

    rule              "eb" (entropy_bounded), "confidence" or "top_k"
    level             gamma in nats, tau in [0, 1], or k; None with "eb": the threshold head's
                      gamma(c)
    block_length      tokens in a block: as in LLaDA, a block opens when the one before it is full;
                      None: one block, so any masked position may come next
    temperature       the sampling temperature; 0 is greedy
    cache             block cache of keys and values: none (exact), prefix or dual
    stop_at_eos       end a row once everything up to an end token is unmasked; the rest is padding
    sample_threshold  True: draw gamma(c) from the head's distribution, as training does; False: use
                      the distribution's median
    """

    rule: str = "eb"
    level: float | None = 0.1
    block_length: int | None = None
    temperature: float = 1.0
    cache: str = "none"
    stop_at_eos: bool = True
    sample_threshold: bool = True

    def __post_init__(self):
        ranges = {"eb": (0, 1e9), "confidence": (0, 1), "top_k": (1, 1e9)}
        if self.rule not in ranges:
            raise ValueError(f"unknown decoder {self.rule!r}: choose one of {', '.join(ranges)}")
        low, high = ranges[self.rule]
        if self.level is None and self.rule != "eb":
            raise ValueError(f"decoder {self.rule} needs a level; only eb can be learned")
        if self.level is not None and not low <= self.level <= high:
            raise ValueError(
                f"decoder {self.rule} takes a level of {low} to {high:g}, not {self.level}"
            )
        if self.rule == "top_k" and self.level != int(self.level):
            raise ValueError(f"level = {self.level}: top_k takes a whole number")
        if self.block_length is not None and self.block_length < 1:
            raise ValueError(f"block_length = {self.block_length}: it has to be at least 1")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature = {self.temperature}: it has to be at least 0")
        if self.cache not in CACHES:
            raise ValueError(f"unknown cache {self.cache!r}: choose one of {', '.join(CACHES)}")
        if self.cache != "none" and self.block_length is None:
            raise ValueError(f"the {self.cache} cache works block by block: give a block_length")

    def open_positions(self, masked, offset=None) -> torch.Tensor:
        """The masked positions of each row's first unfinished block. (B, L) bool -> (B, L) bool

        offset  (B,) long, how many prompt tokens share the block in which the completion begins;
                None: 0. (A block-causal denoiser counts blocks from the prompt's first token.)
        """
        if self.block_length is None:
            return masked
        position = torch.arange(masked.shape[1], device=masked.device).unsqueeze(0)  # (1, L)
        if offset is not None:
            position = position + offset.unsqueeze(1)  # (B, L)
        block = position // self.block_length
        # A fully unmasked row gets a block number that no position has, so nothing is open.
        first = torch.where(masked, block, block.max() + 1).amin(dim=-1, keepdim=True)  # (B, 1)
        return masked & (block == first)

    def select(self, entropy, confidence, masked, gamma=None) -> torch.Tensor:
        """The masked positions to unmask, by the rule.

        entropy, confidence (B, L) float, masked (B, L) bool -> (B, L) bool
        gamma (B,): with "eb", each row's own threshold; None: all rows use `level`
        """
        if self.rule == "eb":
            return entropy_bounded(entropy, masked, self.level if gamma is None else gamma)
        if self.rule == "confidence":
            return confidence_threshold(confidence, masked, self.level)
        return top_k(confidence, masked, int(self.level))


class ThresholdHead(nn.Module):
    """The learned sampler: it reads the prompt and predicts a threshold gamma(c). [PAPER]

    Its input is the mean of the denoiser's last hidden states over the prompt, taken from the first
    call, so gamma costs no extra call. Its weights start at zero, so at first every prompt has the
    same distribution of thresholds. [OUR CHOICE]

    A DiffusionPolicy(..., threshold_head=head) uses it whenever it decodes with
    Decoder(level=None). It is trained by diffpo_loss.threshold_loss, with rollout.threshold_logp as
    the old log-prob and head(rollout.prompt_state).log_prob(rollout.threshold) as the new one.

    hidden_size        D of the denoiser; V, the vocabulary size, for a denoiser.LogitsModel
    initial_threshold  gamma_0 in nats
    sigma              standard deviation of log gamma: the amount of exploration
    floor, ceiling     bounds of gamma in nats

    Raises ValueError if initial_threshold is outside these bounds.
    """

    def __init__(self, hidden_size, initial_threshold=0.1, sigma=0.5, floor=1e-3, ceiling=10.0):
        super().__init__()
        if not 0 < floor <= initial_threshold <= ceiling:
            raise ValueError(
                f"initial_threshold = {initial_threshold}: it has to be within {floor} to {ceiling}"
            )
        self.sigma = sigma
        self.floor = floor
        self.ceiling = ceiling
        self.standardise = nn.LayerNorm(hidden_size, elementwise_affine=False)
        self.linear = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.constant_(self.linear.bias, math.log(initial_threshold))

    def forward(self, prompt_state) -> "ClampedLogNormal":
        """prompt_state (B, D) -> the distribution of gamma (B,). No gradient reaches the denoiser.

        Adam's first update moves each weight by the learning rate, and so log gamma by the learning
        rate times the sum of the inputs' magnitudes. For a standardised state that sum is about
        0.8 D; scaled by 10 / D it is 8 at any hidden size, so a learning rate of 0.01 moves log
        gamma by 0.08.
        """
        state = self.standardise(prompt_state.detach().float()) * (10 / prompt_state.shape[-1])
        mean = self.linear(state).squeeze(-1)
        return ClampedLogNormal(mean, self.sigma, self.floor, self.ceiling)


class ClampedLogNormal:
    """log gamma ~ Normal(mean, sigma^2), and gamma clamped into [floor, ceiling]. [OUR CHOICE]

    The clamp moves each tail's probability mass to its bound. So `log_prob` is the log of the
    tail's mass at a bound, and the log of the density between the bounds.
    """

    def __init__(self, mean, sigma, floor, ceiling):
        self.mean = mean  # (B,)
        self.sigma = sigma
        self.floor = floor
        self.ceiling = ceiling
        self.log_normal = torch.distributions.LogNormal(mean, sigma)

    @torch.no_grad()  # a draw is data: no gradient may pass through it into its log_prob
    def sample(self, uniform) -> torch.Tensor:
        """Draw gamma (B,) by inversion, from uniform numbers (B,) in [0, 1)."""
        noise = torch.special.ndtri(uniform).to(self.mean.dtype)
        return (self.mean + self.sigma * noise).exp().clamp(self.floor, self.ceiling)

    @property
    def median(self) -> torch.Tensor:
        """The median gamma, (B,)."""
        return self.mean.exp().clamp(self.floor, self.ceiling)

    def log_prob(self, gamma) -> torch.Tensor:
        """The log-probability of each row's gamma. (B,) -> (B,)"""
        z = (gamma.log() - self.mean) / self.sigma
        at_floor = torch.special.log_ndtr(z)
        at_ceiling = torch.special.log_ndtr(-z)
        between = self.log_normal.log_prob(gamma)
        above_floor = torch.where(gamma >= self.ceiling, at_ceiling, between)
        return torch.where(gamma <= self.floor, at_floor, above_floor)


def example():
    """The three rules on four masked positions and one that is already unmasked."""
    confidence = torch.tensor([0.99, 0.6, 0.9, 0.7, 1.0])  # of the more likely of two tokens
    entropy = torch.special.entr(confidence) + torch.special.entr(1 - confidence)
    masked = torch.tensor([True, True, True, True, False])
    print("position         ", *(f"{i:5}" for i in range(5)), "(unmasked)")
    print("confidence       ", *(f"{x:5.2f}" for x in confidence.tolist()))
    print("entropy, nats    ", *(f"{x:.3f}" for x in entropy.tolist()))
    for rule, level in [("top_k", 2), ("confidence", 0.8), ("eb", 0.0), ("eb", 0.1), ("eb", 0.4)]:
        decoder = Decoder(rule, level)
        selected = decoder.select(entropy[None], confidence[None], masked[None])[0]
        print(f"{rule:>10} {level:<6}", *("    x" if x else "    ." for x in selected))
    print("eb 0.4 selects 0, 2 and 3: the two before the last sum to 0.056 + 0.325 = 0.381 <= 0.4.")
    print("With the 0.611 of position 3 they sum to 0.992 > 0.4, so position 1 stays masked.")


if __name__ == "__main__":
    example()
