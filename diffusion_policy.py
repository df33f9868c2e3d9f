"""The reverse process of a masked-diffusion language model, as a policy: rollouts that record what training needs.

A completion starts as L times [MASK]. Then, until no mask is left: one denoiser call on prompt and completion, a rule picks
positions (sampler.py), their tokens are drawn from the denoiser's distribution at each of them. The true policy is

    pi(o | c) = product over tokens of  pi(o_t | c, z_{t-1})      z_{t-1}: the partly unmasked completion before step t [PAPER]

and every factor is at hand while sampling, so it is recorded then (`behaviour_logp`) and costs no extra call. [OUR CHOICE]

Shapes: B rows, P prompt tokens (left-padded), L completion tokens, S = P + L, V vocabulary, D hidden size.
"""

from dataclasses import dataclass, fields, replace

import torch


@dataclass
class Rollout:
    """Everything about B completions that likelihood, loss and log need.

    A position that was never drawn because its row stopped at [EOS] holds [EOS] and has `unmask_step` nfe + 1: it was a mask
    in every state that the denoiser saw.
    """

    prompt_ids: torch.Tensor  #     (B, P) long, left-padded
    prompt_mask: torch.Tensor  #    (B, P) bool, False on padding
    completion: torch.Tensor  #     (B, L) long, o
    unmask_step: torch.Tensor  #    (B, L) long, the step t, counted from 1, at which a token was drawn
    behaviour_logp: torch.Tensor  # (B, L) float, log pi_old^true(o_t | c, z_{t-1}), of the distribution really drawn from
    token_mask: torch.Tensor  #     (B, L) bool, tokens up to the first [EOS], it included: what follows is padding
    nfe: torch.Tensor  #            (B,)   long, T, the row's denoiser calls
    threshold: torch.Tensor  #      (B,)   float, gamma in nats (nan where the rule has none)
    threshold_logp: torch.Tensor  # (B,)   float, log-prob of gamma under the threshold head (0 where it was not drawn)
    prompt_state: torch.Tensor  #   (B, D) float, what the threshold head reads
    temperature: float  #           that the tokens were drawn with

    def rows(self, index):
        """The same for some rows: a slice, or a long or bool tensor."""
        return replace(self, **{f.name: getattr(self, f.name)[index] for f in fields(self) if f.name != "temperature"})


