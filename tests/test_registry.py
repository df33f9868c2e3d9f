"""Problems, rewards and files of tasks.py, against evaluators and solvers of the tests' own."""

import itertools
import json
import operator
import random
import re
import zlib
from fractions import Fraction
from pathlib import Path

import pytest

from tasks.answers import arithmetic
from tasks.registry import TASKS, compact_form, find_task
from tasks.splits import ProblemsFromFile, split_of
from tasks.sudoku import is_solution_grid

COUNTDOWN, SUDOKU, GSM8K, MATH = TASKS.values()
GENERATED = {
    "countdown": COUNTDOWN,
    "sudoku": SUDOKU,
}  # the others' problems come from data sets: test_answers.py
SPLITS = ("train", "validation", "test")
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
D1_FILE = Path(__file__).parent.parent.parent / "shared" / "data" / "countdown_cd3_test.jsonl"

EASY = {"numbers": [3, 4, 5], "target": 35}
RIGHT = "(3 + 4) * 5"
GRID = {"puzzle": "1200341221434321", "solution": "1234341221434321"}
OTHER_GRID = "1243431221343421"  # also a finished grid


def answer(text):
    return f"<answer>{text}</answer>"


# ---- the tests' own ways to an answer ------------------------------------------------------------


def reachable(numbers):
    """Every value that an expression of all the numbers can have.

    Any two of them are replaced by their result until one is left.
    """
    if len(numbers) == 1:
        return {Fraction(numbers[0])}
    values = set()
    for i, j in itertools.permutations(range(len(numbers)), 2):
        rest = [x for k, x in enumerate(numbers) if k not in (i, j)]
        for symbol, operation in OPERATIONS.items():
            if symbol != "/" or numbers[j] != 0:
                values |= reachable([operation(Fraction(numbers[i]), numbers[j]), *rest])
    return values


def random_tree(numbers, rng):
    """A number, or (operator, left, right)."""
    if len(numbers) == 1:
        return numbers[0]
    cut = rng.randint(1, len(numbers) - 1)
    return rng.choice("+-*/"), random_tree(numbers[:cut], rng), random_tree(numbers[cut:], rng)


def tree_value(tree):
    return (
        Fraction(tree)
        if isinstance(tree, int)
        else OPERATIONS[tree[0]](tree_value(tree[1]), tree_value(tree[2]))
    )


def tree_text(tree, rng):
    """The tree with the parentheses that it needs, now and then some more, and random spaces."""

    def binding(t):
        return 3 if isinstance(t, int) else 2 if t[0] in "*/" else 1

    def bracketed(t, needed):
        text = tree_text(t, rng)
        for _ in range(max(needed, rng.choice([0, 0, 0, 1, 2]))):
            text = f"({text})"
        return text + rng.choice(["", " ", "\n"])

    if isinstance(tree, int):
        return str(tree)
    left, right = (
        bracketed(tree[1], binding(tree[1]) < binding(tree)),
        bracketed(tree[2], binding(tree[2]) <= binding(tree)),
    )
    return left + tree[0] + rng.choice(["", " ", "\t"]) + right


def sudoku_solutions(puzzle):
    """All completions, by trying each digit in the first blank cell."""
    i = puzzle.find("0")
    if i < 0:
        return [puzzle]
    seen = {
        puzzle[j]
        for j in range(16)
        if j // 4 == i // 4 or j % 4 == i % 4 or (j // 8, j % 4 // 2) == (i // 8, i % 4 // 2)
    }
    return [
        s
        for digit in "1234"
        if digit not in seen
        for s in sudoku_solutions(puzzle[:i] + digit + puzzle[i + 1 :])
    ]


# ---- problems ------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", GENERATED.values(), ids=GENERATED)
@pytest.mark.parametrize("compact", [False, True])
def test_a_seed_decides_the_problems(task, compact):
    small, task = task.compact, task.compact if compact else task
    for split in SPLITS:
        assert (
            task.problems(split, 20, 1)
            == task.problems(split, 20, 1)
            != task.problems(split, 20, 2)
        )
    assert len(task.problems("train", 20, 1)) == 20
    assert (
        [*small.demonstrations(20, 1, 0.5)]
        == [*small.demonstrations(20, 1, 0.5)]
        != [*small.demonstrations(20, 2, 0.5)]
    )


@pytest.mark.parametrize(("task", "highest"), [(COUNTDOWN, 99), (COUNTDOWN.compact, 20)])
def test_every_countdown_target_can_be_reached_with_numbers_in_range(task, highest):
    for split in SPLITS:
        for problem in task.problems(split, 60, 3):
            assert len(problem["numbers"]) == 3 and all(
                1 <= x <= highest for x in problem["numbers"]
            )
            assert 1 <= problem["target"] <= 99 and problem["target"] in reachable(
                problem["numbers"]
            )


