"""The reverse process of a masked-diffusion language model, as a policy.

A completion starts as L [MASK] tokens. Each denoising step makes one denoiser call on prompt and
completion; a rule selects positions (sampler.py); and a token is drawn at each of them from the
denoiser's distribution there. This ends when no mask is left or, with `stop_at_eos`, none before
the first end token. The true policy is

    pi(o | c) = product over tokens of  pi(o_t | c, z_{t-1})                                [PAPER]

where z_{t-1} is the partly unmasked completion before the step t that unmasked token o_t. (Given
gamma the rule is deterministic, so o fixes the order in which it was unmasked.) Every factor is
known while sampling, so it is recorded then, as `behaviour_logp`, at no extra call. [OUR CHOICE]

`denoise_by_definition` is this loop for one completion. `DiffusionPolicy.denoise` does the same for
many completions at once, optionally with block caches; training uses it.

Besides torch, this file needs only sampler.py and denoiser.py. `python diffusion_policy.py` unmasks
one completion step by step.

Shapes: B rows, P prompt tokens (left-padded), L completion tokens, S = P + L columns of a canvas, D
hidden size; b rows of a call, N positions that a rule may select. Step t of a row is the t-th
denoiser call that runs it, so its number of steps T is its NFE.
"""

from dataclasses import dataclass, fields, replace
from types import SimpleNamespace

import torch
from torch import nn

from denoiser import BlockCache, DenoiserCalls, LogitsModel
from sampler import Decoder


class NotFinite(ValueError):
    """Raised if a quantity is NaN or infinite. `rollout`: the batch it came from, or None."""

    def __init__(self, message, rollout=None):
        super().__init__(message)
        self.rollout = rollout


@dataclass
class Rollout:
    """B completions, with everything that the likelihood, the loss and the log need.

    A position where no token was drawn, because its row had stopped at an end token, holds [EOS]
    and has unmask_step nfe + 1: it was [MASK] in every state that the denoiser saw.
    """

    prompt_ids: torch.Tensor  #     (B, P) long, left-padded
    prompt_mask: torch.Tensor  #    (B, P) bool, False on padding
    completion: torch.Tensor  #     (B, L) long, o
    unmask_step: torch.Tensor  #    (B, L) long, the step t, from 1, in which a token was drawn
    behaviour_logp: torch.Tensor  # (B, L) float, log pi_old^true(o_t | c, z_{t-1})
    token_mask: torch.Tensor  #     (B, L) bool, the text: tokens up to and including the first end
    #                               token
    nfe: torch.Tensor  #            (B,)   long, T, the row's number of denoiser calls
    threshold: torch.Tensor  #      (B,)   float, gamma in nats (nan where the rule has none)
    threshold_logp: torch.Tensor  # (B,)   float, gamma's log-prob under the head (0 if fixed)
    prompt_state: torch.Tensor  #   (B, D) float, what the threshold head reads
    temperature: float  #           at which the tokens were drawn

    def rows(self, index) -> "Rollout":
        """The rollout of some rows only; index is a slice, or a long or bool tensor."""
        tensors = [f.name for f in fields(self) if f.name != "temperature"]
        return replace(self, **{name: getattr(self, name)[index] for name in tensors})


# ---- the definition ------------------------------------------------------------------------------


