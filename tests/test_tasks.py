"""Problems, rewards and files of tasks.py, against evaluators, solvers and counts of the tests' own."""

import itertools
import json
import operator
import random
import re
from fractions import Fraction
from pathlib import Path

import pytest

from tasks import TASKS, expression_value, extract_answer, is_solution_grid, split_of

COUNTDOWN, SUDOKU = TASKS["countdown"], TASKS["sudoku"]
GENERATED = {"countdown": COUNTDOWN, "sudoku": SUDOKU}  # the others' problems come from data sets: test_answers.py
SPLITS = ("train", "validation", "test")
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
D1_FILE = Path(__file__).parent.parent.parent / "shared" / "data" / "countdown_cd3_test.jsonl"

EASY = {"numbers": [3, 4, 5], "target": 35}
RIGHT = "(3 + 4) * 5"
GRID = {"puzzle": "1200341221434321", "solution": "1234341221434321"}
OTHER_GRID = "1243431221343421"  # also a finished grid


def answer(text):
    return f"<answer>{text}</answer>"


# ---- the tests' own ways to an answer ----------------------------------------------------------------------------------


def reachable(numbers):
    """Every value that an expression of all the numbers can have: replace any two by their result until one is left."""
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
    return Fraction(tree) if isinstance(tree, int) else OPERATIONS[tree[0]](tree_value(tree[1]), tree_value(tree[2]))


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
    left, right = bracketed(tree[1], binding(tree[1]) < binding(tree)), bracketed(tree[2], binding(tree[2]) <= binding(tree))
    return left + tree[0] + rng.choice(["", " ", "\t"]) + right


