"""One denoiser call, and how to handle a large vocabulary in little memory.

A denoiser reads a prompt and a partly masked completion, in both directions, and predicts every
position. One call is `hidden`: ids (b, S) -> states (b, S, D). What is read off a state (its
entropy, a drawn token, the log-prob of a token) needs V logits, and V is 126,464 for LLaDA: half a
megabyte per position. So logits are made only where they are needed, a chunk of positions or a
slice of the vocabulary at a time, and are never kept.

What your model must offer. The first way: a transformers model without the causal mask, with

    get_decoder()            callable with input_ids, attention_mask, position_ids, use_cache and
                             past_key_values (None without a block cache); its result has
                             .last_hidden_state (b, S, D)
    get_output_embeddings()  the last layer, with .weight (V, D) and .bias, (V,) or None
    device                   where its weights are
    config.shift_logits      optional, True: position i is predicted by the state at i - 1 (Dream)
    config.block_size        optional: attention is block-causal, in blocks of so many tokens (SDAR)
    disable_adapter()        only under a LoRA adapter (peft has it)

The second way: any `model(ids, attention_mask=mask) -> logits (b, S, V)`, as LogitsModel(model).
attention_mask is (b, S) bool, False on padding, or None where nothing is padded.

This file needs torch alone. `python denoiser.py` shows a call and what is read off it.

Shapes: b rows, S positions of prompt and completion, N positions of any rows, V words, D wide.
"""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

# The most float32 logits in memory at once if whole distributions are needed; of LLaDA's vocabulary
# that is 1,061 positions (0.5 GiB) on a GPU, 132 on a CPU.
CHUNK = {"cuda": 2**27, "cpu": 2**24}
# The same if the vocabulary is processed in slices; on a CPU one slice should fit into the cache.
SLICE = {"cuda": 2**27, "cpu": 2**19}
BLOCKED = -1e30  # the logit of [MASK], never drawn nor scored; finite, or 0 * inf would be nan