def test_countdown_splits_share_no_multiset_of_numbers():
    multisets = {
        split: {
            tuple(sorted(p["numbers"]))
            for task in (COUNTDOWN, COUNTDOWN.compact)
            for p in task.problems(split, 700, 4)
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


def test_split_shares_are_70_10_20():
    splits = [split_of(f"key {i}") for i in range(10_000)]
    assert [round(splits.count(split) / 10_000, 1) for split in SPLITS] == [0.7, 0.1, 0.2]


def test_there_are_288_finished_grids_and_the_splits_part_them():
    grids = sudoku_solutions("0" * 16)
    assert len(grids) == 288 and sorted(SUDOKU.grids) == sorted(grids)
    assert sorted(itertools.chain(*SUDOKU.grids_of.values())) == sorted(grids) and all(
        SUDOKU.grids_of.values()
    )


def test_a_grid_is_finished_only_if_it_is_among_the_288():
    grids, rng = set(sudoku_solutions("0" * 16)), random.Random(0)
    assert all(map(is_solution_grid, grids))
    for grid in sorted(grids)[:100]:
        i, j = rng.sample(range(16), 2)
        swapped = list(grid)
        swapped[i], swapped[j] = grid[j], grid[i]
        assert is_solution_grid("".join(swapped)) == ("".join(swapped) in grids)
    assert not is_solution_grid(
        "1234234134124123"
    )  # its rows and columns are right, its boxes are not
    assert (
        not is_solution_grid("1234" * 4)
        and not is_solution_grid("1234")
        and not is_solution_grid("")
    )


def test_sudoku_puzzles_have_exactly_their_solution():
    for split in SPLITS:
        for problem in SUDOKU.problems(split, 15, 5):
            assert sudoku_solutions(problem["puzzle"]) == [problem["solution"]]
            assert 6 <= problem["puzzle"].count("0") <= 11


def test_sudoku_splits_share_no_solution_grid():
    grids = {split: {p["solution"] for p in SUDOKU.problems(split, 500, 6)} for split in SPLITS}
    assert all(len(g) > 10 for g in grids.values())
    assert len(set().union(*grids.values())) == sum(len(g) for g in grids.values())


# ---- demonstrations ------------------------------------------------------------------------------


@pytest.mark.parametrize("careless", [0.0, 0.5, 1.0])
def test_demonstrations_come_from_the_training_split(careless):
    held_out = {
        tuple(sorted(p["numbers"]))
        for s in ("validation", "test")
        for p in COUNTDOWN.compact.problems(s, 1000, 7)
    }
    assert not held_out & {
        tuple(sorted(p["numbers"])) for p, _ in COUNTDOWN.compact.demonstrations(500, 7, careless)
    }
    assert {p["solution"] for p, _ in SUDOKU.compact.demonstrations(200, 7, careless)} <= set(
        SUDOKU.grids_of["train"]
    )


@pytest.mark.parametrize("task", GENERATED.values(), ids=GENERATED)
def test_careful_demonstrations_are_all_solved(task):
    demonstrations = [*task.compact.demonstrations(300, 8, careless=0.0)]
    assert len(demonstrations) == 300 and all(
        task.solved(problem, text) for problem, text in demonstrations
    )


def test_careless_countdown_demonstrations_keep_form_and_numbers():
    for problem, text in COUNTDOWN.compact.demonstrations(500, 9, careless=1.0):
        assert re.fullmatch(
            r"<answer>(\( \d+ [-+*/] \d+ \) [-+*/] \d+|\d+ [-+*/] \( \d+ [-+*/] \d+ \))</answer>",
            text,
        )
        assert sorted(map(int, re.findall(r"\d+", text))) == sorted(problem["numbers"])
        assert len(text.split()) + 2 + 1 == COUNTDOWN.compact.length  # two tags and [EOS]


def test_careless_countdown_demonstrations_all_earn_something():
    assert all(
        COUNTDOWN.reward(problem, text) >= 0.1
        for problem, text in COUNTDOWN.compact.demonstrations(2000, 0, careless=1.0)
    )


def test_careless_sudoku_demonstrations_keep_givens_and_fill_rows():
    for problem, text in SUDOKU.compact.demonstrations(200, 9, careless=1.0):
        grid = re.fullmatch(r"<answer>([1-4](?: [1-4]){15})</answer>", text)[1].replace(" ", "")
        assert all(
            given in ("0", cell) for given, cell in zip(problem["puzzle"], grid, strict=True)
        )
        assert all(sorted(grid[i : i + 4]) == [*"1234"] for i in range(0, 16, 4))


@pytest.mark.parametrize("task", GENERATED.values(), ids=GENERATED)
def test_half_careless_demonstrations_lie_halfway(task):
    solved = {
        c: sum(task.solved(p, t) for p, t in task.compact.demonstrations(400, 10, c))
        for c in (0.0, 0.5, 1.0)
    }
    assert solved[0.0] == 400 > solved[0.5] > solved[1.0]
    assert abs(solved[0.5] - (400 + solved[1.0]) / 2) < 40  # four standard deviations


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
            assert task.reward(problem, text) == 0.0 and not task.solved(problem, text)


# ---- countdown's verifier ------------------------------------------------------------------------


def test_arithmetic_agrees_with_the_tree_that_was_printed():
    rng, zero_divisions = random.Random(11), 0
    for _ in range(1500):
        numbers = [rng.randint(0, 12) for _ in range(rng.randint(1, 7))]
        tree = random_tree(numbers, rng)
        text = tree_text(tree, rng)
        try:
            value = tree_value(tree)
        except ZeroDivisionError:
            zero_divisions += 1
            with pytest.raises(ZeroDivisionError):
                arithmetic(text, numbers)
        else:
            assert arithmetic(text, rng.sample(numbers, len(numbers))) == value, text
    assert 50 < zero_divisions < 1000


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8 - 4 - 2", 2),
        ("8 / 4 / 2", 1),
        ("8 - (4 - 2)", 6),
        ("8 / (4 / 2)", 4),
        ("8-4*2", 0),
        ("(2)/((8)*4)", Fraction(1, 16)),
    ],
)
def test_expressions_have_the_values_worked_out_by_hand(text, value):
    assert arithmetic(text, [2, 4, 8]) == value