def sudoku_solutions(puzzle):
    """All completions, by trying each digit in the first blank cell."""
    i = puzzle.find("0")
    if i < 0:
        return [puzzle]
    seen = {puzzle[j] for j in range(16) if j // 4 == i // 4 or j % 4 == i % 4 or (j // 8, j % 4 // 2) == (i // 8, i % 4 // 2)}
    return [s for digit in "1234" if digit not in seen for s in sudoku_solutions(puzzle[:i] + digit + puzzle[i + 1 :])]


# ---- problems ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", GENERATED.values(), ids=GENERATED)
@pytest.mark.parametrize("compact", [False, True])
def test_a_seed_decides_the_problems(task, compact):
    for split in SPLITS:
        assert task.problems(split, 20, 1, compact) == task.problems(split, 20, 1, compact) != task.problems(split, 20, 2, compact)
    assert len(task.problems("train", 20, 1, compact)) == 20
    assert [*task.demonstrations(20, 1, 0.5)] == [*task.demonstrations(20, 1, 0.5)] != [*task.demonstrations(20, 2, 0.5)]


@pytest.mark.parametrize(("compact", "highest"), [(False, 99), (True, 12)])
def test_every_countdown_target_can_be_reached_with_numbers_in_range(compact, highest):
    for split in SPLITS:
        for problem in COUNTDOWN.problems(split, 60, 3, compact):
            assert len(problem["numbers"]) == 3 and all(1 <= x <= highest for x in problem["numbers"])
            assert 1 <= problem["target"] <= 99 and problem["target"] in reachable(problem["numbers"])


def test_countdown_splits_share_no_multiset_of_numbers():
    multisets = {
        split: {tuple(sorted(p["numbers"])) for compact in (False, True) for p in COUNTDOWN.problems(split, 1500, 4, compact)}
        for split in SPLITS
    }
    assert all(len(m) > 30 for m in multisets.values())
    assert len(set().union(*multisets.values())) == sum(len(m) for m in multisets.values())


def test_a_split_of_numbers_holds_for_every_seed_and_order():
    seen = {}
    for seed, split in itertools.product(range(5), SPLITS):
        for problem in COUNTDOWN.problems(split, 200, seed, compact=True):
            assert seen.setdefault(tuple(sorted(problem["numbers"])), split) == split
    assert len(seen) <= 364  # the multisets of three numbers of 1 to 12: 14 over 3


def test_split_shares_are_70_10_20():
    splits = [split_of(f"key {i}") for i in range(10_000)]
    assert [round(splits.count(split) / 10_000, 1) for split in SPLITS] == [0.7, 0.1, 0.2]


def test_there_are_288_finished_grids_and_the_splits_part_them():
    grids = sudoku_solutions("0" * 16)
    assert len(grids) == 288 and sorted(SUDOKU.grids) == sorted(grids)
    assert sorted(itertools.chain(*SUDOKU.grids_of.values())) == sorted(grids) and all(SUDOKU.grids_of.values())


def test_a_grid_is_finished_only_if_it_is_among_the_288():
    grids, rng = set(sudoku_solutions("0" * 16)), random.Random(0)
    assert all(map(is_solution_grid, grids))
    for grid in sorted(grids)[:100]:
        i, j = rng.sample(range(16), 2)
        swapped = list(grid)
        swapped[i], swapped[j] = grid[j], grid[i]
        assert is_solution_grid("".join(swapped)) == ("".join(swapped) in grids)
    assert not is_solution_grid("1234234134124123")  # its rows and columns are right, its boxes are not
    assert not is_solution_grid("1234" * 4) and not is_solution_grid("1234") and not is_solution_grid("")


def test_sudoku_puzzles_have_exactly_their_solution():
    for split in SPLITS:
        for problem in SUDOKU.problems(split, 15, 5):
            assert sudoku_solutions(problem["puzzle"]) == [problem["solution"]]
            assert 6 <= problem["puzzle"].count("0") <= 11


def test_sudoku_splits_share_no_solution_grid():
    grids = {split: {p["solution"] for p in SUDOKU.problems(split, 500, 6)} for split in SPLITS}
    assert all(len(g) > 10 for g in grids.values())
    assert len(set().union(*grids.values())) == sum(len(g) for g in grids.values())


# ---- demonstrations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("careless", [0.0, 0.5, 1.0])
def test_demonstrations_come_from_the_training_split(careless):
    held_out = {tuple(sorted(p["numbers"])) for s in ("validation", "test") for p in COUNTDOWN.problems(s, 1000, 7, compact=True)}
    assert not held_out & {tuple(sorted(p["numbers"])) for p, _ in COUNTDOWN.demonstrations(500, 7, careless)}
    assert {p["solution"] for p, _ in SUDOKU.demonstrations(200, 7, careless)} <= set(SUDOKU.grids_of["train"])


@pytest.mark.parametrize("task", GENERATED.values(), ids=GENERATED)
def test_careful_demonstrations_are_all_solved(task):
    demonstrations = [*task.demonstrations(300, 8, careless=0.0)]
    assert len(demonstrations) == 300 and all(task.solved(problem, text) for problem, text in demonstrations)


def test_careless_countdown_demonstrations_keep_form_and_numbers():
    for problem, text in COUNTDOWN.demonstrations(500, 9, careless=1.0):
        assert re.fullmatch(r"<answer>(\( \d+ [-+*/] \d+ \) [-+*/] \d+|\d+ [-+*/] \( \d+ [-+*/] \d+ \))</answer>", text)
        assert sorted(map(int, re.findall(r"\d+", text))) == sorted(problem["numbers"])
        assert len(text.split()) + 2 + 1 == COUNTDOWN.compact_length  # two tags and [EOS]


def test_careless_countdown_demonstrations_all_earn_something():
    assert all(COUNTDOWN.reward(problem, text) >= 0.1 for problem, text in COUNTDOWN.demonstrations(2000, 0, careless=1.0))


def test_careless_sudoku_demonstrations_keep_givens_and_fill_rows():
    for problem, text in SUDOKU.demonstrations(200, 9, careless=1.0):
        grid = re.fullmatch(r"<answer>([1-4](?: [1-4]){15})</answer>", text)[1].replace(" ", "")
        assert all(given in ("0", cell) for given, cell in zip(problem["puzzle"], grid, strict=True))
        assert all(sorted(grid[i : i + 4]) == [*"1234"] for i in range(0, 16, 4))


@pytest.mark.parametrize("task", GENERATED.values(), ids=GENERATED)
def test_half_careless_demonstrations_lie_halfway(task):
    solved = {c: sum(task.solved(p, t) for p, t in task.demonstrations(400, 10, c)) for c in (0.0, 0.5, 1.0)}
    assert solved[0.0] == 400 > solved[0.5] > solved[1.0]
    assert abs(solved[0.5] - (400 + solved[1.0]) / 2) < 40  # four standard deviations


# ---- the answer in the text --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        ("<answer>1</answer>", "1"),
        ("<reasoning>so 2</reasoning>\n<answer>\n\t 1 + 2\n</answer> done", "1 + 2"),
        ("<answer>1\n2</answer>", "1\n2"),
        ("<answer>1</answer><answer>2</answer>", "2"),
        ("<answer>1</answer> no: <answer>2", "1"),
        ("<answer>1<answer>2</answer>", "2"),
        ("<answer></answer>", ""),
        ("<answer>1</answer><answer> \n </answer>", ""),
        ("<answer>1", ""),
        ("1</answer>", ""),
        ("</answer>1<answer>", ""),
        ("<ANSWER>1</ANSWER>", ""),
        ("<Answer>1</answer>", ""),
        ("<answer>1</Answer>", ""),
        ("< answer>1</ answer>", ""),
        ("<answer/>1</answer>", ""),
        ("1", ""),
        ("", ""),
    ],
)
def test_the_answer_is_what_the_last_pair_of_tags_holds(text, inside):
    assert extract_answer(text) == inside


