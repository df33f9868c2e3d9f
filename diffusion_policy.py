"""The reverse process of a masked-diffusion language model, as a policy.

A completion starts as L times [MASK]. Then, until no mask is left: one denoiser call on prompt and
completion, a rule picks positions (sampler.py), their tokens are drawn from the denoiser's
distribution at each of them. The true policy is

    pi(o | c) = product over tokens of  pi(o_t | c, z_{t-1})                                [PAPER]

with z_{t-1} the partly unmasked completion before step t. Every factor is at hand while sampling.
So it is recorded then, as `behaviour_logp`, and costs no extra call. [OUR CHOICE]

`python diffusion_policy.py` unmasks one completion step by step.

Shapes: B rows, P prompt tokens (left-padded), L completion tokens, S = P + L, V words, D wide.
"""

from contextlib import suppress
from dataclasses import dataclass, fields, replace
from os.path import commonprefix
from types import SimpleNamespace

import torch
from torch import nn

from denoiser import BlockCache, DenoiserCalls, LogitsModel
from sampler import Decoder


@dataclass
class Rollout:
    """Everything about B completions that likelihood, loss and log need.

    A position that was never drawn, because its row stopped at an end token, holds [EOS] and has
    unmask_step nfe + 1: it was a mask in every state that the denoiser saw.
    """

    prompt_ids: torch.Tensor  #     (B, P) long, left-padded
    prompt_mask: torch.Tensor  #    (B, P) bool, False on padding
    completion: torch.Tensor  #     (B, L) long, o
    unmask_step: torch.Tensor  #    (B, L) long, the step t, from 1, at which a token was drawn
    behaviour_logp: torch.Tensor  # (B, L) float, log pi_old^true(o_t | c, z_{t-1})
    token_mask: torch.Tensor  #     (B, L) bool, the text: tokens up to the first end token, with it
    nfe: torch.Tensor  #            (B,)   long, T, the row's denoiser calls
    threshold: torch.Tensor  #      (B,)   float, gamma in nats (nan where the rule has none)
    threshold_logp: torch.Tensor  # (B,)   float, its log-prob under the head (0 where not drawn)
    prompt_state: torch.Tensor  #   (B, D) float, what the threshold head reads
    temperature: float  #           that the tokens were drawn with

    def rows(self, index):
        """The same for some rows: a slice, or a long or bool tensor."""
        tensors = [f.name for f in fields(self) if f.name != "temperature"]
        return replace(self, **{name: getattr(self, name)[index] for name in tensors})

    @staticmethod
    def from_steps(*args, **more):
        """The Rollout of completions that another engine made: see replay.from_steps."""
        from training.replay import from_steps  # which this file does not need otherwise

        return from_steps(*args, **more)