def test_countdown_rewards_are_1_for_the_target_and_a_tenth_for_form():
    for text in (RIGHT, "5*(4+3)", "( ( 3 ) + 4 )\n*\t5", "(((5))) * ((4) + 3)"):
        assert (
            COUNTDOWN.reward(EASY, answer(text)) == 1.0
            and COUNTDOWN.solved(EASY, answer(text)) is True
        )
    for text in ("3 + 4 + 5", "3 + 4 * 5", "3 - 4 - 5", "3 / 4 / 5"):
        assert COUNTDOWN.reward(EASY, answer(text)) == 0.1 and not COUNTDOWN.solved(
            EASY, answer(text)
        )
    assert COUNTDOWN.solved(
        {"numbers": [1, 49, 49], "target": 1}, answer("1 / 49 * 49")
    )  # floats would make it 0.9999999999999999


HOSTILE = """
    -3+4*5  +(3+4)*5  (3+4)*-5  (3+4)*+5  (3+4)**5  (3+4)//5  3+4*5-  *3+4*5  (3+4)*5.0  (3+4)*2.5
    (3.+4)*5  (3+4)*05  3e4+5  1e3  (3+4)*0x5  (3+4)*0b101  (３+４)*５  (٣+٤)*٥  (3+4)*⁵  (3+4)*5⁵
    (3+4)*⑤  35  (3+4)*5==35  3<4*5  3%4+5  3^4+5  (3+4)*x  a  __import__('os')  (3+4)*5or(1)
    (3+4)*5if(1)else(2)  lambda:(3+4)*5  3+4*6  (3+4)*5*5  (3+4)*5+5-5  3+4  34+5  345  3_4+5
    3,4,5  3*45  (3+4)5  (3)(4)(5)  3(4)5  ()  ((3+4)*5  (3+4)*5)  )3+4(*5  ()+(3+4)*5  (3+4)()*5
    (3+)4*5  [3+4]*5  {3+4}*5  (3+4)*5;  (3+4)*5#  (3+4)*5\\n  "(3+4)*5"  <b>(3+4)*5</b>  (3+4)*5,
    (3+4)*5!    half=(3+4)*5    =(3+4)*5  (3+4)*5=  35=7*5  7*5=35
    -\\boxed{(3+4)*5}  not(3+4)*5  (3+4)*5k
"""


DRESSED = {  # as chat models write: each with its reward
    "\\boxed{(3+4)*5}": 1, "$(3+4)*5$": 1, "\\(5 \\times (3 + 4)\\)": 1, "\\[(3+4)\\cdot 5\\]": 1,
    "(3+4)×5": 1, "(3 + 4) x 5": 1, "(3+4)·5": 1, "`(3+4)*5`": 1, "```\n(3+4)*5\n```": 1,
    "```python\n(3+4)*5\n```": 1, "**(3+4)*5**": 1, "(3+4)*5.": 1,
    "\\left(3 + 4\\right) \\times 5": 1,
    "\\boxed{(3+4)*5 = 35}": 1, "(3+4)*5=35": 1, "35=(3+4)*5": 1, "x = (3+4)*5": 1,
    "\\boxed{35 = (3 + 4) \\times 5}": 1, "**\\boxed{(3+4)*5}**": 1, "\\boxed{(3+4)*5": 1,
    "So the expression is:\n(3+4)*5": 1, "We get \\boxed{(3+4)*5}.": 1, "boxed{(3+4)*5}": 1,
    "\\text{(3+4)*5}": 1, "\\[\n\\boxed{(3+4)*5}\n\\]": 1, "(3+4)*5=5*(4+3)": 1,
    "(3+4)*5 = 7*5 = 35": 1,
    "(3+4)÷5": 0.1, "(3−4)*5": 0.1, "(3–4)*5": 0.1, "3 \\div 4 + 5": 0.1, "\\frac{3}{4} * 5": 0.1,
    "5 - \\frac{3}{4}": 0.1, "(3+4)*5 = 36": 0.1, "3+4+5 = 35": 0.1, "3+4*5 = (3+4)*5": 0.1,
    "3 - 4 - 5 = -6": 0.1, "3+4*5=(3+4)*6": 0.1,
}  # fmt: skip


@pytest.mark.parametrize("text", DRESSED)
def test_an_expression_counts_whatever_its_dress_and_what_it_claims_has_to_be_so(text):
    assert COUNTDOWN.reward(EASY, answer(text)) == DRESSED[text]
    assert COUNTDOWN.solved(EASY, answer(text)) is (DRESSED[text] == 1)


