"""Traces: what they record against what the rollout really saw, and what can be read off them."""

from dataclasses import dataclass, replace
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from toy import toy_policy

from evaluation import traces
from evaluation.plots import shade
from likelihood import latent_at
from sampler import Decoder

TASK = SimpleNamespace(prompt=lambda problem: problem, solved=lambda problem, text: "a" in text)
DECODERS = [
    Decoder("eb", 1.2, temperature=0.0),
    Decoder("eb", None, temperature=0.0, sample_threshold=False, stop_at_eos=True),
    Decoder("eb", 0.8, 3, temperature=0.0),
    Decoder("top_k", 2, temperature=0.0),
    Decoder("confidence", 0.6, 4, temperature=1.0),
]


@pytest.fixture(scope="module")
def policy():
    return toy_policy(head=True)


@dataclass(frozen=True)
class Watched(Decoder):
    """A decoder that keeps what it was shown, and what it chose."""

    def select(self, entropy, confidence, masked, gamma=None):
        chosen = super().select(entropy, confidence, masked, gamma)
        read = entropy if self.rule == "eb" else confidence
        seen.append([x[0].tolist() for x in (read, masked, chosen)])
        return chosen


seen = []


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_trace_has_what_each_call_of_the_rollout_saw_and_took(policy, decoder):
    seen.clear()
    trace = traces.record(policy, TASK, "a b", Watched(**vars(decoder)), 7, seed=3)
    assert len(trace.read) == len(seen) > 1
    for t, (read, masked, chosen) in enumerate(seen, start=1):
        assert [step == t for step in trace.step] == chosen
        assert [x is not None for x in trace.read[t - 1]] == masked
        for now, then in zip(trace.read[t - 1], read, strict=True):
            assert now is None or now == pytest.approx(then, abs=1e-5)


def test_a_trace_says_what_came_of_it(policy):
    decoder = DECODERS[1]
    prompts = policy.encode(["a b"])
    rollout = policy.rollout(*prompts, 7, decoder)
    trace, (text,) = traces.record(policy, TASK, "a b", decoder, 7), policy.decode(rollout)
    assert (trace.prompt, trace.answer, trace.solved) == ("a b", text, "a" in text)
    assert trace.step == rollout.unmask_step[0].tolist()
    words = dict(enumerate(["[MASK]", "[EOS]", "a", "b"]))
    assert trace.words == [words[i] for i in rollout.completion[0].tolist()]
    assert trace.level == pytest.approx(rollout.threshold.item())


@pytest.fixture
def trace():
    """Two calls: gamma 0.1 allows 1, 3 and 0, since 0.02 + 0.05 come before 0. Then 2."""
    entropy = [[0.5, 0.02, 0.9, 0.05], [None, None, 0.3, None]]
    words, step = ["35", "(", "+", ")"], [1, 1, 2, 1]
    return traces.Trace("3 4", words, step, entropy, "eb", 0.1, "35", True)


def test_the_reason_is_the_sum_of_the_entropies_before(trace):
    assert trace.before(1) == pytest.approx({1: 0, 3: 0.02, 0: 0.07, 2: 0.57})
    said = "takes 3: 0.070 of 0.100 nats before the last"
    assert trace.reason(1) == said + "; 0.570 before the next"
    assert trace.reason(2) == "takes 1: 0.000 of 0.100 nats before the last"
    assert replace(trace, rule="top_k", level=3).reason(1) == "takes 3: the 3 surest"
    said = "takes 1: p > 0.95, or the best one"
    assert replace(trace, rule="confidence", level=0.95).reason(2) == said


def test_the_terminal_reads_without_colour(trace):
    lines = traces.printed(trace, colour=False).splitlines()
    assert lines[1:3] == ["prompt  3 4", "γ = 0.1, 4 tokens in 2 calls, solved"]
    assert lines[5].split() == ["35·1", "(·1", "░░░", ")·1"]
    assert lines[6].split() == ["0.50*", "0.02*", "0.90", "0.05*"]
    assert lines[9].split() == ["35·1", "(·1", "+·2", ")·1"] and lines[10].split() == ["0.30*"]
    coloured = traces.printed(trace, colour=True)
    assert coloured.count("\x1b[48;5;") == 3 + 4 and coloured.count("\x1b[0m") == 3 + 4
    wide = replace(trace, words=["</answer>"] * 40, step=[1] * 39 + [2])
    wide.read = [[0.1] * 40, [None] * 39 + [0.1]]
    assert max(map(len, traces.printed(wide, colour=False).splitlines())) <= 80


