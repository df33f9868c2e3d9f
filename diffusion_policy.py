"""The reverse process of a masked-diffusion language model, as a policy: rollouts that record what training needs.

A completion starts as L times [MASK]. Then, until no mask is left: one denoiser call on prompt and completion, a rule picks
positions (sampler.py), their tokens are drawn from the denoiser's distribution at each of them. The true policy is

    pi(o | c) = product over tokens of  pi(o_t | c, z_{t-1})      z_{t-1}: the partly unmasked completion before step t [PAPER]

and every factor is at hand while sampling, so it is recorded then (`behaviour_logp`) and costs no extra call. [OUR CHOICE]

Where the time goes, and what is done about it (tests/benchmark.py measures it):
    the vocabulary   126,464 logits a position: only for positions that may be unmasked now, a slice of the vocabulary at a time
    the layers       finished rows leave the batch; rows of like prompt length go together, so little is padded; a group's first
                     call, G times the same, is made once; block caches (below) run only a part of the canvas
    waiting          the masks are kept on the host too: a step needs one short message from the GPU, which positions were
                     selected, and with `stop_at_eos` a second one, the tokens drawn

Shapes: B rows, P prompt tokens (left-padded), L completion tokens, S = P + L, V vocabulary, D hidden size.
"""

from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from os.path import commonprefix

import torch
from torch.utils.checkpoint import checkpoint

CACHES = ("none", "prefix", "dual")
CHUNK = {"cuda": 2**27, "cpu": 2**24}  # logits made at once: of LLaDA's vocabulary 1,061 positions, half a GiB in float32, or 132
SLICE = {"cuda": 2**27, "cpu": 2**19}  # the same where a slice of the vocabulary at a time will do: on a CPU, what fits its cache
BLOCKED = -1e30  # the logit of [MASK], which is never drawn nor scored; finite, because 0 times infinity is no number


@dataclass
class Rollout:
    """Everything about B completions that likelihood, loss and log need.

    A position that was never drawn because its row stopped at an end token holds [EOS] and has `unmask_step` nfe + 1: it was
    a mask in every state that the denoiser saw.
    """

    prompt_ids: torch.Tensor  #     (B, P) long, left-padded
    prompt_mask: torch.Tensor  #    (B, P) bool, False on padding
    completion: torch.Tensor  #     (B, L) long, o
    unmask_step: torch.Tensor  #    (B, L) long, the step t, counted from 1, at which a token was drawn
    behaviour_logp: torch.Tensor  # (B, L) float, log pi_old^true(o_t | c, z_{t-1}), of the distribution really drawn from
    token_mask: torch.Tensor  #     (B, L) bool, tokens up to the first end token, it included: what follows is padding
    nfe: torch.Tensor  #            (B,)   long, T, the row's denoiser calls
    threshold: torch.Tensor  #      (B,)   float, gamma in nats (nan where the rule has none)
    threshold_logp: torch.Tensor  # (B,)   float, log-prob of gamma under the threshold head (0 where it was not drawn)
    prompt_state: torch.Tensor  #   (B, D) float, what the threshold head reads
    temperature: float  #           that the tokens were drawn with

    def rows(self, index):
        """The same for some rows: a slice, or a long or bool tensor."""
        return replace(self, **{f.name: getattr(self, f.name)[index] for f in fields(self) if f.name != "temperature"})


class BlockCache:
    """Keys and values of a whole canvas, (b, heads, S, head size) a layer; a call on a part of it overwrites that part.

    Block-wise decoding fills it by one call on everything when a block opens. Until that block is full, the calls run only

        prefix   the block and all behind it: what is left of the block keeps its keys and values
        dual     the block alone: what is right of it keeps them too

    (Fast-dLLM's two caches, arXiv 2505.22618.) Approximate: attention is bidirectional, so whatever is unmasked changes all
    other positions' keys and values a little, and the cached ones are from before. The behaviour log-probs are those of the
    distributions really drawn from, so the importance weights see the difference and correct for it.
    """

    is_compileable = False  # this and the three get_ methods are what transformers asks of a cache

    def __init__(self):
        self.keys, self.values, self.start = [], [], 0

    def update(self, keys, values, layer, *_, **__):
        """The layer's new keys and values, of positions start, start + 1, ... -> those of the whole canvas."""
        if layer == len(self.keys):  # the call that fills it
            self.keys.append(keys)
            self.values.append(values)
        else:
            part = slice(self.start, self.start + keys.shape[2])
            self.keys[layer][:, :, part], self.values[layer][:, :, part] = keys, values
        return self.keys[layer], self.values[layer]

    def keep(self, rows):
        """Drop all but some rows, or repeat some."""
        for tensors in (self.keys, self.values):
            for i, tensor in enumerate(tensors):  # one after the other: two copies of everything would be too much memory
                tensors[i] = tensor[rows]

    def get_seq_length(self, layer=0):
        return self.start

    def get_query_offset(self, layer=0):
        return self.start

    def get_mask_sizes(self, query_length, layer=0):
        return (self.keys[layer].shape[2] if layer < len(self.keys) else query_length), 0


