"""Pictures: drawn from rows that are known, and read back."""

import warnings

import pytest
from PIL import Image
from rows import ROWS, row

from evaluation import plots
from evaluation.traces import TwoStages

HOSTILE = "_$x_{$"  # matplotlib would hide a label that begins with _, and fail on this TeX


@pytest.fixture
def drawn(monkeypatch):
    """The figures that would have been saved, by file name."""
    figures = {}
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.update({path.name: figure}))
    return figures


def texts_of(legend):
    return [text.get_text() for text in legend.get_texts()]


# ---- accuracy against NFE ------------------------------------------------------------------------


def test_lines_bars_and_origin_are_those_of_the_rows(drawn, tmp_path):
    plots.plot_frontier(ROWS, tmp_path / "frontier.png", "countdown")
    (axis,) = drawn["frontier.png"].axes
    assert axis.get_xlim()[0] == axis.get_ylim()[0] == 0
    lines = {box.get_label(): box for box in axis.containers}
    assert texts_of(axis.get_legend()) == list(lines)
    line, _, (bars,) = lines["base, entropy-bounded (γ)"]
    assert line.get_xydata().tolist() == [[3.0, 0.10], [5.0, 0.13]]
    assert [bar[:, 1].tolist() for bar in bars.get_segments()] == [
        pytest.approx([0.08, 0.12]),
        pytest.approx([0.11, 0.15]),
    ]
    styles = {(x[0].get_marker(), x[0].get_linestyle()) for x in lines.values()}
    assert len(styles) == len(lines) == 4  # told apart without colour
    star = lines["trained, learned γ"][0]
    assert star.get_marker() == "*" and star.get_xydata().tolist() == [[3.1, 0.24]]


@pytest.mark.parametrize("rows", [ROWS, ROWS[:1], ROWS[3:4]])
def test_a_frontier_is_drawn(rows, tmp_path):
    plots.plot_frontier(rows, tmp_path / "frontier.png", "countdown")
    width, height = Image.open(tmp_path / "frontier.png").size
    assert (width, height) == (880, 616) and not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    ("rows", "labels"),
    [
        (ROWS[:4], ["base", "trained, learned γ", "trained"]),  # one rule: the caption names it
        (ROWS[2:], ["learned γ", "entropy-bounded (γ)", "top-k (k)"]),  # one name: the title's
        (ROWS[:2], ["entropy-bounded (γ)"]),
    ],
)
def test_a_label_has_no_more_than_what_tells_lines_apart(rows, labels, drawn, tmp_path):
    plots.plot_frontier(rows, tmp_path / "frontier.png", "countdown")
    (axis,) = drawn["frontier.png"].axes
    assert texts_of(axis.get_legend()) == labels
    styles = {(x[0].get_marker(), x[0].get_linestyle()) for x in axis.containers}
    assert len(styles) == len(labels)


def test_many_lines_have_their_legend_below_the_axes(drawn, tmp_path):
    rows = ROWS + [row("countdown-joint-20261130-000235", "eb", 1, 4.0, 0.3)]
    plots.plot_frontier(rows, tmp_path / "frontier.png", "countdown")
    (legend,) = drawn["frontier.png"].legends
    assert texts_of(legend)[-1] == "countdown-jo…1130-000235, entropy-bounded (γ)"


def test_a_long_title_is_wrapped_and_stays_in_the_picture(drawn, tmp_path):
    plots.plot_frontier(ROWS, tmp_path / "frontier.png", "countdown-joint-" * 8)
    figure = drawn["frontier.png"]
    figure.draw_without_rendering()
    (axis,) = figure.axes
    title = axis._left_title
    box = title.get_window_extent()
    assert box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
    assert title.get_text().replace("\n", "") == "countdown-joint-" * 8
    [caption] = axis.texts
    assert not box.overlaps(caption.get_window_extent())


# ---- a run ---------------------------------------------------------------------------------------


def log_of(steps):
    """Rows of metrics.jsonl."""
    return [dict.fromkeys(plots.PANELS, 0.1 * i) | {"step": i} for i in range(1, steps + 1)]


MEASURED = [
    row("base", "eb", 0.1, 5.0, 0.13, threshold_mean=0.1),
    row("trained", "eb", "learned", 3.1, 0.24, threshold_mean=0.04),
    row("trained at starting γ", "eb", 0.1, 2.3, 0.2, threshold_mean=0.1),
]


