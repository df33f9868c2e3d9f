"""The policy for block-causal denoisers (SDAR, TraDo, LLaDA2.0, Fast-dLLM v2, bd3lm).

A block-causal denoiser attends in both directions within a block, and to all blocks before it.
Blocks are counted from the prompt's first token. [OUR CHOICE] Three things follow from this:

    the mask         `block_causal_mask`: which columns of a canvas each column attends to
    an exact cache   a finished block's keys and values never change, since it does not see what
                     comes after it. So rollouts keep them, and no row waits for another
    the likelihood   each block is scored given the *finished* blocks before it, not their state
                     at the stage's boundary

`BlockCausalPolicy` overrides those methods of `DiffusionPolicy` that this changes; rules,
boundaries, weights and loss stay the same.

Shapes: b rows of a call, S columns of its canvas (padding, prompt and completion), w columns that
it runs; P prompt tokens, L completion tokens, R states, D hidden size.
"""

import torch
from torch.nn.functional import pad

from denoiser import BlockCache, shifted_states
from diffusion_policy import BlockWindow, DiffusionPolicy


def make_policy(denoiser, tokenizer, **settings) -> DiffusionPolicy:
    """The right policy for a denoiser: a BlockCausalPolicy if its config has a block_size."""
    if getattr(denoiser.config, "block_size", None):
        return BlockCausalPolicy(denoiser, tokenizer, **settings)
    return DiffusionPolicy(denoiser, tokenizer, **settings)


class BlockCausalPolicy(DiffusionPolicy):
    """A DiffusionPolicy whose denoiser is block-causal, in blocks of `config.block_size` tokens."""

    def __init__(self, denoiser, tokenizer, **settings):
        self.block_size = denoiser.config.block_size
        super().__init__(denoiser, tokenizer, **settings)

    def hidden(
        self, ids, attention_mask=None, cache=None, start=None, stop=None, num_noisy=0
    ) -> torch.Tensor:
        """Like DenoiserCalls.hidden: ids (b, S) -> each column's state, (b, S, D).

        cache      a FinishedBlocksCache, or None. Once it is filled, each row runs two blocks of
                   columns, w = min(2 * block_size, S), and the result is (b, w, D); `stop` is not
                   used
        start      (b,) long: where these columns begin
        num_noisy  how many columns at the end are a second, partly masked copy of the positions
                   before them (see hidden_of_state)
        """
        b, S = ids.shape
        is_real = attention_mask
        if is_real is None:
            is_real = torch.ones_like(ids, dtype=torch.bool)
        clean = S - num_noisy
        position = (is_real[:, :clean].long().cumsum(dim=1) - 1).clamp(min=0)  # (b, clean)
        position = torch.cat([position, position[:, clean - num_noisy :]], dim=1)  # (b, S)
        column = torch.arange(S, device=ids.device).expand(b, S)
        if cache is not None and cache.keys:
            width = min(2 * self.block_size, S)
            column = start.unsqueeze(1) + torch.arange(width, device=ids.device)  # (b, w)
        if cache is not None:
            cache.column = column
        sees = block_causal_mask(position, is_real, column, self.block_size, num_noisy)
        position = position.gather(1, column)  # (b, w)
        hidden = self.run_decoder(
            ids.gather(1, column),
            attention_mask=sees.unsqueeze(1),  # (b, 1, w, S)
            position_ids=position,
            cache=cache,
        )
        if not self.is_shifted:
            return hidden
        # Fast-dLLM v2: the first position of a noisy block is predicted from a clean column.
        is_first_of_noisy_block = (column >= clean) & (position % self.block_size == 0)
        previous = column - 1 - num_noisy * is_first_of_noisy_block
        return shifted_states(hidden, column, position, previous)

    def hidden_of_state(self, prompt_ids, prompt_mask, latent, completion) -> torch.Tensor:
        """What likelihood.hidden_of_state computes for other denoisers.

        prompt_ids, prompt_mask (R, P), latent, completion (R, L) -> (R, L, D)

        The partly masked state is appended after prompt and completion as a second, noisy copy, so
        that one call scores all blocks; such models are trained in the same way (BD3-LM, arXiv
        2503.09573). If the completion begins inside a block, the prompt's last tokens share that
        block and attend to it, so they are part of both copies.
        """
        P = prompt_ids.shape[1]
        L = latent.shape[1]
        first = max(P - self.block_size + 1, 0)  # earlier tokens share no block with the completion
        is_real = pad(prompt_mask, (0, L), value=True)  # (R, P + L)
        ids = torch.cat([prompt_ids, completion, prompt_ids[:, first:], latent], dim=1)
        mask = torch.cat([is_real, is_real[:, first:]], dim=1)
        return self.hidden(ids, mask, num_noisy=P - first + L)[:, -L:]

    def block_offset(self, prompt_mask) -> torch.Tensor:
        """How many prompt tokens share the block in which the completion begins: (B,) long."""
        return prompt_mask.sum(dim=1) % self.block_size

    def make_window(self, decoder, prompt_mask, length) -> "BlockCausalWindow":
        return BlockCausalWindow(
            decoder,
            prompt_length=prompt_mask.shape[1],
            completion_length=length,
            block_size=self.block_size,
            block_offset=self.block_offset(prompt_mask).cpu(),
        )