class DenoiserCalls:
    """A denoiser's call, and what is computed from its output.

    With `adapter` False the LoRA adapter is disabled. `rows_run` counts the rows that all calls so
    far have run: the work that was spent.
    """

    def __init__(self, denoiser, mask_id, adapter=True):
        self.denoiser = denoiser
        self.mask_id = mask_id
        self.adapter = adapter
        self.rows_run = 0
        self.memory = None  # a StateMemory while states are remembered
        self.compiled_decoder = None  # see compile_cached_calls
        config = getattr(denoiser, "config", None)
        # Tokens of a block of a block-causal denoiser; 0: each position sees all others.
        self.block_size = getattr(config, "block_size", None) or 0

    def hidden(self, ids, attention_mask=None, cache=None, start=0, stop=None) -> torch.Tensor:
        """One call without its last layer: ids (b, S) -> last hidden states (b, stop - start, D).

        attention_mask (b, S) bool, or None where nothing is padded: attention then keeps its
        fastest kernel. With a filled `cache` (a BlockCache) only positions start to stop are run.
        Positions count from the first real token, so left padding changes nothing.
        """
        if self.block_size:
            return self.block_causal_hidden(ids, attention_mask, cache, start)
        is_shifted = getattr(getattr(self.denoiser, "config", None), "shift_logits", False)
        begin = start
        if is_shifted:  # Dream predicts i from the state at i - 1
            begin = max(start - 1, 0)
        position_ids = None
        if attention_mask is not None:
            position_ids = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, begin:stop]
        elif cache is not None:
            position_ids = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)[:, begin:stop]
        if cache is not None:
            cache.start = begin
        hidden = self.run(ids[:, begin:stop], attention_mask, position_ids, cache)
        if is_shifted and begin == 0 and attention_mask is not None:
            # Nothing comes before the first token: padding would be read there. Its own state is
            # now at the position behind it.
            first = attention_mask.long().argmax(dim=1, keepdim=True)  # (b, 1)
            column = torch.arange(hidden.shape[1], device=ids.device).expand(hidden.shape[:2])
            column = torch.where(column == first, column + 1, column)
            hidden = hidden.gather(1, column.unsqueeze(-1).expand_as(hidden))
        return hidden[:, start - begin :]

    def run(self, ids, attention_mask, position_ids, cache) -> torch.Tensor:
        """The decoder's last hidden states (b, w, D) of its inputs as they are."""
        self.rows_run += len(ids)
        # A bfloat16 base may carry a float32 adapter: autocast makes its products bfloat16 as well.
        head = self.denoiser.get_output_embeddings()
        is_half = head is not None and head.weight.dtype == torch.bfloat16
        adapter = nullcontext() if self.adapter else self.denoiser.disable_adapter()
        decoder = self.denoiser.get_decoder()
        if self.compiled_decoder is not None and cache is not None and cache.keys:
            decoder = self.compiled_decoder
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=is_half), adapter:
            output = decoder(
                input_ids=ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=cache is not None,
            )
        return output.last_hidden_state

    def block_causal_hidden(
        self, ids, attention_mask=None, cache=None, start=None, noisy=0
    ) -> torch.Tensor:
        """`hidden` of a block-causal denoiser; see block_causal_mask for what it sees.

        start  with a filled `cache` (a FinishedBlocksCache): (b,) long, the first of the columns
               that each row runs, two blocks of them
        noisy  the last so many columns stand for the same positions as those before them, in a
               state that is still partly masked: see likelihood.canvas_of_state
        """
        b, S = ids.shape
        is_real = attention_mask
        if is_real is None:
            is_real = torch.ones_like(ids, dtype=torch.bool)
        clean = S - noisy
        position = (is_real[:, :clean].long().cumsum(dim=1) - 1).clamp(min=0)  # (b, clean)
        position = torch.cat([position, position[:, clean - noisy :]], dim=1)  # (b, S)
        column = torch.arange(S, device=ids.device).expand(b, S)
        if cache is not None and cache.keys:
            width = min(2 * self.block_size, S)
            column = start.unsqueeze(1) + torch.arange(width, device=ids.device)  # (b, w)
        if cache is not None:
            cache.column = column
        sees = block_causal_mask(position, is_real, column, self.block_size, noisy)  # (b, w, S)
        position = position.gather(1, column)  # (b, w)
        hidden = self.run(
            ids.gather(1, column),
            attention_mask=sees.unsqueeze(1),
            position_ids=position,
            cache=cache,
        )
        if not getattr(self.denoiser.config, "shift_logits", False):
            return hidden
        # Fast-dLLM v2 predicts i from the state at i - 1. Before a noisy block that is a clean one.
        is_behind_clean = (column >= clean) & (position % self.block_size == 0)
        before = column - 1 - noisy * is_behind_clean
        # Nothing comes before the first token: padding would be read there.
        before = torch.where(position == 0, column, before)
        place = (before - column[:, :1]).clamp(min=0)  # among the columns that were run
        return hidden.gather(1, place.unsqueeze(-1).expand_as(hidden))

    def compile_cached_calls(self):
        """From now on, calls on a part of a canvas run by torch.compile. Not with split weights.

        These calls are short: thousands of small kernels, whose launches take longer than the
        kernels do. Compiled ones are fewer. The number of rows and positions is left open, because
        rows finish one after another: padding them to one shape would run half of them for nothing.
        """
        self.compiled_decoder = torch.compile(self.denoiser.get_decoder(), dynamic=True)

    def casting_once(self):
        """A block that casts a float32 adapter that learns to bfloat16 once, not in each call.

        autocast keeps such copies until its outermost block ends. The weights must not change here.
        """
        return torch.autocast(self.denoiser.device.type, enabled=False)

    def hidden_of_distinct(self, ids, attention_mask=None, cache=None) -> torch.Tensor:
        """What `hidden` returns, with equal canvases run once; remembered ones are not run at all.

        All rows of a group are equal at first, and greedy or nearly certain ones stay so. An empty
        `cache` is filled for every row.
        """
        S = ids.shape[1]
        key = ids
        if attention_mask is not None:
            key = torch.cat([ids, attention_mask.long()], dim=1)
        distinct, copy = torch.unique(key, dim=0, return_inverse=True)  # (U, ...), (b,)

        def run(canvases):
            mask = None if attention_mask is None else canvases[:, S:].bool()
            return self.hidden(canvases[:, :S], mask, cache=cache)

        if self.memory is not None and cache is None:
            return self.memory.states(distinct, run)[copy]
        if len(distinct) == len(ids):  # all differ: copy nothing
            return run(key)
        hidden = run(distinct)
        if cache is not None:
            cache.repeat(copy)
        return hidden[copy]

    @contextmanager
    def remembering_states(self):
        """A block in which no canvas is run twice: for several decoders of the same prompts.

        The weights must not change in it. With a block cache nothing is remembered.
        """
        self.memory = StateMemory()
        try:
            yield
        finally:
            self.memory = None

    def logits(self, hidden, part=slice(0, None)) -> torch.Tensor:
        """hidden (N, D) -> logits (N, v) in float32, of all words or a part, [MASK] BLOCKED."""
        head = self.denoiser.get_output_embeddings()
        if head is None:
            logits = hidden[:, part].float().clone()
        elif head.weight.dtype == torch.bfloat16:
            logits = Float32Product.apply(head.weight[part], hidden.to(torch.bfloat16)).T
        else:
            logits = (head.weight[part] @ hidden.T).T  # this way round a CPU is up to twice as fast
        if head is not None and head.bias is not None:
            logits = logits + head.bias[part]
        if part.start <= self.mask_id < part.start + logits.shape[1]:
            logits[:, self.mask_id - part.start] = BLOCKED
        return logits

    def vocabulary_size(self, hidden) -> int:
        """V. (A LogitsModel's states are its logits.)"""
        head = self.denoiser.get_output_embeddings()
        return hidden.shape[-1] if head is None else len(head.weight)

    def positions_at_once(self, hidden) -> int:
        """How many positions' logits are made at once."""
        chunk = CHUNK.get(hidden.device.type, CHUNK["cpu"])
        return max(1, chunk // self.vocabulary_size(hidden))

    def entropy_and_confidence(self, hidden, rule="eb") -> tuple[torch.Tensor, torch.Tensor]:
        """The entropy in nats and the confidence of N untempered distributions: (N,), (N,).

        Confidence is the best token's probability, not the drawn one's: it must not depend on the
        draw. [OUR CHOICE] (Greedy, the two are the same.) The entropy is computed only for the rule
        "eb", and is meaningless for others.

        One pass over slices of the vocabulary. With m the highest logit so far, only the sums of
        e^(l - m) and of (l - m) e^(l - m) are kept. Both are easily corrected when m rises.
        """
        N = len(hidden)
        device = hidden.device
        highest = torch.full((N,), BLOCKED, device=device)  # m
        total = torch.zeros(N, device=device)  # sum of e^(l - m)
        dot = torch.zeros(N, device=device)  # sum of (l - m) e^(l - m)
        width = max(1024, SLICE.get(device.type, SLICE["cpu"]) // N)
        for start in range(0, self.vocabulary_size(hidden), width):
            logits = self.logits(hidden, slice(start, start + width))  # (N, width)
            new_highest = torch.maximum(highest, logits.amax(dim=-1))
            rise = highest - new_highest  # <= 0
            highest = new_highest
            logits -= highest.unsqueeze(-1)
            weight = logits.exp()
            if rule == "eb":
                dot = rise.exp() * (dot + rise * total) + weight.mul(logits).sum(dim=-1)
            total = rise.exp() * total + weight.sum(dim=-1)
        entropy = (total.log() - dot / total).clamp(min=0)
        return entropy, 1 / total

    def sample_tokens(self, hidden, temperature, uniform) -> tuple[torch.Tensor, torch.Tensor]:
        """A token for each of N positions and its log-prob: (N,), (N,). Temperature 0: the best.

        Drawn by inversion: the first token at which the cumulated probability exceeds `uniform`, a
        uniform number for each position, (N,) float64 in [0, 1). (Gumbel noise would need V numbers
        per position.) Cumulated in float64, or a large vocabulary's tail would be rounded away.
        """

        def sample(states, point):  # a function, so that a chunk's tensors end with it
            logits = self.logits(states).contiguous()  # (n, V), row by row: cumsum is fast so
            if temperature == 0:
                token = logits.argmax(dim=-1)  # (n,)
                return token, torch.zeros(len(token), device=token.device)
            # In place, for it is large: a logit takes 4 bytes here and 8 in float64.
            weight = logits.sub_(logits.amax(dim=-1, keepdim=True)).div_(temperature).exp_()
            cumulated = weight.double().cumsum_(dim=-1)
            total = cumulated[:, -1:]
            token = torch.searchsorted(cumulated, point.unsqueeze(-1) * total, right=True)
            token = token.clamp(max=logits.shape[1] - 1)  # (n, 1)
            logp = (weight.gather(-1, token) / total).log().float()
            return token.squeeze(-1), logp.squeeze(-1)

        size = self.positions_at_once(hidden)
        all_tokens = []
        all_logps = []
        for states, point in zip(hidden.split(size), uniform.split(size), strict=True):
            tokens, logps = sample(states, point)
            all_tokens.append(tokens)
            all_logps.append(logps)
        return torch.cat(all_tokens), torch.cat(all_logps)

    def token_logp(self, hidden, tokens, temperature, state=None) -> torch.Tensor:
        """Log-probs (N,) of N tokens, each at one of M states (M, D). Differentiable.

        state   (N,) long, the state that each token is at; None: M = N, one each. However many
                tokens a state has, its logits are made once.

        No (M, V) is kept for the backward pass. Where the last layer is frozen, as under LoRA, the
        gradient is computed along with the log-probs (FrozenLayerLogp). Where it learns, a chunk's
        logits are made again when its gradient is due.
        """
        if state is None:
            state = torch.arange(len(tokens), device=tokens.device)
        head = self.denoiser.get_output_embeddings()
        is_frozen = head is not None and not any(p.requires_grad for p in head.parameters())
        size = self.positions_at_once(hidden)

        def score(states, tokens, state):
            logits = self.logits(states) / temperature  # (m, V)
            return logits[state, tokens] - logits.logsumexp(dim=-1)[state]

        logps = []
        places = []  # of each chunk's tokens among the N
        for first in range(0, len(hidden), size):
            states = hidden[first : first + size]
            place = ((state >= first) & (state < first + size)).nonzero().squeeze(1)
            here = tokens[place]
            state_here = state[place] - first
            if is_frozen:
                logp = FrozenLayerLogp.apply(states, here, state_here, temperature, self)
            elif torch.is_grad_enabled() and len(hidden) > size:
                logp = checkpoint(score, states, here, state_here, use_reentrant=False)
            else:
                logp = score(states, here, state_here)
            logps.append(logp)
            places.append(place)
        return torch.cat(logps)[torch.cat(places).argsort()]


class FrozenLayerLogp(torch.autograd.Function):
    """Log-probs (N,) of tokens at M states (M, D), where the last layer's weight W is frozen.

    With p the softmax of the logits (W h + bias) / temperature, the gradient of a token's log-prob

        d log p(o) / dh = (W[o] - sum_v p(v) W[v]) / temperature

    has D numbers. The sum is computed while p is there, before the loss is known: all that the loss
    adds is a factor for each token. So the backward pass needs neither p nor the logits, as in
    fused cross-entropies (Liger Kernel, arXiv 2410.10989).
    """

    @staticmethod
    def forward(context, hidden, tokens, state, temperature, calls):
        weight = calls.denoiser.get_output_embeddings().weight  # (V, D)
        logits = calls.logits(hidden)  # (M, V), and from here on in place, for it is large
        highest, best = logits.max(dim=-1)  # (M,)
        logits.sub_(highest.unsqueeze(-1)).div_(temperature)
        token_logit = logits[state, tokens]  # (N,)
        # Of the total the best token has e^0 = 1, and all others together have `others`.
        p = logits.exp_()
        each = torch.arange(len(hidden), device=hidden.device)
        p[each, best] = 0
        others = p.sum(dim=-1)  # (M,)
        if context.needs_input_grad[0]:
            # W[best] is added apart: a p(best) near 1 would be rounded to 1 in bfloat16.
            p[each, best] = -others
            rest = (p.to(weight.dtype) @ weight) / (1 + others.unsqueeze(-1))  # (M, D)
            context.save_for_backward(weight[best] + rest, weight, tokens, state)
            context.temperature = temperature
        return token_logit - others.log1p()[state]

    @staticmethod
    def backward(context, gradient):  # (N,)
        mean, weight, tokens, state = context.saved_tensors
        factor = (gradient / context.temperature).unsqueeze(-1)  # (N, 1)
        direction = (weight[tokens] - mean[state]) * factor  # (N, D)
        # Unlike index_add_, this sums in the same order each time on a GPU too.
        total = torch.zeros_like(mean).index_put_((state,), direction, accumulate=True)  # (M, D)
        return total, None, None, None, None


class LogitsModel(nn.Module):
    """Any `model(ids, attention_mask=mask) -> logits` as a denoiser: a plain module, LLaDA's code.

    The logits stand in for the hidden states, so D = V, and all of a call's logits exist at once.
    Left padding is rolled behind the text: a model with absolute positions counts from the text.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def get_decoder(self) -> nn.Module:
        return self

    def get_output_embeddings(self) -> None:
        return None

    def forward(self, input_ids, attention_mask=None, past_key_values=None, **_):
        if past_key_values is not None:
            raise ValueError("a LogitsModel has no keys and values to keep: take the cache none")
        S = input_ids.shape[1]
        index = torch.arange(S, device=input_ids.device).expand_as(input_ids)  # (b, S)
        mask = attention_mask
        if mask is not None:
            padding = (~mask.bool()).sum(dim=1, keepdim=True)  # (b, 1)
            index = (index + padding) % S  # the text comes first
            mask = mask.gather(1, index)
        logits = self.model(input_ids.gather(1, index), attention_mask=mask)
        logits = getattr(logits, "logits", logits)  # (b, S, V)
        back = index.argsort(1).unsqueeze(-1).expand_as(logits)
        return SimpleNamespace(last_hidden_state=logits.gather(1, back))


class BlockCache:
    """Keys and values of a whole canvas; a call on a part of it overwrites that part.

    Block-wise decoding fills it by one call on everything when a block opens. Until that block is
    full, calls run only the block and all behind it (cache "prefix") or the block alone ("dual"),
    and read the others' keys and values from here (Fast-dLLM's caches, arXiv 2505.22618). That is
    approximate: attention looks both ways, so each unmasked token changes all keys and values, and
    these are from before. Rollouts record the log-probs of what was really drawn from, so the
    importance weights see the difference and correct for it. [OUR CHOICE]

    Tensors are (b, heads, S, head size), one a layer. The three get_ methods and is_compileable are
    what transformers asks of a cache.
    """

    is_compileable = False

    def __init__(self):
        self.keys = []
        self.values = []
        self.start = 0

    def update(self, keys, values, layer, *_, **__) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer's new keys and values, from position `start` on -> those of the whole canvas."""
        if layer == len(self.keys):  # the call that fills it
            self.keys.append(keys)
            self.values.append(values)
        else:
            part = slice(self.start, self.start + keys.shape[2])
            self.keys[layer][:, :, part] = keys
            self.values[layer][:, :, part] = values
        return self.keys[layer], self.values[layer]

    def repeat(self, rows) -> None:
        """Row i becomes what row rows[i] was. One tensor at a time: two copies may not fit."""
        for tensors in (self.keys, self.values):
            for i, tensor in enumerate(tensors):
                tensors[i] = tensor[rows]

    def keep(self, is_kept) -> torch.Tensor:
        """Drop rows, is_kept (b,) bool on the host. Returns which row each place has now, (b',).

        The last rows move into the places that become free: only as many are copied as are dropped.
        """
        b = len(is_kept)
        n = int(is_kept.sum())
        order = torch.arange(b)
        free = (~is_kept[:n]).nonzero().squeeze(1)
        moving = n + is_kept[n:].nonzero().squeeze(1)
        order[free] = moving
        device = self.keys[0].device
        for tensors in (self.keys, self.values):
            for i, tensor in enumerate(tensors):
                tensor[free.to(device)] = tensor[moving.to(device)]
                tensors[i] = tensor[:n]
        return order[:n]

    def get_seq_length(self, layer=0) -> int:
        return self.start

    def get_query_offset(self, layer=0) -> int:
        return self.start

    def get_mask_sizes(self, query_length, layer=0) -> tuple[int, int]:
        return (self.keys[layer].shape[2] if layer < len(self.keys) else query_length), 0


# ---- block-causal denoisers ----------------------------------------------------------------------


def block_causal_mask(position, is_real, column, block_size, noisy=0) -> torch.Tensor:
    """Which columns of a canvas are seen from some of them, in a block-causal denoiser.

    A position sees its own block, both ways, and all blocks before it. Blocks are counted from the
    first token of the prompt.

    position  (b, S) long, of each column; is_real (b, S) bool, False on padding
    column    (b, w) long, the columns that see
    noisy     the last so many columns are a second copy, of positions that are still being
              unmasked. A noisy block sees itself, and of all blocks before it the clean copy. The
              clean copy sees no noisy column.

    Returns (b, w, S) bool.
    """
    S = position.shape[1]
    block = position // block_size  # (b, S)
    own_block = block.gather(1, column).unsqueeze(2)  # (b, w, 1)
    block = block.unsqueeze(1)  # (b, 1, S)
    all_columns = torch.arange(S, device=position.device)
    is_noisy = all_columns >= S - noisy  # (S,)
    is_own_noisy = (column >= S - noisy).unsqueeze(2)  # (b, w, 1)
    sees = (block < own_block) & ~is_noisy
    sees = sees | (block == own_block) & (is_noisy == is_own_noisy)
    # Nobody sees padding. It sees itself, since a softmax over nothing is nan.
    return sees & is_real.unsqueeze(1) | (all_columns == column.unsqueeze(2))


class FinishedBlocksCache(BlockCache):
    """Keys and values for a block-causal denoiser: exact, and each row is at a block of its own.

    A finished block's keys and values never change, since it does not see what comes after it. So
    a call runs only the block that is being unmasked, and once more the one before it, whose last
    tokens the call before has not seen yet.
    """

    def update(self, keys, values, layer, *_, **__) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer's new keys and values, of the columns `column` (b, w) -> those of the canvas."""
        if layer == len(self.keys):  # the call that fills it
            self.keys.append(keys)
            self.values.append(values)
        else:
            place = self.column[:, None, :, None].expand_as(keys)
            self.keys[layer].scatter_(2, place, keys)
            self.values[layer].scatter_(2, place, values)
        return self.keys[layer], self.values[layer]


class StateMemory:
    """The last hidden states of canvases that were run, S x D numbers each, on the host.

    Once they fill `max_bytes`, no more are remembered: other canvases are run again.
    """

    def __init__(self, max_bytes=2**30):
        self.max_bytes = max_bytes
        self.bytes = 0
        self.state_of = {}  # a canvas, as a tuple -> its states (S, D)

    def states(self, canvases, run) -> torch.Tensor:
        """canvases (U, ...) long -> (U, S, D). `run` is called with those that are not known."""
        keys = [tuple(canvas) for canvas in canvases.tolist()]
        unknown = [i for i, key in enumerate(keys) if key not in self.state_of]
        new_state_of = {}
        if unknown:
            new_states = run(canvases[unknown]).cpu()  # (u, S, D)
            new_state_of = dict(zip([keys[i] for i in unknown], new_states, strict=True))
            if self.bytes + new_states.nbytes <= self.max_bytes:
                self.bytes += new_states.nbytes
                self.state_of |= new_state_of
        all_states = self.state_of | new_state_of
        return torch.stack([all_states[key] for key in keys]).to(canvases.device)


class Float32Product(torch.autograd.Function):
    """weight (v, D) @ hidden (N, D)^T -> (v, N): the factors are bfloat16, the result float32.

    A GPU accumulates such products in float32 anyway. Rounding a logit of 15 back to bfloat16 moves
    it by up to 0.03 nats, more than many an importance weight differs from 1.
    """

    @staticmethod
    def forward(context, weight, hidden):
        context.save_for_backward(weight, hidden)
        if weight.is_cuda:
            return torch.mm(weight, hidden.T, out_dtype=torch.float32)
        return weight.float() @ hidden.T.float()

    @staticmethod
    def backward(context, gradient):  # (v, N)
        weight, hidden = context.saved_tensors
        gradient = gradient.to(weight.dtype)
        weight_gradient = gradient @ hidden if context.needs_input_grad[0] else None
        return weight_gradient, gradient.T @ weight


class Echo(nn.Embedding):
    """A plain model: it predicts a position from its own word and the mean of all words."""

    def forward(self, ids, attention_mask):
        words = super().forward(ids)  # (b, S, V)
        return words + words.mean(1, keepdim=True)


@torch.no_grad()
def example():
    """One call on four words, and what is read off it."""
    words = ["[MASK]", "a", "b", "c", "d"]
    ids = torch.tensor([[1, 1, 2, 0]])
    model = Echo(5, 5, _weight=3 * torch.eye(5))
    calls = DenoiserCalls(LogitsModel(model), mask_id=0)
    hidden = calls.hidden(ids)[0]  # (4, 5)
    entropy, confidence = calls.entropy_and_confidence(hidden)
    last = hidden[3:].expand(5, -1)
    logp = calls.token_logp(last, torch.arange(5), temperature=1.0)
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(5, generator=generator, dtype=torch.float64)
    tokens, _ = calls.sample_tokens(last, temperature=1.0, uniform=uniform)
    print("canvas        ", *(f"{words[i]:>6}" for i in ids[0]))
    print("entropy, nats ", *(f"{x:6.2f}" for x in entropy.tolist()))
    print("confidence    ", *(f"{x:6.2f}" for x in confidence.tolist()))
    print("at [MASK]     ", *(f"{w} {x.exp():.2f} " for w, x in zip(words, logp, strict=True)))
    print("five draws    ", *(words[i] for i in tokens), "  (never [MASK])")


if __name__ == "__main__":
    example()
