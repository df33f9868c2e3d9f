"""Sudoku, 4x4: fill a grid so that every row, column and 2x2 box holds 1, 2, 3 and 4.

A problem              {"puzzle": "3102243002031020", "solution": "3142243142131324"}
                       row by row; 0 is a blank cell, the other digits are the givens
The tiny model reads   3 1 0 2 2 4 3 0 0 2 0 3 1 0 2 0
A right answer         <answer>3 1 4 2 2 4 3 1 4 2 1 3 1 3 2 4</answer>     reward 1
A careless answer      <answer>3 1 4 2 2 4 3 1 1 2 4 3 1 3 2 4</answer>     reward 4/6: filling
                       each row in ascending order is wrong in two of the six blank cells

The reward is the share of blank cells that are right times the share of givens that are kept, so
that every cell counts and overwriting a given never pays. A complete grid that keeps every given
and fills at least one blank earns at least 0.1, which makes a first step easy.

Every generated puzzle has exactly one solution. There are only 288 finished grids, so many puzzles
share one. Therefore the finished grid decides the split: no two splits share one. (A grid whose
digits are merely relabelled counts as another grid.)
"""

import collections
import itertools
import re
from functools import lru_cache

from tasks import answers
from tasks.splits import split_of
from tasks.task import INSTRUCTION, Generated

DIGITS = set("1234")
# The cells, numbered 0 to 15 row by row, of each row, column and box.
ROWS = [range(start, start + 4) for start in (0, 4, 8, 12)]
COLUMNS = [range(start, 16, 4) for start in range(4)]
BOXES = [[corner, corner + 1, corner + 4, corner + 5] for corner in (0, 2, 8, 10)]
UNITS = [*ROWS, *COLUMNS, *BOXES]

DIGITS_ALONE = re.compile(r"[0-9\s]+")
# What may be drawn around the digits of a grid: LaTeX's tables and commands, signs, box characters,
# and the rows' names.
DECORATION = re.compile(
    r"""
    \\(?:begin|end)\{[a-z]*\}(?:\{[c|]*\})?       # \begin{array}{|c|c|}
    | \\[a-z]+                                    # \hline
    | \b[Rr](?:ow)?\ ?[1-4]\b                     # Row 1
    | ^[ \t]*[1-4][.:)]\s                           # 1.
    | [][,|(){}&:;/\\*`$+='"“”‘’\u2500-\u257f-]
    """,
    re.VERBOSE | re.MULTILINE,
)


def is_solution_grid(grid):
    """Whether 16 characters are a finished grid: 1 to 4 once in every row, column and box."""
    return len(grid) == 16 and all({grid[cell] for cell in unit} == DIGITS for unit in UNITS)


def all_solution_grids():
    """Returns the 288 finished grids, as strings of 16 digits."""
    rows = ["".join(digits) for digits in itertools.permutations("1234")]
    halves = [  # two rows whose left box, and so their right box too, holds four digits
        first + second for first in rows for second in rows if len({*first[:2], *second[:2]}) == 4
    ]
    return [
        upper + lower for upper in halves for lower in halves if is_solution_grid(upper + lower)
    ]


SOLUTION_GRIDS = all_solution_grids()
GRIDS_WITH = collections.defaultdict(set)  # (cell, digit) -> the finished grids that have it
for solution_grid in SOLUTION_GRIDS:
    for cell_and_digit in enumerate(solution_grid):
        GRIDS_WITH[cell_and_digit].add(solution_grid)


@lru_cache(maxsize=10_000)  # a puzzle is scored many times
def solutions_of(puzzle):
    """Returns the set of finished grids that agree with the givens of a puzzle, a string."""
    solutions = set(SOLUTION_GRIDS)
    for cell, digit in enumerate(puzzle):
        if digit != "0":
            solutions &= GRIDS_WITH.get((cell, digit), set())
    return solutions


def partial_reward(puzzle, solution, grid):
    """Returns the share of blank cells that are right times the share of givens that are kept.

    A missing cell counts as wrong, and each extra cell as one more wrong blank.
    """
    num_blanks = puzzle.count("0") + max(len(grid) - 16, 0)
    num_givens = 16 - puzzle.count("0")
    cells = list(zip(puzzle, solution, grid, strict=False))
    num_right = sum(given == "0" and cell == right_cell for given, right_cell, cell in cells)
    num_kept = sum(given != "0" and cell == given for given, _, cell in cells)
    share_right = num_right / max(1, num_blanks)
    share_kept = num_kept / num_givens if num_givens else 1.0
    return share_right * share_kept