class DiffusionPolicy(DenoiserCalls):
    """A denoiser, its tokenizer and, where the threshold is learned, its head.

    `prefill` is how every completion is made to begin. `rows_at_once` is how many rows a rollout
    completes together at most, 0: all. `adapter` False looks past a LoRA adapter.
    """

    def __init__(self, denoiser, tokenizer, threshold_head=None, adapter=True, prefill=""):
        super().__init__(denoiser, tokenizer.mask_token_id, adapter)
        self.tokenizer, self.threshold_head, self.prefill = tokenizer, threshold_head, prefill
        self.rows_at_once = 0
        self.eos_id, self.end_ids = tokenizer.eos_token_id, end_token_ids(tokenizer)
        # The tiny model reads short prompts as they stand: no instructions, no chat template.
        self.compact = getattr(getattr(denoiser, "config", None), "compact_prompts", False)

    @torch.no_grad()
    def rollout(self, prompt_ids, prompt_mask, length, decoder, chance=None, num_generations=1):
        """Complete B prompts with `length` tokens each, as the decoder says. Returns a Rollout.

        prompt_ids, prompt_mask (B, P) from `encode`. num_generations G: each G adjacent rows have
        one prompt, so their first call, G times the same, is made once. Temperature 0 is greedy:
        its log-probs are 0. chance: a torch.Generator, or what `draw_chance` drew: no row's depends
        on the others. Raises ValueError for a gamma from nowhere, or groups that are none.
        """
        if decoder.rule == "eb" and decoder.level is None and self.threshold_head is None:
            raise ValueError("this policy has no threshold head: give the eb decoder a gamma")
        if not torch.equal(
            prompt_ids[::num_generations].repeat_interleave(num_generations, 0), prompt_ids
        ):
            raise ValueError(f"the prompts are no groups of {num_generations} equal rows")
        if not isinstance(chance, torch.Tensor):
            chance = self.draw_chance(len(prompt_ids), length, chance)
        lengths, parts = prompt_mask.sum(dim=1).tolist(), []
        most = (
            self.rows_at_once and max(self.rows_at_once // num_generations, 1) * num_generations
        )  # whole
        buckets = length_buckets(lengths, length, most)
        for rows in buckets:  # rows of about one prompt length: little is padded
            longest, index = lengths[rows[0]], torch.tensor(rows, device=prompt_ids.device)
            ids, mask = prompt_ids[index, -longest:], prompt_mask[index, -longest:]
            unmasking = Unmasking(self, ids, mask, chance[index], decoder, num_generations)
            while unmasking.unfinished():
                hidden = unmasking.call()
                if unmasking.first:
                    unmasking.read_prompt(hidden)
                positions, chosen, uniform = unmasking.select(hidden)
                tokens, logp = self.draw(chosen, decoder.temperature, uniform)
                unmasking.write_down(positions, tokens, logp)
            parts.append(unmasking.result())
        back = torch.tensor(sum(buckets, [])).argsort().to(prompt_ids.device)  # the prompts' order
        columns = [torch.cat(column)[back] for column in zip(*parts, strict=True)]
        return Rollout(prompt_ids, prompt_mask, *columns, decoder.temperature)

    def draw_chance(self, B, length, generator=None):
        """A rollout's: uniform numbers (B, L + 1), one for each position, the last for gamma."""
        how = {"dtype": torch.float64, "device": self.denoiser.device}
        return torch.rand((B, length + 1), generator=generator, **how)

    def without_adapter(self):
        """The base model under a LoRA adapter: a reference model that shares its weights."""
        how = {"adapter": False, "prefill": self.prefill}
        return DiffusionPolicy(self.denoiser, self.tokenizer, **how)

    def encode(self, prompts, room=0):
        """Texts -> prompt_ids (B, P), prompt_mask (B, P), left-padded: completions start at P.

        Each text becomes one user message in the tokenizer's chat template; `prefill` follows. (A
        compact model gets the text as it stands.) Raises ValueError for an empty prompt, a missing
        chat template, a text without tokens, and a prompt that leaves no `room` for the
        completion: nothing is ever cut off.
        """
        if not all(prompts):
            raise ValueError("an empty prompt: there is nothing to complete")
        texts = prompts
        if not self.compact:
            if self.tokenizer.chat_template is None:
                raise ValueError("the tokenizer has no chat template: take the Instruct model's")
            messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
            # Qwen3 was trained without its thoughts; other templates do not know the word.
            how = {"add_generation_prompt": True, "tokenize": False, "enable_thinking": False}
            texts = self.tokenizer.apply_chat_template(messages, **how)
        texts = [text + self.prefill for text in texts]
        how = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
        try:  # the template has written the special tokens
            batch = self.tokenizer(texts, add_special_tokens=False, **how)
        except Exception as error:  # tokenizers raises bare Exceptions
            text = max(prompts, key=len)[:60]
            raise ValueError(f"no tokens for a text such as {text!r}: {error}") from None
        longest, config = batch.input_ids.shape[1], getattr(self.denoiser, "config", None)
        limit = getattr(config, "max_position_embeddings", None) or longest + room
        if longest + room > limit:  # name the prompt by what sets it apart from the others
            shared = len(commonprefix(prompts)) if len(set(prompts)) > 1 else 0
            i = int(batch.attention_mask.sum(1).argmax())
            which = f"prompt {i + 1} of {len(prompts)}, with {prompts[i][shared : shared + 60]!r}"
            need = f"{longest} tokens and {room} for the completion"
            raise ValueError(
                f"{which}, needs {need}: more than the {limit} that the model can read"
            )
        device = self.denoiser.device
        return batch.input_ids.to(device), batch.attention_mask.bool().to(device)

    def decode(self, rollout):
        """The completions' texts with their prefill, each up to its first end token."""
        words = rollout.token_mask & ~self.ends(rollout.completion)  # (B, L)
        rows = [ids[mask].tolist() for ids, mask in zip(rollout.completion, words, strict=True)]
        return [self.prefill + self.tokenizer.decode(ids) for ids in rows]

    def ends(self, tokens):
        """Which tokens end a completion. Any shape -> bool"""
        return torch.isin(tokens, torch.tensor(self.end_ids, device=tokens.device))

    def text_mask(self, completion):
        """The tokens that have no end token before them. (B, L) -> (B, L) bool"""
        end = self.ends(completion)
        return (end.cumsum(-1) - end.long()) == 0


# ---- one batch on its way from all [MASK] to text ------------------------------------------------


class Unmasking:
    """The state of a rollout for rows of about one prompt length, and its steps.

    What the loop branches on is on the host: a step waits for the GPU once, to hear what was
    selected, and with `stop_at_eos` a second time, for the tokens.
    """

    def __init__(self, policy, prompt_ids, prompt_mask, chance, decoder, num_generations):
        (B, P), length = prompt_ids.shape, chance.shape[1] - 1
        self.policy, self.decoder, self.prompt_mask, self.P = policy, decoder, prompt_mask, P
        self.device, self.num_generations, self.first = prompt_ids.device, num_generations, True
        there, level = {"device": self.device}, decoder.level if decoder.rule == "eb" else None
        self.canvas = torch.cat([prompt_ids, torch.full((B, length), policy.mask_id, **there)], 1)
        self.chance, self.attend = chance, None  # unpadded, attention keeps its fastest kernel
        if not prompt_mask.all():
            self.attend = nn.functional.pad(prompt_mask, (0, length), value=True)  # (B, S)
        self.logp, self.gamma_logp = torch.zeros((B, length), **there), torch.zeros(B, **there)
        self.gamma = torch.full((B,), torch.nan if level is None else level, **there)
        self.masked = torch.ones((B, length), dtype=torch.bool)
        self.ended, self.step = ~self.masked, torch.zeros((B, length), dtype=torch.long)
        self.nfe, self.cache, self.block = torch.zeros(B, dtype=torch.long), None, -1

    def unfinished(self):
        """Who goes on: `rows` (b,), and the positions that may be unmasked, `open` (b, L) bool.

        Rows with a mask before their first end token. With a cache all rows do the same block, and
        those that are through with it wait.
        """
        text = self.masked & (self.ended.cumsum(-1) == 0)  # (B, L)
        self.rows = text.any(-1).nonzero().squeeze(-1)
        self.open = self.decoder.open_positions(self.masked[self.rows])
        self.start, self.stop = 0, None  # what a call runs: the whole canvas
        if self.decoder.cache != "none" and len(self.rows):
            block = self.open.long().argmax(-1) // self.decoder.block_length  # (b,)
            here = block == block.min()
            self.rows, self.open = self.rows[here], self.open[here]
            self.narrow(int(block.min()))
        self.there = self.rows.to(self.device)
        return len(self.rows) > 0

    def narrow(self, block):
        """With a cache: run everything when a block opens, then only prefix's or dual's part."""
        if block != self.block:
            self.cache, self.block, self.cached = BlockCache(), block, self.rows
            return
        if len(self.rows) < len(self.cached):
            self.cache.keep(torch.isin(self.cached, self.rows).nonzero()[:, 0].to(self.device))
            self.cached = self.rows
        self.start = self.P + block * self.decoder.block_length
        if self.decoder.cache == "dual":
            self.stop = min(self.start + self.decoder.block_length, self.canvas.shape[1])

    def call(self):
        """One denoiser call for these rows -> hidden states (b, stop - start, D)."""
        rows, G = self.there, self.num_generations
        if self.first:  # G rows of one prompt are still the same: one of them will do
            rows = rows[::G]
        attend = None if self.attend is None else self.attend[rows]
        hidden = self.policy.hidden(self.canvas[rows], attend, self.cache, self.start, self.stop)
        if self.first:
            copy = torch.arange(len(hidden), device=self.device).repeat_interleave(G)
            hidden = hidden[copy]
            if self.cache:
                self.cache.keep(copy)
        return hidden

    def read_prompt(self, hidden):
        """After the first call: the prompt's mean state (B, D), and from it each row's gamma."""
        self.first, decoder = False, self.decoder
        self.prompt_state = mean_state(hidden, self.prompt_mask)
        if decoder.rule == "eb" and decoder.level is None:
            head, drawn = self.policy.threshold_head(self.prompt_state), decoder.sample_threshold
            self.gamma = head.sample(self.chance[:, -1]) if drawn else head.median
            self.gamma_logp = head.log_prob(self.gamma)

    def select(self, hidden):
        """The positions to unmask now, (b, L) bool on the host; their states (n, D) and chance."""
        row, position = (index.to(self.device) for index in self.open.nonzero(as_tuple=True))
        hidden = hidden[row, self.P + position - self.start]  # (N, D) of the open positions
        read = torch.zeros(2, *self.open.shape, device=self.device)
        surety = self.policy.entropy_and_confidence(hidden, self.decoder.rule)
        read[0, row, position], read[1, row, position] = surety
        gamma, open_there = self.gamma[self.there], self.open.to(self.device)
        selected = self.decoder.select(*read, open_there, gamma).cpu()  # here the host waits
        if not selected.any(1).all():  # or the loop would have no end
            raise ValueError("the denoiser's output is not finite: no position can be selected")
        chosen = selected[self.open].nonzero()[:, 0].to(self.device)
        return selected, hidden[chosen], self.chance[self.there[row], position][chosen]

    def write_down(self, selected, tokens, logp):
        """Put the tokens onto the canvas; note how likely, when, and how many calls."""
        row, position = selected.nonzero(as_tuple=True)
        row = self.rows[row]
        self.canvas[row.to(self.device), self.P + position.to(self.device)] = tokens
        self.logp[row.to(self.device), position.to(self.device)] = logp
        self.nfe[self.rows] += 1
        self.step[row, position] = self.nfe[row]
        self.masked[row, position] = False
        if self.decoder.stop_at_eos:
            self.ended[row, position] = self.policy.ends(tokens).cpu()

    def result(self):
        """The Rollout's fields from completion to prompt_state. What was never drawn is padding."""
        masked, nfe = self.masked.to(self.device), self.nfe.to(self.device)
        completion = self.canvas[:, self.P :].masked_fill(masked, self.policy.eos_id)
        step = torch.where(masked, nfe.unsqueeze(1) + 1, self.step.to(self.device))
        text = self.policy.text_mask(completion)
        gamma = (self.gamma, self.gamma_logp, self.prompt_state)
        return completion, step, self.logp, text, nfe, *gamma


def mean_state(hidden, prompt_mask):
    """What the threshold head reads: the mean of a prompt's states. (B, S, D), (B, P) -> (B, D)"""
    weight = prompt_mask.unsqueeze(-1) / prompt_mask.sum(dim=1).view(-1, 1, 1)
    return (hidden[:, : prompt_mask.shape[1]].float() * weight).sum(dim=1)


def length_buckets(lengths, room, most=0):
    """Rows that are completed together, as lists of indices, longest first: padding stays under an
    eighth of a canvas. (Equal lengths alone would make batches too small for a GPU.) No list has
    more than `most` rows; 0: no limit.
    """
    buckets = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):  # groups stay
        longest = lengths[buckets[-1][0]] if buckets else 0
        full = buckets and len(buckets[-1]) == most
        if not buckets or full or longest - lengths[row] > (longest + room) / 8:
            buckets.append([])
        buckets[-1].append(row)
    return buckets