@pytest.mark.parametrize(
    "text",
    [
        *HOSTILE.split(),
        "3 4 5",
        "(3 + 4) 5",
        "(3+4)*\u200b5",
        "(3+4)*5\0",
        "(3+4)*5\ud800",
        "(3+4)* 5 5",
    ],
)
def test_what_is_no_expression_of_the_numbers_scores_nothing(text):
    assert (
        COUNTDOWN.reward(EASY, answer(text)) == 0.0
        and COUNTDOWN.solved(EASY, answer(text)) is False
    )


def test_division_by_zero_scores_nothing():
    for text in ("3 / (5 - 5)", "(5 - 5) / (3 - 3)", "3/(5*0+5-5)"):
        numbers = [int(x) for x in re.findall(r"\d+", text)]
        assert all(
            COUNTDOWN.reward({"numbers": numbers, "target": target}, answer(text)) == 0.0
            for target in (0, 1, 3)
        )


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


def test_fuzzed_answers_get_one_of_three_rewards():
    rng, rewards = random.Random(12), []
    near = ["(3+4)", "*5", "5*", "(", ")", "3+4", " ", "3", "*4", "+5", "/", "-"]
    far = [*near, *"345+-*/()=.e\0\n", "**", "٣", "\ud800", "<answer>", "</answer>"]
    for i in range(6000):
        text = answer("".join(rng.choices(far if i % 2 else near, k=rng.randint(1, 8))))
        rewards.append(COUNTDOWN.reward(EASY, text))
        assert rewards[-1] in (0.0, 0.1, 1.0) and COUNTDOWN.solved(EASY, text) is (
            rewards[-1] == 1.0
        )
        assert 0.0 <= SUDOKU.reward(GRID, text) <= 1.0
    assert {*rewards} == {0.0, 0.1, 1.0}


def test_fuzzed_expressions_score_as_python_would_score_them():
    rng, well_formed = random.Random(13), 0
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
        well_formed += value is not None
        assert COUNTDOWN.reward(EASY, answer(text)) == (
            0.0 if value is None else 1.0 if value == 35 else 0.1
        )
    assert well_formed > 300


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
    assert COUNTDOWN.reward(EASY, text) == 0.0 and SUDOKU.reward(GRID, text) == 0.0


