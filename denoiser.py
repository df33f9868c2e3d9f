"""One denoiser call, and how to touch a large vocabulary cheaply.

A denoiser reads a prompt and a partly masked completion, both ways, and predicts every position.
One call is `hidden`: ids (b, S) -> states (b, S, D). What is wanted of a state, its entropy, a
drawn token, a token's log-prob, needs V logits, and V is 126,464 for LLaDA: half a megabyte a
position. So logits are made only where they are needed, a chunk of positions or a slice of the
vocabulary at a time, and never kept.

What your model must offer, the first way in: a transformers model without the causal mask

    get_decoder()            callable with input_ids, attention_mask, position_ids, use_cache and,
                             for block caches, past_key_values; gives .last_hidden_state (b, S, D)
    get_output_embeddings()  the last layer, with .weight (V, D) and .bias, (V,) or None
    device                   where its weights are
    config.shift_logits      optional, True: position i is predicted by the state at i - 1 (Dream)
    disable_adapter()        only under a LoRA adapter (peft has it)

The second way in: any `model(ids, attention_mask=mask) -> logits (b, S, V)`: LogitsModel(model).
attention_mask is (b, S) bool, False on padding, or None where nothing is padded.

This file needs torch alone. `python denoiser.py` shows a call and what is read off it.

Shapes: b rows, S positions of prompt and completion, N positions of any rows, V words, D wide.
"""

from contextlib import nullcontext
from types import SimpleNamespace

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

CHUNK = {"cuda": 2**27, "cpu": 2**24}  # logits made at once: 1,061 or 132 positions of LLaDA's
SLICE = {"cuda": 2**27, "cpu": 2**19}  # the same where slices of the vocabulary do: a CPU's cache
BLOCKED = -1e30  # the logit of [MASK], never drawn nor scored; finite, or 0 * inf would be nan