@pytest.mark.parametrize("steps", [1, 2, 7, 300])
def test_curves_count_whole_steps_and_mark_what_was_measured(steps, drawn, tmp_path):
    plots.plot_curves(log_of(steps), MEASURED, "a run", tmp_path / "curves.png")
    figure = drawn["curves.png"]
    assert len(figure.axes) == len(plots.PANELS)
    for axis, (_, key) in zip(figure.axes, plots.PANELS.values(), strict=True):
        assert all(tick == int(tick) for tick in axis.get_xticks()) and axis.get_xlim()[0] == 0
        each, mean, *marks = axis.lines
        assert each.get_xdata().tolist() == list(range(1, steps + 1))
        window = max(1, steps // 20)
        assert mean.get_ydata()[-1] == pytest.approx(0.1 * (steps - (window - 1) / 2))
        expected = []
        if key:
            expected = [(step, x[key]) for step, x in zip((0, steps, steps), MEASURED, strict=True)]
        assert [tuple(mark.get_xydata()[0]) for mark in marks] == expected
        assert len({mark.get_marker() for mark in marks}) == len(marks)
        assert axis.get_ylim()[0] == 0 and axis.get_ylim()[1] > max(each.get_ydata())
    (legend,) = figure.legends
    assert texts_of(legend) == [x["name"] for x in MEASURED]


def test_curves_of_a_run_that_was_not_measured_have_no_marks(tmp_path):
    plots.plot_curves(log_of(2), [], "a run", tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").size == (1320, 748)


def test_a_quantity_that_is_never_logged_leaves_its_panel_empty(drawn, tmp_path):
    rows = [row | {"surrogate_kl": None, "grad_norm": None} for row in log_of(3)]
    plots.plot_curves(rows, MEASURED, "a run of the sampler alone", tmp_path / "curves.png")
    drawn["curves.png"].draw_without_rendering()
    lengths = [len(axis.lines[0].get_xdata()) for axis in drawn["curves.png"].axes]
    assert lengths == [3, 3, 3, 3, 0, 0]


@pytest.mark.parametrize("title", ["countdown-joint-20261130-000235", HOSTILE * 30])
def test_the_legend_covers_neither_title_nor_panels(title, drawn, tmp_path):
    plots.plot_curves(log_of(40), MEASURED, title, tmp_path / "curves.png")
    figure = drawn["curves.png"]
    figure.draw_without_rendering()  # lays it out
    (legend,) = figure.legends
    box = legend.get_window_extent()
    heading = figure._suptitle.get_window_extent()
    assert not box.overlaps(heading) and heading.x1 <= figure.bbox.x1
    assert not any(box.overlaps(axis.get_tightbbox()) for axis in figure.axes)
    assert figure._suptitle.get_text().startswith(title[:99])


# ---- names and tokens ----------------------------------------------------------------------------


def test_any_name_of_a_run_can_be_drawn(drawn, tmp_path):
    rows = [x | {"name": f"{HOSTILE} {x['name']}", "task": HOSTILE} for x in ROWS]
    measured = [x | {"name": HOSTILE} for x in MEASURED]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plots.plot_frontier(rows, tmp_path / "frontier.png", HOSTILE)
        plots.plot_curves(log_of(3), measured, HOSTILE, tmp_path / "curves.png")
        for figure in drawn.values():
            figure.draw_without_rendering()
    (axis,) = drawn["frontier.png"].axes
    assert texts_of(axis.get_legend())[0].startswith(HOSTILE)
    assert axis.get_title(loc="left") == HOSTILE


STAGES = TwoStages(
    prompt="3 4 = 7",
    tau=2,
    solved=True,
    tokens=["3", "+", "4", "[EOS]"],
    unmask_step=[1, 3, 2, 4],
    scored_from=[0, 2, 0, 2],
    drawn=[0.5, 0.8, 0.4, 0.1],
    scored=[0.5, 0.4, 0.3, 0.3],
)


def test_two_stages_draw_an_arrow_from_each_tokens_state_and_its_weights(drawn, tmp_path):
    plots.plot_two_stages(STAGES, tmp_path / "two_stages.png")
    (axis,) = drawn["two_stages.png"].axes
    arrows = [text for text in axis.texts if getattr(text, "arrowprops", None)]
    down = [arrow.xy[1] > arrow.xyann[1] for arrow in arrows]  # y counts from the top
    assert down == [True, False, True, False]
    texts = [text.get_text() for text in axis.texts]
    assert texts[texts.index("ratio") + 1 :][:4] == ["1.00", "0.50", "0.75", "3.00"]
    assert texts[texts.index("weight w") + 1 :][:4] == ["1.00", "0.50", "0.75", "1.00"]
    assert "✓ solved" in texts and any("ratio), here with C = 1." in text for text in texts)
    masks = [text.get_position()[1] for text in axis.texts if text.get_text() == "[MASK]"]
    assert sorted(masks) == [79] * 4 + [259] * 2  # z_0 is all masks, z_2 has those of calls 3 and 4


def test_any_token_can_be_drawn(tmp_path):
    stages = TwoStages(
        prompt="$1 $2_{",
        tau=1,
        solved=False,
        tokens=["$x", "$\\frac{$", "你", "_^", "</answer>"],
        unmask_step=[1, 1, 1, 1, 2],
        scored_from=[0, 0, 0, 0, 1],
        drawn=[0.5] * 5,
        scored=[0.4] * 5,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plots.plot_two_stages(stages, tmp_path / "x.png")
    assert Image.open(tmp_path / "x.png").size == (880, 539)


def test_later_calls_are_lighter_and_ink_stands_out():
    def grey(rgb):
        red, green, blue = rgb
        return 0.3 * red + 0.59 * green + 0.11 * blue

    for T in (1, 2, 3, 8):
        shades = [plots.shade(t, T) for t in range(1, T + 1)]
        greys = [grey(background) for background, _ in shades]
        assert all(later - sooner > 0.04 for sooner, later in zip(greys, greys[1:], strict=False))
        assert all(abs(grey(background) - grey(ink)) > 0.4 for background, ink in shades)