@pytest.mark.parametrize("text", ["<answer>1<answer>2</answer></answer>", "<answer>2</answer></answer>", "<answer>2</answer> or </answer>"])
def test_an_answer_ends_at_its_first_closing_tag(text):
    assert extract_answer(text) == "2"


def test_only_the_last_answer_is_scored():
    for task, problem, right, wrong in ((COUNTDOWN, EASY, RIGHT, "3"), (SUDOKU, GRID, GRID["solution"], "1")):
        assert task.solved(problem, answer(wrong) + answer(right)) and task.solved(problem, answer(f"\n {right}\n"))
        for text in (answer(right) + answer(wrong), answer(right) + answer(""), right, f"<answer>{right}", "", answer("")):
            assert task.reward(problem, text) == 0.0 and not task.solved(problem, text)


# ---- countdown's verifier ----------------------------------------------------------------------------------------------


def test_expression_value_agrees_with_the_tree_that_was_printed():
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
                expression_value(text, numbers)
        else:
            assert expression_value(text, rng.sample(numbers, len(numbers))) == value, text
    assert 50 < zero_divisions < 1000


@pytest.mark.parametrize(
    ("text", "value"),
    [("8 - 4 - 2", 2), ("8 / 4 / 2", 1), ("8 - (4 - 2)", 6), ("8 / (4 / 2)", 4), ("8-4*2", 0), ("(2)/((8)*4)", Fraction(1, 16))],
)
def test_expressions_have_the_values_worked_out_by_hand(text, value):
    assert expression_value(text, [2, 4, 8]) == value


def test_countdown_rewards_are_1_for_the_target_and_a_tenth_for_form():
    for text in (RIGHT, "5*(4+3)", "( ( 3 ) + 4 )\n*\t5", "(((5))) * ((4) + 3)"):
        assert COUNTDOWN.reward(EASY, answer(text)) == 1.0 and COUNTDOWN.solved(EASY, answer(text)) is True
    for text in ("3 + 4 + 5", "3 + 4 * 5", "3 - 4 - 5", "3 / 4 / 5"):
        assert COUNTDOWN.reward(EASY, answer(text)) == 0.1 and not COUNTDOWN.solved(EASY, answer(text))
    assert COUNTDOWN.solved({"numbers": [1, 49, 49], "target": 1}, answer("1 / 49 * 49"))  # floats would make it 0.9999999999999999