def unique_rows(rows):
    """(R, S) -> first (U,), the index of one of each distinct row, and copy (R,): rows[first][copy] == rows."""
    _, copy = torch.unique(rows, dim=0, return_inverse=True)
    index = torch.arange(len(rows), device=rows.device)
    first = torch.full_like(index, len(rows)).scatter_reduce(0, copy, index, "amin")
    return first[first < len(rows)], copy


def end_token_ids(tokenizer):
    """The tokens that end a completion: eos, and what ends an assistant's turn in the tokenizer's own chat template (LLaDA: eot)."""
    ends = [tokenizer.eos_token_id]
    if tokenizer.chat_template is not None:
        turn = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "ANSWER"}]
        try:
            after = tokenizer.apply_chat_template(turn, tokenize=False).rpartition("ANSWER")[2]
        except Exception:  # a template may refuse whatever it likes
            return ends
        special = [i for i in tokenizer(after, add_special_tokens=False).input_ids if i in tokenizer.added_tokens_decoder]
        ends += [i for i in special[:1] if i not in ends]
    return ends


def length_buckets(lengths, room):
    """Rows, as lists of indices, that are completed together: a new list wherever padding would exceed an eighth of a canvas.

    Exactly equal lengths alone would need no padding at all, but make batches too small for a GPU.
    """
    buckets = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):  # a stable sort: a group stays together
        if not buckets or lengths[buckets[-1][0]] - lengths[row] > (lengths[buckets[-1][0]] + room) / 8:
            buckets.append([])
        buckets[-1].append(row)
    return buckets


