"""Several tasks in one run: whose turn it is, whose problem, in which length."""

import random
import threading

import pytest

from tasks.answers import solutions
from tasks.mixture import (
    TaskMixture,
    batches_by_task,
    completion_length,
    score_completions,
    task_for_step,
)
from tasks.registry import TASKS, compact_form, load_task

NAMES = ("countdown", "sudoku")
BOTH = ",".join(NAMES)
RIGHT = {
    "countdown": lambda p: solutions(*sorted(p["numbers"], reverse=True))[p["target"]],
    "sudoku": lambda p: " ".join(p["solution"]),
}
OWN = """
class Mine:
    length = 4
    def __init__(self, problem={"a": 1}): self.one = problem
    def problems(self, split, n, seed): return [self.one] * n
    def prompt(self, problem): return str(problem["a"])
    def reward(self, problem, text): return 0.5
    def solved(self, problem, text): return False
    def demonstrations(self, n, seed, careless): return []
taken = Mine({"a": 1, "task": "mine"})
"""


@pytest.fixture
def own(tmp_path):
    """The name of a task in a file, up to the colon."""
    (tmp_path / "own.py").write_text(OWN)
    return f"{tmp_path}/own.py"


def small(name):
    return compact_form(TASKS[name])


def test_problems_are_each_tasks_own_in_turn_and_say_whose_they_are():
    task, problems = load_task(BOTH, True), load_task(BOTH, True).problems("test", 7, 3)
    assert [problem["task"] for problem in problems] == [*NAMES * 3, "countdown"]
    for name, n in zip(NAMES, (4, 3), strict=True):
        mine = [problem for problem in problems if problem["task"] == name]
        alone = small(name).problems("test", n, 3)
        assert mine == [problem | {"task": name} for problem in alone]
        for problem, other in zip(mine, alone, strict=True):
            assert task.prompt(problem) == small(name).prompt(other)
            assert task.key(problem).endswith(small(name).key(other))
            right = f"<answer>{RIGHT[name](other)}</answer>"
            assert task.solved(problem, right) and task.reward(problem, right) == 1
            assert not task.solved(problem, "<answer>1") and task.reward(problem, "") == 0


def test_one_held_out_problem_is_one_of_the_first_task():
    assert [p["task"] for p in load_task("sudoku,countdown", True).problems("test", 1, 0)] == [
        "sudoku"
    ]


def test_a_task_that_has_no_more_problems_leaves_the_rest_to_the_others():
    few = type("Few", (), {"problems": lambda self, split, n, seed: [{"a": 0}]})()
    many = type("Many", (), {"problems": lambda self, split, n, seed: [{"a": i} for i in range(n)]})
    problems = TaskMixture({"few": few, "many": many()}, False).problems("test", 6, 0)
    assert [p["task"] for p in problems] == ["few", "many", "many", "many"]


def test_tasks_take_turns_each_in_its_own_length_and_one_task_has_every_step():
    task = load_task(BOTH, True)
    for step in range(5):
        part, length = task_for_step(task, step, 19)
        name = NAMES[step % 2]
        expected = small(name).problems("train", 3, f"0 {step}")
        assert part.problems("train", 3, f"0 {step}") == [p | {"task": name} for p in expected]
        assert length == small(name).length
        assert (
            task_for_step(load_task(BOTH, False), step, 256)[1] == 256
        )  # a large model's is the same for all
        assert task_for_step(small("sudoku"), step, 33) == (small("sudoku"), 33)


def test_a_batch_is_of_one_task_and_no_problem_is_left_out():
    task = load_task(BOTH, True)
    problems = task.problems("test", 23, 0)
    random.Random(0).shuffle(problems)
    found = list(batches_by_task(task, problems, 19, 4))
    for places, length in found:
        (name,) = {problems[place]["task"] for place in places}
        assert length == completion_length(task, problems[places[0]], 19) == small(name).length
    assert sorted(sum((places for places, _ in found), [])) == list(range(23))
    assert sorted(len(places) for places, _ in found) == [3, 4, 4, 4, 4, 4]  # 12 and 11
    alone = list(batches_by_task(small("sudoku"), problems, 33, 10))  # in order, whatever they hold
    assert alone == [([*range(10)], 33), ([*range(10, 20)], 33), ([*range(20, 23)], 33)]


def test_own_tasks_may_be_among_them(own):
    task = load_task(f"sudoku,{own}:Mine", True)
    problem = task.problems("test", 2, 0)[1]
    assert problem == {"a": 1, "task": f"{own}:Mine"} and task.key(problem).endswith("Mine 1")
    assert task.length == 19 and completion_length(task, problem, 19) == 4
    assert task.reward(problem, "") == 0.5 and not task.solved(problem, "")
    with pytest.raises(ValueError, match='taken: its problems have a field "task"'):
        load_task(f"sudoku,{own}:taken", True).problems("test", 2, 0)


@pytest.mark.parametrize(
    ("names", "how", "says"),
    [
        ("countdown,countdown", {}, "countdown is there twice"),
        ("countdown,", {}, "unknown task ''"),
        (",countdown", {}, "unknown task ''"),
        ("countdown, sudoku", {}, "unknown task ' sudoku'"),
        ("sudoku,chess", {}, "unknown task 'chess'"),
        ("sudoku,gsm8k", {}, "gsm8k has no length"),
        (BOTH, {"data": "rows.jsonl"}, "--data rows.jsonl is for one task"),
        (BOTH, {"length": 12}, "leave out --max_completion_length"),
    ],
)
def test_what_cannot_be_together_is_one_line(names, how, says):
    with pytest.raises(ValueError) as caught:
        load_task(names, True, **how)
    assert says in str(caught.value) and len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("at_once", [1, 3])
def test_completions_are_judged_in_their_order_by_as_many_threads_as_the_task_allows(at_once):
    threads = set()

    class Task:
        def reward(self, problem, text):
            threads.add(threading.get_ident())
            return problem / 8

        def solved(self, problem, text):
            return text == "yes"

    Task.scoring_threads = at_once
    found = score_completions(Task(), range(8), ["yes", "no"] * 4)
    assert found == [(n / 8, n % 2 == 0) for n in range(8)]
    assert len(threads) <= at_once and (threads == {threading.get_ident()}) is (at_once == 1)
    with pytest.raises(ValueError):
        score_completions(Task(), [1, 2], ["yes"])