def test_a_right_answer_in_a_megabyte_of_space_still_counts():
    space = " \n\t\r" * (MEGABYTE // 4)
    assert COUNTDOWN.solved(EASY, space + answer(f"(3{space}+ 4) * 5") + space)
    assert SUDOKU.solved(GRID, answer(GRID["solution"][:7] + space + GRID["solution"][7:]))


# ---- sudoku's verifier ---------------------------------------------------------------------------


def test_the_solution_is_solved_however_it_is_spaced():
    solution = GRID["solution"]
    rows = [solution[i : i + 4] for i in range(0, 16, 4)]
    for text in (
        solution,
        " ".join(solution),
        "\n".join(rows),
        "\n".join(map(" ".join, rows)),
        "\t".join(rows) + "\n\n",
    ):
        assert (
            SUDOKU.reward(GRID, answer(text)) == 1.0 and SUDOKU.solved(GRID, answer(text)) is True
        )


def test_a_changed_given_earns_nothing():
    for i, given in enumerate(GRID["puzzle"]):
        for cell in set("01234x") - {GRID["solution"][i]}:
            text = answer(GRID["solution"][:i] + cell + GRID["solution"][i + 1 :])
            assert SUDOKU.reward(GRID, text) == (
                0.5 if given == "0" else 0.0
            ) and not SUDOKU.solved(GRID, text)
    assert is_solution_grid(OTHER_GRID) and SUDOKU.reward(GRID, answer(OTHER_GRID)) == 0.0


def test_a_partial_reward_is_the_share_of_blank_cells_that_are_right():
    problem = {"puzzle": "1030041020000301", "solution": "1234341221434321"}  # nine blank cells
    assert SUDOKU.reward(problem, answer("1231 3413 2222 4331")) == pytest.approx(
        3 / 9
    )  # right: 2, then 3, then 4
    assert SUDOKU.reward(problem, answer("1234 3412 2143 4331")) == pytest.approx(8 / 9)
    assert SUDOKU.reward(problem, answer(problem["puzzle"])) == 0.0


def test_a_grid_of_the_wrong_length_is_never_solved_but_what_is_right_of_it_counts():
    puzzle, solution = "1030041020000301", "1234341221434321"  # nine blank cells
    problem = {"puzzle": puzzle, "solution": solution}
    rewards = [SUDOKU.reward(problem, answer(solution[:n])) for n in range(17)]
    assert rewards == sorted(rewards) and rewards[0] == 0 and rewards[-1] == 1 > rewards[-2]
    assert SUDOKU.reward(problem, answer(solution[:8])) == 4 / (9 + 3)  # three givens lack
    assert SUDOKU.reward(problem, answer(solution + "1")) == pytest.approx(9 / 10)
    assert SUDOKU.reward(problem, answer(solution * 2)) == pytest.approx(9 / 25)
    assert SUDOKU.reward(problem, answer("1234 04")) == 2 / (9 + 4)  # an unfilled cell is wrong
    for text in (solution[:15], solution + "1", solution * 2, solution[0], f"Grid: {solution}"):
        assert not SUDOKU.solved(problem, answer(text))
    full = {"puzzle": solution, "solution": solution}
    assert SUDOKU.reward(full, answer(solution[:15])) == SUDOKU.reward(full, answer("")) == 0.0


def test_a_grid_may_be_drawn_with_signs():
    rows = [GRID["solution"][i : i + 4] for i in range(0, 16, 4)]
    for text in (
        ",".join(GRID["solution"]), f"[{GRID['solution']}]", str([[*map(int,
        row)] for row in rows]),
        "\n".join("| " + " | ".join(row) + " |" for row in rows), f"\\boxed{{{GRID['solution']}}}",
        "The grid is:\n" + "\n".join(rows), "```\n" + "\n".join(rows) + "\n```",
        f"**{GRID['solution']}**",
        "\\\\\n".join(rows), "\\begin{array}{|c|c|c|c|}\n\\hline " + " \\\\ ".join(
            " & ".join(row) for row in rows) + " \\hline\n\\end{array}",
    ):  # fmt: skip
        assert SUDOKU.solved(GRID, answer(text)), text


@pytest.mark.parametrize(
    "digits", ["１２３４", "١٢٣٤", "¹²³⁴", "①②③④", "abcd", "\0\0\0\0", "\ud800\ud800\ud800\ud800"]
)
def test_other_characters_are_no_digits(digits):
    other = GRID["solution"].translate(str.maketrans("1234", digits))
    assert SUDOKU.reward(GRID, answer(other)) == 0.0 and not is_solution_grid(other)
    empty = {"puzzle": "0" * 16, "solution": GRID["solution"]}
    assert SUDOKU.reward(empty, answer(other)) == 0.0
    assert SUDOKU.reward(empty, answer(other[:4] + GRID["solution"][4:])) == 0.75


def test_any_completion_of_an_ambiguous_puzzle_is_solved():
    puzzle = "1200001200000000"
    completions = sudoku_solutions(puzzle)
    assert len(completions) > 1
    for solution, completion in itertools.product(completions, repeat=2):
        assert SUDOKU.solved({"puzzle": puzzle, "solution": solution}, answer(completion))
    for grid in sudoku_solutions("0" * 16):
        assert SUDOKU.solved({"puzzle": puzzle, "solution": completions[0]}, answer(grid)) == (
            grid in completions
        )


def test_a_puzzle_without_blanks_is_solved_by_itself_alone():
    problem = {"puzzle": GRID["solution"], "solution": GRID["solution"]}
    assert (
        SUDOKU.reward(problem, answer(GRID["solution"])) == 1.0
        and SUDOKU.reward(problem, answer(OTHER_GRID)) == 0.0
    )


# ---- files ---------------------------------------------------------------------------------------


def write(path, *rows):
    path.write_text(
        "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n",
        encoding="utf-8",
    )
    return path


def test_what_was_written_is_loaded(tmp_path):
    for name, task in GENERATED.items():
        problems = task.problems("train", 20, 15)
        assert (
            task.load(write(tmp_path / name, *problems))
            == task.load(str(tmp_path / name))
            == problems
        )


def test_d1_rows_are_loaded(tmp_path):
    own = write(
        tmp_path / "d1.jsonl",
        {"input": "30,100,93", "output": "23"},
        "",
        "   ",
        {"input": "83, 18, 75", "output": 10},
    )
    assert COUNTDOWN.load(own) == [
        {"numbers": [30, 100, 93], "target": 23},
        {"numbers": [83, 18, 75], "target": 10},
    ]
    assert COUNTDOWN.solved(COUNTDOWN.load(own)[0], answer("30 - (100 - 93)"))
    if D1_FILE.exists():
        problems = COUNTDOWN.load(D1_FILE)
        rows = [json.loads(line) for line in D1_FILE.read_text(encoding="utf-8").splitlines()]
        assert [(",".join(map(str, p["numbers"])), str(p["target"])) for p in problems] == [
            (r["input"], r["output"]) for r in rows
        ]
        assert len(problems) == 256 and all(
            p["target"] in reachable(p["numbers"]) for p in problems
        )


def test_a_sudoku_file_may_leave_out_the_solution(tmp_path):
    unique, ambiguous = SUDOKU.problems("train", 1, 16)[0], "1200001200000000"
    last = sudoku_solutions(ambiguous)[-1]
    rows = (
        {"puzzle": unique["puzzle"]},
        {"puzzle": ambiguous},
        {"puzzle": ambiguous, "solution": last},
    )
    first, second, third = SUDOKU.load(write(tmp_path / "s", *rows))
    assert (
        first == unique
        and second["solution"] in sudoku_solutions(ambiguous)
        and third["solution"] == last
    )


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
    path = write(tmp_path / "rows.jsonl", EASY if name == "countdown" else GRID, "", row)
    with pytest.raises(ValueError) as caught:
        TASKS[name].load(path)
    message = str(caught.value)
    assert (
        str(path) in message
        and "line 3" in message
        and len(message.splitlines()) == 1
        and len(message) < len(str(path)) + 250
    )


@pytest.mark.parametrize(
    "row",
    ['{"numbers": [3, 4, Infinity], "target": 35}', '{"numbers": [3, 4, 5], "target": 1e999}'],
)
def test_an_infinite_number_is_a_bad_row_too(tmp_path, row):
    with pytest.raises(ValueError, match="line 1"):
        COUNTDOWN.load(write(tmp_path / "rows.jsonl", row))


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
    assert str(path) in str(caught.value) and len(str(caught.value).splitlines()) == 1


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
    assert (
        COUNTDOWN.reward(problem, COUNTDOWN.prompt(problem))
        == SUDOKU.reward(GRID, SUDOKU.prompt(GRID))
        == 0.0
    )


# ---- gsm8k and math ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "gsm8k", "math"),
    [
        ("<reasoning>a\nb</reasoning>\n<answer>72</answer>", 1.0, (2 + 0.75) / 3),
        ("<reasoning>a</reasoning><answer>\\boxed{72}</answer>", 1.0, 1.0),
        (
            "well <reasoning>a</reasoning> so <answer>72</answer>",
            (2 + 0.5 + 0.5 + 0.5) / 4,
            (2 + 0.75) / 3,
        ),
        ("<answer>72</answer><reasoning>a</reasoning>", (2 + 0.5 + 0.5) / 4, (2 + 0.75) / 3),
        ("<answer>72</answer>", (2 + 0.5 + 0.25) / 4, (2 + 0.75) / 3),
        ("\\boxed{72}", (2 + 0.5) / 4, (2 + 0.5) / 3),
        ("<reasoning>a</reasoning><answer>71</answer>", 0.5, 0.25),
        ("<reasoning>a</reasoning><answer>71.5</answer>", 1.5 / 4, 0.25),
        ("<answer></answer>" * 3, 0.0, 0.25 / 3),
        ("it is 72", 0.0, 0.25 / 3),
        ("  ", 0.0, 0.0),
    ],
)
def test_rewards_are_the_sum_of_their_parts(text, gsm8k, math):
    problem = {"question": "?", "answer": "72"}
    assert GSM8K.reward(problem, text) == pytest.approx(gsm8k) and MATH.reward(
        problem, text
    ) == pytest.approx(math)


