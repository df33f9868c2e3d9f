"""Others' prompts, files and completions."""

import json

import pytest

import evaluate
from tasks import published_prompts
from tasks.registry import TASKS
from tasks.splits import ProblemsFromFile, split_of
from tasks.sudoku import is_solution_grid

COUNTDOWN, SUDOKU = TASKS["countdown"], TASKS["sudoku"]


def test_a_solved_example_fills_every_blank_with_what_its_units_leave():
    for puzzle, solution in published_prompts.SHOTS:
        text = published_prompts.solved_example(puzzle, solution)
        assert is_solution_grid(solution) and text.count("<answer>") == 1
        assert SUDOKU.solved({"puzzle": puzzle, "solution": solution}, text)
        found = dict(
            step.split(" = ") for step in text.split("fits:\n")[1].split("\n")[0].split(", ")
        )
        blanks = [i for i in range(16) if puzzle[i] == "0"]
        assert found == {f"R{i // 4 + 1}C{i % 4 + 1}": solution[i] for i in blanks}


def test_prompts_in_d1s_form_have_its_fields_tags_and_example():
    countdown = published_prompts.with_published_prompts(COUNTDOWN, "d1", 0)
    text = countdown.prompt({"numbers": [30, 100, 93], "target": 23})
    assert text.endswith("\n\nNumbers: [30, 100, 93]\nTarget: 23")
    assert r"\boxed{a + b * c}" in text and "<answer>\n\\boxed{...}\n</answer>" in text
    question = {"question": "How many {answer}?", "answer": "72"}
    for name in ("gsm8k", "math"):
        text = published_prompts.with_published_prompts(TASKS[name], "d1", 0).prompt(question)
        assert text.endswith("\n\nHow many {answer}?") and "72" not in text and "boxed" in text
    assert countdown.solved({"numbers": [3, 4, 5], "target": 35}, "<answer>5*(3+4)</answer>")


def test_sudoku_in_d1s_form_with_and_without_spgs_three_examples():
    problem = {"puzzle": "0310200404001043", "solution": "4312213434211243"}
    plain, three = (published_prompts.with_published_prompts(SUDOKU, "d1", n).prompt(problem) for n in (0, 3))
    assert plain.endswith("\n\nSolve the following Sudoku puzzle: 0310200404001043\n")
    assert three.endswith(
        "Question: Solve the following Sudoku puzzle: 0310200404001043\n\nAnswer:\n"
    )
    places = [three.index(puzzle) for puzzle, _ in published_prompts.SHOTS]
    assert (
        places == sorted(places) and three.count("<answer>") == 4 and plain.count("<answer>") == 1
    )
    assert problem["solution"] not in three


@pytest.mark.parametrize(
    ("name", "prompt", "shots"),
    [("countdown", "d2", 0), ("countdown", "d1", 3), ("sudoku", "", 3), ("sudoku", "d1", 4)],
)
def test_what_nobody_asks_is_refused(name, prompt, shots):
    with pytest.raises(ValueError, match="prompt|shots") as error:
        published_prompts.with_published_prompts(TASKS[name], prompt, shots)
    assert "\n" not in str(error.value)
    assert published_prompts.with_published_prompts(TASKS[name], "", 0) is TASKS[name]


# ---- files as they are published -----------------------------------------------------------------

