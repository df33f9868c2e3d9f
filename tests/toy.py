"""A toy that can be enumerated: four tokens, a tiny random bidirectional Llama, and answers got
without the code under test.
"""

import json
import math
from dataclasses import replace
from itertools import product

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from diffusion_policy import DiffusionPolicy
from models.prompting import encode_prompts
from models.tiny import tiny_denoiser, tiny_tokenizer
from sampler import Decoder, ThresholdHead

MASK, EOS, A, B = range(4)
HIDDEN = 16
PROMPTS = ["a b", "b", "a a b b a"]


class DoublePolicy(DiffusionPolicy):
    """Logits in the denoiser's own precision, so that float64 reaches the loss and finite
    differences are sharp.
    """

    def logits(self, hidden, part=slice(0, None)):
        assert part == slice(0, None)
        logits = self.denoiser.get_output_embeddings()(hidden)  # (N, V)
        blocked = torch.full_like(logits[:, :1], -torch.inf)  # [MASK] is token 0
        return torch.cat([blocked, logits[:, 1:]], dim=-1)


def toy_tokenizer():
    tokenizer = Tokenizer(WordLevel({"[MASK]": MASK, "[EOS]": EOS, "a": A, "b": B}))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, mask_token="[MASK]", eos_token="[EOS]", pad_token="[EOS]"
    )


def metrics_of(run):
    """The rows of a run's metrics.jsonl without what differs from run to run: times, memory."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in row.items() if "second" not in k and "memory" not in k} for row in rows
    ]


def scores_of(run, file="eval.json"):
    """The rows of a run's eval.json or frontier.json without times."""
    rows = json.loads((run / file).read_text())
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def random_tiny(seed=0):
    """(denoiser, tokenizer) of the embedded model before it has learned anything."""
    tokenizer = tiny_tokenizer()
    return tiny_denoiser(tokenizer, seed), tokenizer