HOSTILE = """
    -3+4*5          +(3+4)*5        (3+4)*-5        (3+4)*+5        (3+4)**5        (3+4)//5        3+4*5-          *3+4*5
    (3+4)*5.0       (3+4)*2.5       (3.+4)*5        (3+4)*05        3e4+5           1e3             (3+4)*0x5       (3+4)*0b101
    (３+４)*５      (٣+٤)*٥         (3+4)*⁵         (3+4)*5⁵        (3+4)*⑤        (3+4)×5         (3+4)·5         (3+4)÷5
    (3−4)*5         (3+4)*5=35      35=(3+4)*5      35              (3+4)*5==35     3<4*5           3%4+5           3^4+5
    (3+4)*x         a               __import__('os')                (3+4)*5or(1)    (3+4)*5if(1)else(2)             lambda:(3+4)*5
    3+4*6           (3+4)*5*5       (3+4)*5+5-5     3+4             34+5            345             3_4+5           3,4,5
    3*45            (3+4)5          (3)(4)(5)       3(4)5           ()              ((3+4)*5        (3+4)*5)        )3+4(*5
    ()+(3+4)*5      (3+4)()*5       (3+)4*5         [3+4]*5         {3+4}*5         (3+4)*5;        (3+4)*5#        $(3+4)*5$
    \\boxed{(3+4)*5}                (3+4)*5\\n      "(3+4)*5"       `(3+4)*5`       <b>(3+4)*5</b>  (3+4)*5,        (3+4)*5!
"""


@pytest.mark.parametrize("text", [*HOSTILE.split(), "3 4 5", "(3 + 4) 5", "(3+4)*\u200b5", "(3+4)*5\0", "(3+4)*5\ud800", "(3+4)* 5 5"])
def test_what_is_no_expression_of_the_numbers_scores_nothing(text):
    assert COUNTDOWN.reward(EASY, answer(text)) == 0.0 and COUNTDOWN.solved(EASY, answer(text)) is False


def test_division_by_zero_scores_nothing():
    for text in ("3 / (5 - 5)", "(5 - 5) / (3 - 3)", "3/(5*0+5-5)"):
        numbers = [int(x) for x in re.findall(r"\d+", text)]
        assert all(COUNTDOWN.reward({"numbers": numbers, "target": target}, answer(text)) == 0.0 for target in (0, 1, 3))


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
        assert rewards[-1] in (0.0, 0.1, 1.0) and COUNTDOWN.solved(EASY, text) is (rewards[-1] == 1.0)
        assert 0.0 <= SUDOKU.reward(GRID, text) <= 1.0
    assert {*rewards} == {0.0, 0.1, 1.0}


def test_fuzzed_expressions_score_as_python_would_score_them():
    rng, well_formed = random.Random(13), 0
    for _ in range(3000):
        parts = [rng.choice(["", "(", "(("]), "3", rng.choice("+-*/"), "(" * rng.randint(0, 1), "4", ")" * rng.randint(0, 2)]
        text = "".join([*parts, rng.choice("+-*/"), "5", ")" * rng.randint(0, 2)])
        try:  # only 3, 4, 5, one operator between two of them, and parentheses: safe to evaluate
            value = eval(re.sub(r"(\d)", r"Fraction(\1)", text), {"Fraction": Fraction})
        except (SyntaxError, ZeroDivisionError):
            value = None
        well_formed += value is not None
        assert COUNTDOWN.reward(EASY, answer(text)) == (0.0 if value is None else 1.0 if value == 35 else 0.1)
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


# ---- sudoku's verifier -------------------------------------------------------------------------------------------------


def test_the_solution_is_solved_however_it_is_spaced():
    solution = GRID["solution"]
    rows = [solution[i : i + 4] for i in range(0, 16, 4)]
    for text in (solution, " ".join(solution), "\n".join(rows), "\n".join(map(" ".join, rows)), "\t".join(rows) + "\n\n"):
        assert SUDOKU.reward(GRID, answer(text)) == 1.0 and SUDOKU.solved(GRID, answer(text)) is True