@torch.no_grad()
def denoise_by_definition(policy, prompt_ids, uniform, decoder):
    """The reverse process of one completion: each step makes one denoiser call on the whole canvas.

    policy      a DiffusionPolicy
    prompt_ids  (1, P) long, without padding
    uniform     (1, L + 1) uniform numbers in [0, 1): one per position, and the last one for gamma
    decoder     sampler.Decoder; its block cache is not used

    Returns completion, unmask_step and behaviour_logp, (1, L) each, the threshold (1,), and T.
    """
    P = prompt_ids.shape[1]
    L = uniform.shape[1] - 1
    completion = torch.full((1, L), policy.mask_id, device=prompt_ids.device)
    unmask_step = torch.zeros_like(completion)
    behaviour_logp = torch.zeros((1, L), device=prompt_ids.device)
    T = 0
    while True:
        is_masked = completion == policy.mask_id  # (1, L); a drawn token is never [MASK]
        is_missing = is_masked
        if decoder.stop_at_eos:  # nothing after the first end token is needed
            is_missing = is_masked & policy.text_mask(completion)
        if not is_missing.any():
            break
        T += 1

        # One denoiser call on the prompt and the state z_{T-1}.
        hidden = policy.hidden(torch.cat([prompt_ids, completion], dim=1))  # (1, P + L, D)
        if T == 1:  # the threshold head reads the prompt
            prompt_state = hidden[:, :P].float().mean(dim=1)  # (1, D)
            threshold, _ = policy.choose_threshold(prompt_state, decoder, uniform=uniform[:, -1])

        # The rule reads each position's distribution and selects some of the open ones.
        states = hidden[0, P:]  # (L, D); state i predicts token i itself, not the next one
        entropy, confidence = policy.entropy_and_confidence(states, decoder.rule)  # (L,) each
        is_open = decoder.open_positions(is_masked)
        is_selected = decoder.select(
            entropy.unsqueeze(0), confidence.unsqueeze(0), is_open, gamma=threshold
        )  # (1, L)

        # Draw a token at each of these, and record how likely it was.
        completion[is_selected], behaviour_logp[is_selected] = policy.sample_tokens(
            states[is_selected[0]], decoder.temperature, uniform=uniform[:, :L][is_selected]
        )
        unmask_step[is_selected] = T

    # Positions where no token was drawn become [EOS], as if unmasked one step after the last.
    unmask_step[is_masked] = T + 1
    completion[is_masked] = policy.eos_id
    return completion, unmask_step, behaviour_logp, threshold, T


# ---- the policy ----------------------------------------------------------------------------------


