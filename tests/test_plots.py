"""Pictures: drawn from rows that are known, and read back."""

import json
import warnings

import pytest
from PIL import Image

from evaluation import plots, traces


def row(name, rule, level, nfe, solved, **more):
    said = dict(name=name, decoder=rule, level=level, nfe=nfe, solved=solved, length=10)
    said |= dict(solved_low=solved - 0.02, solved_high=solved + 0.02, temperature=0.0)
    return said | dict(block_length=10, cache="none", problems=848, clusters=65) | more


ROWS = [
    row("base", "eb", 0.1, 5.0, 0.13), row("base", "eb", 1.0, 3.0, 0.10),
    row("trained", "eb", 0.1, 2.3, 0.20), row("trained", "eb", "learned", 3.1, 0.24),
    row("trained", "top_k", 2, 5.0, 0.22), row("trained", "top_k", 1, 10.0, 0.25),
]  # fmt: skip


def test_a_line_for_each_name_and_rule_by_nfe_and_the_learned_point_apart():
    found = {key: [x["nfe"] for x in rows] for key, rows in plots.curves_of(ROWS).items()}
    trained = {("trained", "learned"): [3.1], ("trained", "eb"): [2.3]}
    expected = {("base", "eb"): [3.0, 5.0], **trained, ("trained", "top_k"): [5.0, 10.0]}
    assert found == expected


@pytest.fixture
def drawn(monkeypatch):
    """The figures that would have been saved, by file name."""
    figures = {}
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.update({path.name: figure}))
    return figures


def test_lines_bars_and_origin_are_those_of_the_rows(drawn, tmp_path):
    plots.plot_frontier(ROWS, tmp_path / "frontier.png", "countdown")
    (axis,) = drawn["frontier.png"].axes
    assert axis.get_xlim()[0] == axis.get_ylim()[0] == 0
    lines = {box.get_label(): box for box in axis.containers}
    line, _, (bars,) = lines["base: entropy-bounded (γ)"]
    assert line.get_xydata().tolist() == [[3.0, 0.10], [5.0, 0.13]]
    assert [bar[:, 1].tolist() for bar in bars.get_segments()] == [
        pytest.approx([0.08, 0.12]), pytest.approx([0.11, 0.15]),
    ]  # fmt: skip
    styles = {(x[0].get_marker(), x[0].get_linestyle()) for x in lines.values()}
    assert len(styles) == len(lines) == 4  # told apart without colour
    star = lines["trained: learned γ"][0]
    assert star.get_marker() == "*" and star.get_xydata().tolist() == [[3.1, 0.24]]


@pytest.mark.parametrize("rows", [ROWS, ROWS[:1], ROWS[3:4]])
def test_a_frontier_is_drawn(rows, tmp_path):
    plots.plot_frontier(rows, tmp_path / "frontier.png", "countdown")
    width, height = Image.open(tmp_path / "frontier.png").size
    assert (width, height) == (880, 594) and not list(tmp_path.glob("*.tmp"))


def test_the_caption_says_what_all_rows_share_and_nothing_else():
    said = "greedy, length 10, one block, no cache, 848 problems in 65 clusters"
    assert plots.conditions(ROWS) == said
    said = "sudoku, top_k, temperature 0.5, length 10, blocks of 5, dual cache, 848 problems"
    rows = [row("a", "top_k", k, 5, 0.1, task="sudoku", cache="dual") for k in (1, 2)]
    rows = [x | dict(temperature=0.5, block_length=5, clusters=k) for k, x in enumerate(rows)]
    assert plots.conditions(rows) == said


def write_run(folder, steps, rows):
    names = [*plots.PANELS, "step"]
    lines = [json.dumps(dict.fromkeys(names, 0.1 * i) | {"step": i}) for i in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    if rows:
        (folder / "eval.json").write_text(json.dumps(rows))


MEASURED = [
    row("base", "eb", 0.1, 5.0, 0.13, threshold_mean=0.1),
    row("trained", "eb", "learned", 3.1, 0.24, threshold_mean=0.04),
    row("trained at the starting γ", "eb", 0.1, 2.3, 0.2, threshold_mean=0.1),
]


@pytest.mark.parametrize("steps", [1, 2, 7, 300])
def test_curves_count_whole_steps_and_mark_what_was_measured(steps, drawn, tmp_path):
    write_run(tmp_path, steps, MEASURED)
    plots.plot_curves(tmp_path)
    figure = drawn["curves.png"]
    assert len(figure.axes) == len(plots.PANELS)
    for axis, (_, key) in zip(figure.axes, plots.PANELS.values(), strict=True):
        assert all(tick == int(tick) for tick in axis.get_xticks()) and axis.get_xlim()[0] == 0
        each, mean, *marks = axis.lines
        assert each.get_xdata().tolist() == list(range(1, steps + 1))
        w = max(1, steps // 20)
        assert mean.get_ydata()[-1] == pytest.approx(0.1 * (steps - (w - 1) / 2))
        expected = (
            [(step, x[key]) for step, x in zip((0, steps, steps), MEASURED, strict=True)]
            if key
            else []
        )
        assert [tuple(mark.get_xydata()[0]) for mark in marks] == expected
        assert len({mark.get_marker() for mark in marks}) == len(marks)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [x["name"] for x in MEASURED]


def test_curves_of_a_run_that_was_not_measured_have_no_marks(tmp_path):
    write_run(tmp_path, 2, [])
    plots.plot_curves(tmp_path)
    assert Image.open(tmp_path / "curves.png").size == (1320, 704)


def test_any_token_can_be_drawn(tmp_path):
    words = ["$x", "$\\frac{$", "你", "_^", "</answer>"]
    trace = traces.Trace(
        "$1 $2_{", words, [1, 1, 1, 1, 2], [[0.1] * 5, [None] * 4 + [0.2]], "eb", 1.0, "", False
    )
    stages = dict(
        prompt=trace.prompt, tau=1, step=trace.step, words=words, scored_from=[0] * 4 + [1]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert traces.frame(trace, 2, 10).size == (800, 218)
        plots.plot_two_stages(stages | dict(drawn=[0.5] * 5, scored=[0.4] * 5), tmp_path / "x.png")
    assert Image.open(tmp_path / "x.png").size == (880, 478)


def test_two_stages_draw_an_arrow_from_each_tokens_state_and_its_weight(drawn, tmp_path):
    stages = dict(prompt="3 4 = 7", tau=2, step=[1, 3, 2, 4], words=["3", "+", "4", "[EOS]"])
    stages |= dict(
        scored_from=[0, 2, 0, 2], drawn=[0.5, 0.8, 0.4, 0.1], scored=[0.5, 0.4, 0.3, 0.3]
    )
    plots.plot_two_stages(stages, tmp_path / "two_stages.png")
    (axis,) = drawn["two_stages.png"].axes
    arrows = [text for text in axis.texts if getattr(text, "arrowprops", None)]
    down = [arrow.xy[1] > arrow.xyann[1] for arrow in arrows]  # y counts from the top
    assert down == [True, False, True, False]
    said = [text.get_text() for text in axis.texts]
    assert said[said.index("weight") + 1 :][:4] == ["1.00", "0.50", "0.75", "3.00"]
    masks = [text.get_position()[1] for text in axis.texts if text.get_text() == "[MASK]"]
    assert sorted(masks) == [79] * 4 + [259] * 2  # z_0 is all masks, z_2 has those of calls 3 and 4
