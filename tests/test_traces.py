"""Traces: what they record against what the rollout really saw, and what can be read off them."""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from toy import toy_policy

from evaluation import traces
from likelihood import latent_at
from models.prompting import decode_completions, encode_prompts
from sampler import Decoder

TASK = SimpleNamespace(prompt=lambda problem: problem, solved=lambda problem, text: "a" in text)
DECODERS = [
    Decoder("eb", 1.2, temperature=0.0, stop_at_eos=False),
    Decoder("eb", None, temperature=0.0, stop_at_eos=True, sample_threshold=False),
    Decoder("eb", 0.8, block_length=3, temperature=0.0, stop_at_eos=False),
    Decoder("top_k", 2, temperature=0.0, stop_at_eos=False),
    Decoder("confidence", 0.6, block_length=4, temperature=1.0, stop_at_eos=False),
]


@pytest.fixture(scope="module")
def policy():
    return toy_policy(head=True)


@dataclass(frozen=True)
class WatchedDecoder(Decoder):
    """A decoder that notes what it is shown, and what it selects."""

    def select(self, entropy, confidence, masked, gamma=None):
        selected = super().select(entropy, confidence, masked, gamma)
        reading = entropy if self.rule == "eb" else confidence
        seen.append([x[0].tolist() for x in (reading, masked, selected)])
        return selected


seen = []


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_trace_has_what_each_call_of_the_rollout_saw_and_took(policy, decoder):
    seen.clear()
    trace = traces.record(policy, TASK, "a b", WatchedDecoder(**vars(decoder)), 7, seed=3)
    assert trace.nfe == len(trace.readings) == len(seen) > 1
    for t, (readings, masked, selected) in enumerate(seen, start=1):
        assert [step == t for step in trace.unmask_step] == selected
        assert [x is not None for x in trace.readings[t - 1]] == masked
        for recorded, shown in zip(trace.readings[t - 1], readings, strict=True):
            assert recorded is None or recorded == pytest.approx(shown, abs=1e-5)


def test_a_trace_has_the_rollouts_text_tokens_steps_and_threshold(policy):
    decoder = DECODERS[1]
    prompt_ids, prompt_mask = encode_prompts(policy, ["a b"])
    rollout = policy.rollout(prompt_ids, prompt_mask, 7, decoder)
    trace = traces.record(policy, TASK, "a b", decoder, 7)
    [text] = decode_completions(policy, rollout)
    assert (trace.prompt, trace.text, trace.solved) == ("a b", text, "a" in text)
    assert trace.unmask_step == rollout.unmask_step[0].tolist()
    words = dict(enumerate(["[MASK]", "[EOS]", "a", "b"]))
    assert trace.tokens == [words[i] for i in rollout.completion[0].tolist()]
    assert trace.level == pytest.approx(rollout.threshold.item())


def test_the_explanation_has_the_sum_that_gamma_bounds_and_the_sum_that_stops_the_next(trace):
    assert trace.nats_before(1) == pytest.approx({1: 0, 3: 0.02, 0: 0.07, 2: 0.57})
    line = "unmasks 3: the 2 surest sum to 0.070 nats (γ = 0.100), all 3 to 0.570"
    assert trace.explain(1) == line
    assert trace.explain(2) == "unmasks the remaining one"
    at_once = replace(trace, unmask_step=[1] * 4, level=0.6)
    line = "unmasks the remaining 4: the 3 surest sum to 0.570 nats (γ = 0.600)"
    assert at_once.explain(1) == line
    two = replace(trace, unmask_step=[2, 1, 2, 1], level=0.03)
    assert two.explain(1) == "unmasks 2: the surest has 0.020 nats (γ = 0.030), both sum to 0.070"
    one = replace(trace, unmask_step=[2, 1, 2, 2], level=0.01)
    assert one.explain(1) == "unmasks 1: it has 0.020 nats (γ = 0.010)"
    assert replace(trace, rule="top_k", level=3).explain(1) == "unmasks 3: the 3 surest"
    line = "unmasks 1: all with p > 0.95, and at least the surest"
    assert replace(trace, rule="confidence", level=0.95).explain(2) == line