class DiffusionPolicy(DenoiserCalls):
    """A denoiser, its tokenizer and, if the threshold is learned, its head.

    A denoiser call and what is computed from it (hidden, entropy_and_confidence, sample_tokens,
    token_logp) are inherited from denoiser.DenoiserCalls.

    denoiser         see denoiser.py for what it must offer
    tokenizer        anything with mask_token_id and eos_token_id
    threshold_head   sampler.ThresholdHead, or None if no threshold is learned
    adapter          False: the LoRA adapter is disabled, so this is the base model
    end_ids          ids of the tokens that end a completion; None: [EOS] alone. A chat model has
                     more (models/prompting.py)
    prefill          text with which every completion begins; models/prompting.py adds it

    The attribute `rollout_batch_size` limits how many rows a rollout completes at once; 0: no
    limit. The rows of one prompt may then be completed in different batches.
    """

    def __init__(
        self, denoiser, tokenizer, threshold_head=None, adapter=True, end_ids=None, prefill=""
    ):
        super().__init__(denoiser, mask_id=tokenizer.mask_token_id, adapter=adapter)
        self.tokenizer = tokenizer
        self.threshold_head = threshold_head
        self.eos_id = tokenizer.eos_token_id
        self.end_ids = end_ids or [tokenizer.eos_token_id]
        self.prefill = prefill
        self.rollout_batch_size = 0
        # For models/prompting.py: the tiny model reads short prompts as they are, without
        # instructions or chat template.
        config = getattr(denoiser, "config", None)
        self.compact_prompts = getattr(config, "compact_prompts", False)

    @torch.no_grad()
    def rollout(
        self, prompt_ids, prompt_mask, length, decoder, generator=None, uniform=None
    ) -> Rollout:
        """Complete B prompts with `length` tokens each.

        prompt_ids    (B, P) long, left-padded; prompt_mask (B, P) bool, False on padding
        length        L, tokens in a completion
        decoder       sampler.Decoder: the rule, its level, temperature, blocks, ... At temperature
                      0 (greedy) the recorded log-probs are 0.
        generator     a torch.Generator to draw with, or None
        uniform       (B, L + 1) uniform numbers to draw with instead (see draw_uniform), or None. A
                      row's completion depends only on its own numbers, not on the rest of the
                      batch.

        Raises ValueError if the decoder needs a learned threshold and this policy has none, if a
        prompt is empty or padded on the right, or if `uniform` has another shape.
        """
        if decoder.rule == "eb" and decoder.level is None and self.threshold_head is None:
            raise ValueError("this policy has no threshold head: give the eb decoder a gamma")
        if prompt_mask.shape[1] == 0 or not prompt_mask[:, -1].all():
            raise ValueError(
                "a prompt ends in padding, or is empty: prompts are padded on the left"
            )
        if uniform is None:
            uniform = self.draw_uniform(len(prompt_ids), length, generator)
        if uniform.shape != (len(prompt_ids), length + 1):
            raise ValueError(
                f"uniform is {tuple(uniform.shape)}: it has to be {(len(prompt_ids), length + 1)}"
            )
        # Rows with prompts of similar length are completed together, to keep padding small.
        lengths = prompt_mask.sum(dim=1).tolist()
        batches = batches_by_length(lengths, room=length, max_rows=self.rollout_batch_size)
        parts = []
        with self.casting_once():
            for batch in batches:
                rows = torch.tensor(batch, device=prompt_ids.device)
                longest = lengths[batch[0]]
                parts.append(
                    self.denoise(
                        prompt_ids=prompt_ids[rows, -longest:],
                        prompt_mask=prompt_mask[rows, -longest:],
                        uniform=uniform[rows],
                        decoder=decoder,
                    )
                )
        # Restore the order of the prompts.
        order = torch.tensor(sum(batches, [])).argsort().to(prompt_ids.device)

        def joined(name):
            return torch.cat([getattr(part, name) for part in parts])[order]

        return Rollout(
            prompt_ids=prompt_ids,
            prompt_mask=prompt_mask,
            completion=joined("completion"),
            unmask_step=joined("unmask_step"),
            behaviour_logp=joined("behaviour_logp"),
            token_mask=joined("token_mask"),
            nfe=joined("nfe"),
            threshold=joined("threshold"),
            threshold_logp=joined("threshold_logp"),
            prompt_state=joined("prompt_state"),
            temperature=decoder.temperature,
        )

    def denoise(self, prompt_ids, prompt_mask, uniform, decoder) -> Rollout:
        """The reverse process: from all [MASK] to text, for rows with prompts of similar length.

        prompt_ids, prompt_mask (B, P), uniform (B, L + 1) and decoder as in `rollout`

        Without a block cache each row's result equals that of denoise_by_definition, with less
        work: finished rows leave the batch, equal canvases are run once, and only open positions
        are read. Raises NotFinite if the denoiser's output is not finite.

        What the loop branches on (masks, ends, steps) is kept on the host. Each step synchronises
        with the GPU before its call, to copy what it runs; after it, to read the selection; with
        `stop_at_eos`, to read the tokens; and, unless a cache is filled, to find equal canvases.
        """
        B, P = prompt_ids.shape
        L = uniform.shape[1] - 1
        device = prompt_ids.device
        all_masked = torch.full((B, L), self.mask_id, device=device)
        canvas = torch.cat([prompt_ids, all_masked], dim=1)  # (B, S)
        # If nothing is padded, attention needs no mask and keeps its fastest kernel.
        attention_mask = None
        if not prompt_mask.all():
            attention_mask = nn.functional.pad(prompt_mask, (0, L), value=True)  # (B, S)
        behaviour_logp = torch.zeros((B, L), device=device)
        is_masked = torch.ones((B, L), dtype=torch.bool)
        is_end = torch.zeros((B, L), dtype=torch.bool)
        unmask_step = torch.zeros((B, L), dtype=torch.long)
        nfe = torch.zeros(B, dtype=torch.long)
        threshold = None
        window = self.make_window(decoder, prompt_mask, L)

        while True:
            # 1. A row is unfinished as long as a mask precedes its first end token. `rows` are the
            #    b of the B rows that run now: without a block cache, all unfinished ones. `is_open`
            #    marks the positions that the rule may select (decoder.open_positions).
            is_unfinished = (is_masked & (is_end.cumsum(dim=1) == 0)).any(dim=1)
            rows = is_unfinished.nonzero().squeeze(1)
            if len(rows) == 0:
                break
            rows, is_open = window.advance(rows, is_masked[rows])  # (b,), (b, L)
            open_row, open_position = is_open.nonzero(as_tuple=True)  # (N,) each, of the b rows
            # A copy to the GPU waits for all work under way, so these stand before the call.
            rows_on_device = rows.to(device)
            open_row = open_row.to(device)
            open_position = open_position.to(device)
            is_open_on_device = is_open.to(device)

            # 2. One denoiser call on prompt and completion, or on the window's columns of them.
            ids = canvas[rows_on_device]
            mask = None if attention_mask is None else attention_mask[rows_on_device]
            if window.is_cache_filled:  # each row has its own keys and values, so all are run
                hidden = self.hidden(ids, mask, window.cache, window.start, window.stop)
            else:
                hidden = self.hidden_of_distinct(ids, mask, window.cache)  # (b, S, D)

            # 3. After the first call the threshold head reads the prompt and sets each row's gamma.
            if threshold is None:
                prompt_state = mean_prompt_state(hidden, prompt_mask)  # (B, D)
                threshold, threshold_logp = self.choose_threshold(
                    prompt_state, decoder, uniform=uniform[:, -1]
                )

            # 4. The rule reads the distributions at the N open positions and selects some of them.
            states = hidden[open_row, window.output_index(open_row, open_position)]  # (N, D)
            entropy = torch.zeros(is_open.shape, device=device)  # (b, L)
            confidence = torch.zeros(is_open.shape, device=device)
            entropy[open_row, open_position], confidence[open_row, open_position] = (
                self.entropy_and_confidence(states, decoder.rule)
            )
            is_selected = decoder.select(
                entropy, confidence, is_open_on_device, gamma=threshold[rows_on_device]
            ).cpu()  # (b, L); here the host waits for the GPU
            if not is_selected.any(dim=1).all():  # without this the loop would never end
                raise NotFinite("the denoiser's output is not finite: no position can be selected")

            # 5. Draw a token at each selected position, and record how likely it was.
            selected = is_selected[is_open].nonzero().squeeze(1).to(device)  # among the N positions
            drawn_row = rows_on_device[open_row[selected]]  # among the B rows
            drawn_position = open_position[selected]
            tokens, logp = self.sample_tokens(
                states[selected], decoder.temperature, uniform=uniform[drawn_row, drawn_position]
            )
            canvas[drawn_row, P + drawn_position] = tokens
            behaviour_logp[drawn_row, drawn_position] = logp

            # 6. Record the step, on the host.
            host_row, host_position = is_selected.nonzero(as_tuple=True)
            host_row = rows[host_row]  # among the B rows
            nfe[rows] += 1
            unmask_step[host_row, host_position] = nfe[host_row]
            is_masked[host_row, host_position] = False
            if decoder.stop_at_eos:
                is_end[host_row, host_position] = self.is_end_token(tokens).cpu()

        # Positions where no token was drawn become [EOS], as if unmasked one step after the last.
        is_masked = is_masked.to(device)
        nfe = nfe.to(device)
        completion = canvas[:, P:].masked_fill(is_masked, self.eos_id)
        unmask_step = torch.where(is_masked, nfe.unsqueeze(1) + 1, unmask_step.to(device))
        return Rollout(
            prompt_ids=prompt_ids,
            prompt_mask=prompt_mask,
            completion=completion,
            unmask_step=unmask_step,
            behaviour_logp=behaviour_logp,
            token_mask=self.text_mask(completion),
            nfe=nfe,
            threshold=threshold,
            threshold_logp=threshold_logp,
            prompt_state=prompt_state,
            temperature=decoder.temperature,
        )

    def choose_threshold(self, prompt_state, decoder, uniform) -> tuple[torch.Tensor, torch.Tensor]:
        """Each row's gamma and its log-prob: (B,), (B,).

        prompt_state (B, D), uniform (B,) in [0, 1). A fixed gamma has log-prob 0. If the rule has
        no gamma, gamma is nan and its log-prob 0.
        """
        threshold_logp = torch.zeros(len(prompt_state), device=prompt_state.device)
        if decoder.rule != "eb":
            return torch.full_like(threshold_logp, torch.nan), threshold_logp
        if decoder.level is not None:
            return torch.full_like(threshold_logp, decoder.level), threshold_logp
        distribution = self.threshold_head(prompt_state)
        if decoder.sample_threshold:
            threshold = distribution.sample(uniform)
        else:
            threshold = distribution.median
        return threshold, distribution.log_prob(threshold)

    def make_window(self, decoder, prompt_mask, length) -> "BlockWindow":
        """A BlockWindow, which decides which rows and columns each call of a rollout runs.

        It is a method because block-causal models override it (models/block_causal.py).
        """
        return BlockWindow(decoder, prompt_length=prompt_mask.shape[1], completion_length=length)

    def draw_uniform(self, B, length, generator=None) -> torch.Tensor:
        """A rollout's random numbers, (B, L + 1): one per position, and the last one for gamma."""
        return torch.rand(
            (B, length + 1),
            generator=generator,
            dtype=torch.float64,
            device=self.denoiser.device,
        )

    def without_adapter(self) -> "DiffusionPolicy":
        """The base model under the LoRA adapter: a reference model that shares its weights."""
        return type(self)(
            self.denoiser,
            self.tokenizer,
            adapter=False,
            end_ids=self.end_ids,
            prefill=self.prefill,
        )

    def is_end_token(self, tokens) -> torch.Tensor:
        """Which tokens end a completion. Any shape -> bool"""
        return torch.isin(tokens, torch.tensor(self.end_ids, device=tokens.device))

    def text_mask(self, completion) -> torch.Tensor:
        """The tokens that have no end token before them. (B, L) -> (B, L) bool"""
        is_end = self.is_end_token(completion)
        return (is_end.cumsum(dim=-1) - is_end.long()) == 0


