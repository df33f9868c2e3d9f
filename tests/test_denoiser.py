"""denoiser.py: what is read off a state against the whole softmax; parts, chunks and caches against
calls on everything; both ways in, with models of other kinds of positions.
"""

import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from checkpoints import write_checkpoint
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from toy import (
    HIDDEN,
    MASK,
    generator,
    random_prompts,
    to_the_end,
    toy_policy,
    toy_tokenizer,
    wide_policy,
)
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

import denoiser
from denoiser import BlockCache, Float32Product, LogitsModel
from diffusion_policy import DiffusionPolicy
from likelihood import draw_boundaries, surrogate_logp, unit_weight_tokens
from models.loading import load_denoiser
from models.lora import add_lora

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
    policy = wide_policy(vocabulary=20_000)
    V = 20_000
    n = 2000
    hidden = torch.zeros(n, 32)
    hidden[:, 0] = 1.0
    weight = policy.denoiser.get_output_embeddings().weight
    with torch.no_grad():
        weight.zero_()
        # Ten tokens, one of them [MASK]: nine share nine tenths of the mass, the tail has the rest.
        weight[:10, 0] = math.log(V)
        uniform = torch.rand(n, generator=generator(7), dtype=torch.float64)
        tokens, logp = policy.sample_tokens(hidden, temperature=1.0, uniform=uniform)
    total = 9 * V + V - 10
    tail = (tokens >= 10).float().mean().item()
    expected = (V - 10) / total
    assert abs(tail - expected) < 4 * math.sqrt(expected * (1 - expected) / n)
    assert not (tokens == policy.mask_id).any() and len(set(tokens[tokens >= 10].tolist())) > 100
    expected = torch.where(tokens >= 10, -math.log(total), math.log(V / total))
    torch.testing.assert_close(logp, expected)


def test_even_a_uniform_number_of_0_does_not_draw_the_mask():
    policy = wide_policy()
    assert policy.mask_id == 0  # the first token, of probability 0
    hidden = torch.randn(3, 32, generator=generator())
    with torch.no_grad():
        tokens, logp = policy.sample_tokens(
            hidden, temperature=1.0, uniform=torch.zeros(3, dtype=torch.float64)
        )
    assert tokens.tolist() == [1, 1, 1] and logp.isfinite().all()


def test_few_positions_logits_are_made_at_once_but_always_one(monkeypatch):
    policy = wide_policy()
    hidden = torch.randn(7, 32, generator=generator())
    assert policy.vocabulary_size(hidden) == 3000
    for chunk, positions in ((9000, 3), (8999, 2), (1, 1)):
        monkeypatch.setitem(denoiser.CHUNK, "cpu", chunk)
        assert policy.positions_at_once(hidden) == positions
    whole = []
    parts = []
    uniform = torch.rand(7, generator=generator(1), dtype=torch.float64)
    for chunk, results in ((2**24, whole), (9000, parts)):
        monkeypatch.setitem(denoiser.CHUNK, "cpu", chunk)
        with torch.no_grad():
            results += policy.sample_tokens(hidden, temperature=0.9, uniform=uniform)
    assert torch.equal(whole[0], parts[0])
    torch.testing.assert_close(whole[1], parts[1])


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
    policy = wide_policy()
    (ids, mask) = random_prompts(6, 6, 6, 6)
    with Largest() as rolling:
        rollout = policy.rollout(ids, mask, 16, to_the_end("eb", 1.0), generator(2))
    with Largest() as learning:
        logp = surrogate_logp(policy, rollout, draw_boundaries(rollout.nfe, 2, generator(0)))
        (logp.sum() * torch.ones(())).backward()
    V = policy.denoiser.config.vocab_size
    assert rolling.size <= 4 * 16 * 1024 < 4 * 16 * V  # a slice is never narrower than 1,024
    # 32 V is the output layer's own gradient
    assert learning.size <= max(2**14, 32 * V) < 4 * 16 * V


