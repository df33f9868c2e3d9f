"""Countdown's problems and its verifier, against all values that three numbers can reach."""

import itertools
import json
import random
import re
from fractions import Fraction
from pathlib import Path

import pytest
from task_examples import EASY, RIGHT, SPLITS, answer, reachable, write_rows

from tasks.registry import TASKS

COUNTDOWN = TASKS["countdown"]
D1_FILE = Path(__file__).parent.parent.parent / "shared" / "data" / "countdown_cd3_test.jsonl"

# ---- problems ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("task", "highest"), [(COUNTDOWN, 99), (COUNTDOWN.compact, 20)])
def test_every_countdown_target_can_be_reached_with_numbers_in_range(task, highest):
    for split in SPLITS:
        for problem in task.problems(split, 60, 3):
            assert len(problem["numbers"]) == 3
            assert all(1 <= number <= highest for number in problem["numbers"])
            assert 1 <= problem["target"] <= 99
            assert problem["target"] in reachable(problem["numbers"])


def test_countdown_splits_share_no_multiset_of_numbers():
    multisets = {
        split: {
            tuple(sorted(problem["numbers"]))
            for task in (COUNTDOWN, COUNTDOWN.compact)
            for problem in task.problems(split, 700, 4)
        }
        for split in SPLITS
    }
    assert all(len(m) > 30 for m in multisets.values())
    assert len(set().union(*multisets.values())) == sum(len(m) for m in multisets.values())


def test_a_split_of_numbers_holds_for_every_seed_and_order():
    seen = {}
    for seed, split in itertools.product(range(5), SPLITS):
        for problem in COUNTDOWN.compact.problems(split, 200, seed):
            assert seen.setdefault(tuple(sorted(problem["numbers"])), split) == split
    assert len(seen) <= 1540  # the multisets of three numbers of 1 to 20: 22 over 3


def test_careless_countdown_demonstrations_keep_form_and_numbers():
    form = r"<answer>(\( \d+ [-+*/] \d+ \) [-+*/] \d+|\d+ [-+*/] \( \d+ [-+*/] \d+ \))</answer>"
    for problem, text in COUNTDOWN.compact.demonstrations(500, 9, careless=1.0):
        assert re.fullmatch(form, text)
        assert sorted(map(int, re.findall(r"\d+", text))) == sorted(problem["numbers"])
        assert len(text.split()) + 2 + 1 == COUNTDOWN.compact.length  # two tags and [EOS]


def test_careless_countdown_demonstrations_all_earn_something():
    assert all(
        COUNTDOWN.reward(problem, text) >= 0.1
        for problem, text in COUNTDOWN.compact.demonstrations(2000, 0, careless=1.0)
    )


# ---- rewards -------------------------------------------------------------------------------------


def test_countdown_rewards_are_1_for_the_target_and_a_tenth_for_form():
    for text in (RIGHT, "5*(4+3)", "( ( 3 ) + 4 )\n*\t5", "(((5))) * ((4) + 3)"):
        assert COUNTDOWN.reward(EASY, answer(text)) == 1.0
        assert COUNTDOWN.solved(EASY, answer(text)) is True
    for text in ("3 + 4 + 5", "3 + 4 * 5", "3 - 4 - 5", "3 / 4 / 5"):
        assert COUNTDOWN.reward(EASY, answer(text)) == 0.1
        assert not COUNTDOWN.solved(EASY, answer(text))
    # In floats this would be 0.9999999999999999.
    assert COUNTDOWN.solved({"numbers": [1, 49, 49], "target": 1}, answer("1 / 49 * 49"))


