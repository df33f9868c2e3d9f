"""What makes rollouts fast must not show: the tokens of a naive loop, without a cache; exactly the stale states' own, with one."""

import math

import pytest
import torch
from checkpoints import VOCABULARY, reference_logits, write_checkpoint
from torch.utils._python_dispatch import TorchDispatchMode
from toy import generator, pick, toy_policy
from transformers import LlamaConfig, LlamaForCausalLM

import diffusion_policy
from diffpo_loss import diffpo_loss
from diffusion_policy import BlockCache, DiffusionPolicy, length_buckets, unique_rows
from likelihood import cache_kl, draw_boundaries, latent_at, surrogate_logp
from models import load_denoiser
from sampler import Decoder, ThresholdHead

DECODERS = [Decoder("eb", 2.0), Decoder("eb", 0.5, 4), Decoder("confidence", 0.3, 4), Decoder("top_k", 2), Decoder("top_k", 3, 4)]
PROMPTS = ["what is 3 + 4?", "what is 2 + 9?", "and 10 - 7"]


def name(value):
    return f"{value.rule}-{value.setting}-block-{value.block_length}" if isinstance(value, Decoder) else str(value)


@pytest.fixture(scope="module")
def llada(tmp_path_factory):
    """(policy, weights, config) of a random LLaDA checkpoint in the hub's layout."""
    folder = tmp_path_factory.mktemp("llada")
    weights, config = write_checkpoint(folder, "llada")
    return DiffusionPolicy(*load_denoiser(str(folder))), weights, config