@pytest.mark.parametrize("learns", [True, False], ids=["learns", "frozen"])
def test_a_chunks_logits_are_not_kept_for_the_backward_pass(monkeypatch, learns):
    monkeypatch.setitem(denoiser.CHUNK, "cpu", 9000)
    policy = wide_policy()
    policy.denoiser.lm_head.requires_grad_(learns)
    hidden = torch.randn(40, 32, generator=generator()).requires_grad_()
    tokens = torch.arange(1, 41)
    sizes = []  # of the tensors that autograd saves

    def save(x):
        sizes.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
        logp = policy.token_logp(hidden, tokens, 0.9)
    V = policy.denoiser.config.vocab_size
    assert max(sizes, default=0) <= max(32 * V, 9000)
    assert sum(n for n in sizes if n != 32 * V) < 40 * V / 4  # 32 V is the weight itself
    logp.sum().backward()
    assert hidden.grad.abs().sum() > 0


def test_a_chunked_score_has_the_gradient_of_a_whole_one(monkeypatch):
    policy = wide_policy()
    (ids, mask) = random_prompts(6, 6, 5)
    rollout = policy.rollout(ids, mask, 12, to_the_end("eb", 1.0), generator(2))
    boundaries = draw_boundaries(rollout.nfe, 2, generator(0))
    results = []
    for chunk in (2**24, 9000):
        monkeypatch.setitem(denoiser.CHUNK, "cpu", chunk)
        policy.denoiser.zero_grad()
        logp = surrogate_logp(policy, rollout, boundaries)
        (logp * torch.linspace(-1, 1, 12)).sum().backward()
        results.append([logp.detach()] + [p.grad.clone() for p in policy.denoiser.parameters()])
    for whole, chunked in zip(*results, strict=True):
        torch.testing.assert_close(chunked, whole, rtol=1e-4, atol=1e-4)


# ---- log-probs and their gradient ----------------------------------------------------------------


def logp_of_the_whole_softmax(policy, hidden, tokens, temperature, state_index):
    """The definition: all logits of every token's own state, in float32, and autograd."""
    head = policy.denoiser.get_output_embeddings()
    logits = hidden[state_index].float() @ head.weight.float().T  # (N, V)
    if head.bias is not None:
        logits = logits + head.bias.float()
    blocked = torch.arange(logits.shape[1]) == policy.mask_id
    logits = logits.masked_fill(blocked, -torch.inf) / temperature
    return logits.log_softmax(dim=-1).gather(1, tokens.unsqueeze(1)).squeeze(1)


def policy_with_last_layer(kind, learns, dtype):
    """A random policy whose last layer is "plain", "biased" or "tied" to the embedding."""
    policy = wide_policy()
    model = policy.denoiser
    if kind == "biased":
        model.lm_head.bias = nn.Parameter(torch.linspace(-2, 2, 3000))
    if kind == "tied":
        model.lm_head.weight = model.model.embed_tokens.weight
    model.to(dtype)
    model.lm_head.requires_grad_(learns)
    return policy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("learns", [True, False], ids=["learns", "frozen"])
@pytest.mark.parametrize("kind", ["plain", "biased", "tied"])
@pytest.mark.parametrize("chunk", [2**24, 9000], ids=["one-chunk", "chunks"])
def test_log_probs_and_gradients_are_those_of_the_whole_softmax(
    monkeypatch, dtype, learns, kind, chunk
):
    monkeypatch.setitem(denoiser.CHUNK, "cpu", chunk)
    policy = policy_with_last_layer(kind, learns, dtype)
    ids = torch.randint(2, 3000, (2, 10), generator=generator())
    state = torch.randint(0, 20, (50,), generator=generator(1))  # some have no token, some several
    tokens = torch.randint(1, 3000, (50,), generator=generator(2))
    factor = torch.randn(50, generator=generator(3))  # what the loss makes of each log-prob
    parameters = [p for p in policy.denoiser.parameters() if p.requires_grad]
    logps = []
    gradients = []
    for score in (policy.token_logp, partial(logp_of_the_whole_softmax, policy)):
        hidden = policy.hidden(ids).flatten(0, 1)  # (20, D)
        logps.append(score(hidden, tokens, temperature=0.7, state_index=state))
        gradients.append(torch.autograd.grad((logps[-1] * factor).sum(), parameters))
    torch.testing.assert_close(*logps, rtol=1e-5, atol=1e-5)
    for gradient, right in zip(*gradients, strict=True):
        error = (gradient.double() - right.double()).norm() / right.double().norm()
        assert error < (1e-5 if dtype == torch.float32 else 2**-6)