def end_token_ids(tokenizer):
    """The tokens that end a completion: eos, and of a chat model what ends a turn, and padding.

    LLaDA writes <|eot_id|>, then a flood of eos; Qwen's eos ends a turn, and it pads with another.
    """
    ends, text = [tokenizer.eos_token_id], ""
    if tokenizer.chat_template is not None:
        turn = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "ANSWER"}]
        with suppress(Exception):  # a template may refuse whatever it likes
            text = tokenizer.apply_chat_template(turn, tokenize=False).rpartition("ANSWER")[2]
    after = tokenizer(text, add_special_tokens=False).input_ids if text else []
    special = [i for i in after if i in tokenizer.added_tokens_decoder][:1]
    special += [tokenizer.pad_token_id] if special else []
    return list(dict.fromkeys(ends + special))


class Toy(nn.Embedding):
    """A toy: its rows are what it wants to say; the more neighbours it sees, the surer it is."""

    def forward(self, ids, attention_mask):
        seen = nn.functional.pad((ids > 0).float(), (1, 1))  # (b, S + 2)
        return self.weight * (2 + 2 * (seen[:, :-2] + seen[:, 2:])).unsqueeze(-1)  # (b, S, V)


def example():
    """One completion of the prompt "we", six tokens, by the entropy-bounded rule."""
    words = ["[MASK]", "[EOS]", "we", "are", "what", "we", "read"]
    tokenizer = SimpleNamespace(mask_token_id=0, eos_token_id=1, chat_template=None)
    toy = LogitsModel(Toy(7, 7, _weight=torch.eye(7)[[2, 2, 3, 4, 5, 6, 1]]))
    policy, prompt, chance = DiffusionPolicy(toy, tokenizer), torch.tensor([[2]]), torch.Generator()
    decoder, chance = Decoder("eb", 1.2), chance.manual_seed(1)
    rollout = policy.rollout(prompt, prompt > 0, 6, decoder, chance).rows(0)
    for t in range(int(rollout.nfe) + 1):
        tokens = zip(rollout.completion, rollout.unmask_step, strict=True)
        print(f"z_{t}", *(f"{words[i] if step <= t else '_':>7}" for i, step in tokens))
    print("p  ", *(f"{p:7.2f}" for p in rollout.behaviour_logp.exp().tolist()))
    print(f"{rollout.nfe} denoiser calls for 6 tokens; p is the probability each was drawn with")


if __name__ == "__main__":
    example()