HOSTILE = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "\x1b[2J\n", "&lt;"]


def test_a_token_cannot_steer_the_terminal():
    assert [traces.visible(word) for word in ("\x1b[2J", " the", "\n", "  ", "é\u202e")] == [
        r"\x1b[2J", "the", "⏎", "␣", r"é\u202e",
    ]  # fmt: skip


class Page(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.said = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.said += data


def test_a_hostile_completion_stays_text_and_the_page_needs_nothing_else(trace):
    bad = replace(trace, words=[traces.visible(x) for x in HOSTILE], prompt=HOSTILE[0])
    bad.answer = HOSTILE[1]
    stages = {"prompt": HOSTILE[1], "words": HOSTILE[:1], "drawn": [0.5], "scored": [0.25]}
    page, good = (Page(traces.page([x], stages, "aW1n", HOSTILE[0])) for x in (bad, trace))
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in good.tags]
    names = {name for _, attributes in page.tags for name in attributes}
    assert not any(name.startswith("on") or name == "href" for name in names)
    (source,) = [attributes["src"] for _, attributes in page.tags if "src" in attributes]
    assert source == "data:image/png;base64,aW1n"
    assert all(traces.visible(word) in page.said for word in HOSTILE)
    (alt,) = [attributes["alt"] for _, attributes in page.tags if "alt" in attributes]
    assert alt.startswith(HOSTILE[1]) and alt.endswith("drawn 0.50, scored 0.25")


def test_the_page_shows_all_calls_without_javascript(trace):
    page = traces.section(trace)
    calls = page.split('<div class="call">')[1:]
    assert len(calls) == 2 and "call 2" in calls[1] and calls[0].count('class="mask"') == 1
    assert calls[0].count('class="box now"') == 3 and calls[1].count('class="box now"') == 1
    assert "0.50" in calls[0] and "<small>2</small>" in calls[1] and "hidden" not in calls[0]


def test_the_animation_shows_each_call_for_a_second_and_holds_the_end(trace, tmp_path):
    traces.animate([trace, replace(trace, solved=False)], tmp_path / "trace.gif")
    image, seconds = Image.open(tmp_path / "trace.gif"), []
    for i in range(image.n_frames):
        image.seek(i)
        seconds.append(image.info["duration"] / 1000)
    assert seconds == [1, 1, 3] * 2 and image.size[0] == 800
    assert (tmp_path / "trace.gif").stat().st_size < 400_000


def test_later_calls_are_lighter_and_ink_stands_out():
    def grey(rgb):
        return sum(share * x for share, x in zip((0.3, 0.59, 0.11), rgb, strict=True))

    for T in (1, 2, 3, 8):
        shades = [shade(t, T) for t in range(1, T + 1)]
        greys = [grey(back) for back, _ in shades]
        assert all(later - sooner > 0.04 for sooner, later in zip(greys, greys[1:], strict=False))
        assert all(abs(grey(back) - grey(ink)) > 0.4 for back, ink in shades)


def test_two_stages_score_each_token_from_its_state(policy):
    decoder = Decoder("top_k", 2)
    stages = traces.two_stages(policy, TASK, "a b", decoder, 7, seed=5)
    chance = torch.Generator().manual_seed(5)
    prompts = policy.encode(["a b"])
    rollout = policy.rollout(*prompts, 7, replace(decoder, stop_at_eos=True), chance).rows([0])
    tau, n = stages["tau"], len(stages["words"])
    assert tau == int(rollout.nfe) // 2 and n == int(rollout.token_mask.sum())
    for i, (step, start) in enumerate(zip(stages["step"], stages["scored_from"], strict=True)):
        assert start == (tau if step > tau else 0)
        for key, seen_at in (("scored", start), ("drawn", step - 1)):
            state = latent_at(rollout.completion, rollout.unmask_step, seen_at, policy.mask_id)
            logits = policy.denoiser(input_ids=torch.cat([prompts[0], state], 1)).logits[0, 2 + i]
            logits[policy.mask_id] = -torch.inf
            p = logits.softmax(-1)[rollout.completion[0, i]].item()
            assert stages[key][i] == pytest.approx(p, abs=1e-5)
