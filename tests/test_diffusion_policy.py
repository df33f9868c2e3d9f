"""diffusion_policy.py: rollouts of a toy against every trajectory that it can take, enumerated one denoiser call at a time."""

import math
from collections import Counter

import pytest
import torch
from torch import nn
from toy import EOS, MASK, PROMPTS, A, B, chi_square_p, direct_logp, generator, next_positions, prompt_of, sample, toy_policy, trajectories

from sampler import Decoder

RULES = [("eb", 0.3), ("confidence", 0.7), ("top_k", 1), ("top_k", 2)]
DECODERS = [Decoder(rule, setting, block) for rule, setting in RULES for block in (None, 2)]
LEARNED = Decoder("eb", None)


def name(decoder):
    return f"{decoder.rule}-{decoder.setting}-block-{decoder.block_length}"


def greedy_loop(policy, prompt, length, decoder, gamma=None):
    """One row, one call at a time: (completion, unmask_step), lists."""
    state, steps, t = [MASK] * length, [0] * length, 0
    while MASK in state:
        t += 1
        positions = next_positions(policy, prompt, state, decoder, gamma)
        best = direct_logp(policy, prompt, state).argmax(-1).tolist()
        for i in positions:
            state[i], steps[i] = best[i], t
    return state, steps


def assert_row_equals(rollout, row, other, other_row=0):
    """All of two rows but their prompts' padding."""
    for field in ("completion", "unmask_step", "token_mask", "nfe"):
        assert torch.equal(getattr(rollout, field)[row], getattr(other, field)[other_row]), field
    for field in ("behaviour_logp", "threshold", "threshold_logp", "prompt_state"):
        expected = getattr(other, field)[other_row]
        torch.testing.assert_close(getattr(rollout, field)[row], expected, rtol=1e-4, atol=1e-4, equal_nan=True)


# ---- against the enumerated distribution -------------------------------------------------------------------------------


