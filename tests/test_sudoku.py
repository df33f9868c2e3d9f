"""Sudoku's problems and its verifier, against a solver that tries every digit."""

import itertools
import json
import random
import re
from pathlib import Path

import pytest
from task_examples import GRID, OTHER_GRID, SPLITS, answer, sudoku_solutions, write_rows

from tasks.registry import TASKS
from tasks.sudoku import is_solution_grid

SUDOKU = TASKS["sudoku"]
REAL_COMPLETIONS = Path(__file__).parents[2] / "shared" / "data" / "llada_completions.jsonl"
NINE_BLANKS = {"puzzle": "1030041020000301", "solution": "1234341221434321"}

# ---- problems ------------------------------------------------------------------------------------


def test_there_are_288_finished_grids_and_the_splits_part_them():
    grids = sudoku_solutions("0" * 16)
    assert len(grids) == 288
    assert sorted(SUDOKU.grids) == sorted(grids)
    assert sorted(itertools.chain(*SUDOKU.grids_of.values())) == sorted(grids)
    assert all(SUDOKU.grids_of.values())


def test_a_grid_is_finished_only_if_it_is_among_the_288():
    grids = set(sudoku_solutions("0" * 16))
    rng = random.Random(0)
    assert all(map(is_solution_grid, grids))
    for grid in sorted(grids)[:100]:
        i, j = rng.sample(range(16), 2)
        swapped = list(grid)
        swapped[i], swapped[j] = grid[j], grid[i]
        assert is_solution_grid("".join(swapped)) == ("".join(swapped) in grids)
    # The rows and columns of this one are right, its boxes are not.
    assert not is_solution_grid("1234234134124123")
    assert not is_solution_grid("1234" * 4)
    assert not is_solution_grid("1234")
    assert not is_solution_grid("")


def test_sudoku_puzzles_have_exactly_their_solution():
    for split in SPLITS:
        for problem in SUDOKU.problems(split, 15, 5):
            assert sudoku_solutions(problem["puzzle"]) == [problem["solution"]]
            assert 6 <= problem["puzzle"].count("0") <= 11


def test_sudoku_splits_share_no_solution_grid():
    grids = {
        split: {problem["solution"] for problem in SUDOKU.problems(split, 500, 6)}
        for split in SPLITS
    }
    assert all(len(g) > 10 for g in grids.values())
    assert len(set().union(*grids.values())) == sum(len(g) for g in grids.values())


def test_careless_sudoku_demonstrations_keep_givens_and_fill_rows():
    for problem, text in SUDOKU.compact.demonstrations(200, 9, careless=1.0):
        grid = re.fullmatch(r"<answer>([1-4](?: [1-4]){15})</answer>", text)[1].replace(" ", "")
        assert all(
            given in ("0", cell) for given, cell in zip(problem["puzzle"], grid, strict=True)
        )
        assert all(sorted(grid[i : i + 4]) == [*"1234"] for i in range(0, 16, 4))


# ---- rewards -------------------------------------------------------------------------------------


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
        assert SUDOKU.reward(GRID, answer(text)) == 1.0
        assert SUDOKU.solved(GRID, answer(text)) is True


def test_a_changed_given_costs_its_share():
    num_givens = 16 - GRID["puzzle"].count("0")
    for i, given in enumerate(GRID["puzzle"]):
        for cell in set("01234x") - {GRID["solution"][i]}:
            text = answer(GRID["solution"][:i] + cell + GRID["solution"][i + 1 :])
            expected = 0.5 if given == "0" else (num_givens - 1) / num_givens
            assert SUDOKU.reward(GRID, text) == pytest.approx(expected)
            assert not SUDOKU.solved(GRID, text)
    assert is_solution_grid(OTHER_GRID)
    assert not SUDOKU.solved(GRID, answer(OTHER_GRID))


def random_answer(problem, rng):
    """An answer of random quality: a grid of 12 to 20 characters, some of them right."""
    length = rng.choice((12, 15, 16, 16, 16, 17, 20))
    quality = rng.random()
    solution = problem["solution"].ljust(length, "1")
    return [solution[i] if rng.random() < quality else rng.choice("01234x") for i in range(length)]