FILES = {  # rows as they stand in the files of d1, SPG, Jiayi Pan and Dream
    "d1.jsonl": (COUNTDOWN, '{"input": "30,100,93", "output": "23"}', [30, 100, 93], 23),
    "tasks.jsonl": (COUNTDOWN, '{"target": 98, "nums": [44, 19, 35]}', [44, 19, 35], 98),
    "cd4.jsonl": (
        COUNTDOWN, '{"input": "97,38,3,17,14", "output": "97-38=59,59-17=42,42/3=14"}',
        [97, 38, 3, 17], 14,
    ),
    "spg.csv": (
        SUDOKU, "Puzzle,Solution\n0310200404001043,4312213434211243",
        "0310200404001043", "4312213434211243",
    ),
    "dos.csv": (
        SUDOKU, "Puzzle,Solution\r\n0310200404001043,4312213434211243\r",
        "0310200404001043", "4312213434211243",
    ),
    "dream.jsonl": (
        SUDOKU, json.dumps({"input": "1000\n0002\n4003\n0000", "output": "1234\n3412\n4123\n2341"}),
        "1000000240030000", "1234341241232341",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_published_file_is_read_as_it_stands(tmp_path, name):
    task, text, *values = FILES[name]
    (tmp_path / name).write_bytes(text.encode() + b"\n")
    assert [list(problem.values()) for problem in task.load(tmp_path / name)] == [values]


@pytest.mark.parametrize(
    ("row", "line"),
    [("031020040400104,4312213434211243", 3), ("0310200404001043", 3), ("a,b,c", 3)],
)
def test_a_bad_row_of_a_csv_file_is_named_by_its_line(tmp_path, row, line):
    (tmp_path / "bad.csv").write_text(f"{FILES['spg.csv'][1]}\n{row}\n")
    with pytest.raises(ValueError, match=f"bad.csv, line {line}: expected") as error:
        SUDOKU.load(tmp_path / "bad.csv")
    assert "\n" not in str(error.value)


def test_cells_are_d1s_score():
    problem = {"puzzle": "0310200404001043", "solution": "4312213434211243"}
    blanks = problem["puzzle"].count("0")
    for grid, right in (
        ("4312213434211243", blanks), ("0310200404001043", 0), ("43", 1), ("", 0),
        ("4312213434211244", blanks),  # a changed given, which our reward forgives nothing
        ("4312213434211243999", blanks), ("1111111111111111", 2),
    ):  # fmt: skip
        assert SUDOKU.cells(problem, f"<answer>{grid}</answer>") == right / blanks


def test_a_task_that_asks_in_d1s_form_reads_a_file_and_splits_it_like_any_other(tmp_path):
    (tmp_path / "d1.jsonl").write_text(FILES["d1.jsonl"][1] + "\n")
    task = published_prompts.with_published_prompts(ProblemsFromFile(COUNTDOWN, tmp_path / "d1.jsonl"), "d1", 0)
    [problem] = sum(task.pools.values(), [])
    split = split_of(task.key(problem))
    assert task.problems(split, 1, 0) == [problem] and "[30, 100, 93]" in task.prompt(problem)


# ---- completions ---------------------------------------------------------------------------------

PUZZLE = {"puzzle": "0310200404001043", "solution": "4312213434211243"}
WRITTEN = [
    {"task": task, "problem": problem, "text": text}
    for task, problem, text in (
        ("countdown", {"numbers": [3, 4, 5], "target": 35}, "<answer>5*(3+4)"),
        ("countdown", {"numbers": [3, 4, 6], "target": 42}, "<answer>6*4+3"),
        ("sudoku", PUZZLE, "<answer>4312213434211243</answer>"),
    )
]


def test_completions_of_a_file_are_scored_without_a_model(tmp_path, capsys):
    path = tmp_path / "written.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in WRITTEN))
    evaluate.main(["--completions", str(path)])
    header, countdown, sudoku = (line.split() for line in capsys.readouterr().out.splitlines())
    assert countdown[:4] == ["countdown", "2", "2", "50.0%"] and countdown[-1] == "0.550"
    assert sudoku[:4] == ["sudoku", "1", "1", "100.0%"] and sudoku[-1] == "100.0%"
    assert header[-1] == "cells" and len(header) == len(sudoku) - 1 - 1


BAD = [
    "{", "[]", '{"task": "countdown"}', '{"task": "evil.py:X", "problem": {}, "text": ""}',
    '{"task": "countdown", "problem": {}, "text": "1"}', json.dumps(WRITTEN[0] | {"text": 5}),
]  # fmt: skip


@pytest.mark.parametrize("line", BAD)
def test_a_bad_completion_is_named_by_its_line(tmp_path, line, capsys):
    path = tmp_path / "written.jsonl"
    path.write_text(json.dumps(WRITTEN[0]) + "\n\n" + line + "\n")
    with pytest.raises(SystemExit) as exit:
        evaluate.main(["--completions", str(path)])
    said = capsys.readouterr().err
    assert exit.value.code == 2 and "line 3" in said and said.count("\n") == 1
