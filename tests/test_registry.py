"""Tasks by name, your own from a file, and all four on what a real model wrote."""

import json
from pathlib import Path

import pytest
from task_examples import SPLITS

from tasks.registry import TASKS, compact_form, find_task
from tasks.splits import ProblemsFromFile

# ---- tasks by name -------------------------------------------------------------------------------


def test_the_tiny_model_is_sent_elsewhere():
    for name in ("gsm8k", "math"):
        with pytest.raises(ValueError, match="no length and no demonstrations.*--model") as caught:
            compact_form(TASKS[name])
        assert len(str(caught.value).splitlines()) == 1
    for name in ("countdown", "sudoku", "chain"):
        task = TASKS[name]
        assert compact_form(task) is compact_form(task.compact) is task.compact


OWN_TASKS = """
import random
class Addition:
    def problems(self, split, n, seed):
        rng = random.Random(f"{split} {seed}")
        return [{"a": rng.randint(1, 9), "b": rng.randint(1, 9)} for _ in range(n)]
    def prompt(self, problem):
        return f"{problem['a']} + {problem['b']}"
    def reward(self, problem, text):
        return float(self.solved(problem, text))
    def solved(self, problem, text):
        return text.strip() == str(problem["a"] + problem["b"])
instance = Addition()
class Half:
    prompt = solved = print
class Needy(Addition):
    def __init__(self, wanted): pass
class Loading(Addition):
    def load(self, path):
        return [{"a": i % 30, "b": 1} for i in range(90)]
"""


def test_a_task_of_ones_own_is_found_by_file_and_name(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(OWN_TASKS)
    for name in ("Addition", "instance"):
        task = find_task(f"{file}:{name}")
        assert task.solved({"a": 2, "b": 3}, "5")
        assert len(task.problems("test", 4, 0)) == 4
    assert all(find_task(name) is task for name, task in TASKS.items())
    with pytest.raises(ValueError, match="Addition has no length and no demonstrations.*--model"):
        compact_form(task)
    with pytest.raises(ValueError, match=r"no load\(path\)"):
        ProblemsFromFile(task, "rows.jsonl")


def test_a_file_for_a_task_without_a_key_is_split_by_the_prompt(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(OWN_TASKS)
    task = find_task(f"{file}:Loading")
    source = ProblemsFromFile(task, "rows.jsonl")
    prompts = {split: {task.prompt(p) for p in source.pools[split]} for split in SPLITS}
    assert sum(map(len, prompts.values())) == len(set().union(*prompts.values())) == 30


def test_a_task_that_cannot_be_loaded_is_one_line(tmp_path):
    (tmp_path / "own.py").write_text(OWN_TASKS)
    (tmp_path / "broken.py").write_text("import no_such_module")
    (tmp_path / "syntax.py").write_text("def (")
    (tmp_path / "exits.py").write_text("raise SystemExit(3)")
    (tmp_path / "text.txt").write_text(OWN_TASKS)
    for name, part_of_message in {
        "chess": "countdown, sudoku, gsm8k, math, chain, or a FILE.py:NAME",
        "": "unknown task",
        f"{tmp_path}/none.py:Addition": "none.py",
        f"{tmp_path}/text.txt:Addition": "text.txt",
        f"{tmp_path}/own.py": "unknown task",
        f"{tmp_path}:x": "unknown task",
        f"{tmp_path}/own.py:Other": "Other",
        f"{tmp_path}/own.py:": "own.py",
        f"{tmp_path}/own.py:Half": "no problems, no reward",
        f"{tmp_path}/own.py:random": "no problems",
        f"{tmp_path}/own.py:Needy": "wanted",
        f"{tmp_path}/broken.py:x": "no_such_module",
        f"{tmp_path}/syntax.py:x": "SyntaxError",
        f"{tmp_path}/exits.py:x": "SystemExit",
    }.items():
        with pytest.raises(ValueError) as caught:
            find_task(name)
        assert part_of_message in str(caught.value), name
        assert len(str(caught.value).splitlines()) == 1, name


# ---- what a real model writes --------------------------------------------------------------------

COMPLETIONS = Path(__file__).parent.parent.parent / "shared" / "data" / "llada_completions.jsonl"

# Rows where the verdict is not d1's, in every one of them right where d1 says wrong.
NOT_AS_D1 = {
    81: "48, 96, 26 to 74: 96 - 48 + 26, without a box",
    450: "3/24 for 1/8",
    461: "8 + 8 + 15 = 31 units for 31",
    505: "1/4, without a box",
    527: "0.09 for 9/100",
    586: "6/3 for 2",
}


@pytest.fixture(scope="module")
def completions():
    if not COMPLETIONS.exists():
        pytest.skip(f"{COMPLETIONS.name}, completions of LLaDA-8B-Instruct, is not there")
    return [json.loads(line) for line in COMPLETIONS.read_text(encoding="utf-8").splitlines()]


def test_verdicts_on_real_completions_are_d1s_but_for_a_list(completions):
    differing = [
        i
        for i, row in enumerate(completions)
        if TASKS[row["task"]].solved(row["problem"], row["text"]) != row["d1_correct"]
    ]
    assert differing == list(NOT_AS_D1)
    assert not any(completions[i]["d1_correct"] for i in differing)


def test_real_completions_have_a_reward_to_climb(completions):
    rewards = {row["task"]: [] for row in completions}
    for row in completions:
        task = TASKS[row["task"]]
        rewards[row["task"]].append(task.reward(row["problem"], row["text"]))
    share_above_zero = {
        name: sum(reward > 0 for reward in of_task) / len(of_task)
        for name, of_task in rewards.items()
    }
    assert share_above_zero["countdown"] > 0.5
    assert min(share_above_zero["gsm8k"], share_above_zero["math"]) > 0.9