def test_a_float16_models_logits_are_float32_and_never_of_mask():
    policy = toy_policy()
    hidden = torch.randn((5, HIDDEN), generator=generator())
    exact = policy.entropy_and_confidence(hidden)
    policy.denoiser.half()
    logits = policy.logits(hidden.half())
    assert logits.dtype == torch.float32 and (logits[:, MASK] == denoiser.BLOCKED).all()
    for ours, right in zip(policy.entropy_and_confidence(hidden.half()), exact, strict=True):
        torch.testing.assert_close(ours, right, rtol=0.01, atol=0.01)


def test_the_gradient_of_a_nearly_certain_token_is_not_lost_in_rounding():
    weight, hidden = half_pair()
    hidden = (2.5 * hidden).requires_grad_()
    layer = nn.Linear(64, 300, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    layer.weight.copy_(weight)
    model = SimpleNamespace(get_output_embeddings=lambda: layer)
    calls = denoiser.DenoiserCalls(model, mask_id=0)
    tokens = (hidden @ weight.T)[:, 1:].argmax(dim=1) + 1
    logp = calls.token_logp(hidden, tokens, 1.0)
    logp.sum().backward()

    exact = hidden.detach().double().requires_grad_()
    logits = (exact @ weight.double().T)[:, 1:]
    expected = logits.log_softmax(dim=1).gather(1, tokens.unsqueeze(1) - 1).squeeze(1)
    expected.sum().backward()
    torch.testing.assert_close(logp.double(), expected, rtol=1e-4, atol=0)
    certain = (expected > -0.01) & (expected < -1e-4)
    assert certain.sum() >= 5
    error = (hidden.grad.double() - exact.grad).norm(dim=1) / exact.grad.norm(dim=1)
    assert error[certain].max() < 0.02


@pytest.mark.parametrize("learns", [True, False], ids=["learns", "frozen"])
def test_a_frozen_last_layers_logits_are_made_once_a_state(monkeypatch, learns):
    monkeypatch.setitem(denoiser.CHUNK, "cpu", 9000)
    policy = wide_policy()
    policy.denoiser.lm_head.requires_grad_(learns)
    hidden = torch.randn(20, 32, generator=generator()).requires_grad_()
    tokens = torch.arange(1, 101)
    with FlopCounterMode(display=False) as counter:
        logp = policy.token_logp(hidden, tokens, 0.9, state_index=torch.arange(20).repeat(5))
        logp.sum().backward()
    product = 2 * 20 * 32 * 3000
    # The logits and the gradient of the states; and if it learns, the logits again and its own.
    assert counter.get_total_flops() == (4 if learns else 2) * product


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
        cache = BlockCache()
        whole = policy.hidden(ids, mask)
        torch.testing.assert_close(policy.hidden(ids, mask, cache), whole, rtol=0, atol=1e-5)
        for _ in range(2):  # a call leaves the cache as it was
            part = policy.hidden(ids, mask, cache, start, stop)
            starts_in_padding = start < 3 and mask is not None  # Dream's row 1 there is padding
            rows = torch.tensor([0, 2]) if starts_in_padding else torch.arange(3)
            torch.testing.assert_close(part[rows], whole[rows, start:stop], rtol=0, atol=1e-5)
        order = cache.keep(torch.tensor([True, False, True]))
        assert order.tolist() == [0, 2]
        cache.repeat(torch.tensor([1, 0]))
        two = None if mask is None else mask[[2, 0]]
        part = policy.hidden(ids[[2, 0]], two, cache, start, stop)
        torch.testing.assert_close(part, whole[[2, 0], start:stop], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kept", [[0], [4], [0, 1, 2], [1, 3, 4], [0, 1, 2, 3, 4], [2, 4]])
def test_a_cache_keeps_rows_by_moving_the_last_into_free_places(kept):
    tensor = torch.arange(10.0).view(5, 2)
    cache = BlockCache()
    cache.keys = [tensor.clone(), tensor + 10]
    cache.values = [tensor + 20, tensor + 30]
    is_kept = torch.zeros(5, dtype=torch.bool)
    is_kept[kept] = True
    storage = cache.keys[0].data_ptr()
    order = cache.keep(is_kept)
    assert sorted(order.tolist()) == kept and cache.keys[0].data_ptr() == storage
    for i, x in enumerate((*cache.keys, *cache.values)):
        assert torch.equal(x, tensor[order] + 10 * i)
    moved = [row for place, row in enumerate(order.tolist()) if place != row]
    assert len(moved) == len([row for row in kept if row >= len(kept)])


# ---- the product of the last layer ---------------------------------------------------------------


def half_pair(v=300, n=40, D=64):
    """A bfloat16 weight (v, D) and states (n, D) whose logits reach 15 or so."""
    weight = torch.randn((v, D), generator=generator(1)) * 0.5
    return weight.bfloat16(), torch.randn((n, D), generator=generator(2)).bfloat16()


def test_a_product_of_bfloat16_factors_is_the_float32_product_of_its_inputs():
    weight, hidden = half_pair()
    product = Float32Product.apply(weight, hidden)
    expected = (weight.double() @ hidden.double().T).float()
    assert product.dtype == torch.float32 and expected.abs().max() > 12
    torch.testing.assert_close(product, expected, rtol=1e-5, atol=1e-5)
    assert ((weight @ hidden.T).float() - expected).abs().max() > 0.01  # what it is there for


@pytest.mark.parametrize("trained", [True, False], ids=["trained-weight", "frozen-weight"])
def test_its_gradient_is_that_of_the_float32_product(trained):
    weight, hidden = half_pair()
    weight.requires_grad_(trained), hidden.requires_grad_()
    floats = [x.detach().float().requires_grad_() for x in (weight, hidden)]
    factor = torch.randn((300, 40), generator=generator(3))
    loss = (Float32Product.apply(weight, hidden) * factor).sum()
    with Largest() as going_back:
        loss.backward()
    assert (going_back.size >= weight.numel()) == trained  # nothing is computed for a frozen weight
    (floats[0] @ floats[1].T * factor).sum().backward()
    assert trained or weight.grad is None
    for x, right in zip((weight, hidden), floats, strict=True):
        if x.requires_grad:
            assert x.grad.dtype == torch.bfloat16
            error = (x.grad.float() - right.grad).norm() / right.grad.norm()
            assert error < 2**-8  # bfloat16 keeps 8 bits: each rounding errs by 2^-9 at most


class RoundedProduct:
    """A last layer whose logits are bfloat16."""

    @staticmethod
    def apply(weight, hidden):
        return (weight @ hidden.T).float()


def half_policy(layers):
    """A random bfloat16 Llama whose states differ little, and whose logits reach 15."""
    policy = toy_policy()
    config = LlamaConfig(
        is_causal=False, compact_prompts=True, vocab_size=2000, hidden_size=128,
        intermediate_size=256, num_hidden_layers=layers, num_attention_heads=4,
        initializer_range=0.02, tie_word_embeddings=False, pad_token_id=None, bos_token_id=None,
        eos_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        policy.denoiser = LlamaForCausalLM(config).eval().bfloat16()
        torch.nn.init.normal_(policy.denoiser.lm_head.weight, std=0.35)
    return policy


@torch.no_grad()
def test_a_token_of_a_bfloat16_model_is_scored_without_rounding_its_logits(monkeypatch):
    policy = half_policy(layers=2)
    hidden = policy.hidden(torch.randint(2, 2000, (1, 60), generator=generator()))[0]
    logits = hidden.double() @ policy.denoiser.lm_head.weight.double().T
    logits[:, policy.mask_id] = -torch.inf
    tokens = logits.argmax(-1)  # the likely ones are the ones that are drawn
    exact = logits.log_softmax(-1).gather(1, tokens.unsqueeze(1)).squeeze(1).float()
    torch.testing.assert_close(policy.token_logp(hidden, tokens, 1.0), exact, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(denoiser, "Float32Product", RoundedProduct)
    assert (policy.token_logp(hidden, tokens, 1.0) - exact).square().mean().sqrt() > 0.01


@pytest.mark.parametrize("layers, share", [(2, 0.6), (16, 0.95)])
@torch.no_grad()
def test_unit_weights_of_a_bfloat16_model_err_less_than_with_rounded_logits(
    monkeypatch, layers, share
):
    """A rollout is scored in parts that are padded otherwise than it was. All of a token's states
    are computed in bfloat16 too, and their error grows with depth, so that the logits' rounding is
    half of a shallow model's error, and a smaller part of a deep one's.
    """
    policy = half_policy(layers)
    ids, mask = (x.repeat_interleave(2, dim=0) for x in random_prompts(7, 6, 5, 4))
    rollout = policy.rollout(ids, mask, 24, to_the_end("top_k", 4), generator(1))
    boundaries = draw_boundaries(rollout.nfe, 7, generator(2))  # before every step
    assert unit_weight_tokens(rollout.unmask_step, boundaries)[rollout.token_mask].all()
    errors = []
    for product in (Float32Product, RoundedProduct):
        monkeypatch.setattr(denoiser, "Float32Product", product)
        as_drawn = surrogate_logp(policy, rollout, boundaries)  # padded as the rollout was
        parts = [slice(i, i + 2) for i in range(0, 8, 2)]
        old = [surrogate_logp(policy, rollout.rows(part), boundaries[part]) for part in parts]
        log_weight = (torch.cat(old) - as_drawn)[rollout.token_mask]
        errors.append(log_weight.square().mean().sqrt().item())
        if product is Float32Product:
            recorded = rollout.behaviour_logp * rollout.token_mask
            torch.testing.assert_close(as_drawn, recorded, rtol=0, atol=1e-4)
    assert 0.001 < errors[0] < share * errors[1]


class Casts(TorchDispatchMode):
    """How often each of some weights is cast to another type."""

    def __init__(self, weights):
        super().__init__()
        self.count = dict.fromkeys([weight.data_ptr() for weight in weights], 0)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default and args[0].data_ptr() in self.count:
            self.count[args[0].data_ptr()] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("cache", ["none", "dual"])
def test_a_rollout_casts_a_float32_adapter_once(cache):
    policy = half_policy(layers=2)
    policy.denoiser = add_lora(policy.denoiser, rank=2, alpha=4)
    adapter = [p for p in policy.denoiser.parameters() if p.requires_grad]
    with torch.no_grad():
        for i, weight in enumerate(adapter):
            weight.copy_(0.1 * torch.randn(weight.shape, generator=generator(i)))
    ids, mask = random_prompts(6, 5)
    decoder = to_the_end("top_k", 2, 4, cache=cache)
    rollouts = []
    for _ in range(2):
        with Casts(adapter) as casts:
            rollouts.append(policy.rollout(ids, mask, 8, decoder, generator(1)))
        assert set(casts.count.values()) == {1} and len(casts.count) == 2 * 2 * 7
        with torch.no_grad():  # learning in between: the copies are not those of before
            for weight in adapter:
                weight.neg_()
                weight[0] *= -1
    with Casts(adapter) as casts, torch.no_grad():  # call by call
        for _ in range(3):
            policy.hidden(ids)
    assert set(casts.count.values()) == {3}
    assert not torch.equal(rollouts[0].behaviour_logp, rollouts[1].behaviour_logp)


def test_a_rollout_that_fails_leaves_a_float32_adapter(monkeypatch):
    policy = half_policy(layers=1)
    policy.denoiser = add_lora(policy.denoiser, rank=2, alpha=4)
    adapter = [p for p in policy.denoiser.parameters() if p.requires_grad]
    seen = []

    def interrupt(*_, **__):
        seen.extend(p.dtype for p in adapter)
        raise KeyboardInterrupt

    monkeypatch.setattr(policy, "sample_tokens", interrupt)
    ids, mask = random_prompts(6)
    with pytest.raises(KeyboardInterrupt):
        policy.rollout(ids, mask, 8, to_the_end("top_k", 2), generator(1))
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in adapter} == {torch.float32}


def test_a_compiled_call_and_a_frozen_adapters_cast_nothing_either():
    policy = half_policy(layers=2)
    policy.denoiser = add_lora(policy.denoiser, rank=2, alpha=4).requires_grad_(False)
    adapter = [p for name, p in policy.denoiser.named_parameters() if ".lora_" in name]
    shapes = {p.shape for p in adapter}
    dtypes = set()

    def compile_nothing(graph, inputs):
        for x in inputs:
            if isinstance(x, torch.Tensor) and x.shape in shapes:
                dtypes.add(x.dtype)
        return graph

    ids, mask = random_prompts(6, 5)
    decoder = to_the_end("top_k", 2, 4, cache="dual")
    with Casts(adapter) as casts:
        policy.rollout(ids, mask, 8, decoder, generator(1))
    assert set(casts.count.values()) == {1}
    policy.compiled_decoder = torch.compile(
        policy.denoiser.get_decoder(), dynamic=True, backend=compile_nothing
    )
    policy.rollout(ids, mask, 8, decoder, generator(1))
    assert dtypes == {torch.bfloat16}
    assert {p.dtype for p in adapter} == {torch.float32}


# ---- other models: plain modules, and absolute positions -----------------------------------------


class Plain(nn.Module):
    """Two attention layers over 12 words, with learned positions counted from the first column."""

    def __init__(self, V=12, D=16):
        super().__init__()
        self.embed = nn.Embedding(V, D)
        self.position = nn.Embedding(40, D)
        self.attend = nn.ModuleList([nn.Linear(D, 3 * D) for _ in range(2)])
        self.last = nn.Linear(D, V)

    def forward(self, ids, attention_mask):
        x = self.embed(ids) + self.position.weight[: ids.shape[1]]  # (b, S, D)
        for layer in self.attend:
            q, k, v = layer(x).chunk(3, dim=-1)
            scores = q @ k.mT / 4
            if attention_mask is not None:
                scores = scores.masked_fill(~attention_mask.unsqueeze(1), -torch.inf)
            x = x + (scores.softmax(-1) @ v).tanh()
        return self.last(x)  # (b, S, V)


class Absolute(nn.Module):
    """A BERT with a linear head: transformers' own learned absolute positions."""

    def __init__(self):
        super().__init__()
        self.config = BertConfig(
            vocab_size=12, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=32, max_position_embeddings=40, initializer_range=0.7,
            pad_token_id=None,
        )  # fmt: skip
        self.bert = BertModel(self.config, add_pooling_layer=False)
        self.head = nn.Linear(16, 12)

    device = property(lambda self: self.head.weight.device)

    def get_decoder(self):
        return self.bert

    def get_output_embeddings(self):
        return self.head

    def forward(self, ids, attention_mask):
        return self.head(self.bert(ids, attention_mask=attention_mask).last_hidden_state)


def other_policy(kind):
    """(policy, model): the model is called as model(ids, None) -> logits."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = kind().eval()
    wrapped = LogitsModel(model) if kind is Plain else model
    return DiffusionPolicy(wrapped, toy_tokenizer()), model


@torch.no_grad()
def logp_of_each_token_by_itself(model, rollout):
    """Each token's log-prob from a plain call on its own unpadded canvas. -> (B, L)"""
    logp = torch.zeros_like(rollout.behaviour_logp)
    for row, steps in enumerate(rollout.unmask_step):
        prompt = rollout.prompt_ids[row][rollout.prompt_mask[row]]
        for t in range(1, int(rollout.nfe[row]) + 1):
            state = rollout.completion[row].masked_fill(steps >= t, 0)
            logits = model(torch.cat([prompt, state]).unsqueeze(0), None)[0, len(prompt) :]
            logits[:, 0] = -torch.inf
            scores = (logits / rollout.temperature).log_softmax(-1)
            drawn = (steps == t).nonzero().flatten()
            logp[row, drawn] = scores[drawn, rollout.completion[row, drawn]]
    return logp


def few_words(*lengths):
    ids, mask = random_prompts(*lengths)
    return (2 + ids % 10) * mask, mask


@pytest.mark.parametrize("kind", [Plain, Absolute])
@pytest.mark.parametrize("lengths", [(7, 6, 5), (6, 6, 6)], ids=["padded", "unpadded"])
@pytest.mark.parametrize(
    "decoder", [to_the_end("eb", 2.0), to_the_end("top_k", 2, 4)], ids=["eb", "k"]
)
def test_learned_absolute_positions_count_from_the_first_real_token(kind, lengths, decoder):
    policy, model = other_policy(kind)
    decoder = replace(decoder, temperature=0.8)
    rollout = policy.rollout(*few_words(*lengths), 10, decoder, generator(2))
    expected = logp_of_each_token_by_itself(model, rollout)
    torch.testing.assert_close(rollout.behaviour_logp, expected, rtol=1e-4, atol=1e-4)
    every_step = torch.arange(1, int(rollout.nfe.max()) + 1).expand(len(lengths), -1)
    exact = surrogate_logp(policy, rollout, every_step)
    torch.testing.assert_close(exact, expected * rollout.token_mask, rtol=1e-4, atol=1e-4)
    assert rollout.nfe.max() > 3


@pytest.mark.parametrize("kind", [Plain, Absolute])
def test_with_positions_counted_from_the_padding_log_probs_would_be_others(kind, monkeypatch):
    policy, model = other_policy(kind)  # or the test above would prove little

    def from_the_padding(ids, attention_mask=None, **_):
        logits = model(ids, attention_mask)
        return logits if kind is Plain else policy.denoiser.bert(ids, attention_mask)[0]

    monkeypatch.setattr(policy, "hidden", from_the_padding)
    rollout = policy.rollout(*few_words(7, 6, 5), 10, to_the_end("eb", 2.0), generator(2))
    missed = (rollout.behaviour_logp - logp_of_each_token_by_itself(model, rollout)).abs()
    assert missed[0].max() < 1e-4 and missed[1].max() > 0.1 and missed[2].max() > 0.1


def test_a_plain_modules_states_are_its_logits_and_padding_is_moved_back():
    policy, model = other_policy(Plain)
    ids, mask = few_words(4, 7)
    with torch.no_grad():
        hidden = policy.hidden(ids, mask)
        alone = model(ids[:1, 3:], None)
    assert hidden.shape == (2, 7, 12)
    torch.testing.assert_close(hidden[0, 3:], alone[0], rtol=1e-4, atol=1e-5)


def test_a_shifted_models_states_are_moved_here_and_its_first_token_never_reads_padding():
    policy, model = other_policy(Plain)
    ids, mask = few_words(3, 5)
    states = policy.hidden(ids, mask)
    policy.denoiser.config = SimpleNamespace(shift_logits=True)
    shifted = DiffusionPolicy(policy.denoiser, policy.tokenizer).hidden(ids, mask)
    assert torch.equal(shifted[0, 2:], states[0, [2, 2, 3]])  # two of padding
    assert torch.equal(shifted[1], states[1, [0, 0, 1, 2, 3]])


def test_a_model_with_other_arguments_and_named_outputs_works_too():
    policy, model = other_policy(Plain)
    own_forward = model.forward

    def forward(input_ids=None, inputs_embeds=None, attention_mask=None):  # in LLaDA's own order
        assert inputs_embeds is None
        return SimpleNamespace(logits=own_forward(input_ids, attention_mask))

    (ids, mask) = few_words(4, 7)
    other = LogitsModel(model)
    with torch.no_grad():
        expected = policy.hidden(ids, mask)
        model.forward = forward
        torch.testing.assert_close(other(ids, mask).last_hidden_state, expected)
        torch.testing.assert_close(other(ids[1:]).last_hidden_state, expected[1:])


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_a_plain_module_refuses_a_block_cache_in_one_line(cache):
    policy, _ = other_policy(Plain)
    with pytest.raises(ValueError, match="cache none") as error:
        policy.rollout(*few_words(7, 6), 8, to_the_end("top_k", 2, 4, cache=cache))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", [Plain, Absolute])
def test_a_gradient_step_through_another_model_makes_its_text_likelier(kind):
    policy, model = other_policy(kind)
    rollout = policy.rollout(*few_words(7, 6, 5), 10, to_the_end("eb", 2.0), generator(2))
    boundaries = draw_boundaries(rollout.nfe, 2, generator(3))
    L = []
    optimiser = torch.optim.SGD(policy.denoiser.parameters(), lr=1e-3)
    for _ in range(2):
        L.append(surrogate_logp(policy, rollout, boundaries).sum())
        optimiser.zero_grad()
        (-L[-1]).backward()
        optimiser.step()
    squares = sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None)
    assert L[1] > L[0] and squares > 1
