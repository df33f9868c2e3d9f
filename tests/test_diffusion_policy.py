"""diffusion_policy.py: rollouts of a toy against every trajectory that it can take, enumerated one
denoiser call at a time. What makes rollouts fast must not show: without a cache the tokens are
those of a naive loop; with one the recorded log-probs are those of the stale states.
"""

import functools
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from checkpoints import VOCABULARY, reference_logits, write_checkpoint
from torch import nn
from toy import (
    EOS,
    MASK,
    PROMPTS,
    A,
    B,
    calls_of,
    chi_square_p,
    direct_logp,
    generator,
    next_positions,
    pick,
    prompt_of,
    random_prompts,
    sample,
    to_the_end,
    toy_policy,
    trajectories,
    wide_policy,
)  # fmt: skip

import denoiser
from diffusion_policy import batches_by_length, denoise_by_definition
from likelihood import latent_at, surrogate_logp
from models.checkpoints import load_policy
from models.prompting import decode_completions, encode_prompts
from sampler import ThresholdHead

RULES = [("eb", 0.3), ("confidence", 0.7), ("top_k", 1), ("top_k", 2)]
DECODERS = [to_the_end(rule, level, block) for rule, level in RULES for block in (None, 2)]
LEARNED = to_the_end("eb", None)


def name(decoder):
    return f"{decoder.rule}-{decoder.level}-block-{decoder.block_length}"


def paths(rollout):
    """Each row's (completion, unmask_step), two tuples, as `trajectories` has them for keys."""
    completions = rollout.completion.tolist()
    steps = rollout.unmask_step.tolist()
    return list(zip(map(tuple, completions), map(tuple, steps), strict=True))


def greedy_loop(policy, prompt, length, decoder, gamma=None):
    """One row, one call at a time: (completion, unmask_step), lists."""
    state = [MASK] * length
    steps = [0] * length
    t = 0
    while MASK in state:
        t += 1
        positions = next_positions(policy, prompt, state, decoder, gamma)
        best = direct_logp(policy, prompt, state).argmax(-1).tolist()
        for i in positions:
            state[i] = best[i]
            steps[i] = t
    return state, steps


def assert_row_equals(rollout, row, other, other_row=0):
    """All of two rows but their prompts' padding."""
    for field in ("completion", "unmask_step", "token_mask", "nfe"):
        assert torch.equal(getattr(rollout, field)[row], getattr(other, field)[other_row]), field
    for field in ("behaviour_logp", "threshold", "threshold_logp", "prompt_state"):
        expected = getattr(other, field)[other_row]
        torch.testing.assert_close(
            getattr(rollout, field)[row], expected, rtol=1e-4, atol=1e-4, equal_nan=True
        )


# ---- against the definition ----------------------------------------------------------------------


@pytest.mark.parametrize("stop_at_eos", [False, True], ids=["to-the-end", "stop-at-eos"])
@pytest.mark.parametrize("decoder", [*DECODERS, LEARNED], ids=name)
def test_a_rollout_is_the_definition_of_each_row_alone(decoder, stop_at_eos):
    policy = toy_policy(head=True)
    decoder = replace(decoder, temperature=0.8, stop_at_eos=stop_at_eos)
    ids, mask = encode_prompts(policy, PROMPTS * 4)  # of unlike length
    uniform = policy.draw_uniform(len(ids), 7, generator())
    rollout = policy.rollout(ids, mask, 7, decoder, uniform=uniform)
    for i in range(len(ids)):
        completion, unmask_step, logp, threshold, T = denoise_by_definition(
            policy, ids[i : i + 1, mask[i]], uniform[i : i + 1], decoder
        )
        row = slice(i, i + 1)
        assert torch.equal(rollout.completion[row], completion)
        assert torch.equal(rollout.unmask_step[row], unmask_step)
        assert rollout.nfe[i] == T
        close = {"rtol": 1e-5, "atol": 1e-5, "equal_nan": True}
        torch.testing.assert_close(rollout.behaviour_logp[row], logp, **close)
        torch.testing.assert_close(rollout.threshold[row], threshold, **close)
    if stop_at_eos:
        assert (rollout.unmask_step > rollout.nfe.unsqueeze(1)).any()  # a row did end early


# ---- against the enumerated distribution ---------------------------------------------------------


