"""What holds for every task that generates its problems, in the full and in the compact form."""

import itertools
import json
import random
import re
import zlib

import pytest
from task_examples import (
    EASY,
    GRID,
    RIGHT,
    SPLITS,
    answer,
    reachable,
    write_rows,
)

from tasks.registry import TASKS
from tasks.splits import split_of

COUNTDOWN = TASKS["countdown"]
SUDOKU = TASKS["sudoku"]
GENERATED = {"countdown": COUNTDOWN, "sudoku": SUDOKU}

# ---- problems ------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", GENERATED.values(), ids=GENERATED)
@pytest.mark.parametrize("compact", [False, True])
def test_a_seed_decides_the_problems(task, compact):
    form = task.compact if compact else task
    for split in SPLITS:
        problems = form.problems(split, 20, 1)
        assert problems == form.problems(split, 20, 1)
        assert problems != form.problems(split, 20, 2)
    assert len(form.problems("train", 20, 1)) == 20

    demonstrations = list(task.compact.demonstrations(20, 1, 0.5))
    assert demonstrations == list(task.compact.demonstrations(20, 1, 0.5))
    assert demonstrations != list(task.compact.demonstrations(20, 2, 0.5))


def every_countdown_problem(highest, split):
    problems = set()
    for numbers in itertools.combinations_with_replacement(range(1, highest + 1), 3):
        if split_of("countdown " + " ".join(map(str, numbers))) == split:
            problems |= {(numbers, int(v)) for v in reachable(numbers) if v in range(1, 100)}
    return problems


def identity(problem):
    """What makes a problem another one: the order of its numbers does not."""
    if "puzzle" in problem:
        return problem["puzzle"]
    return tuple(sorted(problem["numbers"])), problem["target"]


def test_held_out_problems_are_distinct_and_end_where_there_are_no_more(capsys):
    for task, n in ((COUNTDOWN, 1200), (COUNTDOWN.compact, 1000), (SUDOKU, 1200)):
        for split in ("validation", "test"):
            drawn = task.problems(split, n, 3)
            assert len(drawn) == len(set(map(identity, drawn)))
            assert len(drawn) == n or "has only" in capsys.readouterr().err
    drawn = COUNTDOWN.compact.problems("validation", 100_000, 4)
    everything = every_countdown_problem(20, "validation")
    distinct = set(map(identity, drawn))
    assert distinct <= everything
    assert len(distinct) == len(drawn) > 0.99 * len(everything)
    assert f"countdown has only {len(drawn)} validation problems" in capsys.readouterr().err


def test_training_draws_are_those_that_base_models_were_made_from():
    drawn = [task.problems("train", 60, 0) for task in (COUNTDOWN, COUNTDOWN.compact, SUDOKU)]
    drawn += [list(task.compact.demonstrations(60, 0, 0.7)) for task in (COUNTDOWN, SUDOKU)]
    assert zlib.crc32(json.dumps(drawn).encode()) == 930428997


# ---- prompts -------------------------------------------------------------------------------------


def test_compact_prompts_are_exact():
    assert COUNTDOWN.compact.prompt(EASY) == "5 4 3 = 35"
    assert COUNTDOWN.compact.prompt({"numbers": [12, 1], "target": 9}) == "12 1 = 9"
    assert SUDOKU.compact.prompt(GRID) == "1 2 0 0 3 4 1 2 2 1 4 3 4 3 2 1"


def test_instructions_name_the_problem_and_both_tags_but_hold_no_answer():
    problem = {"numbers": [61, 87, 58], "target": 29}
    for text, wanted in (
        (COUNTDOWN.prompt(problem), {"61", "87", "58", "29"}),
        (SUDOKU.prompt(GRID), {GRID["puzzle"]}),
    ):
        assert wanted <= set(re.findall(r"\d+", text))
        assert all(tag in text for tag in ("<reasoning>", "</reasoning>", "<answer>", "</answer>"))
        assert GRID["solution"] not in text
    assert COUNTDOWN.reward(problem, COUNTDOWN.prompt(problem)) == 0.0
    assert SUDOKU.reward(GRID, SUDOKU.prompt(GRID)) == 0.0


# ---- demonstrations ------------------------------------------------------------------------------


