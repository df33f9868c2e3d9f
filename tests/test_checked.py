"""A task of the user's own: whatever its methods return or raise, a mistake is one line."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_run import SMALL_RUN

import train
from tasks import mixture, registry
from tasks.checked import CheckedTask
from tasks.countdown import Countdown

pytestmark = pytest.mark.usefixtures("no_pictures")
ROOT = Path(train.__file__).parent

TASK_FILE = """
import sys
import torch
from tasks.countdown import Countdown

class Mine(Countdown):
    name = "mine"

    def __init__(self, is_compact=True):
        super().__init__(is_compact)

    def {method}(self, *arguments):
        {body}
"""
MISTAKES = [
    ("reward", "return float('nan')", "returned nan: it has to be a number of 0 to 1"),
    ("reward", "return float('inf')", "returned inf: "),
    ("reward", "return -1", "returned -1: "),
    ("reward", "return 100", "returned 100: "),
    ("reward", "return 1e30", "returned 1e+30: "),
    ("reward", "return None", "returned None: "),
    ("reward", "return 'good'", "returned 'good': "),
    ("reward", "return [1.0]", "returned [1.0]: "),
    ("reward", "return torch.tensor(0.5)", "a number of 0 to 1, and not of type Tensor"),
    ("reward", "return 1j", "returned 1j: "),
    ("reward", "sys.exit(0)", "raised SystemExit: 0"),
    ("reward", "raise ValueError('boom')", "raised ValueError: boom"),
    ("reward", "raise StopIteration", "raised StopIteration"),
    ("solved", "return 2", "returned 2: it has to be True or False"),
    ("solved", "return None", "returned None: "),
    ("solved", "return torch.tensor(True)", "returned tensor(True): "),
    ("solved", "return 1 / 0", "raised ZeroDivisionError"),
    ("prompt", "return 3", "returned 3: it has to be a text"),
    ("prompt", "raise KeyError('x')", "raised KeyError"),
    ("key", "return 3", "returned 3: it has to be a text"),
    ("cells", "return 7", "returned 7: it has to be a number of 0 to 1"),
    ("load", "return 1 / 0", "raised ZeroDivisionError"),
    ("load", "return [3]", "returned [3]: it has to be a list of dicts"),
    ("problems", "return []", "returned []: it has to be"),
    ("problems", "return None", "returned None: it has to be a list of dicts"),
    ("problems", "return [3] * arguments[1]", "it has to be a list of dicts"),
    ("problems", "return [{'x': float('nan')}] * arguments[1]", "it has to be dicts that JSON can"),
    ("problems", "return [{'x': b'1'}] * arguments[1]", "texts, finite numbers, lists, dicts"),
]


ARGUMENTS = {"problems": ("train", 4, 0), "prompt": ({},), "key": ({},), "load": ("file",)}


@pytest.mark.parametrize("length", ["'x'", "None", "0", "2.5", "True"])
def test_a_length_that_is_no_number_is_one_line(tmp_path, length):
    source = TASK_FILE.format(method="extra", body="pass") + f"\n    length = {length}\n"
    (tmp_path / "mine.py").write_text(source)
    with pytest.raises(ValueError, match="^task mine: length is .*an int above 0$"):
        registry.load_task(f"{tmp_path}/mine.py:Mine", compact=True)


@pytest.mark.parametrize(("method", "body", "says"), MISTAKES)
def test_a_mistake_of_a_task_names_task_method_and_value_in_one_line(tmp_path, method, body, says):
    (tmp_path / "mine.py").write_text(TASK_FILE.format(method=method, body=body))
    task = registry.load_task(f"{tmp_path}/mine.py:Mine", compact=True)
    with pytest.raises(ValueError, match=rf"^task mine: {method}\(") as error:
        getattr(task, method)(*ARGUMENTS.get(method, ({"target": 3}, "a completion")))
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("body", ["return -1", "return None", "sys.exit(0)"])
def test_it_is_told_before_anything_is_measured(tmp_path, capsys, body):
    (tmp_path / "mine.py").write_text(TASK_FILE.format(method="reward", body=body))
    flags = ["--task", f"{tmp_path}/mine.py:Mine", "--model", str(ROOT / "bases" / "tiny")]
    run_dir = tmp_path / "run"
    assert train.main([*SMALL_RUN, *flags, "--steps", "1", "--run_dir", str(run_dir)]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("train.py: task mine: reward(") and printed.err.count("\n") == 1
    assert "measuring" not in printed.out and not run_dir.exists()


def test_no_training_problems_are_told_before_anything_is_measured(tmp_path, capsys):
    body = "return [] if arguments[0] == 'train' else super().problems(*arguments)"
    (tmp_path / "mine.py").write_text(TASK_FILE.format(method="problems", body=body))
    flags = ["--task", f"{tmp_path}/mine.py:Mine", "--model", str(ROOT / "bases" / "tiny")]
    run_dir = tmp_path / "run"
    assert train.main([*SMALL_RUN, *flags, "--steps", "1", "--run_dir", str(run_dir)]) == 2
    assert "it has to be a list of 4 problems, and not of 0" in capsys.readouterr().err


def test_what_is_right_passes_and_everything_else_is_the_tasks_own():
    task = Countdown(is_compact=True)
    checked = CheckedTask(task)
    problems = checked.problems("train", 3, 0)
    assert problems == task.problems("train", 3, 0)
    assert checked.prompt(problems[0]) == task.prompt(problems[0])
    assert checked.key(problems[0]) == task.key(problems[0])
    assert checked.length == task.length
    assert list(checked.demonstrations(2, 0, 0.5)) == list(task.demonstrations(2, 0, 0.5))
    assert not hasattr(CheckedTask(object()), "key")
    task.reward = lambda problem, text: 0.1 + 0.2 + 0.7 + 1e-9
    task.solved = lambda problem, text: torch.ones(1).numpy()[0] == 1  # numpy's bool
    assert mixture.score_completions(checked, problems[:1], ["x"]) == [(1.0, True)]
    assert not isinstance(registry.load_task("countdown", True), CheckedTask)


def test_held_out_problems_that_differ_from_call_to_call_are_refused():
    """After a --resume the trained model would be asked other problems than the base was."""

    class Unseeded:
        name = "unseeded"
        calls = 0

        def problems(self, split, n, seed):
            self.calls += 1
            return [{"number": self.calls + i} for i in range(n)]

    task = CheckedTask(Unseeded())
    assert len(task.problems("train", 3, 0)) == 3
    with pytest.raises(ValueError, match="returned other problems when it was called again"):
        task.problems("test", 3, 0)


def test_what_a_task_changes_in_a_problem_changes_nothing_for_the_others():
    class Changing:
        name = "changing"

        def reward(self, problem, text):
            problem["numbers"].append(1)
            return 1 / len(problem["numbers"])

        def solved(self, problem, text):
            return len(problem.pop("numbers")) == 1

    problem = {"numbers": [7]}
    scores = mixture.score_completions(CheckedTask(Changing()), [problem] * 3, ["", "", ""])
    assert scores == [(0.5, True)] * 3 and problem == {"numbers": [7]}


def test_a_demonstration_that_fails_is_one_line_of_make_base(tmp_path):
    for body, says in (("yield 1, 2", "returned (1, 2)"), ("yield 1 / 0", "ZeroDivisionError")):
        (tmp_path / "mine.py").write_text(TASK_FILE.format(method="demonstrations", body=body))
        flags = ["--task", f"{tmp_path}/mine.py:Mine", "--out", str(tmp_path / "base")]
        done = subprocess.run(
            [sys.executable, "-m", "models.make_base", *flags, "--steps", "1", "--batch", "2"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        errors = [line for line in done.stderr.splitlines() if line.startswith("make_base")]
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert len(errors) == 1 and "demonstrations(" in errors[0] and says in errors[0]