def test_a_changed_given_earns_nothing():
    for i, given in enumerate(GRID["puzzle"]):
        for cell in set("01234x") - {GRID["solution"][i]}:
            text = answer(GRID["solution"][:i] + cell + GRID["solution"][i + 1 :])
            assert SUDOKU.reward(GRID, text) == (0.5 if given == "0" else 0.0) and not SUDOKU.solved(GRID, text)
    assert is_solution_grid(OTHER_GRID) and SUDOKU.reward(GRID, answer(OTHER_GRID)) == 0.0


def test_a_partial_reward_is_the_share_of_blank_cells_that_are_right():
    problem = {"puzzle": "1030041020000301", "solution": "1234341221434321"}  # nine blank cells
    assert SUDOKU.reward(problem, answer("1231 3413 2222 4331")) == pytest.approx(3 / 9)  # right: 2, then 3, then 4
    assert SUDOKU.reward(problem, answer("1234 3412 2143 4331")) == pytest.approx(8 / 9)
    assert SUDOKU.reward(problem, answer(problem["puzzle"])) == 0.0


def test_a_grid_of_the_wrong_length_earns_nothing():
    solution = GRID["solution"]
    for text in (solution[:-1], solution + "1", solution * 2, solution[0], ",".join(solution), f"[{solution}]", f"Grid: {solution}"):
        assert SUDOKU.reward(GRID, answer(text)) == 0.0


@pytest.mark.parametrize("digits", ["１２３４", "١٢٣٤", "¹²³⁴", "①②③④", "abcd", "\0\0\0\0", "\ud800\ud800\ud800\ud800"])
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
        assert SUDOKU.solved({"puzzle": puzzle, "solution": completions[0]}, answer(grid)) == (grid in completions)


def test_a_puzzle_without_blanks_is_solved_by_itself_alone():
    problem = {"puzzle": GRID["solution"], "solution": GRID["solution"]}
    assert SUDOKU.reward(problem, answer(GRID["solution"])) == 1.0 and SUDOKU.reward(problem, answer(OTHER_GRID)) == 0.0


# ---- files -------------------------------------------------------------------------------------------------------------