# ---- which rows and columns a call runs ----------------------------------------------------------


class BlockWindow:
    """Which rows and which columns of their canvases a denoiser call runs.

    Without a block cache each call runs all unfinished rows and their whole canvases. With one
    (denoiser.BlockCache) all rows decode the same block, and rows that have finished it wait. The
    first call for a block runs everything and fills the cache. Later calls run only the columns
    from `start` to `stop`: the block and everything after it ("prefix"), or the block alone
    ("dual").
    """

    def __init__(self, decoder, prompt_length, completion_length):
        self.decoder = decoder
        self.prompt_length = prompt_length
        self.canvas_length = prompt_length + completion_length
        self.start = 0
        self.stop = None
        self.cache = None
        self.is_cache_filled = False
        self.block = None
        self.cached_rows = None  # (b,) which rows the cache holds, in its order

    def output_index(self, row, position) -> torch.Tensor:
        """Where in a call's output each position of the completion is found.

        row (N,) long, among the call's rows; position (N,) long, in the completion -> (N,) long
        """
        return self.prompt_length + position - self.start

    def open_positions(self, rows, is_masked) -> torch.Tensor:
        """The positions that may be unmasked. is_masked (b, L) -> (b, L) bool

        rows  (b,) long; only a block-causal model's window needs them
        """
        return self.decoder.open_positions(is_masked)

    def advance(self, rows, is_masked) -> tuple[torch.Tensor, torch.Tensor]:
        """Move to the next call. Returns the rows that it runs and their open positions.

        rows (b,) long, all unfinished rows, ascending; is_masked (b, L) bool -> rows (b',), b' <=
        b, in any order, and is_open (b', L) bool
        """
        is_open = self.open_positions(rows, is_masked)
        if self.decoder.cache == "none":
            return rows, is_open
        block_length = self.decoder.block_length
        block = is_open.long().argmax(dim=1) // block_length  # (b,) each row's current block
        first = int(block.min())
        rows = rows[block == first]
        is_open = is_open[block == first]
        if first != self.block:  # a block opens
            self.block = first
            self.cache = BlockCache()
            self.cached_rows = rows
            self.is_cache_filled = False
            self.start = 0
            self.stop = None
            return rows, is_open
        self.is_cache_filled = True
        self.start = self.prompt_length + first * block_length
        if self.decoder.cache == "dual":
            self.stop = min(self.start + block_length, self.canvas_length)
        return self.in_cache_order(rows, is_open)

    def in_cache_order(self, rows, is_open) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows and open positions in the cache's order. Other rows are dropped from the cache."""
        if len(rows) < len(self.cached_rows):
            order = self.cache.keep(torch.isin(self.cached_rows, rows))
            self.cached_rows = self.cached_rows[order]
        order = torch.searchsorted(rows, self.cached_rows)
        return rows[order], is_open[order]