def test_no_step_towards_a_solution_lowers_the_reward():
    rng = random.Random(3)
    ambiguous = {"puzzle": "1200001200000000", "solution": sudoku_solutions("1200001200000000")[0]}
    for problem in [*SUDOKU.problems("validation", 40, 0), NINE_BLANKS, GRID, ambiguous]:
        solution = problem["solution"]
        for _ in range(10):
            grid = random_answer(problem, rng)
            before = SUDOKU.reward(problem, answer("".join(grid)))
            steps = [grid[:i] + [solution[i]] + grid[i + 1 :] for i in range(min(16, len(grid)))]
            if len(grid) < 16:
                steps.append([*grid, solution[len(grid)]])
            if len(grid) > 16:
                steps.append(grid[:-1])
            for step in steps:
                if problem is not ambiguous or SUDOKU.solved(problem, answer("".join(step))):
                    assert SUDOKU.reward(problem, answer("".join(step))) >= before


def test_overwriting_a_given_never_pays_more_than_keeping_it():
    rng = random.Random(4)
    for problem in [*SUDOKU.problems("validation", 40, 1), NINE_BLANKS, GRID]:
        for _ in range(10):
            grid = random_answer(problem, rng)
            for i, given in enumerate(problem["puzzle"][: len(grid)]):
                if given != "0":
                    kept = "".join(grid[:i] + [given] + grid[i + 1 :])
                    best_without = max(
                        SUDOKU.reward(problem, answer("".join(grid[:i] + [cell] + grid[i + 1 :])))
                        for cell in set("01234x") - {given}
                    )
                    assert SUDOKU.reward(problem, answer(kept)) >= best_without


@pytest.mark.skipif(not REAL_COMPLETIONS.exists(), reason="needs the file of real completions")
def test_real_completions_earn_something_more_often_than_by_whole_grids_alone():
    rows = [json.loads(line) for line in REAL_COMPLETIONS.read_text().splitlines()]
    rows = [row for row in rows if row["task"] == "sudoku"]
    rewards = [SUDOKU.reward(row["problem"], row["text"]) for row in rows]
    assert len(rewards) == 150
    assert sum(reward > 0 for reward in rewards) >= 0.39 * len(rewards)
    assert sum(SUDOKU.solved(row["problem"], row["text"]) for row in rows) == 1


def test_a_partial_reward_is_the_share_of_blank_cells_that_are_right():
    three_right = answer("1231 3413 2222 4331")  # 2, then 3, then 4
    assert SUDOKU.reward(NINE_BLANKS, three_right) == pytest.approx(3 / 9)
    assert SUDOKU.reward(NINE_BLANKS, answer("1234 3412 2143 4331")) == pytest.approx(8 / 9)
    assert SUDOKU.reward(NINE_BLANKS, answer(NINE_BLANKS["puzzle"])) == 0.0


def test_a_grid_of_the_wrong_length_is_never_solved_but_what_is_right_of_it_counts():
    solution = NINE_BLANKS["solution"]
    rewards = [SUDOKU.reward(NINE_BLANKS, answer(solution[:n])) for n in range(17)]
    assert rewards == sorted(rewards)
    assert rewards[0] == 0
    assert rewards[-1] == 1 > rewards[-2]
    # Three of seven givens are lacking, there is one cell too many, there are 16 too many.
    assert SUDOKU.reward(NINE_BLANKS, answer(solution[:8])) == pytest.approx(4 / 9 * 4 / 7)
    assert SUDOKU.reward(NINE_BLANKS, answer(solution + "1")) == pytest.approx(9 / 10)
    assert SUDOKU.reward(NINE_BLANKS, answer(solution * 2)) == pytest.approx(9 / 25)
    assert SUDOKU.reward(NINE_BLANKS, answer("1234 04")) == pytest.approx(2 / 9 * 3 / 7)
    for text in (solution[:15], solution + "1", solution * 2, solution[0], f"Grid: {solution}"):
        assert not SUDOKU.solved(NINE_BLANKS, answer(text))
    full = {"puzzle": solution, "solution": solution}
    assert SUDOKU.reward(full, answer(solution[:15])) == SUDOKU.reward(full, answer("")) == 0.0


