"""Sudoku, 4x4: fill a grid so that every row, column and 2x2 box holds 1, 2, 3 and 4.

A problem              {"puzzle": "3102243002031020", "solution": "3142243142131324"}
                       row by row; 0 is a blank cell, the other digits are the givens
The tiny model reads   3 1 0 2 2 4 3 0 0 2 0 3 1 0 2 0
A right answer         <answer>3 1 4 2 2 4 3 1 4 2 1 3 1 3 2 4</answer>     reward 1
A careless answer      <answer>3 1 4 2 2 4 3 1 1 2 4 3 1 3 2 4</answer>     reward 4/6: it fills
                       each row in ascending order, which is wrong in two of the six blank cells

The reward is the share of blank cells that are right. A whole grid that keeps every given and fills
at least one blank earns 0.1 or more, so that there is a first step to climb. A changed given earns
nothing.

Every generated puzzle has exactly one solution. There are only 288 finished grids, so many puzzles
share one. The finished grid therefore decides the split: no two splits share one. (A grid whose
digits are merely renamed counts as another grid.)
"""

import collections
import itertools
import re

from tasks import answers
from tasks.splits import split_of
from tasks.task import INSTRUCTION, Generated

DIGITS = set("1234")
# The cells, numbered 0 to 15 row by row, of each row, column and box.
ROWS = [range(start, start + 4) for start in (0, 4, 8, 12)]
COLUMNS = [range(start, 16, 4) for start in range(4)]
BOXES = [[corner, corner + 1, corner + 4, corner + 5] for corner in (0, 2, 8, 10)]
UNITS = [*ROWS, *COLUMNS, *BOXES]

# What may be drawn around the digits of a grid: LaTeX's tables and commands, and these signs.
DECORATION = re.compile(
    r"\\(?:begin|end)\{[a-z]*\}(?:\{[c|]*\})?|\\[a-z]+"  # \begin{array}{|c|c|} and \hline
    r"|[][\s,|(){}&;\\*`$+=-]"
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


class Sudoku(Generated):
    """The task. The compact form has the same puzzles, with shorter prompts."""

    name = "sudoku"
    varying_field = "puzzle"
    example_row = '{"puzzle": "16 characters, 1 to 4, 0 for blank"}, and its "solution" or none'
    length = 19  # the two tags, 16 digits, and [EOS]

    def __init__(self, is_compact=False):
        super().__init__(is_compact)
        self.grids = all_solution_grids()
        self.grids_of = collections.defaultdict(list)  # split -> its finished grids
        self.grids_with = collections.defaultdict(set)  # (cell, digit) -> grids with it there
        for grid in self.grids:
            self.grids_of[split_of(self.key({"solution": grid}))].append(grid)
            for cell_and_digit in enumerate(grid):
                self.grids_with[cell_and_digit].add(grid)

    def key(self, problem):
        return "sudoku " + problem["solution"]

    def solutions_of(self, puzzle):
        """Returns the set of finished grids that agree with the puzzle's givens."""
        solutions = set(self.grids)
        for cell, digit in enumerate(puzzle):
            if digit != "0":
                solutions &= self.grids_with.get((cell, digit), set())
        return solutions

    def draw(self, split, rng):
        """Blanks 6 to 11 cells of a finished grid, in random order, where it stays the only one."""
        solution = rng.choice(self.grids_of[split])
        puzzle = list(solution)
        num_blanks = rng.randint(6, 11)
        for cell in rng.sample(range(16), 16):
            puzzle[cell] = "0"
            if len(self.solutions_of(puzzle)) > 1:
                puzzle[cell] = solution[cell]
            elif puzzle.count("0") == num_blanks:
                break
        return {"puzzle": "".join(puzzle), "solution": solution}, " ".join(solution)

    def careless_solution(self, problem, solution):
        """Fills each row in ascending order and looks at neither columns nor boxes."""
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
        """Returns the characters of the answer's grid, in a right answer 16 digits."""
        answer = answers.without_prose(answers.final_answer(text))
        return DECORATION.sub("", answer)

    def cells(self, problem, text):
        """d1's score: the share of blank cells that are right, whether givens changed or not."""
        grid = self.read_grid(text).ljust(16)  # a cell that is not there is wrong
        are_right = [
            cell == solution_cell
            for given, solution_cell, cell in zip(
                problem["puzzle"], problem["solution"], grid, strict=False
            )
            if given == "0"
        ]
        return sum(are_right) / max(1, len(are_right))

    def reward(self, problem, text):
        """Returns 0 to 1, as the head of this file says."""
        puzzle = problem["puzzle"]
        grid = self.read_grid(text)
        # The cells that the answer has: it may be shorter than 16, or longer.
        cells = list(zip(puzzle, problem["solution"], grid, strict=False))
        if any(given not in ("0", cell) for given, _, cell in cells):
            return 0.0
        if is_solution_grid(grid):  # a puzzle in a file may have several: any of them will do
            return 1.0

        num_right = sum(given == "0" and cell == right_cell for given, right_cell, cell in cells)
        # A surplus cell, or a given that the answer lacks, counts like one more wrong blank.
        num_surplus = max(len(grid) - 16, 0)
        num_givens_lacking = sum(given != "0" for given in puzzle[len(grid) :])
        num_blanks = puzzle.count("0") + num_surplus + num_givens_lacking
        share_right = num_right / max(1, num_blanks)

        fills_a_blank = re.fullmatch("[0-4]{16}", grid) and grid != puzzle
        return max(0.1, share_right) if fills_a_blank else share_right

    def problem_from_row(self, row):
        """Reads our own rows and those of d1's, SPG's and Dream's files, under their own names.

        A row without a solution gets the first of the puzzle's solutions.
        """
        puzzles = [row[name] for name in ("puzzle", "Puzzle", "input") if name in row]
        stated = [row[name] for name in ("solution", "Solution", "output") if name in row]
        puzzle = "".join(puzzles[0].split())
        solutions = self.solutions_of(puzzle)
        solution = "".join(stated[0].split()) if stated else min(solutions, default=None)
        if not re.fullmatch("[0-4]{16}", puzzle) or solution not in solutions:
            raise ValueError("not a puzzle, or not its solution")
        return {"puzzle": puzzle, "solution": solution}