def mean_prompt_state(hidden, prompt_mask) -> torch.Tensor:
    """The threshold head's input, a prompt's mean state. (B, S, D), (B, P) bool -> (B, D)"""
    weight = prompt_mask.unsqueeze(-1) / prompt_mask.sum(dim=1).view(-1, 1, 1)  # (B, P, 1)
    return (hidden[:, : prompt_mask.shape[1]].float() * weight).sum(dim=1)


def batches_by_length(lengths, room, max_rows=0) -> list:
    """Which rows are completed together: lists of their indices, the longest prompts first.

    lengths   number of tokens in each prompt
    room      L, tokens in a completion
    max_rows  the most rows in a batch; 0: no limit

    At most an eighth of each canvas (prompt and completion) is padding. If all prompts of a batch
    had to have the same length, batches would be too small for a GPU.
    """
    batches = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        longest = lengths[batches[-1][0]] if batches else 0
        is_full = bool(batches) and len(batches[-1]) == max_rows
        if not batches or is_full or longest - lengths[row] > (longest + room) / 8:
            batches.append([])
        batches[-1].append(row)
    return batches


# ---- an example ----------------------------------------------------------------------------------


class Toy(nn.Embedding):
    """A toy denoiser: row i of its weight gives position i's preferred token, and the logits grow
    with the number of unmasked neighbours.
    """

    def forward(self, ids, attention_mask):
        is_unmasked = nn.functional.pad((ids > 0).float(), (1, 1))  # (b, S + 2)
        neighbours = is_unmasked[:, :-2] + is_unmasked[:, 2:]  # (b, S)
        return self.weight * (2 + 2 * neighbours).unsqueeze(-1)  # (b, S, V)


