"""Splits by key: near-duplicates stay together, in a file as among generated problems."""

import itertools
import json

import pytest
from task_examples import SPLITS, write_rows

from tasks.registry import TASKS
from tasks.splits import ProblemsFromFile, split_of

COUNTDOWN = TASKS["countdown"]
SUDOKU = TASKS["sudoku"]
GSM8K = TASKS["gsm8k"]
MATH = TASKS["math"]


def test_split_shares_are_70_10_20():
    splits = [split_of(f"key {i}") for i in range(10_000)]
    assert [round(splits.count(split) / 10_000, 1) for split in SPLITS] == [0.7, 0.1, 0.2]


@pytest.mark.parametrize("name", TASKS)
def test_any_task_can_be_trained_from_a_file(tmp_path, name):
    task = TASKS[name]
    if name in ("gsm8k", "math"):
        rows = [{"question": f"{i}?", "answer": str(i)} for i in range(100)]
    else:
        rows = list(itertools.chain(*(task.problems(split, 40, 0) for split in SPLITS)))
    source = ProblemsFromFile(task, write_rows(tmp_path / "rows.jsonl", *rows * 2))
    splits = {
        split: source.problems(split, 10_000 if split != "train" else 50, 0) for split in SPLITS
    }
    keys = {split: {json.dumps(problem) for problem in drawn} for split, drawn in splits.items()}
    assert all(keys.values())
    assert not keys["train"] & keys["test"]
    assert not keys["train"] & keys["validation"]
    problem = splits["test"][0]
    assert source.prompt(problem) == task.prompt(problem)
    assert source.solved(problem, "") is False

    one = ProblemsFromFile(task, write_rows(tmp_path / "one.jsonl", rows[0]))
    with pytest.raises(ValueError, match="1 problem none"):
        for split in SPLITS:
            one.problems(split, 1, 0)


def questions_in_three_spellings():
    spellings = ["What is {} + {}?", "What  is {} + {}?", " what is {} + {}? "]
    return [
        {"question": spelling.format(i, i), "answer": str(2 * i)}
        for i in range(60)
        for spelling in spellings
    ]


def numbers_in_every_order():
    return [
        {"numbers": list(numbers), "target": sum(numbers)}
        for numbers in itertools.product(range(1, 7), repeat=3)
    ]


def puzzles_of_the_same_grids():
    return [
        {"puzzle": solution[:i] + "0" + solution[i + 1 :], "solution": solution}
        for solution in SUDOKU.grids[:40]
        for i in range(8)
    ]


@pytest.mark.parametrize(
    ("task", "rows", "what_duplicates_share"),
    [
        (COUNTDOWN, numbers_in_every_order(), lambda problem: sorted(problem["numbers"])),
        (SUDOKU, puzzles_of_the_same_grids(), lambda problem: problem["solution"]),
        (GSM8K, questions_in_three_spellings(), lambda p: p["question"].lower().split()),
        (MATH, questions_in_three_spellings(), lambda p: p["question"].lower().split()),
    ],
    ids=["countdown", "sudoku", "gsm8k", "math"],
)
def test_near_duplicates_in_a_file_land_in_one_split(tmp_path, task, rows, what_duplicates_share):
    pools = ProblemsFromFile(task, write_rows(tmp_path / "rows.jsonl", *rows)).pools
    keys = {split: {str(what_duplicates_share(p)) for p in pools[split]} for split in SPLITS}
    assert all(keys.values())
    assert sum(map(len, keys.values())) == len(set().union(*keys.values()))


def test_a_file_splits_as_the_generated_problems_do(tmp_path):
    for task in (COUNTDOWN.compact, SUDOKU):
        pools = {split: task.problems(split, 20, 5) for split in SPLITS}
        rows = itertools.chain(*pools.values())
        assert ProblemsFromFile(task, write_rows(tmp_path / "rows.jsonl", *rows)).pools == pools


def test_a_file_too_small_to_split_says_how_to_take_all_of_it(tmp_path):
    """For who wants to see one prompt learned by heart."""
    task = TASKS["gsm8k"]
    path = tmp_path / "one.jsonl"
    path.write_text('{"question": "What is 3 + 4?", "answer": "7"}\n')
    small = ProblemsFromFile(task, path)
    missing = [split for split in SPLITS if not small.pools[split]]
    assert len(missing) == 2
    for split in missing:
        with pytest.raises(ValueError, match="of its 1 problem none .*--eval_split all") as error:
            small.problems(split, 1, 0)
        assert "\n" not in str(error.value)
    whole = ProblemsFromFile(task, path, train_on_all=True)
    [problem] = whole.problems("all", 5, 0)
    assert whole.problems("train", 3, 0) == [problem] * 3
    assert small.problems("all", 5, 0) == [problem]
