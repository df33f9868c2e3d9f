"""Scoring a file of completions without a model: the table, and bad lines."""

import json

import pytest

import evaluate

ROWS = [
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
    {
        "task": "sudoku",
        "problem": {"puzzle": "0310200404001043", "solution": "4312213434211243"},
        "text": "<answer>4312213434211243</answer>",
    },
]


def test_completions_of_a_file_are_scored_without_a_model(tmp_path, capsys):
    path = tmp_path / "completions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    evaluate.main(["--completions", str(path)])
    header, countdown, sudoku = (line.split() for line in capsys.readouterr().out.splitlines())
    assert countdown[:4] == ["countdown", "2", "2", "50.0%"]
    assert countdown[-1] == "0.550"
    assert sudoku[:4] == ["sudoku", "1", "1", "100.0%"]
    assert sudoku[-1] == "100.0%"
    assert header[-1] == "cells"
    # The column of names has no heading, and an interval is three words under a heading of two.
    assert len(header) == len(sudoku) - 1 - 1


BAD_LINES = [
    "{",
    "[]",
    '{"task": "countdown"}',
    '{"task": "evil.py:X", "problem": {}, "text": ""}',
    '{"task": "countdown", "problem": {}, "text": "1"}',
    json.dumps(ROWS[0] | {"text": 5}),
]


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_completion_is_named_by_its_line(tmp_path, line, capsys):
    path = tmp_path / "completions.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n\n" + line + "\n")
    assert evaluate.main(["--completions", str(path)]) == 2
    message = capsys.readouterr().err
    assert "line 3" in message
    assert message.count("\n") == 1