def block_causal_mask(position, is_real, column, block_size, num_noisy=0) -> torch.Tensor:
    """Which columns each of the given columns attends to.

    A position sees its own block, in both directions, and all blocks before it. Blocks are counted
    from the first token of the prompt.

    position   (b, S) long, the position of each column of the canvas
    is_real    (b, S) bool, False on padding
    column     (b, w) long, the given columns
    num_noisy  how many columns at the end are a second copy, of positions that are still being
               unmasked. A noisy block sees itself and the clean copy of all blocks before it. The
               clean copy sees no noisy column.

    Returns (b, w, S) bool.
    """
    S = position.shape[1]
    block = position // block_size  # (b, S)
    own_block = block.gather(1, column).unsqueeze(2)  # (b, w, 1)
    block = block.unsqueeze(1)  # (b, 1, S)
    all_columns = torch.arange(S, device=position.device)
    is_noisy = all_columns >= S - num_noisy  # (S,)
    is_own_noisy = (column >= S - num_noisy).unsqueeze(2)  # (b, w, 1)
    sees = (block < own_block) & ~is_noisy
    sees = sees | (block == own_block) & (is_noisy == is_own_noisy)
    # No column sees padding. (Padding has position 0, so it sees the first block.)
    return sees & is_real.unsqueeze(1)


class FinishedBlocksCache(BlockCache):
    """Keys and values for a block-causal denoiser: exact, and rows may be at different blocks.

    A finished block's keys and values never change, since it does not see what comes after it. A
    call runs the current block and once more the previous one, whose last tokens were drawn after
    its own last call.
    """

    def update(self, keys, values, layer, *_, **__) -> tuple[torch.Tensor, torch.Tensor]:
        """Store a layer's new keys and values, at self.column (b, w). Returns the canvas's."""
        if layer == len(self.keys):  # this call fills the cache
            self.keys.append(keys)
            self.values.append(values)
        else:
            index = self.column[:, None, :, None].expand_as(keys)
            self.keys[layer].scatter_(2, index, keys)
            self.values[layer].scatter_(2, index, values)
        return self.keys[layer], self.values[layer]


class BlockCausalWindow(BlockWindow):
    """Which rows and columns a call of a block-causal denoiser runs.

    Without a block cache each call runs all unfinished rows and their whole canvases. With one
    ("prefix" and "dual" are the same here) the first call runs everything and fills the cache.
    Later calls run each row's current block and the one before it, so `start` is (b,), one per row.

    block_size, block_offset  see BlockCausalPolicy; block_offset is on the host

    Raises ValueError if block_size is not a multiple of the decoder's block_length.
    """

    def __init__(self, decoder, prompt_length, completion_length, block_size, block_offset):
        super().__init__(decoder, prompt_length, completion_length)
        if decoder.block_length is None or block_size % decoder.block_length:
            raise ValueError(
                f"this denoiser is block-causal, in blocks of {block_size} tokens: it cannot be "
                f"decoded with block_length {decoder.block_length or 0}, only with {block_size} or "
                "a part of it"
            )
        self.block_size = block_size
        self.block_offset = block_offset

    def open_positions(self, rows, is_masked) -> torch.Tensor:
        return self.decoder.open_positions(is_masked, self.block_offset[rows])

    def output_index(self, row, position) -> torch.Tensor:
        start = self.start
        if self.is_cache_filled:
            start = start[row]
        return self.prompt_length + position - start

    def advance(self, rows, is_masked) -> tuple[torch.Tensor, torch.Tensor]:
        is_open = self.open_positions(rows, is_masked)
        if self.decoder.cache == "none":
            return rows, is_open
        if self.cache is None:
            self.cache = FinishedBlocksCache()
            self.cached_rows = rows
            return rows, is_open
        self.is_cache_filled = True
        rows, is_open = self.in_cache_order(rows, is_open)
        # Start one block before the current block's first column.
        first = is_open.long().argmax(dim=1)  # (b,) the first open position
        in_block = (self.block_offset[rows] + first) % self.block_size
        start = self.prompt_length + first - in_block - self.block_size
        last_start = max(self.canvas_length - 2 * self.block_size, 0)
        self.start = start.clamp(0, last_start).to(self.cache.keys[0].device)
        return rows, is_open