# ---- where the problems come from ----------------------------------------------------------------

ROWS = {
    ("openai/gsm8k", "main", "train"): [
        {"question": f"What is {i} + {i}?", "answer": f"thinking\n#### {2 * i:,}"}
        for i in range(400)
    ],
    ("openai/gsm8k", "main", "test"): [
        {"question": f"What  is {i} + {i}?", "answer": f"#### {2 * i}"} for i in range(380, 420)
    ],
    ("ankner/math-500", "train"): [
        {"problem": f"Halve {i}.", "solution": f"So \\boxed{{\\frac{{{i}}}{{2}}}}."}
        for i in range(100)
    ],
    ("HuggingFaceH4/MATH-500", "test"): [
        {"problem": f"Halve {i}.", "answer": f"\\frac{{{i}}}{{2}}", "level": 3}
        for i in range(500, 520)
    ],
}


@pytest.fixture
def hub(monkeypatch):
    def load_dataset(path, split, name=None):
        return ROWS[(path, name, split) if name else (path, split)]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    for task in (GSM8K, MATH):
        monkeypatch.setattr(task, "pools", {})


def test_a_data_sets_splits_share_no_question(hub):
    for task, sizes in ((GSM8K, (40, 380)), (MATH, (20, 100))):
        sets = {
            split: {row["question"] for row in task.problems(split, 1000, 0)}
            for split in ("train", "validation", "test")
        }
        assert (
            len(sets["test"]) == sizes[0] and len(sets["train"] | sets["validation"]) == sizes[1]
        )  # 20 leaked questions are gone
        assert (
            not sets["train"] & sets["validation"]
            and 0.03 < len(sets["validation"]) / sizes[1] < 0.2
        )
    assert GSM8K.problems("test", 1, 3)[0]["answer"].isdigit()
    assert MATH.problems("train", 1, 0)[0]["answer"].startswith("\\frac")


def test_draws_repeat_themselves_and_only_training_goes_round_again(hub):
    assert (
        GSM8K.problems("train", 20, "0 1")
        == GSM8K.problems("train", 20, "0 1")
        != GSM8K.problems("train", 20, "0 2")
    )
    assert (
        len(GSM8K.problems("train", 1000, 0)) == 1000 and len(GSM8K.problems("test", 1000, 0)) == 40
    )
    drawn = GSM8K.problems("test", 30, 0)
    assert len({row["question"] for row in drawn}) == 30


