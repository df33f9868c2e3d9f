"""Hostile input, drawn by hypothesis: the short form of fuzz.py, and what else users may feed."""

import json
import random
from dataclasses import asdict, fields

import fuzz
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as run_with
from hypothesis import strategies as st

from config import Config, config_from_json
from tasks.registry import TASKS
from training import files

quick = run_with(
    max_examples=30,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
PIECES = st.sampled_from([*fuzz.NOISE, *fuzz.BEFORE, *fuzz.BEHIND, "72", "<reasoning>", "\ud800"])
TEXTS = st.one_of(st.text(), st.lists(PIECES, max_size=40).map("".join))
NUMBERS = st.one_of(st.integers(), st.floats(), st.just(10**400))
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=8,
)


@pytest.mark.parametrize("name", TASKS)
@quick
@given(seed=st.integers(0, 10**9))
def test_no_wrong_completion_is_solved(name, seed):
    problem, text, is_right = fuzz.completion(name, random.Random(seed))
    solved, _ = fuzz.score(name, problem, text)
    assert is_right is not False or not solved, (problem, text)


@pytest.mark.parametrize("name", ["countdown", "sudoku", "gsm8k", "math"])
@quick
@given(text=TEXTS, inside=TEXTS)
def test_any_text_has_a_reward(name, text, inside):
    problem = fuzz.completion(name, random.Random(0))[0]
    for whole in (text, f"{text}<answer>{inside}</answer>", f"<answer>\\boxed{{{text}}}</answer>"):
        fuzz.score(name, problem, whole)


FIELDS = (
    "numbers",
    "nums",
    "target",
    "puzzle",
    "solution",
    "question",
    "answer",
    "input",
    "output",
)


@pytest.mark.parametrize("name", TASKS)
@quick
@given(row=st.dictionaries(st.sampled_from(FIELDS), JSON, min_size=1) | JSON)
def test_any_row_of_a_file_is_a_problem_or_one_line(tmp_path, name, row):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    try:
        problems = TASKS[name].load(file)
    except ValueError as error:
        assert str(file) in str(error)
        assert "\n" not in str(error)
    else:  # then it has a prompt and can be scored
        fuzz.score(name, problems[0], TASKS[name].prompt(problems[0]))


@quick
@given(name=st.sampled_from([f.name for f in fields(Config)]), value=JSON)
def test_any_value_in_a_config_is_accepted_or_one_line(name, value):
    try:
        config = config_from_json(asdict(Config()) | {name: value}, "config.json")
    except ValueError as error:
        assert name in str(error)
        assert len(str(error)) < 200
        assert "\n" not in str(error)
    else:
        assert type(getattr(config, name)) in (type(getattr(Config(), name)), int)


@quick
@given(lines=st.lists(st.one_of(JSON.map(json.dumps), TEXTS), max_size=5))
def test_any_log_is_read_and_good_rows_are_kept(tmp_path, lines):
    good_row = {"step": 1, "reward_mean": 0.5}
    file = tmp_path / "metrics.jsonl"
    lines = [*lines, json.dumps(good_row), ""]
    file.write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass")
    assert files.read_log(file)[-1] == good_row