def write(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return path


def test_what_was_written_is_loaded(tmp_path):
    for name, task in GENERATED.items():
        problems = task.problems("train", 20, 15)
        assert task.load(write(tmp_path / name, *problems)) == task.load(str(tmp_path / name)) == problems


def test_d1_rows_are_loaded(tmp_path):
    own = write(tmp_path / "d1.jsonl", {"input": "30,100,93", "output": "23"}, "", "   ", {"input": "83, 18, 75", "output": 10})
    assert COUNTDOWN.load(own) == [{"numbers": [30, 100, 93], "target": 23}, {"numbers": [83, 18, 75], "target": 10}]
    assert COUNTDOWN.solved(COUNTDOWN.load(own)[0], answer("30 - (100 - 93)"))
    if D1_FILE.exists():
        problems = COUNTDOWN.load(D1_FILE)
        rows = [json.loads(line) for line in D1_FILE.read_text(encoding="utf-8").splitlines()]
        assert [(",".join(map(str, p["numbers"])), str(p["target"])) for p in problems] == [(r["input"], r["output"]) for r in rows]
        assert len(problems) == 256 and all(p["target"] in reachable(p["numbers"]) for p in problems)


def test_a_sudoku_file_may_leave_out_the_solution(tmp_path):
    unique, ambiguous = SUDOKU.problems("train", 1, 16)[0], "1200001200000000"
    last = sudoku_solutions(ambiguous)[-1]
    rows = {"puzzle": unique["puzzle"]}, {"puzzle": ambiguous}, {"puzzle": ambiguous, "solution": last}
    first, second, third = SUDOKU.load(write(tmp_path / "s", *rows))
    assert first == unique and second["solution"] in sudoku_solutions(ambiguous) and third["solution"] == last


NOT_A_ROW = ["not JSON", "{", "[" * 100_000, '{"a":' * 100_000, "[3, 4, 5]", "[]", "35", "null", '"text"', "{}", '{"question": "?"}']
BAD_COUNTDOWN = """
    {"numbers":[3,4,5]}     {"target":35}           {"input":"3,4,5"}       {"output":"35"}         {"numbers":[],"target":35}
    {"numbers":null,"target":35}                    {"numbers":3,"target":35}                       {"numbers":[3,null],"target":35}
    {"numbers":[3,"x"],"target":35}                 {"numbers":[3,4,5],"target":null}               {"numbers":[[3],4],"target":35}
    {"input":"","output":"35"}                      {"input":[3,4],"output":"35"}                   {"input":"3;4","output":"35"}
    {"input":"3,4,5","output":"x"}                  {"input":"3,,5","output":"35"}                  {"numbers":[3,NaN],"target":35}
"""
BAD_SUDOKU = """
    {"solution":"1234341221434321"}                 {"puzzle":"123434122143432"}                    {"puzzle":"12343412214343210"}
    {"puzzle":"123434122143432x"}                   {"puzzle":"123434122143432１"}                  {"puzzle":"1234341221434325"}
    {"puzzle":1234341221434321}                     {"puzzle":null}         {"puzzle":["1","2"]}    {"puzzle":"1100000000000000"}
    {"puzzle":"1200000000000000","solution":"3412123421434321"}             {"puzzle":"1200000000000000","solution":null}
    {"puzzle":"1200000000000000","solution":["1"]}  {"puzzle":"1200000000000000","solution":"1200000000000000"}
"""
BAD_ROWS = [(name, row) for name, bad in (("countdown", BAD_COUNTDOWN), ("sudoku", BAD_SUDOKU)) for row in NOT_A_ROW + bad.split()]


@pytest.mark.parametrize(("name", "row"), BAD_ROWS, ids=lambda x: x[:70])
def test_a_bad_row_is_named_by_file_and_line_in_one_line(tmp_path, name, row):
    path = write(tmp_path / "rows.jsonl", EASY if name == "countdown" else GRID, "", row)
    with pytest.raises(ValueError) as caught:
        TASKS[name].load(path)
    message = str(caught.value)
    assert str(path) in message and "line 3" in message and len(message.splitlines()) == 1 and len(message) < len(str(path)) + 250


@pytest.mark.parametrize("row", ['{"numbers": [3, 4, Infinity], "target": 35}', '{"numbers": [3, 4, 5], "target": 1e999}'])
def test_an_infinite_number_is_a_bad_row_too(tmp_path, row):
    with pytest.raises(ValueError, match="line 1"):
        COUNTDOWN.load(write(tmp_path / "rows.jsonl", row))


@pytest.mark.parametrize("task", GENERATED.values(), ids=GENERATED)
@pytest.mark.parametrize("content", [b"", b"\n \n\t\n", b'\xff\xfe{"numbers"', b"\x80", None, "directory"])
def test_a_file_that_cannot_be_read_is_named_in_one_line(tmp_path, task, content):
    path = tmp_path / "rows.jsonl"
    if content == "directory":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        task.load(path)
    assert str(path) in str(caught.value) and len(str(caught.value).splitlines()) == 1


# ---- prompts -----------------------------------------------------------------------------------------------------------


def test_compact_prompts_are_exact():
    assert COUNTDOWN.prompt(EASY, compact=True) == "3 4 5 = 35"
    assert COUNTDOWN.prompt({"numbers": [12, 1], "target": 9}, compact=True) == "12 1 = 9"
    assert SUDOKU.prompt(GRID, compact=True) == "1 2 0 0 3 4 1 2 2 1 4 3 4 3 2 1"


def test_instructions_name_the_problem_and_both_tags_but_hold_no_answer():
    problem = {"numbers": [61, 87, 58], "target": 29}
    for text, wanted in ((COUNTDOWN.prompt(problem), {"61", "87", "58", "29"}), (SUDOKU.prompt(GRID), {GRID["puzzle"]})):
        assert wanted <= set(re.findall(r"\d+", text))
        assert all(tag in text for tag in ("<reasoning>", "</reasoning>", "<answer>", "</answer>"))
        assert GRID["solution"] not in text
    assert COUNTDOWN.reward(problem, COUNTDOWN.prompt(problem)) == SUDOKU.reward(GRID, SUDOKU.prompt(GRID)) == 0.0
