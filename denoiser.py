"""One denoiser call, and how to handle a large vocabulary in little memory.

A denoiser reads a prompt and a partly masked completion, in both directions, and predicts every
position. `hidden` makes one call: ids (b, S) -> states (b, S, D). What is computed from a state
(the entropy of its distribution, a drawn token, a token's log-prob) needs V logits, and V is
126,464 for LLaDA: half a megabyte per position. So logits are computed only where they are needed,
for a chunk of positions or a slice of the vocabulary at a time, and are never kept.

What your model must offer: it can be a transformers model without the causal mask, with

    get_decoder()            callable with input_ids, attention_mask, position_ids, use_cache and
                             past_key_values (None without a block cache); its result has
                             .last_hidden_state (b, S, D)
    get_output_embeddings()  the last layer, with .weight (V, D) and .bias, (V,) or None; the logits
                             are weight @ state + bias, and nothing else is done to them
    device                   where its weights are
    config.shift_logits      optional; True: the state at i - 1 predicts position i (Dream)
    disable_adapter()        only under a LoRA adapter (peft provides it)

Or, also if its last layer does more than that (BERT's, Gemma's), it can be any
`model(ids, attention_mask=mask) -> logits (b, S, V)`, wrapped as LogitsModel(model). attention_mask
is (b, S) bool, False on padding, or None if nothing is padded.

Put the model in eval mode; otherwise dropout makes the recorded log-probs those of a random
network. This file does not check that attention is bidirectional (models/loading.py does): if the
last token changes, the first token's state has to change.

This file needs torch alone. `python denoiser.py` shows a call and what is computed from it.

Shapes: b rows of a call; S columns of its canvas (left padding, prompt and completion), of which it
runs w; N positions of any rows; D hidden size, V vocabulary size. Columns are counted from the
canvas's left edge, positions from the first real token.
"""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

# The number of float32 logits in memory at once where whole distributions are needed. With LLaDA's
# vocabulary that is 1,061 positions (0.5 GiB) on a GPU, 132 on a CPU.
CHUNK = {"cuda": 2**27, "cpu": 2**24}
# The same where the vocabulary is processed in slices; on a CPU a slice should fit into its cache.
SLICE = {"cuda": 2**27, "cpu": 2**19}
# The logit of [MASK], the one token that is never drawn or scored. It is finite because 0 * inf
# would be nan.
BLOCKED = -1e30