@pytest.mark.parametrize("stop_at_eos", [False, True], ids=["to-the-end", "stop-at-eos"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("decoder", DECODERS, ids=name)
def test_rollouts_are_distributed_as_the_enumerated_trajectories_and_record_their_log_probs(decoder, temperature, stop_at_eos):
    policy, prompts, n = toy_policy(), PROMPTS[:2], 2000
    rollout = sample(policy, decoder, n, prompts=prompts, temperature=temperature, stop_at_eos=stop_at_eos)
    counts, expected = [], []
    for p in range(len(prompts)):
        rows = rollout.rows(slice(p * n, (p + 1) * n))
        every = trajectories(policy, prompt_of(rows, 0), 3, decoder, temperature, stop_at_eos)
        assert sum(math.exp(sum(logp)) for logp in every.values()) == pytest.approx(1, abs=1e-5)
        keys = list(zip(map(tuple, rows.completion.tolist()), map(tuple, rows.unmask_step.tolist()), strict=True))
        torch.testing.assert_close(rows.behaviour_logp, torch.tensor([every[key] for key in keys]), rtol=1e-4, atol=1e-4)
        seen = Counter(keys)
        counts += [seen[key] for key in every]
        expected += [n * math.exp(sum(logp)) for logp in every.values()]
    assert chi_square_p(counts, expected) > 1e-3


def test_the_chi_square_test_sees_a_wrong_temperature():  # or the test above would prove little
    policy, decoder, n = toy_policy(), Decoder("eb", 0.3), 2000
    rollout = sample(policy, decoder, n, prompts=PROMPTS[:1], temperature=0.8)
    every = trajectories(policy, prompt_of(rollout, 0), 3, decoder, temperature=1.0)
    seen = Counter(zip(map(tuple, rollout.completion.tolist()), map(tuple, rollout.unmask_step.tolist()), strict=True))
    assert chi_square_p([seen[key] for key in every], [n * math.exp(sum(logp)) for logp in every.values()]) < 1e-6


def test_the_enumerated_steps_unmask_one_or_two_tokens_and_depend_on_the_tokens_drawn():
    every = trajectories(toy_policy(), [A, B], 3, Decoder("eb", 0.3))
    assert {steps for _, steps in every} == {(1, 2, 2), (1, 3, 2), (1, 2, 3)}


def test_mask_is_never_drawn_nor_counted_however_likely():
    policy = toy_policy()
    plain = sample(policy, Decoder("eb", 0.3), 50)
    head = nn.Linear(policy.denoiser.config.hidden_size, 4)
    with torch.no_grad():
        head.weight.copy_(policy.denoiser.get_output_embeddings().weight)
        head.bias.copy_(torch.tensor([1000.0, 0, 0, 0]))
    policy.denoiser.set_output_embeddings(head)
    rollout = sample(policy, Decoder("eb", 0.3), 50)
    assert not (rollout.completion == MASK).any()
    for row in range(len(rollout.nfe)):
        assert_row_equals(rollout, row, plain, row)


# ---- what a rollout records --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", DECODERS, ids=name)
def test_every_step_to_nfe_unmasks_a_token_and_no_step_comes_after(decoder):
    rollout = sample(toy_policy(), decoder, 10, length=6)
    for steps, nfe in zip(rollout.unmask_step.tolist(), rollout.nfe.tolist(), strict=True):
        assert set(steps) == set(range(1, nfe + 1))


def test_token_mask_is_the_tokens_up_to_the_first_eos_and_decode_stops_there():
    policy = toy_policy()
    rollout = sample(policy, Decoder("top_k", 2), 100, length=5)
    lengths = set()
    for row, mask, text in zip(rollout.completion.tolist(), rollout.token_mask.tolist(), policy.decode(rollout), strict=True):
        end = row.index(EOS) if EOS in row else 5
        assert mask == [i <= end for i in range(5)]
        assert text.split() == ["ab"[token - A] for token in row[:end]]
        lengths.add(end)
    assert lengths == {0, 1, 2, 3, 4, 5}


def test_encode_pads_on_the_left_and_refuses_unknown_words():
    policy = toy_policy()
    ids, mask = policy.encode(PROMPTS)
    assert mask.tolist() == [[False] * (5 - n) + [True] * n for n in (2, 1, 5)]
    assert [row[m].tolist() for row, m in zip(ids, mask, strict=True)] == [[A, B], [B], [A, A, B, B, A]]
    with pytest.raises(ValueError):
        policy.encode(["a c"])


def test_rows_takes_the_same_rows_of_every_tensor():
    rollout = sample(toy_policy(head=True), LEARNED, 2, temperature=0.7)
    for index in (torch.tensor([1, 4]), torch.tensor([False, True, False, False, True, False]), slice(1, 5, 3)):
        some = vars(rollout.rows(index))
        assert some.pop("temperature") == 0.7
        for field, value in some.items():
            assert value.tolist() == [vars(rollout)[field][i].tolist() for i in (1, 4)]


def test_the_same_seed_gives_the_same_rollout_and_the_global_generator_is_left_alone():
    policy, before = toy_policy(head=True), torch.get_rng_state()
    first, second, other = (sample(policy, LEARNED, 20, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(vars(first)[k], vars(second)[k]) for k in vars(first) if k != "temperature")
    assert not torch.equal(first.completion, other.completion) and not torch.equal(first.threshold, other.threshold)


# ---- greedy, and rows that do not disturb each other -------------------------------------------------------------------


@pytest.mark.parametrize("decoder", DECODERS, ids=name)
def test_greedy_is_the_argmax_loop_of_each_prompt_alone(decoder):  # prompts of unequal length, so left padding too
    policy = toy_policy()
    rollout = sample(policy, decoder, 1, length=6, temperature=0.0)
    assert not rollout.behaviour_logp.any()
    for row in range(len(PROMPTS)):
        expected = greedy_loop(policy, prompt_of(rollout, row), 6, decoder)
        assert (rollout.completion[row].tolist(), rollout.unmask_step[row].tolist()) == expected


def test_a_padded_row_equals_its_own_unbatched_rollout_with_a_learned_gamma():
    policy = toy_policy(head=True)
    rollout = sample(policy, LEARNED, 1, length=6, temperature=0.0, sample_threshold=False)
    for row, prompt in enumerate(PROMPTS):
        alone = sample(policy, LEARNED, 1, length=6, prompts=[prompt], temperature=0.0, sample_threshold=False)
        assert_row_equals(rollout, row, alone)
        expected = greedy_loop(policy, prompt_of(rollout, row), 6, LEARNED, rollout.threshold[row].item())
        assert (rollout.completion[row].tolist(), rollout.unmask_step[row].tolist()) == expected
    assert len(set(rollout.threshold.tolist())) == 3


@pytest.mark.parametrize("stop_at_eos", [False, True])
def test_rows_that_finish_early_do_not_change_the_others(stop_at_eos):
    policy, prompts = toy_policy(seed=4), ["a b", "b", "b b b", "a b a b", "a"]
    options = {"length": 8, "temperature": 0.0, "stop_at_eos": stop_at_eos}
    rollout = sample(policy, Decoder("eb", 0.5), 1, prompts=prompts, **options)
    assert len(set(rollout.nfe.tolist())) > 1
    for row, prompt in enumerate(prompts):
        assert_row_equals(rollout, row, sample(policy, Decoder("eb", 0.5), 1, prompts=[prompt], **options))


@pytest.mark.parametrize("decoder", DECODERS, ids=name)
def test_stopping_at_eos_saves_calls_and_keeps_the_text(decoder):
    saved = 0
    for seed in (1, 4, 5, 6):
        policy = toy_policy(seed)
        whole, stopped = (sample(policy, decoder, 1, length=8, temperature=0.0, stop_at_eos=stop) for stop in (False, True))
        assert policy.decode(whole) == policy.decode(stopped)
        assert torch.equal(whole.token_mask, stopped.token_mask)
        assert (stopped.nfe <= whole.nfe).all()
        saved += (whole.nfe - stopped.nfe).sum().item()
        drawn = whole.unmask_step <= stopped.nfe.unsqueeze(1)  # (B, L)
        assert torch.equal(stopped.completion, whole.completion.where(drawn, torch.tensor(EOS)))
        assert torch.equal(stopped.unmask_step, whole.unmask_step.where(drawn, stopped.nfe.unsqueeze(1) + 1))
    assert saved > 0


@pytest.mark.parametrize("decoder", DECODERS, ids=name)
def test_a_stopped_rows_last_call_is_the_one_that_completes_its_text(decoder):
    rollout = sample(toy_policy(), decoder, 20, length=5, stop_at_eos=True)
    for completion, steps, nfe in zip(rollout.completion.tolist(), rollout.unmask_step.tolist(), rollout.nfe.tolist(), strict=True):
        end = completion.index(EOS) + 1 if EOS in completion else 5
        assert nfe == max(steps[:end])


# ---- blocks and calls --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule, setting", RULES)
@pytest.mark.parametrize("block_length", [1, 2, 3])
def test_no_token_of_a_later_block_comes_before_an_earlier_block_is_full(rule, setting, block_length):
    rollout = sample(toy_policy(), Decoder(rule, setting, block_length), 10, length=8)
    for steps in rollout.unmask_step.tolist():
        blocks = [steps[i : i + block_length] for i in range(0, 8, block_length)]
        assert all(max(earlier) < min(later) for earlier, later in zip(blocks, blocks[1:], strict=False))


@pytest.mark.parametrize("k, block_length", [(1, None), (2, None), (3, None), (9, None), (2, 3), (3, 3), (3, 2), (2, 5)])
def test_top_k_takes_a_blocks_length_over_k_calls_rounded_up(k, block_length):
    rollout = sample(toy_policy(), Decoder("top_k", k, block_length), 2, length=8)
    blocks = [min(block_length or 8, 8 - start) for start in range(0, 8, block_length or 8)]
    assert set(rollout.nfe.tolist()) == {sum(math.ceil(size / k) for size in blocks)}


# ---- the learned threshold ---------------------------------------------------------------------------------------------


def test_prompt_state_is_the_mean_of_the_prompts_last_hidden_states_at_the_first_call():
    policy = toy_policy()
    rollout = sample(policy, Decoder("eb", 0.3), 1)
    for row in range(len(PROMPTS)):
        prompt = prompt_of(rollout, row)
        hidden = policy.denoiser.model(torch.tensor([prompt + [MASK] * 3])).last_hidden_state[0, : len(prompt)]  # (P, D)
        torch.testing.assert_close(rollout.prompt_state[row], hidden.mean(0), rtol=1e-4, atol=1e-4)


def test_a_learned_threshold_is_drawn_from_the_heads_distribution_and_its_log_prob_recorded():
    policy, n = toy_policy(head=True), 1000
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
        completion, steps = rollout.completion[row].tolist(), rollout.unmask_step[row].tolist()
        for t in range(1, rollout.nfe[row].item() + 1):
            state = [token if step < t else MASK for token, step in zip(completion, steps, strict=True)]
            positions = next_positions(policy, prompt_of(rollout, row), state, LEARNED, rollout.threshold[row].item())
            assert sorted(positions) == [i for i in range(4) if steps[i] == t]
            used.add(len(positions))
    assert len(used) > 1


def test_without_sampling_the_threshold_is_the_median_and_without_learning_the_setting():
    policy = toy_policy(head=True)
    rollout = sample(policy, LEARNED, sample_threshold=False)
    assert torch.equal(rollout.threshold, policy.threshold_head(rollout.prompt_state).median)
    fixed = sample(policy, Decoder("eb", 0.25))
    assert set(fixed.threshold.tolist()) == {0.25} and not fixed.threshold_logp.any()
    assert sample(policy, Decoder("top_k", 1)).threshold.isnan().all()


def test_a_larger_gamma_never_takes_more_calls_on_average():
    policy = toy_policy()
    nfe = [sample(policy, Decoder("eb", gamma), 100, length=6).nfe.float().mean().item() for gamma in (0.0, 0.3, 0.6, 1.2, 100.0)]
    assert nfe == sorted(nfe, reverse=True) and nfe[0] == 6 and nfe[-1] == 1


def test_a_rollout_makes_no_gradient_and_counts_its_calls():
    policy, calls = toy_policy(), []
    policy.denoiser.get_decoder().register_forward_pre_hook(lambda *_: calls.append(1))
    rollout = policy.rollout(*policy.encode(["a b"]), 6, Decoder("top_k", 2), generator())
    assert len(calls) == rollout.nfe.item() == 3
    assert not rollout.behaviour_logp.requires_grad