def toy_policy(seed=34, head=False, double=False):
    """A random policy. Its distributions are far from uniform and depend on all tokens in sight."""
    config = LlamaConfig(
        is_causal=False,
        compact_prompts=True,  # prompts as they stand
        vocab_size=4,
        hidden_size=HIDDEN,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.5,
        tie_word_embeddings=False,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=EOS,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        denoiser = LlamaForCausalLM(config).eval()
        threshold_head = ThresholdHead(HIDDEN, initial_threshold=0.2) if head else None
        if head:  # as if trained: every prompt its own gamma
            nn.init.normal_(threshold_head.linear.weight, std=2.0)
    if double:  # Llama's own norm computes in float32
        for layer in denoiser.model.layers:
            layer.input_layernorm = nn.RMSNorm(HIDDEN, 1e-6)
            layer.post_attention_layernorm = nn.RMSNorm(HIDDEN, 1e-6)
        denoiser.model.norm = nn.RMSNorm(HIDDEN, 1e-6)
        denoiser.double()
    return (DoublePolicy if double else DiffusionPolicy)(denoiser, toy_tokenizer(), threshold_head)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def to_the_end(rule, level, block_length=None, **options):
    """A Decoder that goes on behind [EOS] until no mask is left."""
    return Decoder(rule, level, block_length, stop_at_eos=False, **options)


def sample(policy, decoder, rows=4, length=3, prompts=PROMPTS, seed=0, **options):
    """A rollout of `rows` completions of each prompt, a prompt's own rows adjacent.

    `options` are the decoder's, to replace its own.
    """
    prompt_ids, prompt_mask = encode_prompts(policy, prompts)  # (prompts, P)
    return policy.rollout(
        prompt_ids.repeat_interleave(rows, dim=0),  # (B, P)
        prompt_mask.repeat_interleave(rows, dim=0),
        length=length,
        decoder=replace(decoder, **options),
        generator=generator(seed),
    )


def prompt_of(rollout, row):
    """A row's prompt without its padding, a list of tokens."""
    return rollout.prompt_ids[row][rollout.prompt_mask[row]].tolist()


def direct_logp(policy, prompt, state, temperature=1.0):
    """log pi(. | prompt, state) at every position of one completion, of one plain call of the
    denoiser. Lists -> (L, V)
    """
    ids = torch.tensor([list(prompt) + list(state)])
    logits = policy.denoiser(input_ids=ids).logits[0, len(prompt) :]  # (L, V)
    blocked = torch.arange(4) == MASK
    return (logits / temperature).masked_fill(blocked, -torch.inf).log_softmax(-1)


def pick(decoder, probabilities, open_positions, gamma=None):
    """The positions that a rule unmasks, by trying. probabilities: V for each position."""
    surest = sorted(open_positions, key=lambda i: -max(probabilities[i]))
    if decoder.rule == "top_k":
        return surest[: decoder.level]
    if decoder.rule == "confidence":
        return [i for i in open_positions if max(probabilities[i]) > decoder.level] or surest[:1]
    entropy = {i: -sum(p * math.log(p) for p in probabilities[i] if p > 0) for i in open_positions}
    ascending = sorted(open_positions, key=entropy.get)
    budget = decoder.level if gamma is None else gamma
    prefixes = [ascending[:n] for n in range(1, len(ascending) + 1)]

    def within(u):
        return sum(map(entropy.get, u)) - max(map(entropy.get, u)) <= budget

    return max(filter(within, prefixes), key=len)


def next_positions(policy, prompt, state, decoder, gamma=None):
    """What one step unmasks in one state, a list of tokens."""
    masked = [i for i, token in enumerate(state) if token == MASK]
    block = decoder.block_length or len(state)
    masked = [i for i in masked if i // block == masked[0] // block]
    return pick(decoder, direct_logp(policy, prompt, state).exp().tolist(), masked, gamma)


def is_finished(state, eos_id, stop_at_eos):
    end = state.index(eos_id) if stop_at_eos and eos_id in state else len(state)
    return MASK not in state[:end]


@torch.no_grad()
def trajectories(policy, prompt, length, decoder):
    """Every way from all [MASK] to the end: {(completion, unmask_step): log-probs of its tokens},
    tuples of L each.
    """
    ways = {}

    def expand(state, steps, logps, t):
        if is_finished(state, policy.eos_id, decoder.stop_at_eos):
            completion = tuple(EOS if token == MASK else token for token in state)
            ways[completion, tuple(step or t for step in steps)] = tuple(logps)
            return
        positions = next_positions(policy, prompt, state, decoder)
        logp = direct_logp(policy, prompt, state, decoder.temperature).tolist()
        for tokens in product((EOS, A, B), repeat=len(positions)):
            next_state = list(state)
            next_steps = list(steps)
            next_logps = list(logps)
            for i, token in zip(positions, tokens, strict=True):
                next_state[i] = token
                next_steps[i] = t
                next_logps[i] = logp[i][token]
            expand(next_state, next_steps, next_logps, t + 1)

    expand([MASK] * length, [0] * length, [0.0] * length, 1)
    return ways


def chi_square_p(counts, expected):
    """P(a chi-square as large or larger), cells expected less than 5 times pooled. Two lists of
    equal length -> float
    """
    cells = [(n, e) for n, e in zip(counts, expected, strict=True) if e >= 5]
    rare = [(n, e) for n, e in zip(counts, expected, strict=True) if e < 5]
    if sum(e for _, e in rare) > 0:
        cells.append((sum(n for n, _ in rare), sum(e for _, e in rare)))
    statistic = sum((n - e) ** 2 / e for n, e in cells)
    half_freedom = torch.tensor((len(cells) - 1) / 2)
    half = torch.tensor(statistic / 2)
    return torch.special.gammaincc(half_freedom, half).item()


def finite_differences(function, tensor, index, eps=1e-5):
    """d function() / d tensor.view(-1)[i] for each i of index, by central differences in place."""
    slopes = []
    flat = tensor.detach().view(-1)
    for i in index:
        value = flat[i].item()
        ends = []
        for sign in (1, -1):
            flat[i] = value + sign * eps
            with torch.no_grad():
                ends.append(float(function()))
        flat[i] = value
        slopes.append((ends[0] - ends[1]) / (2 * eps))
    return torch.tensor(slopes, dtype=tensor.dtype)


# ---- a vocabulary that is worth slicing ----------------------------------------------------------


def wide_policy(layers=2, vocabulary=3000):
    """A policy over many words, whose distributions are neither flat nor certain."""
    policy = toy_policy()
    config = LlamaConfig(
        is_causal=False, compact_prompts=True, vocab_size=vocabulary, hidden_size=32,
        intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        initializer_range=0.7, tie_word_embeddings=False, pad_token_id=None, bos_token_id=None,
        eos_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        policy.denoiser = LlamaForCausalLM(config).eval()
    return policy


def random_prompts(*lengths):
    """Random ids and mask, (B, P), of prompts of these lengths."""
    P = max(lengths)
    mask = torch.arange(P) >= P - torch.tensor(lengths).unsqueeze(1)
    return torch.randint(2, 100, (len(lengths), P), generator=generator(1)) * mask, mask


def calls_of(policy):
    """A list that gets (rows, positions, whether there was a mask) of each call from now on."""
    calls = []

    def note(_, args, options):
        calls.append((*options["input_ids"].shape, options["attention_mask"] is not None))

    policy.denoiser.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
    return calls