class DiffusionPolicy:
    """A denoiser, its tokenizer and, if the threshold is learned, its head. `adapter` False looks past a LoRA adapter."""

    def __init__(self, denoiser, tokenizer, threshold_head=None, adapter=True):
        self.denoiser, self.tokenizer, self.threshold_head, self.adapter = denoiser, tokenizer, threshold_head, adapter
        self.mask_id, self.eos_id = tokenizer.mask_token_id, tokenizer.eos_token_id
        self.end_ids = end_token_ids(tokenizer)  # eos, and what ends a turn: LLaDA writes <|eot_id|>, then a flood of eos
        self.compact = getattr(denoiser.config, "compact_prompts", False)  # tiny: no instructions, no chat template

    def without_adapter(self):
        """The base model under a LoRA adapter, as a policy that shares its weights: the reference model, for free."""
        return DiffusionPolicy(self.denoiser, self.tokenizer, adapter=False)

    def encode(self, prompts, prefill="", room=0):
        """Texts -> prompt_ids (B, P), prompt_mask (B, P), left-padded so that every completion starts at column P.

        Each becomes one user message in the tokenizer's chat template; `prefill` is how the answer is made to begin. (A compact
        model gets the text as it stands.) Raises ValueError for an empty prompt, a missing chat template, a text that the
        tokenizer has no tokens for, and a prompt that leaves no `room` for the completion: nothing is ever cut off.
        """
        if not all(prompts):
            raise ValueError("an empty prompt: there is nothing to complete")
        texts = prompts
        if not self.compact:
            if self.tokenizer.chat_template is None:
                raise ValueError("the tokenizer has no chat template: take the Instruct model's (its chat_template.jinja)")
            messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
            texts = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        texts = [text + prefill for text in texts]
        try:  # the template has written the special tokens
            batch = self.tokenizer(texts, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt")
        except Exception as error:  # tokenizers raises bare Exceptions
            longest = max(prompts, key=len)
            raise ValueError(f"no tokens for a text such as {longest[:60]!r}: {error}") from None
        lengths, limit = batch.attention_mask.sum(1), self.denoiser.config.max_position_embeddings
        if lengths.max() + room > limit:
            shared = len(commonprefix(prompts)) if len(set(prompts)) > 1 else 0  # the instructions tell no prompt from another
            text = prompts[lengths.argmax()][shared : shared + 60]
            which = f"prompt {lengths.argmax() + 1} of {len(prompts)}, with {text!r}, has {lengths.max()} tokens"
            raise ValueError(f"{which}: with {room} for the completion that is more than the {limit} that the model can read")
        device = self.denoiser.device
        return batch.input_ids.to(device), batch.attention_mask.bool().to(device)

    def decode(self, rollout):
        """The completions' texts, each up to its first end token."""
        texts = []
        for row, is_text in zip(rollout.completion.tolist(), rollout.token_mask.tolist(), strict=True):
            ids = [token for token, text in zip(row, is_text, strict=True) if text and token not in self.end_ids]
            texts.append(self.tokenizer.decode(ids))
        return texts

    def ends(self, tokens):
        """Which tokens end a completion. Any shape -> bool"""
        return torch.isin(tokens, torch.tensor(self.end_ids, device=tokens.device))

    def hidden(self, ids, attention_mask=None, cache=None, start=0, stop=None):
        """One denoiser call, without its last layer: ids (B, S) -> last hidden states (B, S, D), or (B, stop - start, D).

        attention_mask (B, S) bool, or None where nothing is padded: attention then keeps its fastest kernel. Left padding needs
        no position ids, since rotary positions are relative. With a filled cache only positions start to stop are run.
        """
        config = self.denoiser.config
        stop = ids.shape[1] if stop is None else stop
        begin = max(start - int(getattr(config, "shift_logits", False)), 0)  # Dream reads a position's logits one to its left
        positions, past = None, {}
        if cache is not None:
            cache.start = begin
            positions = torch.arange(begin, stop, device=ids.device).unsqueeze(0)  # (1, stop - begin)
            past = {"past_key_values": cache}
        # A bfloat16 base carries a float32 adapter: autocast makes its products bfloat16 as well.
        half = self.denoiser.get_input_embeddings().weight.dtype == torch.bfloat16
        off = nullcontext() if self.adapter else self.denoiser.disable_adapter()
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=half), off:
            states = self.denoiser.get_decoder()(
                input_ids=ids[:, begin:stop], attention_mask=attention_mask, position_ids=positions, use_cache=cache is not None, **past
            ).last_hidden_state
        return states[:, start - begin :]

    def logits(self, hidden, part=slice(0, None)):
        """hidden (N, D) of any N positions -> logits (N, v) in fp32, of the whole vocabulary or a part of it, [MASK] BLOCKED.

        Only for positions that are needed: for LLaDA-8B one row of logits is half a megabyte.
        """
        head = self.denoiser.get_output_embeddings()
        logits = (head.weight[part] @ hidden.T).T.float()  # this way round a CPU is up to twice as fast
        if head.bias is not None:
            logits = logits + head.bias[part]
        if part.start <= self.mask_id < part.start + logits.shape[1]:
            logits[:, self.mask_id - part.start] = BLOCKED
        return logits

    def chunk(self):
        """How many positions' logits are made at once."""
        return max(1, CHUNK.get(self.denoiser.device.type, CHUNK["cpu"]) // self.denoiser.config.vocab_size)

    def surety(self, hidden, rule):
        """(entropy, confidence), (N,) each, of the distributions at N positions; entropy only for the rule that reads it.

        Entropy in nats, untempered. Confidence is the best token's probability, not the drawn one's, so that it does not
        depend on the draw [OUR CHOICE]. Greedy, the two are the same.

        The softmax is taken in one pass over slices of the vocabulary. With m the highest logit so far, all that has to be kept
        are the sums of e^(l - m) and of (l - m) e^(l - m), and both are easily corrected when m rises.
        """
        V, N = self.denoiser.config.vocab_size, len(hidden)
        top, total, dot = torch.full((N,), BLOCKED, device=hidden.device), *torch.zeros(2, N, device=hidden.device)
        width = max(1024, SLICE.get(hidden.device.type, SLICE["cpu"]) // N)
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

    def draw(self, hidden, temperature, generator=None):
        """A token for each of N positions, and its log-prob at this temperature: (N,), (N,). Temperature 0 takes the best one.

        By inversion: the first token at which the cumulated probability exceeds a uniform number; that is one random number a
        token, where Gumbel noise takes V. Cumulated in float64, or the tail of a large vocabulary would be rounded away.
        """
        tokens, logps = [], []
        for part in hidden.split(self.chunk()):
            logits = self.logits(part).contiguous()  # (n, V), a row's logits side by side: cumulating across them is slow
            if temperature > 0:
                weight = logits.sub_(logits.amax(-1, keepdim=True)).div_(temperature).exp_()  # in place: it is large
                cumulated = weight.cumsum(-1, dtype=torch.float64)
                total = cumulated[:, -1:]
                uniform = torch.rand((len(part), 1), generator=generator, dtype=torch.float64, device=total.device)
                token = torch.searchsorted(cumulated, uniform * total, right=True).clamp(max=logits.shape[1] - 1)  # (n, 1)
                tokens.append(token.squeeze(-1))
                logps.append((weight.gather(-1, token) / total).log().float().squeeze(-1))
            else:
                tokens.append(logits.argmax(-1))
                logps.append(torch.zeros(len(part), device=logits.device))
        return torch.cat(tokens), torch.cat(logps)

    def token_logp(self, hidden, tokens, temperature):
        """Log-probs (N,) of N tokens at N positions, hidden (N, D). Differentiable, and even then no (N, V) is kept: a chunk's
        logits are made again when its gradient is due.
        """

        def score(hidden, tokens):
            logits = self.logits(hidden) / temperature  # (n, V)
            return logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)

        parts = list(zip(hidden.split(self.chunk()), tokens.split(self.chunk()), strict=True))
        if len(parts) == 1 or not torch.is_grad_enabled():
            return torch.cat([score(*part) for part in parts])
        return torch.cat([checkpoint(score, *part, use_reentrant=False) for part in parts])

    @torch.no_grad()
    def rollout(
        self, prompt_ids, prompt_mask, length, decoder, generator=None,
        temperature=1.0, sample_threshold=True, stop_at_eos=False, cache="none",
    ):  # fmt: skip
        """Complete B prompts with `length` tokens each. Returns a Rollout.

        temperature 0 is greedy, and its log-probs are 0. `sample_threshold` False takes the median gamma. `stop_at_eos` ends
        a row once all up to an end token is unmasked, since what is left can only be padding. cache "prefix" or "dual" is
        BlockCache's, faster and approximate. Raises ValueError for a cache without blocks, and for a gamma from nowhere.
        """
        if decoder.rule == "eb" and decoder.setting is None and self.threshold_head is None:
            raise ValueError("this policy has no threshold head: give the eb decoder a gamma")
        if cache not in CACHES:
            raise ValueError(f"unknown cache {cache!r}: choose one of {', '.join(CACHES)}")
        if cache != "none" and decoder.block_length is None:
            raise ValueError(f"the {cache} cache works block by block: give a block_length")
        lengths = prompt_mask.sum(dim=1).tolist()
        buckets, parts = length_buckets(lengths, length), []
        for rows in buckets:
            longest = lengths[rows[0]]
            index = torch.tensor(rows, device=prompt_ids.device)
            parts.append(
                self._unmask(
                    prompt_ids[index, -longest:], prompt_mask[index, -longest:], longest == lengths[rows[-1]], length, decoder, generator,
                    temperature, sample_threshold, stop_at_eos, cache,
                )
            )  # fmt: skip
        back = torch.tensor([row for rows in buckets for row in rows]).argsort().to(prompt_ids.device)  # to the order of the prompts
        completion, *rest = (torch.cat(column)[back] for column in zip(*parts, strict=True))
        end = self.ends(completion)
        token_mask = (end.cumsum(-1) - end.long()) == 0  # no end token before it
        unmask_step, behaviour_logp, *rest = rest
        return Rollout(prompt_ids, prompt_mask, completion, unmask_step, behaviour_logp, token_mask, *rest, temperature)

    def _unmask(self, prompt_ids, prompt_mask, unpadded, length, decoder, generator, temperature, sample_threshold, stop_at_eos, cache):
        """The loop itself, for rows of about one prompt length. Returns the Rollout's fields from completion to prompt_state."""
        device, (B, P) = prompt_ids.device, prompt_ids.shape
        canvas = torch.cat([prompt_ids, torch.full((B, length), self.mask_id, device=device)], dim=1)  # (B, S)
        attend = None if unpadded else torch.cat([prompt_mask, torch.ones_like(canvas[:, P:], dtype=torch.bool)], dim=1)
        behaviour_logp = torch.zeros((B, length), device=device)
        gamma = torch.full((B,), torch.nan if decoder.rule != "eb" or decoder.setting is None else decoder.setting, device=device)
        gamma_logp, prompt_state = torch.zeros(B, device=device), None
        first, copy = unique_rows(canvas)  # a group's rows all start the same: they share the first call
        # What the loop branches on is on the host.
        masked, ended = torch.ones(2, B, length, dtype=torch.bool) & torch.tensor([[[True]], [[False]]])
        unmask_step, nfe = torch.zeros((B, length), dtype=torch.long), torch.zeros(B, dtype=torch.long)
        cached, cached_block, cached_rows = None, -1, None

        while True:
            # Rows with a mask before their first end token are unfinished; each one's first unfinished block is open.
            rows = (masked & (ended.cumsum(-1) == 0)).any(-1).nonzero().squeeze(-1)  # (b,)
            if not len(rows):
                break
            open_ = decoder.open_positions(masked[rows])  # (b, L)
            start, stop = 0, P + length
            if cache != "none":  # all rows do the same block, and those that are through with it wait
                block = open_.long().argmax(-1) // decoder.block_length  # (b,)
                rows, open_ = rows[block == block.min()], open_[block == block.min()]
                if block.min() != cached_block:  # a new block opens: everything is run, and kept
                    cached, cached_block, cached_rows = BlockCache(), block.min(), rows
                else:
                    start = P + int(cached_block) * decoder.block_length
                    stop = stop if cache == "prefix" else min(start + decoder.block_length, stop)
                    if len(rows) < len(cached_rows):
                        cached.keep(torch.isin(cached_rows, rows).nonzero().squeeze(-1).to(device))
                        cached_rows = rows
            r, position = (index.to(device) for index in open_.nonzero(as_tuple=True))  # (N,) each, N open positions of all rows
            rows_here = rows.to(device)

            if prompt_state is None:  # the first call
                hidden = self.hidden(canvas[first], None if attend is None else attend[first], cached)[copy]  # (B, S, D)
                if cached:
                    cached.keep(copy)
                weight = prompt_mask.unsqueeze(-1) / prompt_mask.sum(dim=1).view(B, 1, 1)  # (B, P, 1)
                prompt_state = (hidden[:, :P].float() * weight).sum(dim=1)  # (B, D)
                if decoder.rule == "eb" and decoder.setting is None:
                    distribution = self.threshold_head(prompt_state)
                    gamma = distribution.sample(generator) if sample_threshold else distribution.median
                    gamma_logp = distribution.log_prob(gamma)
            else:
                hidden = self.hidden(canvas[rows_here], None if attend is None else attend[rows_here], cached, start, stop)
            hidden = hidden[r, P + position - start]  # (N, D)

            surety = torch.zeros(2, *open_.shape, device=device)
            surety[0, r, position], surety[1, r, position] = self.surety(hidden, decoder.rule)
            selected = decoder.select(*surety, open_.to(device), gamma[rows_here]).cpu()  # (b, L); here the host waits
            chosen = selected[open_].nonzero().squeeze(-1)  # (n,) of the N
            tokens, logp = self.draw(hidden[chosen.to(device)], temperature, generator)  # (n,) each
            row, position = selected.nonzero(as_tuple=True)  # (n,) each
            row = rows[row]
            where = row.to(device), position.to(device)
            canvas[where[0], P + where[1]] = tokens
            behaviour_logp[where] = logp

            nfe[rows] += 1
            unmask_step[row, position] = nfe[row]
            masked[row, position] = False
            if stop_at_eos:  # masks only count up to the first end token
                ended[row, position] = self.ends(tokens).cpu()

        completion = canvas[:, P:].masked_fill(masked.to(device), self.eos_id)  # what was never drawn is padding
        unmask_step = torch.where(masked, nfe.unsqueeze(1) + 1, unmask_step)
        return completion, unmask_step.to(device), behaviour_logp, nfe.to(device), gamma, gamma_logp, prompt_state