def test_the_terminal_reads_without_colour(trace):
    lines = traces.describe_trace(trace, colour=False).splitlines()
    assert lines[1:3] == ["prompt  3 4", "γ = 0.1, 4 tokens in 2 calls, solved"]
    assert lines[5].split() == ["35·1", "(·1", "░░░", ")·1"]
    assert lines[6].split() == ["0.50*", "0.02*", "0.90", "0.05*"]
    assert lines[9].split() == ["35·1", "(·1", "+·2", ")·1"] and lines[10].split() == ["0.30*"]
    coloured = traces.describe_trace(trace, colour=True)
    assert coloured.count("\x1b[48;5;") == 3 + 4 and coloured.count("\x1b[0m") == 3 + 4
    wide = replace(
        trace,
        tokens=["</answer>"] * 40,
        unmask_step=[1] * 39 + [2],
        readings=[[0.1] * 40, [None] * 39 + [0.1]],
    )
    assert max(map(len, traces.describe_trace(wide, colour=False).splitlines())) <= 80


def test_a_token_cannot_steer_the_terminal():
    tokens = ["\x1b[2J", " the", "\n", "  ", "é\u202e"]
    assert [traces.visible(token) for token in tokens] == [
        r"\x1b[2J",
        "the",
        "⏎",
        "␣",
        r"é\u202e",
    ]


def test_two_stages_score_each_token_from_its_state(policy):
    decoder = Decoder("top_k", 2)
    stages = traces.two_stages(policy, TASK, "a b", decoder, 7, seed=5, samples=1)
    generator = torch.Generator().manual_seed(5)
    prompt_ids, prompt_mask = encode_prompts(policy, ["a b"])
    decoder = replace(decoder, stop_at_eos=True)
    rollout = policy.rollout(prompt_ids, prompt_mask, 7, decoder, generator).rows([0])
    tau = stages.tau
    assert tau == int(rollout.nfe) // 2
    assert len(stages.tokens) == int(rollout.token_mask.sum())
    for i, (step, start) in enumerate(zip(stages.unmask_step, stages.scored_from, strict=True)):
        assert start == (tau if step > tau else 0)
        for probability, seen_at in ((stages.scored[i], start), (stages.drawn[i], step - 1)):
            state = latent_at(rollout.completion, rollout.unmask_step, seen_at, policy.mask_id)
            canvas = torch.cat([prompt_ids, state], dim=1)
            logits = policy.denoiser(input_ids=canvas).logits[0, 2 + i]
            logits[policy.mask_id] = -torch.inf
            p = logits.softmax(-1)[rollout.completion[0, i]].item()
            assert probability == pytest.approx(p, abs=1e-5)


def test_two_stages_show_the_solved_completion_of_the_most_calls(policy):
    decoder = Decoder("eb", 0.8)
    prompt_ids, prompt_mask = encode_prompts(policy, ["a b"] * 8)
    decoder_to_eos = replace(decoder, stop_at_eos=True)
    generator = torch.Generator().manual_seed(1)
    rollout = policy.rollout(prompt_ids, prompt_mask, 7, decoder_to_eos, generator)
    texts = decode_completions(policy, rollout)
    for solved_text in (max(texts), "no such text"):
        task = SimpleNamespace(
            prompt=lambda problem: problem,
            solved=lambda problem, text, solved_text=solved_text: text == solved_text,
        )
        stages = traces.two_stages(policy, task, "a b", decoder, 7, seed=1)
        candidates = [i for i in range(8) if texts[i] == solved_text]
        assert stages.solved == bool(candidates)
        most_calls = max(int(rollout.nfe[i]) for i in candidates or range(8))
        assert max(stages.unmask_step) == most_calls