def test_a_grid_may_be_drawn_with_signs():
    solution = GRID["solution"]
    rows = [solution[i : i + 4] for i in range(0, 16, 4)]
    latex_rows = " \\\\ ".join(" & ".join(row) for row in rows)
    for text in (
        ",".join(solution),
        f"[{solution}]",
        str([[*map(int, row)] for row in rows]),
        "\n".join("| " + " | ".join(row) + " |" for row in rows),
        f"\\boxed{{{solution}}}",
        "The grid is:\n" + "\n".join(rows),
        "```\n" + "\n".join(rows) + "\n```",
        f"**{solution}**",
        f"**Answer:** {solution}",
        "**Solution:**\n" + "\n".join(rows),
        "\\\\\n".join(rows),
        "\\begin{array}{|c|c|c|c|}\n\\hline " + latex_rows + " \\hline\n\\end{array}",
        "\\begin{bmatrix} " + latex_rows + " \\end{bmatrix}",
        "\\begin{pmatrix}" + latex_rows + "\\end{pmatrix}",
        "$\\boxed{\\begin{bmatrix} " + latex_rows + " \\end{bmatrix}}$",
        f"'{solution}'",
        f'"{solution}"',
        f"“{solution}”",
        f"‘{' '.join(solution)}’",
        "\n".join(f"R{i}: {row}" for i, row in enumerate(rows, 1)),
        "\n".join(f"Row {i}: {' '.join(row)}" for i, row in enumerate(rows, 1)),
        ", ".join(f"row {i} = {row}" for i, row in enumerate(rows, 1)),
        "\n".join(f"r{i} | {' | '.join(row)} |" for i, row in enumerate(rows, 1)),
        "┌───────┐\n" + "\n".join(f"│ {' '.join(row)} │" for row in rows) + "\n└───────┘",
        "╔══╦══╗\n" + "\n╟──╫──╢\n".join(f"║{row[:2]}║{row[2:]}║" for row in rows) + "\n╚══╩══╝",
        "+-----+\n" + "\n".join(f"|{row}|" for row in rows) + "\n+-----+",
    ):
        assert SUDOKU.solved(GRID, answer(text)), text


@pytest.mark.parametrize(
    "digits", ["１２３４", "١٢٣٤", "¹²³⁴", "①②③④", "abcd", "\0\0\0\0", "\ud800\ud800\ud800\ud800"]
)
def test_other_characters_are_no_digits(digits):
    other = GRID["solution"].translate(str.maketrans("1234", digits))
    assert SUDOKU.reward(GRID, answer(other)) == 0.0
    assert not is_solution_grid(other)
    empty = {"puzzle": "0" * 16, "solution": GRID["solution"]}
    assert SUDOKU.reward(empty, answer(other)) == 0.0
    assert SUDOKU.reward(empty, answer(other[:4] + GRID["solution"][4:])) == 0.75


def test_any_completion_of_an_ambiguous_puzzle_is_solved():
    puzzle = "1200001200000000"
    completions = sudoku_solutions(puzzle)
    assert len(completions) > 1
    for solution, completion in itertools.product(completions, repeat=2):
        assert SUDOKU.solved({"puzzle": puzzle, "solution": solution}, answer(completion))
    problem = {"puzzle": puzzle, "solution": completions[0]}
    for grid in sudoku_solutions("0" * 16):
        assert SUDOKU.solved(problem, answer(grid)) == (grid in completions)


def test_a_puzzle_without_blanks_is_solved_by_itself_alone():
    problem = {"puzzle": GRID["solution"], "solution": GRID["solution"]}
    assert SUDOKU.reward(problem, answer(GRID["solution"])) == 1.0
    assert SUDOKU.reward(problem, answer(OTHER_GRID)) == 0.0


def test_cells_are_d1s_score():
    problem = {"puzzle": "0310200404001043", "solution": "4312213434211243"}
    blanks = problem["puzzle"].count("0")
    for grid, right in (
        ("4312213434211243", blanks),
        ("0310200404001043", 0),
        ("43", 1),
        ("", 0),
        ("4312213434211244", blanks),  # a changed given, for which our reward is 0
        ("4312213434211243999", blanks),
        ("1111111111111111", 2),
    ):
        assert SUDOKU.cells(problem, answer(grid)) == right / blanks


# ---- files ---------------------------------------------------------------------------------------


def test_a_sudoku_file_may_leave_out_the_solution(tmp_path):
    unique = SUDOKU.problems("train", 1, 16)[0]
    ambiguous = "1200001200000000"
    last_solution = sudoku_solutions(ambiguous)[-1]
    path = write_rows(
        tmp_path / "sudoku.jsonl",
        {"puzzle": unique["puzzle"]},
        {"puzzle": ambiguous},
        {"puzzle": ambiguous, "solution": last_solution},
    )
    first, second, third = SUDOKU.load(path)
    assert first == unique
    assert second["solution"] in sudoku_solutions(ambiguous)
    assert third["solution"] == last_solution