class DiffusionPolicy:
    """A denoiser, its tokenizer and, if the threshold is learned, its head."""

    def __init__(self, denoiser, tokenizer, threshold_head=None):
        self.denoiser, self.tokenizer, self.threshold_head = denoiser, tokenizer, threshold_head
        self.mask_id, self.eos_id = tokenizer.mask_token_id, tokenizer.eos_token_id
        self.compact = tokenizer.chat_template is None  # not an instruct model: it gets the compact prompts

    def encode(self, prompts):
        """Texts -> prompt_ids (B, P), prompt_mask (B, P), left-padded so that every completion starts at column P.

        Raises ValueError for an empty prompt, and for a text that the tokenizer has no tokens for.
        """
        if not all(prompts):
            raise ValueError("an empty prompt: there is nothing to complete")
        try:
            batch = self.tokenizer(prompts, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt")
        except Exception as error:  # tokenizers raises bare Exceptions
            longest = max(prompts, key=len)
            raise ValueError(f"no tokens for a text such as {longest[:60]!r}: {error}") from None
        device = self.denoiser.device
        return batch.input_ids.to(device), batch.attention_mask.bool().to(device)

    def decode(self, rollout):
        """The completions' texts, each up to its first [EOS]."""
        texts = []
        for row, is_text in zip(rollout.completion.tolist(), rollout.token_mask.tolist(), strict=True):
            ids = [token for token, text in zip(row, is_text, strict=True) if text and token != self.eos_id]
            texts.append(self.tokenizer.decode(ids))
        return texts

    def hidden(self, ids, attention_mask):
        """One denoiser call, without its last layer: ids (B, S), attention_mask (B, S) bool -> last hidden states (B, S, D).

        Nothing padded: no mask, and attention keeps its fused kernel. Left padding needs no position ids, since rotary
        positions are relative.
        """
        mask = None if attention_mask.all() else attention_mask
        return self.denoiser.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state

    def logits(self, hidden):
        """hidden (N, D) of any N positions -> logits (N, V) in fp32, -inf for [MASK], so that it is never drawn nor scored.

        Only for positions that are needed: for LLaDA-8B one row of logits is half a megabyte.
        """
        logits = self.denoiser.get_output_embeddings()(hidden).float()
        blocked = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
        blocked[self.mask_id] = True
        return logits.masked_fill(blocked, -torch.inf)

    @torch.no_grad()
    def rollout(self, prompt_ids, prompt_mask, length, decoder, generator=None, temperature=1.0, sample_threshold=True, stop_at_eos=False):
        """Complete B prompts with `length` tokens each. Returns a Rollout.

        temperature 0 is greedy, and its log-probs are 0. `sample_threshold` False takes the median gamma. `stop_at_eos` ends
        a row once all up to an [EOS] is unmasked, since what is left can only be padding.
        """
        if decoder.rule == "eb" and decoder.setting is None and self.threshold_head is None:
            raise ValueError("this policy has no threshold head: give the eb decoder a gamma")
        device = prompt_ids.device
        B, P = prompt_ids.shape
        completion = torch.full((B, length), self.mask_id, device=device)
        unmask_step = torch.zeros((B, length), dtype=torch.long, device=device)
        behaviour_logp = torch.zeros((B, length), device=device)
        nfe = torch.zeros(B, dtype=torch.long, device=device)
        gamma = torch.full((B,), torch.nan if decoder.rule != "eb" or decoder.setting is None else decoder.setting, device=device)
        gamma_logp, prompt_state = torch.zeros(B, device=device), None

        rows = torch.arange(B, device=device)  # the unfinished ones: finished rows leave the batch
        step = 0
        while len(rows):
            step += 1
            ids = torch.cat([prompt_ids[rows], completion[rows]], dim=1)  # (b, S), b unfinished rows
            hidden = self.hidden(ids, torch.cat([prompt_mask[rows], torch.ones_like(ids[:, P:], dtype=torch.bool)], dim=1))
            if step == 1:  # all rows are here
                weight = prompt_mask.unsqueeze(-1) / prompt_mask.sum(dim=1).view(B, 1, 1)  # (B, P, 1)
                prompt_state = (hidden[:, :P].float() * weight).sum(dim=1)  # (B, D)
                if decoder.rule == "eb" and decoder.setting is None:
                    distribution = self.threshold_head(prompt_state)
                    gamma = distribution.sample(generator) if sample_threshold else distribution.median
                    gamma_logp = distribution.log_prob(gamma)

            masked = decoder.open_positions(completion[rows] == self.mask_id)  # (b, L), those that may come next
            logits = self.logits(hidden[:, P:][masked])  # (N, V), N open positions of all rows
            logp = logits.log_softmax(-1)
            entropy, confidence = torch.zeros(2, *masked.shape, device=device)
            entropy[masked] = torch.special.entr(logp.exp()).sum(-1)  # nats, untempered
            # Confidence is the best token's probability, not the drawn one's, so that it does not depend on the draw
            # [OUR CHOICE]. Greedy, the two are the same.
            confidence[masked] = logp.amax(-1).exp()
            selected = decoder.select(entropy, confidence, masked, gamma[rows])  # (b, L)

            chosen = selected[masked]  # (N,)
            if temperature > 0:
                logp = (logits[chosen] / temperature).log_softmax(-1)
                token = torch.multinomial(logp.exp(), 1, generator=generator)  # (n, 1), n selected positions
                token_logp = logp.gather(-1, token).squeeze(-1)
            else:
                token, token_logp = logits[chosen].argmax(-1, keepdim=True), 0.0
            row, position = selected.nonzero(as_tuple=True)
            completion[rows[row], position] = token.squeeze(-1)
            behaviour_logp[rows[row], position] = token_logp
            unmask_step[rows[row], position] = step

            nfe[rows] = step
            state = completion[rows]
            unfinished = state == self.mask_id
            if stop_at_eos:  # masks only count up to the first [EOS]
                unfinished = unfinished & ((state == self.eos_id).cumsum(-1) == 0)
            rows = rows[unfinished.any(-1)]

        never = completion == self.mask_id
        completion[never] = self.eos_id
        unmask_step[never] = (nfe.unsqueeze(1) + 1).expand_as(completion)[never]
        is_eos = completion == self.eos_id
        token_mask = (is_eos.cumsum(-1) - is_eos.long()) == 0  # no [EOS] before it
        return Rollout(
            prompt_ids, prompt_mask, completion, unmask_step, behaviour_logp, token_mask, nfe, gamma, gamma_logp, prompt_state, temperature
        )