@pytest.mark.parametrize("stop_at_eos", [False, True], ids=["to-the-end", "stop-at-eos"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("decoder", DECODERS, ids=name)
def test_rollouts_are_distributed_as_the_enumerated_trajectories_and_record_their_log_probs(
    decoder, temperature, stop_at_eos
):
    policy = toy_policy()
    prompts = PROMPTS[:2]
    n = 2000
    decoder = replace(decoder, temperature=temperature, stop_at_eos=stop_at_eos)
    rollout = sample(policy, decoder, n, prompts=prompts)
    counts = []
    expected = []
    for p in range(len(prompts)):
        rows = rollout.rows(slice(p * n, (p + 1) * n))
        every = trajectories(policy, prompt_of(rows, 0), 3, decoder)
        assert sum(math.exp(sum(logp)) for logp in every.values()) == pytest.approx(1, abs=1e-5)
        keys = paths(rows)
        expected_logp = torch.tensor([every[key] for key in keys])
        torch.testing.assert_close(rows.behaviour_logp, expected_logp, rtol=1e-4, atol=1e-4)
        seen = Counter(keys)
        counts += [seen[key] for key in every]
        expected += [n * math.exp(sum(logp)) for logp in every.values()]
    assert chi_square_p(counts, expected) > 1e-3


def test_the_chi_square_test_sees_a_wrong_temperature():  # or the test above would prove little
    policy = toy_policy()
    decoder = to_the_end("eb", 0.3)
    n = 2000
    rollout = sample(policy, decoder, n, prompts=PROMPTS[:1], temperature=0.8)
    every = trajectories(policy, prompt_of(rollout, 0), 3, decoder)  # of temperature 1
    seen = Counter(paths(rollout))
    expected = [n * math.exp(sum(logp)) for logp in every.values()]
    assert chi_square_p([seen[key] for key in every], expected) < 1e-6


def test_the_enumerated_steps_unmask_one_or_two_tokens_and_depend_on_the_tokens_drawn():
    every = trajectories(toy_policy(), [A, B], 3, to_the_end("eb", 0.3))
    assert {steps for _, steps in every} == {(1, 2, 2), (1, 3, 2), (1, 2, 3)}


def test_mask_is_never_drawn_nor_counted_however_likely():
    policy = toy_policy()
    without_bias = sample(policy, to_the_end("eb", 0.3), 50)
    head = nn.Linear(policy.denoiser.config.hidden_size, 4)
    with torch.no_grad():
        head.weight.copy_(policy.denoiser.get_output_embeddings().weight)
        head.bias.copy_(torch.tensor([1000.0, 0, 0, 0]))
    policy.denoiser.set_output_embeddings(head)
    rollout = sample(policy, to_the_end("eb", 0.3), 50)
    assert not (rollout.completion == MASK).any()
    for row in range(len(rollout.nfe)):
        assert_row_equals(rollout, row, without_bias, row)


# ---- what a rollout records ----------------------------------------------------------------------


@pytest.mark.parametrize("decoder", DECODERS, ids=name)
def test_every_step_to_nfe_unmasks_a_token_and_no_step_comes_after(decoder):
    rollout = sample(toy_policy(), decoder, 10, length=6)
    for steps, nfe in zip(rollout.unmask_step.tolist(), rollout.nfe.tolist(), strict=True):
        assert set(steps) == set(range(1, nfe + 1))


def test_token_mask_is_the_tokens_up_to_the_first_eos_and_decode_stops_there():
    policy = toy_policy()
    rollout = sample(policy, to_the_end("top_k", 2), 100, length=5)
    lengths = set()
    masks = rollout.token_mask.tolist()
    texts = decode_completions(policy, rollout)
    for row, mask, text in zip(rollout.completion.tolist(), masks, texts, strict=True):
        end = row.index(EOS) if EOS in row else 5
        assert mask == [i <= end for i in range(5)]
        assert text.split() == ["ab"[token - A] for token in row[:end]]
        lengths.add(end)
    assert lengths == {0, 1, 2, 3, 4, 5}


def test_what_a_rollout_cannot_complete_is_refused():
    policy = toy_policy()
    decoder = to_the_end("eb", 0.1)
    ids = torch.tensor([[A, B, A], [A, B, EOS]])
    on_the_right = torch.tensor([[True, True, True], [True, True, False]])
    with pytest.raises(ValueError, match="prompts are padded on the left"):
        policy.rollout(ids, on_the_right, 4, decoder)
    empty = torch.tensor([[True, True, True], [False, False, False]])
    with pytest.raises(ValueError, match="is empty"):
        policy.rollout(ids, empty, 4, decoder)
    with pytest.raises(ValueError, match="is empty"):
        policy.rollout(ids[:, :0], empty[:, :0], 4, decoder)
    uniform = policy.draw_uniform(2, 3)
    with pytest.raises(ValueError, match=r"uniform is \(2, 4\): it has to be \(2, 5\)"):
        policy.rollout(ids, ids >= 0, 4, decoder, uniform=uniform)


def test_rows_takes_the_same_rows_of_every_tensor():
    rollout = sample(toy_policy(head=True), LEARNED, 2, temperature=0.7)
    for index in (
        torch.tensor([1, 4]),
        torch.tensor([False, True, False, False, True, False]),
        slice(1, 5, 3),
    ):
        some = vars(rollout.rows(index))
        assert some.pop("temperature") == 0.7
        for field, value in some.items():
            assert value.tolist() == [vars(rollout)[field][i].tolist() for i in (1, 4)]


def test_the_same_seed_gives_the_same_rollout_and_the_global_generator_is_left_alone():
    policy = toy_policy(head=True)
    before = torch.get_rng_state()
    first, second, other = (sample(policy, LEARNED, 20, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(
        torch.equal(vars(first)[k], vars(second)[k]) for k in vars(first) if k != "temperature"
    )
    assert not torch.equal(first.completion, other.completion)
    assert not torch.equal(first.threshold, other.threshold)


# ---- greedy, and rows that do not disturb each other ---------------------------------------------


@pytest.mark.parametrize("decoder", DECODERS, ids=name)
def test_greedy_is_the_argmax_loop_of_each_prompt_alone(decoder):
    policy = toy_policy()  # prompts of unequal length, so left padding too
    rollout = sample(policy, decoder, 1, length=6, temperature=0.0)
    assert not rollout.behaviour_logp.any()
    for row in range(len(PROMPTS)):
        expected = greedy_loop(policy, prompt_of(rollout, row), 6, decoder)
        assert (rollout.completion[row].tolist(), rollout.unmask_step[row].tolist()) == expected


def test_a_padded_row_equals_its_own_unbatched_rollout_with_a_learned_gamma():
    policy = toy_policy(head=True)
    options = {"length": 6, "temperature": 0.0, "sample_threshold": False}
    rollout = sample(policy, LEARNED, 1, **options)
    for row, prompt in enumerate(PROMPTS):
        alone = sample(policy, LEARNED, 1, prompts=[prompt], **options)
        assert_row_equals(rollout, row, alone)
        gamma = rollout.threshold[row].item()
        expected = greedy_loop(policy, prompt_of(rollout, row), 6, LEARNED, gamma)
        assert (rollout.completion[row].tolist(), rollout.unmask_step[row].tolist()) == expected
    assert len(set(rollout.threshold.tolist())) == 3


@pytest.mark.parametrize("stop_at_eos", [False, True])
def test_rows_that_finish_early_do_not_change_the_others(stop_at_eos):
    policy = toy_policy(seed=4)
    prompts = ["a b", "b", "b b b", "a b a b", "a"]
    options = {"length": 8, "temperature": 0.0, "stop_at_eos": stop_at_eos}
    rollout = sample(policy, to_the_end("eb", 0.5), 1, prompts=prompts, **options)
    assert len(set(rollout.nfe.tolist())) > 1
    for row, prompt in enumerate(prompts):
        alone = sample(policy, to_the_end("eb", 0.5), 1, prompts=[prompt], **options)
        assert_row_equals(rollout, row, alone)


@pytest.mark.parametrize("decoder", DECODERS, ids=name)
def test_stopping_at_eos_saves_calls_and_keeps_the_text(decoder):
    saved = 0
    for seed in (1, 4, 5, 6):
        policy = toy_policy(seed)
        whole, stopped = (
            sample(policy, decoder, 1, length=8, temperature=0.0, stop_at_eos=stop)
            for stop in (False, True)
        )
        assert decode_completions(policy, whole) == decode_completions(policy, stopped)
        assert torch.equal(whole.token_mask, stopped.token_mask)
        assert (stopped.nfe <= whole.nfe).all()
        saved += (whole.nfe - stopped.nfe).sum().item()
        drawn = whole.unmask_step <= stopped.nfe.unsqueeze(1)  # (B, L)
        assert torch.equal(stopped.completion, whole.completion.where(drawn, torch.tensor(EOS)))
        steps = whole.unmask_step.where(drawn, stopped.nfe.unsqueeze(1) + 1)
        assert torch.equal(stopped.unmask_step, steps)
    assert saved > 0


@pytest.mark.parametrize("decoder", DECODERS, ids=name)
def test_a_stopped_rows_last_call_is_the_one_that_completes_its_text(decoder):
    rollout = sample(toy_policy(), decoder, 20, length=5, stop_at_eos=True)
    for (completion, steps), nfe in zip(paths(rollout), rollout.nfe.tolist(), strict=True):
        end = completion.index(EOS) + 1 if EOS in completion else 5
        assert nfe == max(steps[:end])


# ---- blocks and calls ----------------------------------------------------------------------------


@pytest.mark.parametrize("rule, level", RULES)
@pytest.mark.parametrize("block_length", [1, 2, 3])
def test_no_token_of_a_later_block_comes_before_an_earlier_block_is_full(rule, level, block_length):
    rollout = sample(toy_policy(), to_the_end(rule, level, block_length), 10, length=8)
    for steps in rollout.unmask_step.tolist():
        blocks = [steps[i : i + block_length] for i in range(0, 8, block_length)]
        pairs = zip(blocks, blocks[1:], strict=False)
        assert all(max(earlier) < min(later) for earlier, later in pairs)


@pytest.mark.parametrize(
    "k, block_length",
    [(1, None), (2, None), (3, None), (9, None), (2, 3), (3, 3), (3, 2), (2, 5)],
)
def test_top_k_takes_a_blocks_length_over_k_calls_rounded_up(k, block_length):
    rollout = sample(toy_policy(), to_the_end("top_k", k, block_length), 2, length=8)
    blocks = [min(block_length or 8, 8 - start) for start in range(0, 8, block_length or 8)]
    assert set(rollout.nfe.tolist()) == {sum(math.ceil(size / k) for size in blocks)}


# ---- the learned threshold -----------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llada", "dream", "sdar", "fast_dllm_qwen"])
def test_a_prompt_has_the_same_state_with_padding_and_without(tmp_path, family):
    """A shifted model reads its first token's state too, and never that of padding."""
    write_checkpoint(tmp_path, family)
    policy = load_policy(str(tmp_path))
    ids = torch.randint(0, 250, (2, 6), generator=generator(0))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, :1] = False
    decoder = to_the_end("eb", 1.0, block_length=4)
    padded = policy.rollout(ids, mask, 12, decoder, generator(1)).prompt_state[1]
    alone = policy.rollout(ids[1:, 1:], mask[1:, 1:], 12, decoder, generator(1)).prompt_state[0]
    torch.testing.assert_close(padded, alone, rtol=1e-4, atol=1e-5)


def test_prompt_state_is_the_mean_of_the_prompts_last_hidden_states_at_the_first_call():
    policy = toy_policy()
    rollout = sample(policy, to_the_end("eb", 0.3), 1)
    for row in range(len(PROMPTS)):
        prompt = prompt_of(rollout, row)
        states = policy.denoiser.model(torch.tensor([prompt + [MASK] * 3])).last_hidden_state[0]
        expected = states[: len(prompt)].mean(0)
        torch.testing.assert_close(rollout.prompt_state[row], expected, rtol=1e-4, atol=1e-4)


def test_a_learned_threshold_is_drawn_from_the_heads_distribution_and_its_log_prob_recorded():
    policy = toy_policy(head=True)
    n = 1000
    rollout = sample(policy, LEARNED, n)
    distribution = policy.threshold_head(rollout.prompt_state)
    torch.testing.assert_close(rollout.threshold_logp, distribution.log_prob(rollout.threshold))
    log_gamma = rollout.threshold.log().view(3, n)  # nothing near the bounds, so these are normal
    mean = distribution.mean.view(3, n)[:, 0]
    assert ((log_gamma.mean(1) - mean).abs() < 4 * 0.5 / math.sqrt(n)).all()
    assert (log_gamma.std(1) - 0.5).abs().max() < 4 * 0.5 / math.sqrt(2 * n)
    assert mean.diff().abs().min() > 0.1


def test_every_rows_own_gamma_steers_its_unmasking():
    policy = toy_policy(head=True)
    rollout = sample(policy, LEARNED, 10, length=4)
    used = set()
    for row in range(len(rollout.nfe)):
        completion = rollout.completion[row].tolist()
        steps = rollout.unmask_step[row].tolist()
        prompt = prompt_of(rollout, row)
        gamma = rollout.threshold[row].item()
        for t in range(1, rollout.nfe[row].item() + 1):
            tokens = zip(completion, steps, strict=True)
            state = [token if step < t else MASK for token, step in tokens]
            positions = next_positions(policy, prompt, state, LEARNED, gamma)
            assert sorted(positions) == [i for i in range(4) if steps[i] == t]
            used.add(len(positions))
    assert len(used) > 1


def test_without_sampling_the_threshold_is_the_median_and_without_learning_the_level():
    policy = toy_policy(head=True)
    rollout = sample(policy, LEARNED, sample_threshold=False)
    assert torch.equal(rollout.threshold, policy.threshold_head(rollout.prompt_state).median)
    fixed = sample(policy, to_the_end("eb", 0.25))
    assert set(fixed.threshold.tolist()) == {0.25} and not fixed.threshold_logp.any()
    assert sample(policy, to_the_end("top_k", 1)).threshold.isnan().all()


def test_a_larger_gamma_never_takes_more_calls_on_average():
    policy = toy_policy()
    nfe = [
        sample(policy, to_the_end("eb", gamma), 100, length=6).nfe.float().mean().item()
        for gamma in (0.0, 0.3, 0.6, 1.2, 100.0)
    ]
    assert nfe == sorted(nfe, reverse=True) and nfe[0] == 6 and nfe[-1] == 1


def test_a_rollout_makes_no_gradient_and_counts_the_rows_it_runs():
    policy = toy_policy()
    calls = calls_of(policy)
    prompt_ids, prompt_mask = encode_prompts(policy, ["a b"])
    rollout = policy.rollout(prompt_ids, prompt_mask, 6, to_the_end("top_k", 2), generator())
    assert len(calls) == rollout.nfe.item() == policy.rows_run == 3
    assert not rollout.behaviour_logp.requires_grad
    sample(policy, to_the_end("eb", 0.3), 20, length=6)
    assert policy.rows_run == sum(rows for rows, _, _ in calls) > 3


# ---- what makes rollouts fast must not show: the tokens of a naive loop --------------------------


WIDE = [
    to_the_end("eb", 2.0),
    to_the_end("eb", 0.5, 4),
    to_the_end("confidence", 0.3, 4),
    to_the_end("top_k", 2),
    to_the_end("top_k", 3, 4),
]


@torch.no_grad()
def naive_rollout(policy, ids, mask, length, decoder, uniform):
    """Every row at every step, the logits of every position, one row after the other.
    -> (completion, unmask_step, logp), (B, L) each
    """
    B, P = ids.shape
    V = policy.denoiser.config.vocab_size
    completion = torch.full((B, length), policy.mask_id)
    step = torch.zeros(B, length, dtype=torch.long)
    logp = torch.zeros(B, length)
    attend = torch.cat([mask, torch.ones_like(completion, dtype=torch.bool)], dim=1)
    while (completion == policy.mask_id).any():
        canvas = torch.cat([ids, completion], dim=1)
        logits = policy.denoiser(input_ids=canvas, attention_mask=attend).logits
        logits = logits[:, P:].double()  # (B, L, V)
        logits[..., policy.mask_id] = -torch.inf
        before = completion.clone()
        for row in range(B):
            masked = [i for i in range(length) if before[row, i] == policy.mask_id]
            if not masked:
                continue
            block = decoder.block_length or length
            probabilities = logits[row].softmax(-1).tolist()
            masked = [i for i in masked if i // block == masked[0] // block]
            chosen = pick(decoder, probabilities, masked)
            t = int(step[row].max()) + 1
            for i in sorted(chosen):
                p = (logits[row, i] / decoder.temperature).softmax(-1)
                token = min(int((p.cumsum(-1) <= uniform[row, i]).sum()), V - 1)
                completion[row, i] = token
                step[row, i] = t
                logp[row, i] = p[token].log()
    return completion, step, logp


@pytest.mark.parametrize("slice_size", [2**19, 1], ids=["one-slice", "slices"])
@pytest.mark.parametrize("decoder", WIDE, ids=name)
def test_tokens_are_a_naive_loops_given_the_same_random_numbers(monkeypatch, decoder, slice_size):
    monkeypatch.setitem(denoiser.SLICE, "cpu", slice_size)
    monkeypatch.setitem(denoiser.CHUNK, "cpu", 9000)  # three positions
    policy = wide_policy()
    decoder = replace(decoder, temperature=0.9)
    ids, mask = (x.repeat_interleave(2, dim=0) for x in random_prompts(6, 6, 5))
    rollout = policy.rollout(ids, mask, 10, decoder, generator=generator(3))
    uniform = torch.rand((6, 11), generator=generator(3), dtype=torch.float64)
    completion, step, logp = naive_rollout(policy, ids, mask, 10, decoder, uniform)
    assert torch.equal(rollout.completion, completion) and torch.equal(rollout.unmask_step, step)
    torch.testing.assert_close(rollout.behaviour_logp, logp, rtol=1e-4, atol=1e-4)
    assert len(set(rollout.nfe.tolist())) > 1 or decoder.rule == "top_k"
    again = policy.rollout(ids, mask, 10, decoder, uniform=uniform)
    for row in range(6):
        assert_row_equals(again, row, rollout, row)


# ---- what is saved -------------------------------------------------------------------------------


def distinct_canvases(rollout, t):
    """How many different canvases the rows that make a t-th call have before it."""
    state = latent_at(rollout.completion, rollout.unmask_step, t - 1, MASK)
    canvas = torch.cat([rollout.prompt_ids, state], dim=1)
    return len(canvas[rollout.nfe >= t].unique(dim=0))


def test_finished_rows_leave_equal_ones_are_run_once_and_nothing_padded_means_no_mask():
    policy = wide_policy()
    ids, mask = random_prompts(6, 6, 6, 6)
    ids[1] = ids[0]
    ids[3] = ids[2]  # two groups of two
    calls = calls_of(policy)
    rollout = policy.rollout(ids, mask, 10, to_the_end("eb", 4.0), generator(2))
    steps = range(1, int(rollout.nfe.max()) + 1)
    distinct = [distinct_canvases(rollout, t) for t in steps]
    unfinished = [int((rollout.nfe >= t).sum()) for t in steps]
    assert calls == [(rows, 16, False) for rows in distinct]
    assert policy.rows_run == sum(distinct)
    assert distinct[0] == 2 and distinct[-1] == unfinished[-1] < 4


@pytest.mark.parametrize("lengths", [(6, 6), (6, 5)], ids=["unpadded", "padded"])
def test_rows_that_are_equal_later_are_shared_too(lengths):
    policy = toy_policy()  # of three words, so that rows often draw the same
    ids, mask = random_prompts(*lengths)
    ids = ((1 + ids % 3) * mask).repeat_interleave(6, dim=0)
    mask = mask.repeat_interleave(6, dim=0)
    calls = calls_of(policy)
    rollout = policy.rollout(ids, mask, 5, to_the_end("top_k", 1), generator(2))
    distinct = [distinct_canvases(rollout, t) for t in range(1, 6)]
    assert calls == [(rows, 11, lengths[1] < 6) for rows in distinct]
    assert distinct[0] == 2 < distinct[1] < distinct[-1] < 12

    calls.clear()
    greedy = policy.rollout(ids, mask, 5, to_the_end("top_k", 1, temperature=0.0))
    assert [rows for rows, _, _ in calls] == [2] * 5  # a group's rows stay equal to the end
    assert len(greedy.completion.unique(dim=0)) <= 2


def test_prompts_that_differ_in_their_padding_alone_are_not_shared():
    policy = wide_policy()
    ids = random_prompts(6)[0].expand(2, -1)
    mask = torch.ones((2, 6), dtype=torch.bool)
    mask[1, 0] = False  # the same ids: only the mask says that row 1 has a token less
    calls = calls_of(policy)
    rollout = policy.rollout(ids, mask, 4, to_the_end("top_k", 4), generator(2))
    assert calls == [(2, 10, True)]
    assert (rollout.prompt_state[0] - rollout.prompt_state[1]).abs().max() > 1e-3


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_sharing_changes_nothing_each_row_is_as_if_alone(cache):
    policy = wide_policy()
    decoder = to_the_end("eb", 2.0, 5, cache=cache)
    ids, mask = (x.repeat_interleave(3, dim=0) for x in random_prompts(5, 6, 20))
    uniform = policy.draw_uniform(9, 10, generator(2))
    together = policy.rollout(ids, mask, 10, decoder, uniform=uniform)
    policy.rows_run = 0
    for row in range(9):
        one = slice(row, row + 1)
        alone = policy.rollout(ids[one], mask[one], 10, decoder, uniform=uniform[one])
        assert_row_equals(together, row, alone)
    assert policy.rows_run == together.nfe.sum()


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_a_block_is_opened_by_distinct_rows_and_its_cache_has_them_all(cache):
    policy = wide_policy()
    ids, mask = (x.repeat_interleave(3, dim=0) for x in random_prompts(6, 6))
    calls = calls_of(policy)
    decoder = to_the_end("top_k", 2, 4, temperature=0.0, cache=cache)
    policy.rollout(ids, mask, 8, decoder)
    # Greedy rows of a group stay equal. From an open block on, each has keys and values of its own.
    part = {"prefix": (8, 4), "dual": (4, 4)}[cache]
    whole = (2, 14, False)
    assert calls == [whole, (6, part[0], False), whole, (6, part[1], False)]
    assert policy.rows_run == 2 + 6 + 2 + 6


DECODERS_OF_A_FRONTIER = [
    to_the_end("eb", 0.3, temperature=0.0),
    to_the_end("eb", 2.0, temperature=0.0),
    to_the_end("top_k", 1, temperature=0.0),
    to_the_end("top_k", 2, temperature=0.0),
]


def greedy_rollouts(policy, lengths=(6, 6, 5)):
    ids, mask = random_prompts(*lengths)
    return [policy.rollout(ids, mask, 10, decoder) for decoder in DECODERS_OF_A_FRONTIER]


@pytest.mark.parametrize("max_bytes", [2**30, 40_000, 0], ids=["all", "some", "nothing"])
def test_under_several_decoders_no_remembered_canvas_is_run_twice(monkeypatch, max_bytes):
    monkeypatch.setattr(denoiser.StateMemory.__init__, "__defaults__", (max_bytes,))
    policy = wide_policy()
    expected = greedy_rollouts(policy)
    rows_of_all = policy.rows_run
    policy.rows_run = 0
    canvases = set()  # that were before the denoiser, as (row, state)
    with policy.remembering_states():
        rollouts = greedy_rollouts(policy)
    for rollout, right in zip(rollouts, expected, strict=True):
        for row in range(3):
            assert_row_equals(rollout, row, right.rows(slice(row, row + 1)))
            for t in range(int(rollout.nfe[row])):
                one = rollout.rows(slice(row, row + 1))
                state = latent_at(one.completion, one.unmask_step, t, MASK)
                canvases.add((row, *state[0].tolist()))
    if max_bytes == 2**30:
        assert policy.rows_run == len(canvases) < 0.8 * rows_of_all
    elif max_bytes == 40_000:
        assert len(canvases) < policy.rows_run < rows_of_all
    else:
        assert policy.rows_run == rows_of_all


def test_states_are_forgotten_before_the_weights_change():
    policy = wide_policy()
    with policy.remembering_states():
        before = greedy_rollouts(policy)[0]
    policy.denoiser.lm_head.weight.data.neg_()
    policy.denoiser.model.norm.weight.data.mul_(0.5)
    with policy.remembering_states():
        after = greedy_rollouts(policy)[0]
    assert not torch.equal(after.completion, before.completion)
    assert torch.equal(after.completion, greedy_rollouts(policy)[0].completion)


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_with_a_block_cache_nothing_is_remembered(cache):
    policy = wide_policy()
    ids, mask = random_prompts(6, 6, 5)
    decoder = to_the_end("top_k", 2, 4, temperature=0.0, cache=cache)
    expected = policy.rollout(ids, mask, 8, decoder)
    policy.rows_run = 0
    with policy.remembering_states():
        for _ in range(2):
            again = policy.rollout(ids, mask, 8, decoder)
            assert torch.equal(again.completion, expected.completion)
    assert policy.rows_run == 2 * 3 * 4


def test_compiled_cached_calls_draw_the_same_tokens_from_few_graphs(monkeypatch):
    graphs = []

    def backend(graph, inputs):  # runs the traced operators as they are
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    policy = wide_policy(layers=1)
    decoder = to_the_end("eb", 2.0, 4, cache="dual")
    shapes = set()  # of calls with a filled cache: rows, positions, and whether there is a mask
    run = policy.run_decoder

    def noted_run(ids, attention_mask, position_ids, cache):
        if cache.keys:
            shapes.add((*ids.shape, attention_mask is not None))
        return run(ids, attention_mask, position_ids, cache)

    policy.run_decoder = noted_run
    rollouts = []
    for is_compiled in (False, True):
        if is_compiled:
            policy.compile_cached_calls()
        for lengths in ((6,) * 9, (6, 6, 6, 6, 5, 5, 5)):  # without a mask of padding, and with one
            ids, mask = random_prompts(*lengths)
            rollouts.append(policy.rollout(ids, mask, 8, decoder, generator(3)))
    for expected, compiled in zip(rollouts[:2], rollouts[2:], strict=True):
        assert torch.equal(compiled.completion, expected.completion)
        assert torch.equal(compiled.unmask_step, expected.unmask_step)
        assert torch.equal(compiled.behaviour_logp, expected.behaviour_logp)
    # Rows finish one after another, and hardly any new shape is a new graph.
    assert 0 < len(graphs) <= 5 < len(shapes)


def test_prompts_of_unlike_length_go_apart_and_come_back_in_order():
    policy = wide_policy()
    ids, mask = random_prompts(5, 30, 6, 30)
    calls = calls_of(policy)
    decoder = to_the_end("top_k", 4, temperature=0.0)
    rollout = policy.rollout(ids, mask, 8, decoder, generator(2))
    assert calls == [(2, 38, False)] * 2 + [(2, 14, True)] * 2
    for row in range(4):
        one = policy.rollout(ids[row : row + 1], mask[row : row + 1], 8, decoder)
        assert torch.equal(one.completion[0], rollout.completion[row])


def test_batches_hold_every_row_once_with_little_padding():
    lengths = torch.randint(20, 200, (60,), generator=generator()).tolist()
    batches = batches_by_length(lengths, 64)
    assert sorted(sum(batches, [])) == list(range(60)) and 1 < len(batches) < 20
    for rows in batches:
        longest = max(lengths[row] for row in rows)
        assert lengths[rows[0]] == longest
        assert all(longest - lengths[row] <= (longest + 64) / 8 for row in rows)
    assert batches_by_length([3] * 5, 8) == [[0, 1, 2, 3, 4]]


# ---- few rows at once ----------------------------------------------------------------------------


def few_at_once(rows, decoder):
    """A rollout of 4 groups of 2 equal prompts, `rows` rows at once, and its calls."""
    policy = wide_policy()
    policy.rollout_batch_size = rows
    ids, mask = (x.repeat_interleave(2, dim=0) for x in random_prompts(6, 20, 6, 7))
    calls = calls_of(policy)
    return policy, policy.rollout(ids, mask, 10, decoder, generator(2)), calls


def test_batches_hold_no_more_rows_than_asked():
    lengths = torch.randint(20, 200, (20,), generator=generator()).repeat_interleave(2).tolist()
    batches = batches_by_length(lengths, 64, 6)
    assert sorted(sum(batches, [])) == list(range(40)) and max(map(len, batches)) == 6
    for rows in batches:  # the two of a group side by side: 0 and 1, 2 and 3, ...
        assert rows[1::2] == [row + 1 for row in rows[::2]]
        assert {row % 2 for row in rows[::2]} == {0}
    assert batches_by_length(lengths, 64, 40) == batches_by_length(lengths, 64)


@pytest.mark.parametrize(
    "rows, batches",
    [
        (0, [(1, 2), (3, 6)]),
        (1, [(1, 1)] * 8),
        (3, [(1, 2), (2, 3), (2, 3)]),
        (5, [(1, 2), (3, 5), (1, 1)]),
        (99, [(1, 2), (3, 6)]),
    ],
)
def test_a_batchs_equal_prompts_are_run_once_however_few_rows_fit(rows, batches):
    calls = few_at_once(rows, to_the_end("top_k", 5))[2]
    # Each batch takes two calls: one row of each prompt, then all of them.
    assert [n for n, _, _ in calls] == [n for batch in batches for n in batch]


@pytest.mark.parametrize("cache", ["none", "dual"])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_completions_do_not_depend_on_how_many_rows_are_done_at_once(cache, temperature):
    decoder = to_the_end("eb", 4.0, 5, temperature=temperature, cache=cache)
    together, apart = (few_at_once(rows, decoder)[1] for rows in (0, 2))
    assert torch.equal(together.completion, apart.completion)
    assert torch.equal(together.unmask_step, apart.unmask_step)
    assert torch.equal(together.nfe, apart.nfe) and together.nfe.unique().numel() > 1


def test_few_rows_at_once_record_the_log_probs_that_they_were_drawn_with():
    policy, rollout, _ = few_at_once(2, to_the_end("eb", 4.0, temperature=0.9))
    every_step = torch.arange(1, int(rollout.nfe.max()) + 1).expand(8, -1)
    exact = surrogate_logp(policy, rollout, every_step)
    torch.testing.assert_close(rollout.behaviour_logp, exact, rtol=1e-4, atol=1e-4)
    assert (rollout.completion[::2] != rollout.completion[1::2]).any()  # a group's rows draw apart


# ---- block caches --------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("decoder", [d for d in WIDE if d.block_length], ids=name)
def test_with_one_layer_a_cache_changes_nothing(cache, decoder):
    """Keys and values of a first layer depend on their own token alone, so none is ever stale."""
    policy = wide_policy(layers=1)
    ids, mask = random_prompts(6, 6, 5)
    exact, cached = (
        policy.rollout(ids, mask, 11, replace(decoder, cache=c, temperature=0.9), generator(4))
        for c in ("none", cache)
    )
    for field in ("completion", "unmask_step", "nfe", "token_mask"):
        assert torch.equal(getattr(exact, field), getattr(cached, field)), field
    torch.testing.assert_close(cached.behaviour_logp, exact.behaviour_logp, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(cached.prompt_state, exact.prompt_state)


QUESTIONS = ["what is 3 + 4?", "what is 2 + 9?", "and 10 - 7"]


@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("decoder", [to_the_end("eb", 6.0, 4), to_the_end("top_k", 2, 4)], ids=name)
def test_recorded_log_probs_are_those_of_the_stale_states_really_drawn_from(
    tmp_path, family, cache, decoder
):
    weights, config = write_checkpoint(tmp_path, family)
    policy = load_policy(tmp_path)
    L = 10
    temperature = 0.8
    ids, mask = encode_prompts(policy, QUESTIONS)
    decoder = replace(decoder, temperature=temperature, stop_at_eos=True, cache=cache)
    rollout = policy.rollout(ids, mask, L, decoder, generator(4))
    exact = surrogate_logp(policy, rollout, torch.arange(1, L + 1).expand(3, -1))
    stale = 0
    for row in range(3):
        prompt = ids[row][mask[row]]
        P = len(prompt)
        keys_and_values = []
        block = -1
        for t in range(1, int(rollout.nfe[row]) + 1):
            steps = rollout.unmask_step[row]
            completion = rollout.completion[row]
            drawn = (steps == t).nonzero().flatten()
            state = completion.masked_fill(steps >= t, policy.mask_id)
            canvas = torch.cat([prompt, state]).unsqueeze(0)
            if drawn[0] // 4 != block:
                keys_and_values = []
                block = drawn[0] // 4
                part = None
            else:
                start = P + int(block) * 4
                part = slice(start - (family == "dream"), None if cache == "prefix" else start + 4)
                stale += 1
            logits = reference_logits(
                family, weights, config, canvas, cache=keys_and_values, part=part
            )
            logits = logits[0, P:] / temperature
            logits[:, policy.mask_id] = -torch.inf
            expected = logits.log_softmax(-1)[drawn, completion[drawn]]
            recorded = rollout.behaviour_logp[row, drawn]
            torch.testing.assert_close(recorded, expected, rtol=1e-4, atol=1e-4)
    # approximate, as it should be
    assert stale > 3 and (rollout.behaviour_logp - exact)[rollout.token_mask].abs().max() > 0.01


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_a_cache_runs_the_canvas_once_a_block_and_then_a_part_of_it(cache):
    policy = wide_policy()
    (ids, mask) = random_prompts(6, 6)
    calls = calls_of(policy)
    policy.rollout(ids, mask, 10, to_the_end("top_k", 2, 4, cache=cache), generator(4))
    parts = {"prefix": [10, 6], "dual": [4, 4]}[cache]
    # the last block is full after one
    assert [positions for _, positions, _ in calls] == [16, parts[0], 16, parts[1], 16]


def test_rows_that_finish_a_block_early_wait_for_the_others_and_leave_the_cache():
    policy = wide_policy()
    (ids, mask) = random_prompts(6, 6, 6, 6)
    calls = calls_of(policy)
    rollout = policy.rollout(ids, mask, 12, to_the_end("eb", 5.0, 4, cache="dual"), generator(4))
    whole = [rows for rows, positions, _ in calls if positions == 18]
    assert whole == [4, 4, 4] and {rows for rows, positions, _ in calls if positions == 4} > {4}
    for steps, nfe in zip(rollout.unmask_step.tolist(), rollout.nfe.tolist(), strict=True):
        assert set(steps) == set(range(1, nfe + 1))


def test_the_learned_threshold_works_on_a_checkpoint_and_with_a_cache(tmp_path):
    write_checkpoint(tmp_path, "llada")
    policy = load_policy(tmp_path)
    policy.threshold_head = ThresholdHead(policy.denoiser.config.hidden_size, 1.0)
    ids, mask = encode_prompts(policy, QUESTIONS)
    rollout = policy.rollout(ids, mask, 12, to_the_end("eb", None, 4, cache="dual"), generator(1))
    assert len(set(rollout.threshold.tolist())) == 3 and (rollout.completion < VOCABULARY).all()
    logp = policy.threshold_head(rollout.prompt_state).log_prob(rollout.threshold)
    torch.testing.assert_close(logp, rollout.threshold_logp)