@pytest.mark.parametrize("careless", [0.0, 0.5, 1.0])
def test_demonstrations_come_from_the_training_split(careless):
    held_out = {
        tuple(sorted(problem["numbers"]))
        for split in ("validation", "test")
        for problem in COUNTDOWN.compact.problems(split, 1000, 7)
    }
    assert not held_out & {
        tuple(sorted(problem["numbers"]))
        for problem, _ in COUNTDOWN.compact.demonstrations(500, 7, careless)
    }
    solutions = {p["solution"] for p, _ in SUDOKU.compact.demonstrations(200, 7, careless)}
    assert solutions <= set(SUDOKU.grids_of["train"])


@pytest.mark.parametrize("task", GENERATED.values(), ids=GENERATED)
def test_careful_demonstrations_are_all_solved(task):
    demonstrations = list(task.compact.demonstrations(300, 8, careless=0.0))
    assert len(demonstrations) == 300
    assert all(task.solved(problem, text) for problem, text in demonstrations)


@pytest.mark.parametrize("task", GENERATED.values(), ids=GENERATED)
def test_half_careless_demonstrations_lie_halfway(task):
    solved = {
        careless: sum(
            task.solved(problem, text)
            for problem, text in task.compact.demonstrations(400, 10, careless)
        )
        for careless in (0.0, 0.5, 1.0)
    }
    assert solved[0.0] == 400 > solved[0.5] > solved[1.0]
    assert abs(solved[0.5] - (400 + solved[1.0]) / 2) < 40  # four standard deviations


# ---- rewards -------------------------------------------------------------------------------------


def test_only_the_last_answer_is_scored():
    for task, problem, right, wrong in (
        (COUNTDOWN, EASY, RIGHT, "3"),
        (SUDOKU, GRID, GRID["solution"], "1"),
    ):
        assert task.solved(problem, answer(wrong) + answer(right))
        assert task.solved(problem, answer(f"\n {right}\n"))
        assert task.solved(problem, f"<answer>{right}")  # closed by the end of the text
        for text in (
            answer(right) + answer(wrong),
            answer(right) + answer(""),
            right,
            "",
            answer(""),
        ):
            assert task.reward(problem, text) == 0.0
            assert not task.solved(problem, text)


def test_random_answers_get_one_of_three_rewards():
    rng = random.Random(12)
    rewards = set()
    near = ["(3+4)", "*5", "5*", "(", ")", "3+4", " ", "3", "*4", "+5", "/", "-"]
    far = [*near, *"345+-*/()=.e\0\n", "**", "٣", "\ud800", "<answer>", "</answer>"]
    for i in range(6000):
        text = answer("".join(rng.choices(far if i % 2 else near, k=rng.randint(1, 8))))
        reward = COUNTDOWN.reward(EASY, text)
        rewards.add(reward)
        assert reward in (0.0, 0.1, 1.0)
        assert COUNTDOWN.solved(EASY, text) is (reward == 1.0)
        assert 0.0 <= SUDOKU.reward(GRID, text) <= 1.0
    assert rewards == {0.0, 0.1, 1.0}