def test_a_data_set_that_cannot_be_reached_names_the_way_out(monkeypatch):
    def fail(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("datasets.load_dataset", fail)
    monkeypatch.setattr(GSM8K, "pools", {})
    with pytest.raises(ValueError, match=r"openai/gsm8k.*--data FILE") as error:
        GSM8K.problems("test", 1, 0)
    assert "\n" not in str(error.value)


def test_the_tiny_model_is_sent_elsewhere():
    for task in (GSM8K, MATH):
        with pytest.raises(ValueError, match="no length and no demonstrations.*--model") as caught:
            compact_form(task)
        assert len(str(caught.value).splitlines()) == 1
    for task in (COUNTDOWN, SUDOKU):
        assert compact_form(task) is compact_form(task.compact) is task.compact


def test_files_are_read_under_the_data_sets_own_names(tmp_path):
    rows = [{"question": "a?", "answer": "x\n#### 1,000"}, {"question": "b?", "answer": 7}]
    assert [row["answer"] for row in GSM8K.load(write(tmp_path / "a", *rows))] == ["1,000", "7"]
    rows = [
        {"problem": "a?", "solution": "\\boxed{\\sqrt{2}}"},
        {"question": "b?", "answer": "\\pi", "level": 1},
    ]
    assert [row["answer"] for row in MATH.load(write(tmp_path / "b", *rows))] == [
        "\\sqrt{2}",
        "\\pi",
    ]


BAD_QUESTIONS = [
    {"question": "a?"}, {"answer": "1"}, {"question": "", "answer": "1"}, {"question": "a?",
    "answer": None},
    {"question": "a?", "answer": True}, {"question": ["a"], "answer": "1"}, {"question": "a?",
    "answer": "many"},
]  # fmt: skip


@pytest.mark.parametrize("row", BAD_QUESTIONS)
def test_a_bad_question_is_named_by_its_line(tmp_path, row):
    with pytest.raises(ValueError, match="line 2.*question"):
        GSM8K.load(write(tmp_path / "a", {"question": "a?", "answer": "1"}, row))


@pytest.mark.parametrize("name", TASKS)
def test_any_task_can_be_trained_from_a_file(tmp_path, name):
    task = TASKS[name]
    questions = [{"question": f"{i}?", "answer": str(i)} for i in range(100)]
    generated = [] if name in ("gsm8k", "math") else [task.problems(s, 40, 0) for s in SPLITS]
    rows = questions if not generated else [*itertools.chain(*generated)]
    source = ProblemsFromFile(task, write(tmp_path / "a", *rows * 2))
    splits = {
        split: source.problems(split, 10_000 if split != "train" else 50, 0)
        for split in ("train", "validation", "test")
    }
    keys = {split: {json.dumps(row) for row in drawn} for split, drawn in splits.items()}
    assert (
        all(keys.values())
        and not keys["train"] & keys["test"]
        and not keys["train"] & keys["validation"]
    )
    assert (
        source.prompt(splits["test"][0]) == task.prompt(splits["test"][0])
        and source.solved(splits["test"][0], "") is False
    )
    with pytest.raises(ValueError, match="1 problems"):
        one = ProblemsFromFile(task, write(tmp_path / "b", *rows[:1]))
        [one.problems(split, 1, 0) for split in ("train", "validation", "test")]


# ---- splits by key, distinct problems, own tasks -----------------------------------------------


def split_keys(source, key):
    """The keys of all problems of each split of a file; none may be in two."""
    return {split: {key(p) for p in source.pools[split]} for split in SPLITS}


def test_near_duplicates_in_a_file_land_in_one_split(tmp_path):
    numbers = [[a, b, c] for a in range(1, 7) for b in range(1, 7) for c in range(1, 7)]
    puzzles = []
    for solution in SUDOKU.grids[:40]:
        for i in range(8):
            puzzles.append({"puzzle": solution[:i] + "0" + solution[i + 1 :], "solution": solution})
    asked = ["What is {} + {}?", "What  is {} + {}?", " what is {} + {}? "]
    questions = [
        {"question": form.format(i, i), "answer": str(2 * i)} for i in range(60) for form in asked
    ]
    files = {
        COUNTDOWN: ([{"numbers": x, "target": sum(x)} for x in numbers],
        lambda p: sorted(p["numbers"])),
        SUDOKU: (puzzles, lambda p: p["solution"]),
        GSM8K: (questions, lambda p: p["question"].lower().split()),
        MATH: (questions, lambda p: p["question"].lower().split()),
    }  # fmt: skip
    for task, (rows, near) in files.items():
        keys = split_keys(
            ProblemsFromFile(task, write(tmp_path / "rows", *rows)),
            lambda p, near=near: str(near(p)),
        )
        assert all(keys.values()) and sum(map(len, keys.values())) == len(
            set().union(*keys.values())
        )


def test_a_file_splits_as_the_generated_problems_do(tmp_path):
    for task in (COUNTDOWN.compact, SUDOKU):
        rows = {split: task.problems(split, 20, 5) for split in SPLITS}
        source = ProblemsFromFile(task, write(tmp_path / "rows", *itertools.chain(*rows.values())))
        assert source.pools == rows


def every_countdown_problem(highest, split):
    found = set()
    for numbers in itertools.combinations_with_replacement(range(1, highest + 1), 3):
        if split_of("countdown " + " ".join(map(str, numbers))) == split:
            found |= {(numbers, int(v)) for v in reachable(numbers) if v in range(1, 100)}
    return found


def test_held_out_problems_are_distinct_and_end_where_there_are_no_more(capsys):
    for task, n in ((COUNTDOWN, 1200), (COUNTDOWN.compact, 1000), (SUDOKU, 1200)):
        for split in ("validation", "test"):
            drawn = task.problems(split, n, 3)
            same = {str([p["puzzle"]]) if task is SUDOKU else
                    str([sorted(p["numbers"]), p["target"]]) for p in drawn}  # fmt: skip
            assert len(drawn) == len(same) and (
                len(drawn) == n or "has only" in capsys.readouterr().err
            )
    drawn = COUNTDOWN.compact.problems("validation", 100_000, 4)
    everything = every_countdown_problem(20, "validation")
    found = {(tuple(sorted(p["numbers"])), p["target"]) for p in drawn}
    assert found <= everything and len(found) == len(drawn) > 0.99 * len(everything)
    assert f"countdown has only {len(drawn)} validation problems" in capsys.readouterr().err


def test_training_draws_are_those_that_base_models_were_made_from():
    drawn = [t.problems("train", 60, 0) for t in (COUNTDOWN, COUNTDOWN.compact, SUDOKU)]
    drawn += [[*t.compact.demonstrations(60, 0, 0.7)] for t in (COUNTDOWN, SUDOKU)]
    assert zlib.crc32(json.dumps(drawn).encode()) == 930428997


OWN = """
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
    file.write_text(OWN)
    for name in ("Addition", "instance"):
        task = find_task(f"{file}:{name}")
        assert task.solved({"a": 2, "b": 3}, "5") and len(task.problems("test", 4, 0)) == 4
    assert all(find_task(name) is task for name, task in TASKS.items())
    with pytest.raises(ValueError, match="Addition has no length and no demonstrations.*--model"):
        compact_form(task)
    with pytest.raises(ValueError, match=r"no load\(path\)"):
        ProblemsFromFile(task, "rows.jsonl")
    source = ProblemsFromFile(
        find_task(f"{file}:Loading"), "rows.jsonl"
    )  # without a key: by the prompt
    keys = split_keys(source, task.prompt)
    assert sum(map(len, keys.values())) == len(set().union(*keys.values())) == 30


def test_a_task_that_cannot_be_had_is_one_line(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "broken.py").write_text("import no_such_module")
    (tmp_path / "syntax.py").write_text("def (")
    (tmp_path / "exits.py").write_text("raise SystemExit(3)")
    (tmp_path / "text.txt").write_text(OWN)
    for name, said in {
        "chess": "countdown, sudoku, gsm8k, math, or a FILE.py:NAME", "": "unknown task",
        f"{tmp_path}/none.py:Addition": "none.py", f"{tmp_path}/text.txt:Addition": "text.txt",
        f"{tmp_path}/own.py": "unknown task", f"{tmp_path}:x": "unknown task",
        f"{tmp_path}/own.py:Other": "Other", f"{tmp_path}/own.py:": "own.py",
        f"{tmp_path}/own.py:Half": "no problems, no reward",
        f"{tmp_path}/own.py:random": "no problems",
        f"{tmp_path}/own.py:Needy": "wanted", f"{tmp_path}/broken.py:x": "no_such_module",
        f"{tmp_path}/syntax.py:x": "SyntaxError", f"{tmp_path}/exits.py:x": "SystemExit",
    }.items():  # fmt: skip
        with pytest.raises(ValueError) as caught:
            find_task(name)
        assert said in str(caught.value) and len(str(caught.value).splitlines()) == 1, name


# ---- what a real model writes ------------------------------------------------------------------

COMPLETIONS = Path(__file__).parent.parent.parent / "shared" / "data" / "llada_completions.jsonl"

# Rows where the verdict is not d1's, in every one of them right where d1 says wrong.
NOT_AS_D1 = {
    81: "48, 96, 26 to 74: 96 - 48 + 26, without a box",
    450: "3/24 for 1/8", 461: "8 + 8 + 15 = 31 units for 31", 505: "1/4, without a box",
    527: "0.09 for 9/100", 586: "6/3 for 2",
}  # fmt: skip


@pytest.fixture(scope="module")
def completions():
    if not COMPLETIONS.exists():
        pytest.skip(f"{COMPLETIONS.name}, completions of LLaDA-8B-Instruct, is not there")
    return [json.loads(line) for line in COMPLETIONS.read_text(encoding="utf-8").splitlines()]


def test_verdicts_on_real_completions_are_d1s_but_for_a_list(completions):
    other = [
        i for i, row in enumerate(completions)
        if TASKS[row["task"]].solved(row["problem"], row["text"]) != row["d1_correct"]
    ]  # fmt: skip
    assert other == [*NOT_AS_D1] and not any(completions[i]["d1_correct"] for i in other)


def test_real_completions_have_a_reward_to_climb(completions):
    rewards = {name: [] for name in TASKS}
    for row in completions:
        rewards[row["task"]].append(TASKS[row["task"]].reward(row["problem"], row["text"]))
    earning = {name: sum(r > 0 for r in of) / len(of) for name, of in rewards.items()}
    assert earning["countdown"] > 0.5 and earning["sudoku"] > 0.15
    assert min(earning["gsm8k"], earning["math"]) > 0.9