WRAPPED = {  # as chat models write: each with its reward
    "\\boxed{(3+4)*5}": 1,
    "$(3+4)*5$": 1,
    "\\(5 \\times (3 + 4)\\)": 1,
    "\\[(3+4)\\cdot 5\\]": 1,
    "(3+4)×5": 1,
    "(3 + 4) x 5": 1,
    "(3+4)·5": 1,
    "`(3+4)*5`": 1,
    "```\n(3+4)*5\n```": 1,
    "```python\n(3+4)*5\n```": 1,
    "**(3+4)*5**": 1,
    "(3+4)*5.": 1,
    "\\left(3 + 4\\right) \\times 5": 1,
    "\\boxed{(3+4)*5 = 35}": 1,
    "(3+4)*5=35": 1,
    "35=(3+4)*5": 1,
    "x = (3+4)*5": 1,
    "\\boxed{35 = (3 + 4) \\times 5}": 1,
    "**\\boxed{(3+4)*5}**": 1,
    "\\boxed{(3+4)*5": 1,
    "So the expression is:\n(3+4)*5": 1,
    "**Answer:** (3+4)*5": 1,
    "### Final Answer\n(3+4)*5": 1,
    "We get \\boxed{(3+4)*5}.": 1,
    "boxed{(3+4)*5}": 1,
    "\\text{(3+4)*5}": 1,
    "\\[\n\\boxed{(3+4)*5}\n\\]": 1,
    "(3+4)*5=5*(4+3)": 1,
    "(3+4)*5 = 7*5 = 35": 1,
    "(3+4)⋅5": 1,
    "(3+4)∗5": 1,
    "(3+4)•5": 1,
    "(3+4)∙5": 1,
    "[3+4]*5": 1,
    "{3+4}*5": 1,
    "\\{3+4\\}*5": 1,
    "5*[3+4]": 1,
    "[(3+4)*5]": 1,
    "\\left[3+4\\right]\\cdot 5": 1,
    "-3+4*5": 0.1,
    "−3+4*5": 0.1,
    "5*(-3+4)": 0.1,
    "-(3+4)*5": 0.1,
    "(3+4)∕5": 0.1,
    "(3+4)⁄5": 0.1,
    "2=\\boxed{(3+4)*5}": 0.1,
    "35=\\boxed{(3+4)*5}": 1,
    "(3+4)÷5": 0.1,
    "(3−4)*5": 0.1,
    "(3–4)*5": 0.1,
    "3 \\div 4 + 5": 0.1,
    "\\frac{3}{4} * 5": 0.1,
    "5 - \\frac{3}{4}": 0.1,
    "(3+4)*5 = 36": 0.1,
    "3+4+5 = 35": 0.1,
    "3+4*5 = (3+4)*5": 0.1,
    "3 - 4 - 5 = -6": 0.1,
    "3+4*5=(3+4)*6": 0.1,
}


@pytest.mark.parametrize("text", WRAPPED)
def test_an_expression_counts_however_it_is_wrapped_and_its_equation_has_to_hold(text):
    assert COUNTDOWN.reward(EASY, answer(text)) == WRAPPED[text]
    assert COUNTDOWN.solved(EASY, answer(text)) is (WRAPPED[text] == 1)


HOSTILE = """
    --3+4*5  +(3+4)*5  (3+4)*-5  (3+4)*+5  (3+4)**5  (3+4)//5  3+4*5-  *3+4*5  (3+4)*5.0  (3+4)*2.5
    (3.+4)*5  (3+4)*05  3e4+5  1e3  (3+4)*0x5  (3+4)*0b101  (３+４)*５  (٣+٤)*٥  (3+4)*⁵  (3+4)*5⁵
    (3+4)*⑤  35  (3+4)*5==35  3<4*5  3%4+5  3^4+5  (3+4)*x  a  __import__('os')  (3+4)*5or(1)
    (3+4)*5if(1)else(2)  lambda:(3+4)*5  3+4*6  (3+4)*5*5  (3+4)*5+5-5  3+4  34+5  345  3_4+5
    3,4,5  3*45  (3+4)5  (3)(4)(5)  3(4)5  ()  ((3+4)*5  (3+4)*5)  )3+4(*5  ()+(3+4)*5  (3+4)()*5
    (3+)4*5  [3+4)*5  {3+4]*5  (3+4)*5;  (3+4)*5#  (3+4)*5\\n  "(3+4)*5"  <b>(3+4)*5</b>  (3+4)*5,
    (3+4)*5!    half=(3+4)*5    =(3+4)*5  (3+4)*5=  35=7*5  7*5=35
    -\\boxed{(3+4)*5}  2*\\boxed{(3+4)*5}  \\sqrt{\\boxed{(3+4)*5}}  \\boxed{(3+4)*5}!
    not(3+4)*5  (3+4)*5k
"""
HOSTILE_WITH_SPACES = [
    "3 4 5",
    "(3 + 4) 5",
    "(3+4)*\u200b5",
    "(3+4)*5\0",
    "(3+4)*5\ud800",
    "(3+4)* 5 5",
    "(3 **+** 4) ** 5",
    "3 **4** 5",
    "**Answer:** 35",
    "(3+4)*5 # 35",
    "(3+4)＊5",
    "(3+4)✕5",
    "(３+4)*5",
    "35 = 35",
    "\u202e5*(4+3)",
    "\ufeff(3+4)*5",
]