class DenoiserCalls:
    """A denoiser's call, and what is read off it. `adapter` False looks past a LoRA adapter.

    `calls` counts the rows that calls have run so far: what was spent.
    """

    def __init__(self, denoiser, mask_id, adapter=True):
        self.denoiser, self.mask_id, self.adapter, self.calls = denoiser, mask_id, adapter, 0

    def hidden(self, ids, attention_mask=None, cache=None, start=0, stop=None):
        """One call without its last layer: ids (b, S) -> last hidden states (b, stop - start, D).

        attention_mask (b, S) bool, or None where nothing is padded: attention then keeps its
        fastest kernel. With a filled cache only positions start to stop are run. Positions count
        from the first real token: left padding moves nothing, whatever positions a model has.
        """
        self.calls += len(ids)
        shift = getattr(getattr(self.denoiser, "config", None), "shift_logits", False)
        begin = max(start - int(shift), 0)  # a shifted model reads a position one to its left
        part, positions, more = slice(begin, stop), None, {}
        if attention_mask is not None:
            positions = (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, part]
        elif cache is not None:
            positions = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)[:, part]
        if cache is not None:
            cache.start, more = begin, {"past_key_values": cache}
        # A bfloat16 base may carry a float32 adapter: autocast makes its products bfloat16 as well.
        head = self.denoiser.get_output_embeddings()
        half = head is not None and head.weight.dtype == torch.bfloat16
        off = nullcontext() if self.adapter else self.denoiser.disable_adapter()
        more |= {"position_ids": positions, "use_cache": cache is not None}
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=half), off:
            output = self.denoiser.get_decoder()(
                input_ids=ids[:, part], attention_mask=attention_mask, **more
            )
        return output.last_hidden_state[:, start - begin :]

    def logits(self, hidden, part=slice(0, None)):
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

    def chunk(self, hidden):
        """(V, how many positions' logits are made at once)."""
        head = self.denoiser.get_output_embeddings()
        V = hidden.shape[-1] if head is None else len(head.weight)
        return V, max(1, CHUNK.get(hidden.device.type, CHUNK["cpu"]) // V)

    def entropy_and_confidence(self, hidden, rule="eb"):
        """Of the distributions at N positions, untempered: (N,) in nats, (N,).

        Confidence is the best token's probability, not the drawn one's: it must not depend on the
        draw. [OUR CHOICE] Greedy, the two are the same. The entropy is right for rule "eb" alone.

        One pass over slices of the vocabulary. With m the highest logit so far, only the sums of
        e^(l - m) and of (l - m) e^(l - m) are kept. Both are easily corrected when m rises.
        """
        N, device, (V, _) = len(hidden), hidden.device, self.chunk(hidden)
        top, (total, dot) = hidden.new_full((N,), BLOCKED).float(), torch.zeros(2, N, device=device)
        width = max(1024, SLICE.get(device.type, SLICE["cpu"]) // N)
        for start in range(0, V, width):
            logits = self.logits(hidden, slice(start, start + width))  # (N, width)
            highest = torch.maximum(top, logits.amax(-1))
            rise, top = top - highest, highest  # rise <= 0
            logits -= highest.unsqueeze(-1)
            weight = logits.exp()
            if rule == "eb":
                dot = rise.exp() * (dot + rise * total) + weight.mul(logits).sum(-1)
            total = rise.exp() * total + weight.sum(-1)
        return (total.log() - dot / total).clamp(min=0), 1 / total

    def draw(self, hidden, temperature, chance):
        """A token for each of N positions and its log-prob: (N,), (N,). Temperature 0: the best.

        Drawn by inversion: the first token at which the cumulated probability exceeds `chance`, a
        uniform number for each position, (N,) float64 in [0, 1). Gumbel noise would take V numbers.
        Cumulated in float64, or the tail of a large vocabulary would be rounded away.
        """
        tokens, logps, size = [], [], self.chunk(hidden)[1]
        for part, uniform in zip(hidden.split(size), chance.split(size), strict=True):
            logits = self.logits(part).contiguous()  # (n, V) a row side by side: cumsum is fast so
            if temperature == 0:
                token = logits.argmax(-1, keepdim=True)  # (n, 1)
                logp = torch.zeros_like(token, dtype=torch.float)
            else:  # in place: it is large
                weight = logits.sub_(logits.amax(-1, keepdim=True)).div_(temperature).exp_()
                cumulated = weight.cumsum(-1, dtype=torch.float64)
                point = uniform.unsqueeze(-1) * cumulated[:, -1:]
                token = torch.searchsorted(cumulated, point, right=True)
                token = token.clamp(max=logits.shape[1] - 1)
                logp = (weight.gather(-1, token) / cumulated[:, -1:]).log().float()
            tokens.append(token.squeeze(-1))
            logps.append(logp.squeeze(-1))
        return torch.cat(tokens), torch.cat(logps)

    def token_logp(self, hidden, tokens, temperature):
        """Log-probs (N,) of N tokens at N states (N, D). Differentiable.

        Even then no (N, V) is kept: a chunk's logits are made again when its gradient is due.
        """

        def score(hidden, tokens):
            logits = self.logits(hidden) / temperature  # (n, V)
            return logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)

        size = self.chunk(hidden)[1]
        parts = list(zip(hidden.split(size), tokens.split(size), strict=True))
        if len(parts) == 1 or not torch.is_grad_enabled():
            return torch.cat([score(*part) for part in parts])
        return torch.cat([checkpoint(score, *part, use_reentrant=False) for part in parts])


class LogitsModel(nn.Module):
    """Any `model(ids, attention_mask=mask) -> logits` as a denoiser: a plain module, LLaDA's code.

    The logits stand in for the hidden states, so D = V, and all of a call's logits exist at once.
    Left padding is rolled behind the text: a model with absolute positions counts from the text.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model

    @property
    def device(self):
        return next(self.model.parameters()).device

    def get_decoder(self):
        return self

    def get_output_embeddings(self):
        return None

    def forward(self, input_ids, attention_mask=None, past_key_values=None, **_):
        if past_key_values is not None:
            raise ValueError("a LogitsModel has no keys and values to keep: take the cache none")
        index, mask = torch.arange(input_ids.shape[1], device=input_ids.device), attention_mask
        index = index.expand_as(input_ids)  # (b, S)
        if mask is not None:
            index = (index + (~mask.bool()).sum(1, keepdim=True)) % mask.shape[1]  # the text first
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
        self.keys, self.values, self.start = [], [], 0

    def update(self, keys, values, layer, *_, **__):
        """A layer's new keys and values, from position `start` on -> those of the whole canvas."""
        if layer == len(self.keys):  # the call that fills it
            self.keys.append(keys)
            self.values.append(values)
        else:
            part = slice(self.start, self.start + keys.shape[2])
            self.keys[layer][:, :, part], self.values[layer][:, :, part] = keys, values
        return self.keys[layer], self.values[layer]

    def keep(self, rows):
        """Drop all but some rows, or repeat some. One tensor at a time: two copies may not fit."""
        for tensors in (self.keys, self.values):
            for i, tensor in enumerate(tensors):
                tensors[i] = tensor[rows]

    def get_seq_length(self, layer=0):
        return self.start

    def get_query_offset(self, layer=0):
        return self.start

    def get_mask_sizes(self, query_length, layer=0):
        return (self.keys[layer].shape[2] if layer < len(self.keys) else query_length), 0


class Float32Product(torch.autograd.Function):
    """weight (v, D) @ hidden (N, D)^T -> (v, N), of bfloat16 numbers, the result float32.

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
        gradient, wanted = gradient.to(weight.dtype), context.needs_input_grad[0]
        return gradient @ hidden if wanted else None, gradient.T @ weight


class Echo(nn.Embedding):
    """A plain model: it predicts a position from its own word and the mean of all words."""

    def forward(self, ids, attention_mask):
        words = super().forward(ids)  # (b, S, V)
        return words + words.mean(1, keepdim=True)


@torch.no_grad()
def example():
    """One call on five words, and what is read off it."""
    words, ids = ["[MASK]", "a", "b", "c", "d"], torch.tensor([[1, 1, 2, 0]])
    model = Echo(5, 5, _weight=3 * torch.eye(5))
    calls = DenoiserCalls(LogitsModel(model), mask_id=0)
    hidden = calls.hidden(ids)[0]  # (4, 5)
    entropy, confidence = calls.entropy_and_confidence(hidden)
    last = hidden[3:].expand(5, -1)
    logp = calls.token_logp(last, torch.arange(5), temperature=1.0)
    chance = torch.rand(5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tokens, _ = calls.draw(last, 1.0, chance)
    print("canvas        ", *(f"{words[i]:>6}" for i in ids[0]))
    print("entropy, nats ", *(f"{x:6.2f}" for x in entropy.tolist()))
    print("confidence    ", *(f"{x:6.2f}" for x in confidence.tolist()))
    print("at [MASK]     ", *(f"{w} {x.exp():.2f} " for w, x in zip(words, logp, strict=True)))
    print("five draws    ", *(words[i] for i in tokens), "  (never [MASK])")


if __name__ == "__main__":
    example()
