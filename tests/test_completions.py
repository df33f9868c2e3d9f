"""Files of completions that others wrote: scored without a model, bad lines named."""

import json

import pytest

import evaluate
from evaluation.completions import score_file
from tasks import latex
from tasks.formulas import VerifierError
from tasks.registry import TASKS

PUZZLE = {"puzzle": "0310200404001043", "solution": "4312213434211243"}
WRITTEN = [
    {
        "task": "countdown",
        "problem": {"numbers": [3, 4, 5], "target": 35},
        "text": "<answer>5*(3+4)",
    },
    {
        "task": "countdown",
        "problem": {"numbers": [3, 4, 6], "target": 42},
        "text": "<answer>6*4+3",
    },
    {"task": "sudoku", "problem": PUZZLE, "text": "<answer>4312213434211243</answer>"},
]


@pytest.fixture
def path(tmp_path):
    """The path of a file with three completions, of two tasks."""
    path = tmp_path / "written.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in WRITTEN))
    return path


def test_completions_of_a_file_are_scored_without_a_model(path, capsys):
    assert evaluate.main(["--completions", str(path)]) == 0
    header, countdown, sudoku = (line.split() for line in capsys.readouterr().out.splitlines())
    assert countdown[:4] == ["countdown", "2", "2", "50.0%"] and countdown[-1] == "0.550"
    assert sudoku[:4] == ["sudoku", "1", "1", "100.0%"] and sudoku[-1] == "100.0%"
    assert header[-1] == "cells"
    # The column of names has no heading, and an interval is three words under a heading of two.
    assert len(header) == len(sudoku) - 1 - 1


def test_the_rows_of_a_file_are_written_as_json_too(path, tmp_path):
    assert evaluate.main(["--completions", str(path), "--json", str(tmp_path / "rows")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert rows == score_file(path, TASKS)
    countdown, sudoku = rows
    assert countdown["solved_low"] <= countdown["solved"] == 0.5 <= countdown["solved_high"]
    assert sudoku["cells"] == 1 and "cells" not in countdown


def test_names_with_the_same_problems_are_compared_problem_by_problem(tmp_path, capsys):
    rows = []
    for name, solved in (("first", "1000"), ("second", "1010"), ("of other problems", "11")):
        for i, is_solved in enumerate(solved):
            problem = {"numbers": [3, 4, 5 + i], "target": 12 + i}
            text = f"<answer>3 + 4 + {5 + i}</answer>" if is_solved == "1" else ""
            rows.append({"name": name, "task": "countdown", "problem": problem, "text": text})
    path = tmp_path / "written.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert evaluate.main(["--completions", str(path)]) == 0
    _, differences = capsys.readouterr().out.split("\n\n")
    header, line, explanation = differences.splitlines()
    assert header.split() == ["minus", "first", "countdown", "solved,", "points"]
    assert line.split()[:3] == ["second", "countdown", "+25.0"] and line.endswith(")")
    assert explanation == "In brackets: 95% intervals, paired by problem, over clusters."


BAD_LINES = [
    "{",
    "[]",
    '{"task": "countdown"}',
    '{"task": "evil.py:X", "problem": {}, "text": ""}',
    '{"task": "countdown", "problem": {}, "text": "1"}',
    '{"task": "countdown", "problem": {"numbers": [3], "target": "x"}, "text": "1"}',
    '{"task": "gsm8k", "problem": {"question": "a?", "answer": "many"}, "text": "1"}',
    json.dumps(WRITTEN[0] | {"text": 5}),
]


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_completion_is_named_by_its_line(tmp_path, line, capsys):
    path = tmp_path / "written.jsonl"
    path.write_text(json.dumps(WRITTEN[0]) + "\n\n" + line + "\n")
    assert evaluate.main(["--completions", str(path)]) == 2
    message = capsys.readouterr().err
    assert "line 3" in message and message.count("\n") == 1


def test_an_unknown_task_is_called_so(tmp_path):
    path = tmp_path / "written.jsonl"
    path.write_text(json.dumps(WRITTEN[0] | {"task": "chess"}))
    with pytest.raises(ValueError, match="unknown task 'chess': choose one of countdown, sudoku"):
        score_file(path, TASKS)


def test_an_empty_file_holds_no_completions(tmp_path):
    path = tmp_path / "written.jsonl"
    path.write_text("\n\n")
    with pytest.raises(ValueError, match="holds no completions"):
        score_file(path, TASKS)


def test_a_problem_is_read_as_data_reads_it(tmp_path):
    """A target that is a text was compared with a number, and nothing was ever solved."""
    path = tmp_path / "written.jsonl"
    row = {
        "task": "countdown",
        "problem": {"numbers": [3, 4, 5], "target": "35"},
        "text": "<answer>(3 + 4) * 5</answer>",
    }
    path.write_text(json.dumps(row))
    [scores] = score_file(path, TASKS)
    assert scores["solved"] == 1


def test_a_verifier_that_cannot_run_is_no_fault_of_the_line(tmp_path, monkeypatch, capsys):
    def cannot_run(*formulas):
        raise VerifierError("the formula parser cannot be run: ImportError")

    monkeypatch.setattr(latex, "same_formula", cannot_run)
    row = {"task": "math", "problem": {"question": "q", "answer": "\\sqrt{2}"}}
    path = tmp_path / "written.jsonl"
    path.write_text(json.dumps(row | {"text": "<answer>2^{1/2}</answer>"}))
    assert evaluate.main(["--completions", str(path)]) == 2
    assert capsys.readouterr().err == (
        "evaluate.py: the formula parser cannot be run: ImportError\n"
    )