@pytest.mark.parametrize("text", [*HOSTILE.split(), *HOSTILE_WITH_SPACES])
def test_what_is_no_expression_of_the_numbers_scores_nothing(text):
    assert COUNTDOWN.reward(EASY, answer(text)) == 0.0
    assert COUNTDOWN.solved(EASY, answer(text)) is False


def test_division_by_zero_scores_nothing():
    for text in ("3 / (5 - 5)", "(5 - 5) / (3 - 3)", "3/(5*0+5-5)"):
        numbers = [int(x) for x in re.findall(r"\d+", text)]
        for target in (0, 1, 3):
            problem = {"numbers": numbers, "target": target}
            assert COUNTDOWN.reward(problem, answer(text)) == 0.0


def test_equal_numbers_are_counted_and_digits_are_not_joined():
    pair = {"numbers": [2, 2, 12], "target": 16}
    assert COUNTDOWN.solved(pair, answer("2+2+12"))
    for text in ("2+12", "12+2+2+2", "2+2+1 2", "1 2+2+2", "2+212", "22+12", "2+2+2+10", "2+12+02"):
        assert COUNTDOWN.reward(pair, answer(text)) == 0.0


def test_deep_parentheses_only_count_when_balanced():
    for depth in (10_000, 300_000):
        assert COUNTDOWN.solved(EASY, answer("(" * depth + RIGHT + ")" * depth))
        for opened, closed in ((depth, depth - 1), (depth - 1, depth), (depth, 0), (0, depth)):
            assert COUNTDOWN.reward(EASY, answer("(" * opened + RIGHT + ")" * closed)) == 0.0


def test_random_expressions_score_as_python_would_score_them():
    rng = random.Random(13)
    well_formed = 0
    for _ in range(3000):
        parts = [
            rng.choice(["", "(", "(("]),
            "3",
            rng.choice("+-*/"),
            "(" * rng.randint(0, 1),
            "4",
            ")" * rng.randint(0, 2),
        ]
        text = "".join([*parts, rng.choice("+-*/"), "5", ")" * rng.randint(0, 2)])
        try:  # only 3, 4, 5, one operator between two of them, and parentheses: safe to evaluate
            value = eval(re.sub(r"(\d)", r"Fraction(\1)", text), {"Fraction": Fraction})
        except (SyntaxError, ZeroDivisionError):
            value = None
        if value is None:
            expected = 0.0
        else:
            expected = 1.0 if value == 35 else 0.1
            well_formed += 1
        assert COUNTDOWN.reward(EASY, answer(text)) == expected
    assert well_formed > 300


# ---- files ---------------------------------------------------------------------------------------


def test_d1_rows_are_loaded(tmp_path):
    path = write_rows(
        tmp_path / "d1.jsonl",
        {"input": "30,100,93", "output": "23"},
        "",
        "   ",
        {"input": "83, 18, 75", "output": 10},
    )
    problems = COUNTDOWN.load(path)
    assert problems == [
        {"numbers": [30, 100, 93], "target": 23},
        {"numbers": [83, 18, 75], "target": 10},
    ]
    assert COUNTDOWN.solved(problems[0], answer("30 - (100 - 93)"))


def test_all_of_d1s_test_file_is_loaded():
    if not D1_FILE.exists():
        pytest.skip(f"{D1_FILE.name}, d1's test problems, is not there")
    problems = COUNTDOWN.load(D1_FILE)
    rows = [json.loads(line) for line in D1_FILE.read_text(encoding="utf-8").splitlines()]
    assert [(",".join(map(str, p["numbers"])), str(p["target"])) for p in problems] == [
        (row["input"], row["output"]) for row in rows
    ]
    assert len(problems) == 256
    assert all(problem["target"] in reachable(problem["numbers"]) for problem in problems)
