"""denoiser.py: what is read off a state against the whole softmax; parts, chunks and caches against
calls on everything; both ways in, with models of other kinds of positions.
"""

import math

import pytest
import torch
from checkpoints import write_checkpoint
from torch.utils._python_dispatch import TorchDispatchMode
from toy import generator, random_prompts, wide_policy

import denoiser
from denoiser import BlockCache
from diffusion_policy import DiffusionPolicy
from likelihood import draw_boundaries, surrogate_logp
from models import load_denoiser
from sampler import Decoder

# ---- what is read off states ---------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["eb", "confidence"])
@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("slice_size", [2**19, 1])
def test_entropy_and_confidence_are_those_of_the_whole_softmax(
    monkeypatch, rule, scale, slice_size
):
    monkeypatch.setitem(denoiser.SLICE, "cpu", slice_size)
    policy = wide_policy()
    policy.mask_id = 2100  # inside the last slice
    hidden = scale * torch.randn(7, 32, generator=generator())
    logits = policy.denoiser.get_output_embeddings()(hidden).double()
    logits[:, policy.mask_id] = -torch.inf
    p = logits.softmax(-1)
    with torch.no_grad():
        entropy, confidence = policy.entropy_and_confidence(hidden, rule)
    torch.testing.assert_close(confidence, p.amax(-1).float(), rtol=1e-4, atol=1e-6)
    if rule == "eb":
        torch.testing.assert_close(
            entropy, torch.special.entr(p).sum(-1).float(), rtol=1e-4, atol=1e-5
        )


def test_a_rare_token_of_a_large_vocabulary_is_drawn_as_often_as_it_should_be():
    policy, V, n = wide_policy(vocabulary=20_000), 20_000, 2000
    hidden = torch.zeros(n, 32)
    hidden[:, 0] = 1.0
    weight = policy.denoiser.get_output_embeddings().weight
    with torch.no_grad():
        weight.zero_()
        # Ten tokens, one of them [MASK]: nine share nine tenths of the mass, the tail has the rest.
        weight[:10, 0] = math.log(V)
        tokens, logp = policy.draw(hidden, 1.0, generator(7))
    total = 9 * V + V - 10
    tail = (tokens >= 10).float().mean().item()
    expected = (V - 10) / total
    assert abs(tail - expected) < 4 * math.sqrt(expected * (1 - expected) / n)
    assert not (tokens == policy.mask_id).any() and len(set(tokens[tokens >= 10].tolist())) > 100
    expected = torch.where(tokens >= 10, -math.log(total), math.log(V / total))
    torch.testing.assert_close(logp, expected)


def test_even_a_uniform_number_of_0_does_not_draw_the_mask(monkeypatch):
    policy = wide_policy()
    assert policy.mask_id == 0  # the first token, of probability 0

    def zeros(shape, **options):
        return torch.zeros(shape, dtype=options["dtype"])

    monkeypatch.setattr(torch, "rand", zeros)
    with torch.no_grad():
        tokens, logp = policy.draw(torch.randn(3, 32, generator=generator()), 1.0)
    assert tokens.tolist() == [1, 1, 1] and logp.isfinite().all()


# ---- what is never made, nor kept ----------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that was made, views aside."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor) and not function.is_view:
                self.size = max(self.size, x.numel())
        return out


def test_no_tensor_of_batch_by_length_by_vocabulary_is_made_in_rollout_or_learning(monkeypatch):
    monkeypatch.setitem(denoiser.SLICE, "cpu", 2**14)
    monkeypatch.setitem(denoiser.CHUNK, "cpu", 2**14)
    policy, (ids, mask) = wide_policy(), random_prompts(6, 6, 6, 6)
    with Largest() as rolling:
        rollout = policy.rollout(ids, mask, 16, Decoder("eb", 1.0), generator(2))
    with Largest() as learning:
        logp = surrogate_logp(policy, rollout, draw_boundaries(rollout.nfe, 2, generator(0)))
        (logp.sum() * torch.ones(())).backward()
    V = policy.denoiser.config.vocab_size
    assert rolling.size <= 4 * 16 * 1024 < 4 * 16 * V  # a slice is never narrower than 1,024
    # 32 V is the output layer's own gradient
    assert learning.size <= max(2**14, 32 * V) < 4 * 16 * V


def test_a_chunks_logits_are_not_kept_for_the_backward_pass(monkeypatch):
    monkeypatch.setitem(denoiser.CHUNK, "cpu", 9000)
    policy, kept = wide_policy(), []
    hidden = torch.randn(40, 32, generator=generator()).requires_grad_()
    tokens = torch.arange(1, 41)

    def keep(x):
        kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        logp = policy.token_logp(hidden, tokens, 0.9)
    V = policy.denoiser.config.vocab_size
    assert max(kept, default=0) <= max(32 * V, 9000)
    assert sum(n for n in kept if n != 32 * V) < 40 * V / 4  # 32 V is the weight itself
    logp.sum().backward()
    assert hidden.grad.abs().sum() > 0


def test_a_chunked_score_has_the_gradient_of_a_whole_one(monkeypatch):
    policy, (ids, mask) = wide_policy(), random_prompts(6, 6, 5)
    rollout = policy.rollout(ids, mask, 12, Decoder("eb", 1.0), generator(2))
    boundaries, results = draw_boundaries(rollout.nfe, 2, generator(0)), []
    for chunk in (2**24, 9000):
        monkeypatch.setitem(denoiser.CHUNK, "cpu", chunk)
        policy.denoiser.zero_grad()
        logp = surrogate_logp(policy, rollout, boundaries)
        (logp * torch.linspace(-1, 1, 12)).sum().backward()
        results.append([logp.detach()] + [p.grad.clone() for p in policy.denoiser.parameters()])
    for whole, chunked in zip(*results, strict=True):
        torch.testing.assert_close(chunked, whole, rtol=1e-4, atol=1e-4)


# ---- a call on a part of the canvas --------------------------------------------------------------


@pytest.mark.parametrize("family", ["llada", "llada-gqa", "llada-moe", "dream"])
@pytest.mark.parametrize(("start", "stop"), [(4, 9), (7, 12), (1, 12)])
@torch.no_grad()
def test_a_part_run_on_fresh_keys_and_values_is_that_part_of_the_whole(
    tmp_path, family, start, stop
):
    write_checkpoint(tmp_path, family)
    policy = DiffusionPolicy(*load_denoiser(str(tmp_path)))
    ids = torch.randint(0, 250, (3, 12), generator=generator(1))
    padded = torch.ones_like(ids, dtype=torch.bool)
    padded[1, :2] = False
    for mask in (None, padded):
        cache, whole = BlockCache(), policy.hidden(ids, mask)
        torch.testing.assert_close(policy.hidden(ids, mask, cache), whole, rtol=0, atol=1e-5)
        for _ in range(2):  # a call leaves the cache as it was
            part = policy.hidden(ids, mask, cache, start, stop)
            padded_there = start < 3 and mask is not None  # Dream's row 1 there is padding
            rows = torch.tensor([0, 2]) if padded_there else torch.arange(3)
            torch.testing.assert_close(part[rows], whole[rows, start:stop], rtol=0, atol=1e-5)
        cache.keep(torch.tensor([2, 0]))
        two = None if mask is None else mask[[2, 0]]
        part = policy.hidden(ids[[2, 0]], two, cache, start, stop)
        torch.testing.assert_close(part, whole[[2, 0], start:stop], rtol=0, atol=1e-5)