def wide_policy(layers=2, vocabulary=3000):
    """A vocabulary that is worth slicing, on a random denoiser whose distributions are neither flat nor certain."""
    policy = toy_policy()
    config = LlamaConfig(
        is_causal=False, compact_prompts=True, vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=layers,
        num_attention_heads=4, initializer_range=0.7, tie_word_embeddings=False, pad_token_id=None, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        policy.denoiser = LlamaForCausalLM(config).eval()
    return policy


def prompts(*lengths):
    """Random ids and mask, (B, P), of prompts of these lengths."""
    P = max(lengths)
    mask = torch.arange(P) >= P - torch.tensor(lengths).unsqueeze(1)
    return torch.randint(2, 100, (len(lengths), P), generator=generator(1)) * mask, mask


def calls_of(policy):
    """A list that gets (rows, positions, whether there was a mask) of each denoiser call from now on."""
    calls = []

    def note(_, args, options):
        calls.append((*options["input_ids"].shape, options["attention_mask"] is not None))

    policy.denoiser.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
    return calls


# ---- without a cache: the same tokens ------------------------------------------------------------------------------------


@torch.no_grad()
def naive_rollout(policy, ids, mask, length, decoder, generator, temperature):
    """Every row at every step, the logits of every position, one row after the other. -> (completion, unmask_step, logp), (B, L)"""
    (B, P), V = ids.shape, policy.denoiser.config.vocab_size
    completion = torch.full((B, length), policy.mask_id)
    step, logp = torch.zeros(2, B, length, dtype=torch.long), torch.zeros(B, length)
    step = step[0]
    attend = torch.cat([mask, torch.ones_like(completion, dtype=torch.bool)], dim=1)
    while (completion == policy.mask_id).any():
        logits = policy.denoiser(input_ids=torch.cat([ids, completion], dim=1), attention_mask=attend).logits[:, P:].double()  # (B, L, V)
        logits[..., policy.mask_id] = -torch.inf
        before = completion.clone()
        for row in range(B):
            masked = [i for i in range(length) if before[row, i] == policy.mask_id]
            if not masked:
                continue
            block = decoder.block_length or length
            probabilities = logits[row].softmax(-1).tolist()
            chosen = pick(decoder, probabilities, [i for i in masked if i // block == masked[0] // block])
            t = int(step[row].max()) + 1
            for i in sorted(chosen):
                p = (logits[row, i] / temperature).softmax(-1)
                uniform = torch.rand((), generator=generator, dtype=torch.float64)
                token = min(int((p.cumsum(-1) <= uniform).sum()), V - 1)
                completion[row, i], step[row, i], logp[row, i] = token, t, p[token].log()
    return completion, step, logp


@pytest.mark.parametrize("slice_size", [2**19, 1], ids=["one-slice", "slices"])
@pytest.mark.parametrize("decoder", DECODERS, ids=name)
def test_tokens_are_a_naive_loops_given_the_same_random_numbers(monkeypatch, decoder, slice_size):
    monkeypatch.setitem(diffusion_policy.SLICE, "cpu", slice_size)
    monkeypatch.setitem(diffusion_policy.CHUNK, "cpu", 9000)  # three positions
    policy = wide_policy()
    ids, mask = prompts(6, 6, 6, 5, 5)  # the longest first, which is the order in which a bucket is done
    ids[1] = ids[0]  # two of one group
    rollout = policy.rollout(ids, mask, 10, decoder, generator(3), temperature=0.9)
    completion, step, logp = naive_rollout(policy, ids, mask, 10, decoder, generator(3), temperature=0.9)
    assert torch.equal(rollout.completion, completion) and torch.equal(rollout.unmask_step, step)
    torch.testing.assert_close(rollout.behaviour_logp, logp, rtol=1e-4, atol=1e-4)
    assert len(set(rollout.nfe.tolist())) > 1 or decoder.rule == "top_k"


@pytest.mark.parametrize("rule", ["eb", "confidence"])
@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("slice_size", [2**19, 1])
def test_entropy_and_confidence_are_those_of_the_whole_softmax(monkeypatch, rule, scale, slice_size):
    monkeypatch.setitem(diffusion_policy.SLICE, "cpu", slice_size)
    policy = wide_policy()
    policy.mask_id = 2100  # inside the last slice
    hidden = scale * torch.randn(7, 32, generator=generator())
    logits = policy.denoiser.get_output_embeddings()(hidden).double()
    logits[:, policy.mask_id] = -torch.inf
    p = logits.softmax(-1)
    with torch.no_grad():
        entropy, confidence = policy.surety(hidden, rule)
    torch.testing.assert_close(confidence, p.amax(-1).float(), rtol=1e-4, atol=1e-6)
    if rule == "eb":
        torch.testing.assert_close(entropy, torch.special.entr(p).sum(-1).float(), rtol=1e-4, atol=1e-5)


def test_a_rare_token_of_a_large_vocabulary_is_drawn_as_often_as_it_should_be():
    policy, V, n = wide_policy(vocabulary=20_000), 20_000, 2000
    hidden = torch.zeros(n, 32)
    hidden[:, 0] = 1.0
    weight = policy.denoiser.get_output_embeddings().weight
    with torch.no_grad():
        weight.zero_()
        weight[:10, 0] = math.log(V)  # ten tokens, one of them [MASK]: nine share nine tenths of the mass, the tail has the rest
        tokens, logp = policy.draw(hidden, 1.0, generator(7))
    total = 9 * V + V - 10
    tail = (tokens >= 10).float().mean().item()
    expected = (V - 10) / total
    assert abs(tail - expected) < 4 * math.sqrt(expected * (1 - expected) / n)
    assert not (tokens == policy.mask_id).any() and len(set(tokens[tokens >= 10].tolist())) > 100
    torch.testing.assert_close(logp, torch.where(tokens >= 10, -math.log(total), math.log(V / total)))


def test_even_a_uniform_number_of_0_does_not_draw_the_mask(monkeypatch):
    policy = wide_policy()
    assert policy.mask_id == 0  # the first token, of probability 0
    monkeypatch.setattr(torch, "rand", lambda shape, **options: torch.zeros(shape, dtype=options["dtype"]))
    with torch.no_grad():
        tokens, logp = policy.draw(torch.randn(3, 32, generator=generator()), 1.0)
    assert tokens.tolist() == [1, 1, 1] and logp.isfinite().all()


# ---- what is saved -------------------------------------------------------------------------------------------------------


def test_finished_rows_leave_a_groups_first_call_is_shared_and_nothing_padded_means_no_mask():
    policy = wide_policy()
    ids, mask = prompts(6, 6, 6, 6)
    ids[1], ids[3] = ids[0], ids[2]  # two groups of two
    calls = calls_of(policy)
    rollout = policy.rollout(ids, mask, 10, Decoder("eb", 4.0), generator(2))
    unfinished = [int((rollout.nfe >= t).sum()) for t in range(1, int(rollout.nfe.max()) + 1)]
    assert calls == [(2, 16, False)] + [(rows, 16, False) for rows in unfinished[1:]] and unfinished[-1] < 4


def test_prompts_of_unlike_length_go_apart_and_come_back_in_order():
    policy = wide_policy()
    ids, mask = prompts(5, 30, 6, 30)
    calls = calls_of(policy)
    rollout = policy.rollout(ids, mask, 8, Decoder("top_k", 4), generator(2), temperature=0.0)
    assert calls == [(2, 38, False)] * 2 + [(2, 14, True)] * 2
    for row in range(4):
        one = policy.rollout(ids[row : row + 1], mask[row : row + 1], 8, Decoder("top_k", 4), temperature=0.0)
        assert torch.equal(one.completion[0], rollout.completion[row])


def test_buckets_hold_every_row_once_with_little_padding():
    lengths = torch.randint(20, 200, (60,), generator=generator()).tolist()
    buckets = length_buckets(lengths, 64)
    assert sorted(row for rows in buckets for row in rows) == list(range(60)) and 1 < len(buckets) < 20
    for rows in buckets:
        longest = max(lengths[row] for row in rows)
        assert lengths[rows[0]] == longest and all(longest - lengths[row] <= (longest + 64) / 8 for row in rows)
    assert length_buckets([3] * 5, 8) == [[0, 1, 2, 3, 4]]


def test_unique_rows_give_every_row_back():
    rows = torch.tensor([[1, 2], [3, 4], [1, 2], [0, 9], [3, 4]])
    first, copy = unique_rows(rows)
    assert first.tolist() == [0, 1, 3] or len(first) == 3
    assert torch.equal(rows[first][copy], rows) and set(first.tolist()) == {0, 1, 3}


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
    monkeypatch.setitem(diffusion_policy.SLICE, "cpu", 2**14)
    monkeypatch.setitem(diffusion_policy.CHUNK, "cpu", 2**14)
    policy, (ids, mask) = wide_policy(), prompts(6, 6, 6, 6)
    with Largest() as rolling:
        rollout = policy.rollout(ids, mask, 16, Decoder("eb", 1.0), generator(2))
    with Largest() as learning:
        logp = surrogate_logp(policy, rollout, draw_boundaries(rollout.nfe, 2, generator(0)))
        (logp.sum() * torch.ones(())).backward()
    V = policy.denoiser.config.vocab_size
    assert rolling.size <= 4 * 16 * 1024 < 4 * 16 * V  # a slice is never narrower than 1,024
    assert learning.size <= max(2**14, 32 * V) < 4 * 16 * V  # 32 V is the output layer's own gradient


def test_a_chunks_logits_are_not_kept_for_the_backward_pass(monkeypatch):
    monkeypatch.setitem(diffusion_policy.CHUNK, "cpu", 9000)
    policy, kept = wide_policy(), []
    hidden, tokens = torch.randn(40, 32, generator=generator()).requires_grad_(), torch.arange(1, 41)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        logp = policy.token_logp(hidden, tokens, 0.9)
    V = policy.denoiser.config.vocab_size
    assert max(kept, default=0) <= max(32 * V, 9000) and sum(n for n in kept if n != 32 * V) < 40 * V / 4  # 32 V is the weight itself
    logp.sum().backward()
    assert hidden.grad.abs().sum() > 0


def test_a_chunked_score_has_the_gradient_of_a_whole_one(monkeypatch):
    policy, (ids, mask) = wide_policy(), prompts(6, 6, 5)
    rollout = policy.rollout(ids, mask, 12, Decoder("eb", 1.0), generator(2))
    boundaries, results = draw_boundaries(rollout.nfe, 2, generator(0)), []
    for chunk in (2**24, 9000):
        monkeypatch.setitem(diffusion_policy.CHUNK, "cpu", chunk)
        policy.denoiser.zero_grad()
        logp = surrogate_logp(policy, rollout, boundaries)
        (logp * torch.linspace(-1, 1, 12)).sum().backward()
        results.append([logp.detach()] + [p.grad.clone() for p in policy.denoiser.parameters()])
    for whole, chunked in zip(*results, strict=True):
        torch.testing.assert_close(chunked, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_scoring_runs_what_a_group_shares_once(stages):
    policy, G = wide_policy(), 5
    ids, mask = (x.repeat_interleave(G, dim=0) for x in prompts(6, 6))
    rollout = policy.rollout(ids, mask, 12, Decoder("top_k", 2), generator(2))
    boundaries, calls = draw_boundaries(rollout.nfe, stages, generator(0)), calls_of(policy)
    surrogate_logp(policy, rollout, boundaries)
    states = set()
    for row, taus in enumerate(boundaries.tolist()):
        for low, high in zip([0, *taus], [*taus, 99], strict=True):
            if ((rollout.unmask_step[row] > low) & (rollout.unmask_step[row] <= high) & rollout.token_mask[row]).any():
                state = latent_at(rollout.completion[row : row + 1], rollout.unmask_step[row : row + 1], low, policy.mask_id)
                states.add((row // G, *state[0].tolist()))
    assert calls == [(len(states), 18, False)] and len(states) <= 2 + 2 * G * (stages - 1)  # z_0 once a group


def test_scoring_pads_no_further_than_the_rows_at_hand_need():
    policy = wide_policy()
    rollout = policy.rollout(*prompts(30, 6, 6), 12, Decoder("top_k", 2), generator(2))
    calls = calls_of(policy)
    surrogate_logp(policy, rollout.rows(slice(1, 3)), draw_boundaries(rollout.nfe[1:], 1))
    assert calls == [(2, 18, False)]


# ---- block caches --------------------------------------------------------------------------------------------------------


FAMILIES = ["llada", "llada-gqa", "llada-moe", "dream"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("start", "stop"), [(4, 9), (7, 12), (1, 12)])
@torch.no_grad()
def test_a_part_run_on_fresh_keys_and_values_is_that_part_of_the_whole(tmp_path, family, start, stop):
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
            rows = torch.tensor([0, 2]) if start < 3 and mask is not None else torch.arange(3)  # Dream's row 1 there is padding
            torch.testing.assert_close(part[rows], whole[rows, start:stop], rtol=0, atol=1e-5)
        cache.keep(torch.tensor([2, 0]))
        part = policy.hidden(ids[[2, 0]], None if mask is None else mask[[2, 0]], cache, start, stop)
        torch.testing.assert_close(part, whole[[2, 0], start:stop], rtol=0, atol=1e-5)


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("decoder", [d for d in DECODERS if d.block_length], ids=name)
def test_with_one_layer_a_cache_changes_nothing(cache, decoder):
    """Keys and values of a first layer depend on their own token alone, so none is ever stale."""
    policy = wide_policy(layers=1)
    ids, mask = prompts(6, 6, 5)
    temperature = 0.9 if decoder.rule == "top_k" else 0.0  # other rules' rows are out of step, and draw in another order
    exact, cached = (policy.rollout(ids, mask, 11, decoder, generator(4), temperature, cache=c) for c in ("none", cache))
    for field in ("completion", "unmask_step", "nfe", "token_mask"):
        assert torch.equal(getattr(exact, field), getattr(cached, field)), field
    torch.testing.assert_close(cached.behaviour_logp, exact.behaviour_logp, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(cached.prompt_state, exact.prompt_state)


@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("decoder", [Decoder("eb", 6.0, 4), Decoder("top_k", 2, 4)], ids=name)
def test_recorded_log_probs_are_those_of_the_stale_states_really_drawn_from(tmp_path, family, cache, decoder):
    weights, config = write_checkpoint(tmp_path, family)
    policy, L, temperature = DiffusionPolicy(*load_denoiser(str(tmp_path))), 10, 0.8
    ids, mask = policy.encode(PROMPTS)
    rollout = policy.rollout(ids, mask, L, decoder, generator(4), temperature, stop_at_eos=True, cache=cache)
    exact = surrogate_logp(policy, rollout, torch.arange(1, L + 1).expand(3, -1))
    stale = 0
    for row in range(3):
        prompt, kept, block = ids[row][mask[row]], [], -1
        P = len(prompt)
        for t in range(1, int(rollout.nfe[row]) + 1):
            drawn = (rollout.unmask_step[row] == t).nonzero().flatten()
            state = rollout.completion[row].masked_fill(rollout.unmask_step[row] >= t, policy.mask_id)
            canvas = torch.cat([prompt, state]).unsqueeze(0)
            if drawn[0] // 4 != block:
                block, kept, part = drawn[0] // 4, [], None
            else:
                start = P + int(block) * 4
                part = slice(start - (family == "dream"), None if cache == "prefix" else start + 4)
                stale += 1
            logits = reference_logits(family, weights, config, canvas, cache=kept, part=part)[0, P:] / temperature
            logits[:, policy.mask_id] = -torch.inf
            expected = logits.log_softmax(-1)[drawn, rollout.completion[row, drawn]]
            torch.testing.assert_close(rollout.behaviour_logp[row, drawn], expected, rtol=1e-4, atol=1e-4)
    assert stale > 3 and (rollout.behaviour_logp - exact)[rollout.token_mask].abs().max() > 0.01  # approximate, as it should be


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_a_cache_runs_the_canvas_once_a_block_and_then_a_part_of_it(cache):
    policy, (ids, mask) = wide_policy(), prompts(6, 6)
    calls = calls_of(policy)
    policy.rollout(ids, mask, 10, Decoder("top_k", 2, 4), generator(4), cache=cache)
    parts = {"prefix": [10, 6], "dual": [4, 4]}[cache]
    assert [positions for _, positions, _ in calls] == [16, parts[0], 16, parts[1], 16]  # the last block is full after one


def test_rows_that_finish_a_block_early_wait_for_the_others_and_leave_the_cache():
    policy, (ids, mask) = wide_policy(), prompts(6, 6, 6, 6)
    calls = calls_of(policy)
    rollout = policy.rollout(ids, mask, 12, Decoder("eb", 5.0, 4), generator(4), cache="dual")
    whole = [rows for rows, positions, _ in calls if positions == 18]
    assert whole == [4, 4, 4] and {rows for rows, positions, _ in calls if positions == 4} > {4}
    for steps, nfe in zip(rollout.unmask_step.tolist(), rollout.nfe.tolist(), strict=True):
        assert set(steps) == set(range(1, nfe + 1))


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_what_a_cache_costs_is_measured_against_the_exact_policy(cache):
    policy, (ids, mask) = wide_policy(), prompts(6, 6, 5)
    decoder = Decoder("top_k", 2, 6)
    exact, cached = (policy.rollout(ids, mask, 12, decoder, generator(4), 0.9, cache=c) for c in ("none", cache))
    assert abs(cache_kl(policy, exact)) < 1e-4
    with torch.no_grad():
        true = surrogate_logp(policy, cached, torch.arange(1, 7).expand(3, -1))
    assert cache_kl(policy, cached) == pytest.approx((cached.behaviour_logp - true)[cached.token_mask].mean().item())
    assert abs(cache_kl(policy, cached)) > 1e-3


def test_a_cache_needs_blocks_and_has_to_be_known():
    policy, (ids, mask) = wide_policy(), prompts(6)
    with pytest.raises(ValueError, match="block_length"):
        policy.rollout(ids, mask, 4, Decoder("top_k", 1), cache="dual")
    with pytest.raises(ValueError, match="prefix"):
        policy.rollout(ids, mask, 4, Decoder("top_k", 1, 2), cache="half")


# ---- where a LLaDA's completion ends, and how its prompt begins -----------------------------------------------------------


def scripted(llada, monkeypatch, *texts, per_step=None, **options):
    """A rollout that draws these texts, whatever the model thinks."""
    policy = llada[0]
    script = torch.stack([torch.tensor(policy.tokenizer(text, add_special_tokens=False).input_ids) for text in texts])  # (B, L)
    B, L = script.shape
    k, drawn = per_step or L, iter(range(0, L, per_step or L))
    decoder = Decoder("top_k", k, k)  # the blocks, from left to right

    def draw(hidden, temperature, generator=None):
        start = next(drawn)
        tokens = script[: len(hidden) // k, start : start + k].flatten()
        return tokens, torch.full((len(hidden),), -1.0)

    monkeypatch.setattr(policy, "draw", draw)
    ids, mask = policy.encode(["same length"] * B)
    return policy, policy.rollout(ids, mask, L, decoder, **options)


FLOOD = "<|endoftext|>" * 4


def test_a_completion_ends_at_the_first_eot_and_the_flood_behind_it_is_padding(llada, monkeypatch):
    policy, rollout = scripted(llada, monkeypatch, "hi<|eot_id|>" + FLOOD, "hi<|endoftext|>" + FLOOD, "hey<|eot_id|>" + FLOOD[13:])
    assert policy.decode(rollout) == ["hi", "hi", "hey"]
    assert rollout.token_mask.sum(-1).tolist() == [3, 3, 4]
    calls = calls_of(policy)
    logp = surrogate_logp(policy, rollout, draw_boundaries(rollout.nfe, 1))
    assert torch.equal(logp != 0, rollout.token_mask) and len(calls) == 1
    weights, advantage = torch.ones_like(logp), torch.tensor([1.0, -1.0, 0.5])
    loss, _ = diffpo_loss(logp, logp, advantage, weights, rollout.token_mask, 0.2)
    noise = torch.where(rollout.token_mask, 0.0, torch.randn(logp.shape, generator=generator()))
    other, _ = diffpo_loss(logp + noise, logp, advantage, weights, rollout.token_mask, 0.2)
    assert loss == other  # what follows carries no loss


def test_a_row_stops_at_eot_as_it_does_at_eos(llada, monkeypatch):
    _, rollout = scripted(llada, monkeypatch, "a<|eot_id|>cdef", "a<|endoftext|>cdef", per_step=2, stop_at_eos=True)
    assert rollout.nfe.tolist() == [1, 1] and rollout.unmask_step.tolist() == [[1, 1, 2, 2, 2, 2]] * 2
    assert (rollout.completion[:, 2:] == llada[0].eos_id).all()


def test_a_prompt_is_one_user_message_in_the_chat_template_with_its_prefill(llada):
    policy = llada[0]
    ids, mask = policy.encode(["  what is 3 + 4? ", "1"], prefill="<reasoning>")
    texts = [policy.tokenizer.decode(row[m]) for row, m in zip(ids, mask, strict=True)]
    header = "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    assert texts == [header.format("what is 3 + 4?") + "<reasoning>", header.format("1") + "<reasoning>"]
    assert ids[0][mask[0]].tolist().count(256) == 1 and not mask[1, 0] and ids[1, 0] == policy.tokenizer.pad_token_id


def test_a_prompt_that_does_not_fit_is_an_error_that_names_it_and_nothing_is_cut(llada):
    policy = llada[0]
    limit = policy.denoiser.config.max_position_embeddings
    overhead = policy.encode(["x"])[0].shape[1] - 1
    assert policy.encode(["y" * (limit - overhead - 20)], room=20)[0].shape[1] == limit - 20
    with pytest.raises(ValueError, match="prompt 2 of 2, with 'zzz.*512") as error:
        policy.encode([f"Work it out: {text}" for text in ("fine", "z" * (limit - overhead - 19))], room=20)
    assert "\n" not in str(error.value)


def test_a_tokenizer_without_a_chat_template_is_refused_in_one_line(llada, monkeypatch):
    monkeypatch.setattr(llada[0].tokenizer, "chat_template", None)
    with pytest.raises(ValueError, match="chat template") as error:
        llada[0].encode(["hello"])
    assert "\n" not in str(error.value)


def test_an_empty_prompt_is_refused(llada):
    with pytest.raises(ValueError, match="empty"):
        llada[0].encode(["fine", ""])


def test_the_learned_threshold_works_on_a_checkpoint_and_with_a_cache(llada):
    policy = DiffusionPolicy(llada[0].denoiser, llada[0].tokenizer, ThresholdHead(llada[0].denoiser.config.hidden_size, 1.0))
    ids, mask = policy.encode(PROMPTS)
    rollout = policy.rollout(ids, mask, 12, Decoder("eb", None, 4), generator(1), cache="dual")
    assert len(set(rollout.threshold.tolist())) == 3 and (rollout.completion < VOCABULARY).all()
    torch.testing.assert_close(policy.threshold_head(rollout.prompt_state).log_prob(rollout.threshold), rollout.threshold_logp)
