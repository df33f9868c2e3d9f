"""The page and the animation of traces: safe, whole without JavaScript, small."""

import warnings
from dataclasses import replace
from html.parser import HTMLParser

from PIL import Image

from evaluation import trace_page
from evaluation.traces import TwoStages, visible

HOSTILE = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "\x1b[2J\n", "&lt;"]


class Page(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def test_a_hostile_completion_stays_text_and_the_page_needs_nothing_else(trace):
    hostile = replace(
        trace,
        tokens=[visible(token) for token in HOSTILE],
        prompt=HOSTILE[0],
        text=HOSTILE[1],
    )
    stages = TwoStages(
        prompt=HOSTILE[1],
        tau=1,
        solved=False,
        tokens=HOSTILE[:1],
        unmask_step=[1],
        scored_from=[0],
        drawn=[0.5],
        scored=[0.25],
    )
    page = Page(trace_page.page([hostile], stages, "aW1n", HOSTILE[0]))
    harmless = Page(trace_page.page([trace], stages, "aW1n", HOSTILE[0]))
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in harmless.tags]
    names = {name for _, attributes in page.tags for name in attributes}
    assert not any(name.startswith("on") or name == "href" for name in names)
    (source,) = [attributes["src"] for _, attributes in page.tags if "src" in attributes]
    assert source == "data:image/png;base64,aW1n"
    assert all(visible(token) in page.text for token in HOSTILE)
    (alt,) = [attributes["alt"] for _, attributes in page.tags if "alt" in attributes]
    assert alt.startswith(HOSTILE[1]) and alt.endswith("drawn 0.50, scored 0.25")


def test_the_page_shows_all_calls_without_javascript(trace):
    section = trace_page.section(trace)
    calls = section.split('<div class="call">')[1:]
    assert len(calls) == 2 and "call 2" in calls[1] and calls[0].count('class="mask"') == 1
    assert calls[0].count('class="box now"') == 3 and calls[1].count('class="box now"') == 1
    assert "0.50" in calls[0] and "<small>2</small>" in calls[1] and "hidden" not in calls[0]


def test_the_animation_shows_each_call_for_a_second_and_holds_the_end(trace, tmp_path):
    trace_page.animate([trace, replace(trace, solved=False)], tmp_path / "trace.gif")
    image = Image.open(tmp_path / "trace.gif")
    seconds = []
    for i in range(image.n_frames):
        image.seek(i)
        seconds.append(image.info["duration"] / 1000)
    assert seconds == [1, 1, 3] * 2 and image.size[0] == 800
    assert (tmp_path / "trace.gif").stat().st_size < 400_000


def test_any_token_can_be_drawn(trace):
    hostile = replace(
        trace,
        prompt="$1 $2_{",
        tokens=["$x", "$\\frac{$", "你", "_^", "</answer>"],
        unmask_step=[1, 1, 1, 1, 2],
        readings=[[0.1] * 5, [None] * 4 + [0.2]],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert trace_page.frame(hostile, 2, 10).size == (800, 218)