class DenoiserCalls:
    """A denoiser's call, and what is computed from its output.

    denoiser  see above for what it must offer
    mask_id   the id of [MASK]
    adapter   False: the LoRA adapter is disabled

    `rows_run` counts the rows of all calls so far, as a measure of the work done. Raises ValueError
    for a block-causal denoiser.
    """

    block_size = 0  # each position attends to all others; models/block_causal.py overrides this

    def __init__(self, denoiser, mask_id, adapter=True):
        self.denoiser = denoiser
        self.mask_id = mask_id
        self.adapter = adapter
        self.rows_run = 0
        self.memory = None  # a StateMemory inside remembering_states
        self.compiled_decoder = None  # see compile_cached_calls
        config = getattr(denoiser, "config", None)
        self.is_shifted = bool(getattr(config, "shift_logits", False))
        if (getattr(config, "block_size", None) or 0) != self.block_size:
            raise ValueError(
                "this denoiser is block-causal: use models.block_causal.BlockCausalPolicy"
            )

    def hidden(self, ids, attention_mask=None, cache=None, start=0, stop=None) -> torch.Tensor:
        """One call without the model's last layer: ids (b, S) -> each column's state, (b, S, D).

        A column's state is the one that predicts it, even if the model is shifted.

        attention_mask  (b, S) bool, False on padding, or None if nothing is padded: attention then
                        keeps its fastest kernel. Padding on the left does not change the result.
        cache           a BlockCache, or None. Once it is filled, only the columns from `start` to
                        `stop` are run, and the result is (b, stop - start, D).
        """
        first = start
        if self.is_shifted:  # the state that predicts the first column is one to the left
            first = max(start - 1, 0)
        column = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)[:, first:stop]  # (1, w)
        position = column
        if attention_mask is not None:
            position = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, first:stop]
        if cache is not None:
            cache.start = first
        # Without padding or cache the model counts the positions correctly by itself.
        needs_positions = attention_mask is not None or cache is not None
        hidden = self.run_decoder(
            ids[:, first:stop],
            attention_mask=attention_mask,
            position_ids=position if needs_positions else None,
            cache=cache,
        )
        if self.is_shifted:
            hidden = shifted_states(hidden, column, position, previous=column - 1)
        return hidden[:, start - first :]

    def run_decoder(self, ids, attention_mask, position_ids, cache) -> torch.Tensor:
        """Runs the decoder on exactly these inputs. Returns its last hidden states, (b, w, D)."""
        self.rows_run += len(ids)
        # A bfloat16 base may have a float32 adapter: autocast makes its products bfloat16 as well.
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

    def logits(self, hidden, part=slice(0, None)) -> torch.Tensor:
        """hidden (N, D) -> float32 logits (N, v), all or a slice; [MASK]'s is BLOCKED."""
        head = self.denoiser.get_output_embeddings()
        if head is None:
            logits = hidden[:, part].float().clone()
        elif head.weight.dtype == torch.bfloat16:
            logits = Float32Product.apply(head.weight[part], hidden.to(torch.bfloat16)).T
        else:
            # In this order the product is up to twice as fast on a CPU.
            logits = (head.weight[part] @ hidden.T).T.float()
        if head is not None and head.bias is not None:
            logits = logits + head.bias[part]
        if part.start <= self.mask_id < part.start + logits.shape[1]:
            logits[:, self.mask_id - part.start] = BLOCKED
        return logits

    def entropy_and_confidence(self, hidden, rule="eb") -> tuple[torch.Tensor, torch.Tensor]:
        """The entropy in nats and the confidence at N positions, at temperature 1: (N,), (N,).

        hidden (N, D). Confidence is the most likely token's probability, not the drawn token's: it
        must not depend on the draw. [OUR CHOICE] (At temperature 0 the two are the same.) The
        entropy is computed only for the rule "eb"; for other rules the value returned is
        meaningless.

        One pass goes over the vocabulary, slice by slice. With m the highest logit so far, it keeps
        only the sums of e^(l - m) and of (l - m) e^(l - m), which are easily corrected when m
        rises.
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
            change = highest - new_highest  # <= 0
            highest = new_highest
            logits -= highest.unsqueeze(-1)
            weight = logits.exp()
            if rule == "eb":
                dot = change.exp() * (dot + change * total) + weight.mul(logits).sum(dim=-1)
            total = change.exp() * total + weight.sum(dim=-1)
        entropy = (total.log() - dot / total).clamp(min=0)
        return entropy, 1 / total

    def sample_tokens(self, hidden, temperature, uniform) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw a token at each of N positions. Returns the tokens and their log-probs: (N,), (N,).

        hidden (N, D); uniform (N,) float64, a uniform number in [0, 1) for each position.

        Tokens are drawn by inversion: we take the first token whose cumulative probability exceeds
        `uniform`. (Gumbel noise would need V numbers per position.) The cumulative sum is float64;
        float32 would round away the tail of a large vocabulary. At temperature 0 we take the most
        likely token, with log-prob 0.
        """

        def sample(states, uniform):  # a function, so that its tensors are freed after each chunk
            logits = self.logits(states).contiguous()  # (n, V); cumsum is fast along adjacent rows
            if temperature == 0:
                token = logits.argmax(dim=-1)  # (n,)
                return token, torch.zeros(len(token), device=token.device)
            # In place, since these are large: a logit takes 4 bytes, a cumulative weight 8.
            weight = logits.sub_(logits.amax(dim=-1, keepdim=True)).div_(temperature).exp_()
            cumulative = weight.double().cumsum_(dim=-1)
            total = cumulative[:, -1:]
            token = torch.searchsorted(cumulative, uniform.unsqueeze(-1) * total, right=True)
            token = token.clamp(max=logits.shape[1] - 1)  # (n, 1)
            logp = (weight.gather(-1, token) / total).log().float()
            return token.squeeze(-1), logp.squeeze(-1)

        size = self.positions_at_once(hidden)
        all_tokens = []
        all_logps = []
        for states, numbers in zip(hidden.split(size), uniform.split(size), strict=True):
            tokens, logps = sample(states, numbers)
            all_tokens.append(tokens)
            all_logps.append(logps)
        return torch.cat(all_tokens), torch.cat(all_logps)

    def token_logp(self, hidden, tokens, temperature, state_index=None) -> torch.Tensor:
        """Log-probs (N,) of N tokens, given M states (M, D). Differentiable.

        state_index  (N,) long: token n is scored from the state hidden[state_index[n]]. Each
                     state's logits are computed once, however many tokens it scores. None: M = N,
                     and each token has a state of its own.

        No (M, V) tensor is kept for the backward pass. If the last layer is frozen, as under LoRA,
        the gradient is computed along with the log-probs (FrozenLayerLogp). If it is trained, each
        chunk's logits are recomputed in the backward pass.
        """
        if state_index is None:
            state_index = torch.arange(len(tokens), device=tokens.device)
        head = self.denoiser.get_output_embeddings()
        is_frozen = head is not None and not any(p.requires_grad for p in head.parameters())
        size = self.positions_at_once(hidden)

        def score(states, tokens, index):
            logits = self.logits(states) / temperature  # (m, V)
            return logits[index, tokens] - logits.logsumexp(dim=-1)[index]

        logps = []
        chunks = []  # the indices, among the N, of each chunk's tokens
        for first in range(0, len(hidden), size):
            states = hidden[first : first + size]  # (m, D)
            chunk = ((state_index >= first) & (state_index < first + size)).nonzero().squeeze(1)
            chunk_tokens = tokens[chunk]
            chunk_index = state_index[chunk] - first
            if is_frozen:
                logp = FrozenLayerLogp.apply(states, chunk_tokens, chunk_index, temperature, self)
            elif torch.is_grad_enabled() and len(hidden) > size:
                logp = checkpoint(score, states, chunk_tokens, chunk_index, use_reentrant=False)
            else:
                logp = score(states, chunk_tokens, chunk_index)
            logps.append(logp)
            chunks.append(chunk)
        return torch.cat(logps)[torch.cat(chunks).argsort()]

    def vocabulary_size(self, hidden) -> int:
        """V. (A LogitsModel's states are its logits.)"""
        head = self.denoiser.get_output_embeddings()
        return hidden.shape[-1] if head is None else len(head.weight)

    def positions_at_once(self, hidden) -> int:
        """The number of positions whose logits are computed at once."""
        chunk = CHUNK.get(hidden.device.type, CHUNK["cpu"])
        return max(1, chunk // self.vocabulary_size(hidden))

    # ---- savings: the same results with less work ------------------------------------------------

    def hidden_of_distinct(self, ids, attention_mask=None, cache=None) -> torch.Tensor:
        """Like `hidden`, but equal canvases are run once, and remembered ones not at all.

        All rows of a group are equal at first, and greedy or nearly certain rows stay equal. An
        empty `cache` is filled for every row.
        """
        S = ids.shape[1]
        key = ids
        if attention_mask is not None:
            key = torch.cat([ids, attention_mask.long()], dim=1)
        distinct, index = torch.unique(key, dim=0, return_inverse=True)  # (U, ...), (b,)

        def run_canvases(canvases):
            mask = None if attention_mask is None else canvases[:, S:].bool()
            return self.hidden(canvases[:, :S], mask, cache=cache)

        if self.memory is not None and cache is None:
            return self.memory.states(distinct, run_canvases)[index]
        if len(distinct) == len(ids):  # all differ, so nothing has to be copied
            return run_canvases(key)
        hidden = run_canvases(distinct)
        if cache is not None:
            cache.repeat(index)
        return hidden[index]

    @contextmanager
    def remembering_states(self):
        """Context manager inside which hidden_of_distinct runs no canvas twice, for any decoder.

        The weights must not change inside it. Calls with a block cache are not remembered.
        """
        self.memory = StateMemory()
        try:
            yield
        finally:
            self.memory = None

    @contextmanager
    def casting_once(self):
        """Context manager inside which a float32 adapter on a bfloat16 base is kept in bfloat16.

        Autocast would convert it in every call. (In an outer autocast context it keeps its copies,
        but not those of a frozen adapter, and compiled calls cannot use them.) Inside this context
        the weights must not change, and no gradient of the adapter may be computed. Split weights
        are left as they are.
        """
        head = self.denoiser.get_output_embeddings()
        adapter = []
        if head is not None and head.weight.dtype == torch.bfloat16:
            for name, weight in self.denoiser.named_parameters():
                if ".lora_" in name and not hasattr(weight, "full_tensor"):  # not split
                    adapter.append(weight)
        weights = [weight.data for weight in adapter]
        try:
            for weight in adapter:
                weight.data = weight.data.to(torch.bfloat16)
            yield
        finally:
            for weight, data in zip(adapter, weights, strict=True):
                weight.data = data

    def compile_cached_calls(self):
        """Run calls with a filled cache under torch.compile. Split weights are not supported.

        Such calls consist of many small kernels whose launch time dominates. Shapes stay dynamic,
        because rows finish at different times, and padding to one shape would nearly double the
        work.
        """
        self.compiled_decoder = torch.compile(self.denoiser.get_decoder(), dynamic=True)


def shifted_states(hidden, column, position, previous) -> torch.Tensor:
    """The states that predict a call's columns, if the state at i - 1 predicts position i.

    hidden    (b, w, D), the decoder's states at the w adjacent columns that the call ran
    column    (b, w) or (1, w), which columns of the canvas these are
    position  same shape, the position of each column: 0 for padding and the first real token
    previous  same shape, the column of the preceding position

    Returns (b, w, D). The first real token has no predecessor, only padding, so it uses its own
    state. With two columns of padding:

        column              0  1  2  3  4
        position            0  0  0  1  2
        uses the state of   0  1  2  2  3

    The first column that was run also uses its own state, so callers run one column more than they
    read.
    """
    source = torch.where(position == 0, column, previous)
    index = (source - column[:, :1]).clamp(min=0)  # among the columns that were run
    return hidden.gather(1, index.unsqueeze(-1).expand_as(hidden))


# ---- log-probs and products, with their gradients ------------------------------------------------


class FrozenLayerLogp(torch.autograd.Function):
    """Log-probs (N,) of tokens given M states (M, D), where the last layer's weight W is frozen.

    With p the softmax of the logits (W h + bias) / temperature, the gradient of a token's log-prob

        d log p(o) / dh = (W[o] - sum_v p(v) W[v]) / temperature

    has only D numbers. The forward pass computes the sum, while p exists, and the backward pass
    only scales it for each token. So backward needs neither p nor the logits, as in fused
    cross-entropies (Liger Kernel, arXiv 2410.10989).
    """

    @staticmethod
    def forward(ctx, hidden, tokens, state_index, temperature, denoiser_calls):
        weight = denoiser_calls.denoiser.get_output_embeddings().weight  # (V, D)
        logits = denoiser_calls.logits(hidden)  # (M, V); large, so everything below is in place
        highest, best = logits.max(dim=-1)  # (M,)
        logits.sub_(highest.unsqueeze(-1)).div_(temperature)
        token_logit = logits[state_index, tokens]  # (N,)
        # `others` is the weight of all other tokens, relative to the most likely one's e^0 = 1.
        p = logits.exp_()
        row = torch.arange(len(hidden), device=hidden.device)
        p[row, best] = 0
        others = p.sum(dim=-1)  # (M,)
        if ctx.needs_input_grad[0]:
            # W[best] is added separately, since bfloat16 would round a p(best) near 1 to 1.
            p[row, best] = -others
            rest = (p.to(weight.dtype) @ weight) / (1 + others.unsqueeze(-1))  # (M, D)
            ctx.save_for_backward(weight[best] + rest, weight, tokens, state_index)
            ctx.temperature = temperature
        return token_logit - others.log1p()[state_index]

    @staticmethod
    def backward(ctx, gradient):  # (N,)
        mean, weight, tokens, state_index = ctx.saved_tensors
        factor = (gradient / ctx.temperature).unsqueeze(-1)  # (N, 1)
        direction = (weight[tokens] - mean[state_index]) * factor  # (N, D)
        # Unlike index_add_, this sums in the same order each time, on a GPU too.
        total = torch.zeros_like(mean)  # (M, D)
        total.index_put_((state_index,), direction, accumulate=True)
        return total, None, None, None, None


class Float32Product(torch.autograd.Function):
    """weight (v, D) @ hidden (N, D)^T -> (v, N), with bfloat16 factors and a float32 result.

    A GPU accumulates such products in float32 anyway. Rounding a logit of 15 back to bfloat16 moves
    it by up to 0.03 nats, an error larger than many weights' deviation from 1.
    """

    @staticmethod
    def forward(ctx, weight, hidden):
        ctx.save_for_backward(weight, hidden)
        if weight.is_cuda:
            return torch.mm(weight, hidden.T, out_dtype=torch.float32)
        return weight.float() @ hidden.T.float()

    @staticmethod
    def backward(ctx, gradient):  # (v, N)
        weight, hidden = ctx.saved_tensors
        gradient = gradient.to(weight.dtype)
        weight_gradient = gradient @ hidden if ctx.needs_input_grad[0] else None
        return weight_gradient, gradient.T @ weight


# ---- any model as a denoiser ---------------------------------------------------------------------


class LogitsModel(nn.Module):
    """Any `model(ids, attention_mask=mask) -> logits` as a denoiser, such as LLaDA's own code.

    The logits stand in for the hidden states, so D = V, and all of a call's logits exist at once.
    Left padding is moved behind the text, so absolute positions start at the text. If the model is
    shifted, set `config = SimpleNamespace(shift_logits=True)` on the LogitsModel.
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
            raise ValueError("a LogitsModel has no keys and values to keep: use the cache none")
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


# ---- caches --------------------------------------------------------------------------------------


class BlockCache:
    """Keys and values of a whole canvas; a call on a part of it overwrites that part.

    When a block opens, one call on the whole canvas fills the cache. Until the block is full, calls
    run only the block and everything after it (cache "prefix") or the block alone ("dual"), and
    read the keys and values of the other columns from here (Fast-dLLM's caches, arXiv 2505.22618).
    This is approximate: attention is bidirectional, so each unmasked token changes all keys and
    values, and the cached ones are stale. Rollouts record the log-probs with which tokens were
    really drawn, so the importance weights correct for the difference. [OUR CHOICE]

    Tensors are (b, heads, S, head size), one per layer. transformers requires the three get_
    methods and is_compileable of a cache.
    """

    is_compileable = False

    def __init__(self):
        self.keys = []
        self.values = []
        self.start = 0  # the first column of the current call

    def update(self, keys, values, layer, *_, **__) -> tuple[torch.Tensor, torch.Tensor]:
        """Store a layer's new keys and values, from column `start` on. Returns the canvas's."""
        if layer == len(self.keys):  # this call fills the cache
            self.keys.append(keys)
            self.values.append(values)
        else:
            part = slice(self.start, self.start + keys.shape[2])
            self.keys[layer][:, :, part] = keys
            self.values[layer][:, :, part] = values
        return self.keys[layer], self.values[layer]

    def repeat(self, rows) -> None:
        """Replace row i by row rows[i], one tensor at a time: two copies of all may not fit."""
        for tensors in (self.keys, self.values):
            for i, tensor in enumerate(tensors):
                tensors[i] = tensor[rows]

    def keep(self, is_kept) -> torch.Tensor:
        """Keep only the b' rows where is_kept, (b,) bool on the host, is True.

        The last rows move into the gaps, so no more rows are copied than are dropped. Returns the
        old index of each row that is left, (b',).
        """
        b = len(is_kept)
        n = int(is_kept.sum())
        order = torch.arange(b)
        gaps = (~is_kept[:n]).nonzero().squeeze(1)
        moving = n + is_kept[n:].nonzero().squeeze(1)
        order[gaps] = moving
        device = self.keys[0].device
        gaps = gaps.to(device)  # here the host waits for the GPU, so not once for each tensor
        moving = moving.to(device)
        for tensors in (self.keys, self.values):
            for i, tensor in enumerate(tensors):
                tensor[gaps] = tensor[moving]
                tensors[i] = tensor[:n]
        return order[:n]

    def get_seq_length(self, layer=0) -> int:
        return self.start

    def get_query_offset(self, layer=0) -> int:
        return self.start

    def get_mask_sizes(self, query_length, layer=0) -> tuple[int, int]:
        return (self.keys[layer].shape[2] if layer < len(self.keys) else query_length), 0


class StateMemory:
    """The last hidden states of canvases that have been run, S x D numbers each, kept on the host.

    Once they fill `max_bytes`, no more are stored: new canvases are then run each time.
    """

    def __init__(self, max_bytes=2**30):
        self.max_bytes = max_bytes
        self.bytes = 0
        self.state_of = {}  # a canvas, as a tuple -> its states (S, D)

    def states(self, canvases, compute) -> torch.Tensor:
        """canvases (U, ...) long -> states (U, S, D). `compute` runs those not yet stored."""
        keys = [tuple(canvas) for canvas in canvases.tolist()]
        unknown = [i for i, key in enumerate(keys) if key not in self.state_of]
        new_state_of = {}
        if unknown:
            new_states = compute(canvases[unknown]).cpu()  # (u, S, D)
            new_state_of = dict(zip([keys[i] for i in unknown], new_states, strict=True))
            if self.bytes + new_states.nbytes <= self.max_bytes:
                self.bytes += new_states.nbytes
                self.state_of |= new_state_of
        all_states = self.state_of | new_state_of
        return torch.stack([all_states[key] for key in keys]).to(canvases.device)


# ---- an example ----------------------------------------------------------------------------------


class MyModel(nn.Embedding):
    """A plain model: a position's logits come from its own token and the mean over all tokens."""

    def forward(self, ids, attention_mask):
        logits = super().forward(ids)  # (b, S, V)
        return logits + logits.mean(1, keepdim=True)


@torch.no_grad()
def example():
    """One call on four tokens, and what is computed from it."""
    vocabulary = ["[MASK]", "a", "b", "c", "d"]
    ids = torch.tensor([[1, 1, 2, 0]])
    model = MyModel(5, 5, _weight=3 * torch.eye(5))
    calls = DenoiserCalls(LogitsModel(model), mask_id=0)
    hidden = calls.hidden(ids)[0]  # (4, 5)
    entropy, confidence = calls.entropy_and_confidence(hidden)
    last = hidden[3:].expand(5, -1)
    logp = calls.token_logp(last, torch.arange(5), temperature=1.0)
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(5, generator=generator, dtype=torch.float64)
    tokens, _ = calls.sample_tokens(last, temperature=1.0, uniform=uniform)
    print("canvas        ", *(f"{vocabulary[i]:>6}" for i in ids[0]))
    print("entropy, nats ", *(f"{x:6.2f}" for x in entropy.tolist()))
    print("confidence    ", *(f"{x:6.2f}" for x in confidence.tolist()))
    print("p at [MASK]   ", *(f"{t} {x.exp():.2f} " for t, x in zip(vocabulary, logp, strict=True)))
    print("five draws    ", *(vocabulary[i] for i in tokens), "  (never [MASK])")


if __name__ == "__main__":
    example()