def example():
    """One completion of the prompt "we", six tokens, by the entropy-bounded rule."""
    vocabulary = ["[MASK]", "[EOS]", "we", "are", "what", "read"]
    tokenizer = SimpleNamespace(mask_token_id=0, eos_token_id=1)
    preferred = torch.eye(6)[[2, 2, 3, 4, 2, 5, 1]]  # (S, V): we | we are what we read [EOS]
    policy = DiffusionPolicy(LogitsModel(Toy(7, 6, _weight=preferred)), tokenizer)
    prompt_ids = torch.tensor([[2]])
    rollout = policy.rollout(
        prompt_ids,
        prompt_mask=prompt_ids > 0,
        length=6,
        decoder=Decoder("eb", level=1.2),
        generator=torch.Generator().manual_seed(1),
    )
    T = int(rollout.nfe)
    completion = rollout.completion[0].tolist()
    unmask_step = rollout.unmask_step[0].tolist()
    for t in range(T + 1):
        state = [
            vocabulary[i] if step <= t else "_"
            for i, step in zip(completion, unmask_step, strict=True)
        ]
        print(f"z_{t}", *(f"{token:>7}" for token in state))
    print("p  ", *(f"{p:7.2f}" for p in rollout.behaviour_logp[0].exp().tolist()))
    print(f"{T} denoiser calls for 6 tokens; p is the probability with which each was drawn")


if __name__ == "__main__":
    example()