MEGABYTE = 2**20
HUGE = {
    "spaces": lambda: answer(" " * MEGABYTE),
    "digits": lambda: answer("9" * MEGABYTE),
    "numbers": lambda: answer("3 4 5 " * (MEGABYTE // 6)),
    "open": lambda: answer("(" * MEGABYTE),
    "open-and-numbers": lambda: answer("(" * MEGABYTE + RIGHT),
    "product": lambda: answer("9*" * (MEGABYTE // 2) + "9"),
    "power": lambda: answer("9**" * (MEGABYTE // 3) + "9"),
    "minus": lambda: answer("-" * MEGABYTE + RIGHT),
    "bytes": lambda: answer(random.Random(14).randbytes(MEGABYTE).decode("latin-1")),
    "NUL": lambda: answer("\0" * MEGABYTE),
    "surrogates": lambda: answer("\ud800" * (MEGABYTE // 4) + RIGHT),
    "opening-tags": lambda: "<answer>" * 100_000,
    "closing-tags": lambda: "</answer>" * 100_000,
    "nested-tags": lambda: "<answer>" * 100_000 + "</answer>" * 100_000,
    "empty-answers": lambda: answer(RIGHT) + "<answer></answer>" * 60_000,
    "broken-tags": lambda: "<answer" * 70_000 + "</answer" * 70_000,
}


@pytest.mark.parametrize("kind", HUGE)
def test_a_megabyte_of_anything_scores_nothing(kind):
    text = HUGE[kind]()
    assert len(text) >= MEGABYTE // 4
    assert COUNTDOWN.reward(EASY, text) == 0.0
    assert SUDOKU.reward(GRID, text) == 0.0


def test_a_right_answer_in_a_megabyte_of_space_still_counts():
    space = " \n\t\r" * (MEGABYTE // 4)
    assert COUNTDOWN.solved(EASY, space + answer(f"(3{space}+ 4) * 5") + space)
    assert SUDOKU.solved(GRID, answer(GRID["solution"][:7] + space + GRID["solution"][7:]))


# ---- files ---------------------------------------------------------------------------------------


def test_what_was_written_is_loaded(tmp_path):
    for name, task in GENERATED.items():
        problems = task.problems("train", 20, 15)
        path = write_rows(tmp_path / name, *problems)
        assert task.load(path) == problems
        assert task.load(str(path)) == problems


NOT_A_ROW = [
    "not JSON",
    "{",
    "[" * 100_000,
    '{"a":' * 100_000,
    "[3, 4, 5]",
    "[]",
    "35",
    "null",
    '"text"',
    "{}",
    '{"question": "?"}',
]
BAD_COUNTDOWN = """
    {"numbers":[3,4,5]}  {"target":35}  {"input":"3,4,5"}  {"output":"35"}
    {"numbers":[],"target":35}  {"numbers":null,"target":35}  {"numbers":3,"target":35}
    {"numbers":[3,null],"target":35}  {"numbers":[3,"x"],"target":35}
    {"numbers":[3,4,5],"target":null}  {"numbers":[[3],4],"target":35}  {"input":"","output":"35"}
    {"input":[3,4],"output":"35"}  {"input":"3;4","output":"35"}  {"input":"3,4,5","output":"x"}
    {"input":"3,,5","output":"35"}  {"numbers":[3,NaN],"target":35}
"""
BAD_SUDOKU = """
    {"solution":"1234341221434321"}  {"puzzle":"123434122143432"}  {"puzzle":"12343412214343210"}
    {"puzzle":"123434122143432x"}  {"puzzle":"123434122143432１"}  {"puzzle":"1234341221434325"}
    {"puzzle":1234341221434321}  {"puzzle":null}  {"puzzle":["1","2"]}
    {"puzzle":"1100000000000000"}  {"puzzle":"1200000000000000","solution":"3412123421434321"}
    {"puzzle":"1200000000000000","solution":null}  {"puzzle":"1200000000000000","solution":["1"]}
    {"puzzle":"1200000000000000","solution":"1200000000000000"}
"""
BAD_ROWS = [
    (name, row)
    for name, bad in (("countdown", BAD_COUNTDOWN), ("sudoku", BAD_SUDOKU))
    for row in NOT_A_ROW + bad.split()
]


@pytest.mark.parametrize(("name", "row"), BAD_ROWS, ids=lambda x: x[:70])
def test_a_bad_row_is_named_by_file_and_line_in_one_line(tmp_path, name, row):
    good_row = EASY if name == "countdown" else GRID
    path = write_rows(tmp_path / "rows.jsonl", good_row, "", row)
    with pytest.raises(ValueError) as caught:
        TASKS[name].load(path)
    message = str(caught.value)
    assert str(path) in message
    assert "line 3" in message
    assert len(message.splitlines()) == 1
    assert len(message) < len(str(path)) + 250


@pytest.mark.parametrize(
    "row",
    ['{"numbers": [3, 4, Infinity], "target": 35}', '{"numbers": [3, 4, 5], "target": 1e999}'],
)
def test_an_infinite_number_is_a_bad_row_too(tmp_path, row):
    with pytest.raises(ValueError, match="line 1"):
        COUNTDOWN.load(write_rows(tmp_path / "rows.jsonl", row))


@pytest.mark.parametrize("task", GENERATED.values(), ids=GENERATED)
@pytest.mark.parametrize(
    "content", [b"", b"\n \n\t\n", b'\xff\xfe{"numbers"', b"\x80", None, "directory"]
)
def test_a_file_that_cannot_be_read_is_named_in_one_line(tmp_path, task, content):
    path = tmp_path / "rows.jsonl"
    if content == "directory":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        task.load(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