class Sudoku(Generated):
    """The task. The compact form has the same puzzles, with shorter prompts."""

    name = "sudoku"
    varying_field = "puzzle"
    example_row = '{"puzzle": "16 characters, 1 to 4, 0 for blank"}, and its "solution" or none'
    length = 19  # the two tags, 16 digits, and [EOS]

    def __init__(self, is_compact=False):
        super().__init__(is_compact)
        self.grids = SOLUTION_GRIDS
        self.grids_of = collections.defaultdict(list)  # split -> its finished grids
        for grid in self.grids:
            self.grids_of[split_of(self.key({"solution": grid}))].append(grid)

    def key(self, problem):
        return "sudoku " + problem["solution"]

    def draw(self, split, rng):
        """Blanks 6 to 11 cells of a finished grid in random order, keeping the solution unique."""
        solution = rng.choice(self.grids_of[split])
        puzzle = list(solution)
        num_blanks = rng.randint(6, 11)
        for cell in rng.sample(range(16), 16):
            puzzle[cell] = "0"
            if len(solutions_of("".join(puzzle))) > 1:
                puzzle[cell] = solution[cell]
            elif puzzle.count("0") == num_blanks:
                break
        return {"puzzle": "".join(puzzle), "solution": solution}, " ".join(solution)

    def careless_solution(self, problem, solution):
        """Fills each row in ascending order, ignoring columns and boxes."""
        cells = list(problem["puzzle"])
        for row in ROWS:
            missing = sorted(DIGITS - {cells[cell] for cell in row})
            for cell in row:
                if cells[cell] == "0":
                    cells[cell] = missing.pop(0)
        return " ".join(cells)

    def prompt(self, problem):
        if self.is_compact:
            return " ".join(problem["puzzle"])
        return (
            f"{INSTRUCTION}"
            f"Puzzle: {problem['puzzle']}\n"
            "This is a 4x4 sudoku, written row by row as 16 characters; 0 stands for an empty "
            "cell. Fill the empty cells so that every row, every column and every 2x2 box holds "
            "1, 2, 3 and 4. The answer is the complete grid as 16 digits."
        )

    def read_grid(self, text):
        """Returns the characters of the answer's grid; a right answer has 16 digits."""
        answer = answers.final_answer(text)
        if not DIGITS_ALONE.fullmatch(answer):
            answer = answers.without_prose(DECORATION.sub(" ", answer))
        return "".join(answer.split())

    def cells(self, problem, text):
        """d1's score: the share of blank cells that are right, whether givens changed or not."""
        grid = self.read_grid(text).ljust(16)  # a missing cell is wrong
        are_right = [
            cell == solution_cell
            for given, solution_cell, cell in zip(
                problem["puzzle"], problem["solution"], grid, strict=False
            )
            if given == "0"
        ]
        return sum(are_right) / max(1, len(are_right))

    def reward(self, problem, text):
        """Returns a number from 0 to 1, as described at the top of this file."""
        puzzle = problem["puzzle"]
        grid = self.read_grid(text)
        keeps_givens = len(grid) >= 16 and all(
            given in ("0", cell) for given, cell in zip(puzzle, grid, strict=False)
        )
        if keeps_givens and is_solution_grid(grid):
            return 1.0
        # A puzzle in a file may have several solutions: the one that scores best counts.
        solutions = solutions_of(puzzle) or {problem["solution"]}
        reward = max(partial_reward(puzzle, solution, grid) for solution in solutions)
        fills_a_blank = re.fullmatch("[0-4]{16}", grid) and grid != puzzle
        return max(0.1, reward) if keeps_givens and fills_a_blank else reward

    def problem_from_row(self, row):
        """Reads our own rows and those of d1's, SPG's and Dream's files, whose fields differ.

        A row without a solution gets the first of the puzzle's solutions.
        """
        puzzles = [row[name] for name in ("puzzle", "Puzzle", "input") if name in row]
        stated = [row[name] for name in ("solution", "Solution", "output") if name in row]
        puzzle = "".join(puzzles[0].split())
        solutions = solutions_of(puzzle)
        solution = "".join(stated[0].split()) if stated else min(solutions, default=None)
        if not re.fullmatch("[0-4]{16}", puzzle) or solution not in solutions:
            raise ValueError("not a puzzle, or not its solution")
        return {"puzzle": puzzle, "solution": solution}
