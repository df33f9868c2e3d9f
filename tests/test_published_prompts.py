"""Prompts in the form of published work, and the files that are published with it."""

import json

import pytest

from tasks import published_prompts
from tasks.published_prompts import solved_example, with_published_prompts
from tasks.registry import TASKS
from tasks.splits import ProblemsFromFile, split_of
from tasks.sudoku import is_solution_grid

COUNTDOWN = TASKS["countdown"]
SUDOKU = TASKS["sudoku"]

# ---- prompts -------------------------------------------------------------------------------------


def test_a_solved_example_fills_every_blank_with_what_its_units_leave():
    for puzzle, solution in published_prompts.SHOTS:
        text = solved_example(puzzle, solution)
        assert is_solution_grid(solution)
        assert text.count("<answer>") == 1
        assert SUDOKU.solved({"puzzle": puzzle, "solution": solution}, text)
        steps = text.split("fits:\n")[1].split("\n")[0].split(", ")
        filled = dict(step.split(" = ") for step in steps)
        blanks = [i for i in range(16) if puzzle[i] == "0"]
        assert filled == {f"R{i // 4 + 1}C{i % 4 + 1}": solution[i] for i in blanks}


def test_prompts_in_d1s_form_have_its_fields_tags_and_example():
    countdown = with_published_prompts(COUNTDOWN, "d1", shots=0)
    text = countdown.prompt({"numbers": [30, 100, 93], "target": 23})
    assert text.endswith("\n\nNumbers: [30, 100, 93]\nTarget: 23")
    assert r"\boxed{a + b * c}" in text
    assert "<answer>\n\\boxed{...}\n</answer>" in text
    question = {"question": "How many {answer}?", "answer": "72"}
    for name in ("gsm8k", "math"):
        text = with_published_prompts(TASKS[name], "d1", shots=0).prompt(question)
        assert text.endswith("\n\nHow many {answer}?")
        assert "72" not in text
        assert "boxed" in text
    assert countdown.solved({"numbers": [3, 4, 5], "target": 35}, "<answer>5*(3+4)</answer>")


def test_sudoku_in_d1s_form_with_and_without_spgs_three_examples():
    problem = {"puzzle": "0310200404001043", "solution": "4312213434211243"}
    without_examples = with_published_prompts(SUDOKU, "d1", shots=0).prompt(problem)
    assert without_examples.endswith("\n\nSolve the following Sudoku puzzle: 0310200404001043\n")
    assert without_examples.count("<answer>") == 1

    with_examples = with_published_prompts(SUDOKU, "d1", shots=3).prompt(problem)
    end = "Question: Solve the following Sudoku puzzle: 0310200404001043\n\nAnswer:\n"
    assert with_examples.endswith(end)
    assert with_examples.count("<answer>") == 4
    places = [with_examples.index(puzzle) for puzzle, _ in published_prompts.SHOTS]
    assert places == sorted(places)
    assert problem["solution"] not in with_examples


@pytest.mark.parametrize(
    ("name", "prompt", "shots"),
    [("countdown", "d2", 0), ("countdown", "d1", 3), ("sudoku", "", 3), ("sudoku", "d1", 4)],
)
def test_a_prompt_that_a_task_does_not_have_is_refused(name, prompt, shots):
    with pytest.raises(ValueError, match="prompt|shots") as error:
        with_published_prompts(TASKS[name], prompt, shots)
    assert "\n" not in str(error.value)
    assert with_published_prompts(TASKS[name], "", 0) is TASKS[name]


def test_the_training_overlap_is_counted_for_tasks_that_generate_their_problems(capsys):
    problems = SUDOKU.problems("train", 3, 0) + SUDOKU.problems("test", 2, 0)
    published_prompts.warn_of_training_overlap(problems, SUDOKU, data="new.csv", run="runs/a")
    warning = "3 of 5 problems of new.csv share a solution grid with problems that runs/a may have"
    assert capsys.readouterr().err == f"{warning} trained on\n"
    published_prompts.warn_of_training_overlap([], TASKS["gsm8k"], data="new.csv", run="runs/a")
    assert capsys.readouterr().err == ""


# ---- files as they are published -----------------------------------------------------------------

PUZZLE = "0310200404001043"
SOLUTION = "4312213434211243"
# file name -> task, text as it stands in the files of d1, Jiayi Pan, Dream and SPG, values read
FILES = {
    "d1.jsonl": (
        COUNTDOWN,
        '{"input": "30,100,93", "output": "23"}',
        [[30, 100, 93], 23],
    ),
    "tasks.jsonl": (
        COUNTDOWN,
        '{"target": 98, "nums": [44, 19, 35]}',
        [[44, 19, 35], 98],
    ),
    "cd4.jsonl": (
        COUNTDOWN,
        '{"input": "97,38,3,17,14", "output": "97-38=59,59-17=42,42/3=14"}',
        [[97, 38, 3, 17], 14],
    ),
    "spg.csv": (
        SUDOKU,
        f"Puzzle,Solution\n{PUZZLE},{SOLUTION}",
        [PUZZLE, SOLUTION],
    ),
    "dos.csv": (
        SUDOKU,
        f"Puzzle,Solution\r\n{PUZZLE},{SOLUTION}\r",
        [PUZZLE, SOLUTION],
    ),
    "dream.jsonl": (
        SUDOKU,
        json.dumps({"input": "1000\n0002\n4003\n0000", "output": "1234\n3412\n4123\n2341"}),
        ["1000000240030000", "1234341241232341"],
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_a_published_file_is_read_as_it_stands(tmp_path, name):
    task, text, values = FILES[name]
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


def test_a_task_with_d1s_prompts_reads_a_file_and_splits_it_like_any_other(tmp_path):
    path = tmp_path / "d1.jsonl"
    path.write_text(FILES["d1.jsonl"][1] + "\n")
    task = with_published_prompts(ProblemsFromFile(COUNTDOWN, path), "d1", shots=0)
    [problem] = sum(task.pools.values(), [])
    split = split_of(task.key(problem))
    assert task.problems(split, 1, 0) == [problem]
    assert "[30, 100, 93]" in task.prompt(problem)
