"""Several tasks in one run: whose turn it is, whose problem, in which length."""

import random
import threading

import pytest

from tasks.expressions import solutions
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
OWN_TASKS = """
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
def own_file(tmp_path):
    """The path of a file with tasks."""
    path = tmp_path / "own.py"
    path.write_text(OWN_TASKS)
    return path


def small(name):
    return compact_form(TASKS[name])


def right_answer(name, problem):
    if name == "sudoku":
        return f"<answer>{' '.join(problem['solution'])}</answer>"
    expressions = solutions(*sorted(problem["numbers"], reverse=True))
    return f"<answer>{expressions[problem['target']]}</answer>"


# ---- problems ------------------------------------------------------------------------------------


def test_problems_are_each_tasks_own_in_turn_and_say_whose_they_are():
    task = load_task(BOTH, compact=True)
    problems = task.problems("test", 7, 3)
    assert [problem["task"] for problem in problems] == [*NAMES * 3, "countdown"]
    for name, n in (("countdown", 4), ("sudoku", 3)):
        of_task = [problem for problem in problems if problem["task"] == name]
        alone = small(name).problems("test", n, 3)
        assert of_task == [problem | {"task": name} for problem in alone]
        for problem, other in zip(of_task, alone, strict=True):
            assert task.prompt(problem) == small(name).prompt(other)
            assert task.key(problem).endswith(small(name).key(other))
            text = right_answer(name, other)
            assert task.solved(problem, text)
            assert task.reward(problem, text) == 1
            assert not task.solved(problem, "<answer>1")
            assert task.reward(problem, "") == 0


def test_one_held_out_problem_is_one_of_the_first_task():
    problems = load_task("sudoku,countdown", compact=True).problems("test", 1, 0)
    assert [problem["task"] for problem in problems] == ["sudoku"]


def test_a_task_that_has_no_more_problems_leaves_the_rest_to_the_others():
    class Few:
        def problems(self, split, n, seed):
            return [{"a": 0}]

    class Many:
        def problems(self, split, n, seed):
            return [{"a": i} for i in range(n)]

    problems = TaskMixture({"few": Few(), "many": Many()}, compact=False).problems("test", 6, 0)
    assert [problem["task"] for problem in problems] == ["few", "many", "many", "many"]


# ---- steps and batches ---------------------------------------------------------------------------


def test_tasks_take_turns_each_in_its_own_length_and_one_task_has_every_step():
    task = load_task(BOTH, compact=True)
    for step in range(5):
        task_of_step, length = task_for_step(task, step, length=19)
        name = NAMES[step % 2]
        expected = small(name).problems("train", 3, f"0 {step}")
        problems = task_of_step.problems("train", 3, f"0 {step}")
        assert problems == [problem | {"task": name} for problem in expected]
        assert length == small(name).length
        # A large model completes all tasks in one length.
        assert task_for_step(load_task(BOTH, compact=False), step, length=256)[1] == 256
        assert task_for_step(small("sudoku"), step, length=33) == (small("sudoku"), 33)


def test_a_batch_is_of_one_task_and_no_problem_is_left_out():
    task = load_task(BOTH, compact=True)
    problems = task.problems("test", 23, 0)
    random.Random(0).shuffle(problems)
    batches = list(batches_by_task(task, problems, length=19, size=4))
    for places, length in batches:
        (name,) = {problems[place]["task"] for place in places}
        assert length == completion_length(task, problems[places[0]], 19) == small(name).length
    assert sorted(sum((places for places, _ in batches), [])) == list(range(23))
    assert sorted(len(places) for places, _ in batches) == [3, 4, 4, 4, 4, 4]  # 12 and 11
    # A single task has its problems in order, whatever they hold.
    alone = list(batches_by_task(small("sudoku"), problems, length=33, size=10))
    assert alone == [([*range(10)], 33), ([*range(10, 20)], 33), ([*range(20, 23)], 33)]


# ---- loading -------------------------------------------------------------------------------------


def test_own_tasks_may_be_among_them(own_file):
    task = load_task(f"sudoku,{own_file}:Mine", compact=True)
    problem = task.problems("test", 2, 0)[1]
    assert problem == {"a": 1, "task": f"{own_file}:Mine"}
    assert task.key(problem).endswith("Mine 1")
    assert task.length == 19
    assert completion_length(task, problem, 19) == 4
    assert task.reward(problem, "") == 0.5
    assert not task.solved(problem, "")
    with pytest.raises(ValueError, match='taken: its problems have a field "task"'):
        load_task(f"sudoku,{own_file}:taken", compact=True).problems("test", 2, 0)


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        ("countdown,countdown", {}, "countdown is named twice"),
        ("countdown,", {}, "unknown task ''"),
        (",countdown", {}, "unknown task ''"),
        ("countdown, sudoku", {}, "unknown task ' sudoku'"),
        ("sudoku,chess", {}, "unknown task 'chess'"),
        ("sudoku,gsm8k", {}, "gsm8k has no length"),
        (BOTH, {"data": "rows.jsonl"}, "--data rows.jsonl is for one task"),
        (BOTH, {"length": 12}, "leave out --max_completion_length"),
    ],
)
def test_what_cannot_be_together_is_one_line(names, options, message):
    with pytest.raises(ValueError) as caught:
        load_task(names, compact=True, **options)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


# ---- scoring -------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_threads", [1, 3])
def test_completions_are_scored_in_order_by_as_many_threads_as_the_task_allows(num_threads):
    threads = set()

    class Task:
        scoring_threads = num_threads

        def reward(self, problem, text):
            threads.add(threading.get_ident())
            return problem / 8

        def solved(self, problem, text):
            return text == "yes"

    scores = score_completions(Task(), range(8), ["yes", "no"] * 4)
    assert scores == [(n / 8, n % 2 == 0) for n in range(8)]
    assert len(threads) <= num_threads
    assert (threads == {threading.get_ident()}) is (num_threads == 1)
    with pytest.raises(ValueError):
        score_completions(Task(), [1, 2], ["yes"])
