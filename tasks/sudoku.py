"""Sudoku, 4x4."""

import collections
import itertools
import re

from tasks import answers
from tasks.splits import split_of
from tasks.task import INSTRUCTION, Generated

ROWS = [range(row, row + 4) for row in (0, 4, 8, 12)]
COLUMNS = [range(column, 16, 4) for column in range(4)]
BOXES = [[corner, corner + 1, corner + 4, corner + 5] for corner in (0, 2, 8, 10)]
UNITS = [*ROWS, *COLUMNS, *BOXES]


def is_solution_grid(grid):
    """Whether 16 characters are a finished grid: 1 to 4 once in every row, column and box."""
    return len(grid) == 16 and all({grid[i] for i in unit} == {*"1234"} for unit in UNITS)


class Sudoku(Generated):
    """Fill a 4x4 sudoku. Problem: {"puzzle": "16 characters, 0 is blank", "solution": the same}.

    There are only 288 finished grids, so whole grids are held out, and every puzzle has one
    solution. Reward: the share of blank cells that are right, and at least 0.1 for a whole grid
    that keeps every given and fills a blank. A changed given earns nothing.
    """

    name, asked = "sudoku", "puzzle"
    example = '{"puzzle": "16 characters, 1 to 4, 0 for blank"}, and its "solution" or none'
    length = 19  # two tags, 16 digits, [EOS]

    def __init__(self, small=False):
        super().__init__(small)
        rows = ["".join(p) for p in itertools.permutations("1234")]
        halves = [a + b for a in rows for b in rows if len({*a[:2], *b[:2]}) == 4]  # good boxes
        self.grids = [a + b for a in halves for b in halves if is_solution_grid(a + b)]  # 288
        self.grids_of = collections.defaultdict(list)
        self.having = collections.defaultdict(set)  # (cell, digit): the grids that have it there
        for grid in self.grids:
            self.grids_of[split_of(self.key({"solution": grid}))].append(grid)
            for cell in enumerate(grid):
                self.having[cell].add(grid)

    def key(self, problem):
        return "sudoku " + problem["solution"]

    def _completions(self, puzzle):
        """The finished grids that agree with the puzzle's givens."""
        givens = [cell for cell in enumerate(puzzle) if cell[1] != "0"]
        return set(self.grids).intersection(*(self.having.get(given, ()) for given in givens))

    def draw(self, split, rng):
        """Takes 6 to 11 cells away in random order, where the solution stays the only one."""
        solution = rng.choice(self.grids_of[split])
        puzzle, wanted = list(solution), rng.randint(6, 11)
        for cell in rng.sample(range(16), 16):
            puzzle[cell] = "0"
            if len(self._completions(puzzle)) > 1:
                puzzle[cell] = solution[cell]
            elif puzzle.count("0") == wanted:
                break
        return {"puzzle": "".join(puzzle), "solution": solution}, " ".join(solution)

    def careless(self, problem, solution):
        """Fills each row in ascending order and looks at neither columns nor boxes."""
        cells = list(problem["puzzle"])
        for row in ROWS:
            missing = iter(sorted({*"1234"} - {cells[i] for i in row}))
            for i in row:
                cells[i] = next(missing) if cells[i] == "0" else cells[i]
        return " ".join(cells)

    def prompt(self, problem):
        if self.small:
            return " ".join(problem["puzzle"])
        return (
            INSTRUCTION + f"Puzzle: {problem['puzzle']}\nThis is a 4x4 sudoku, written row by row "
            "as 16 characters; 0 stands for an empty cell. Fill the empty cells so that every row, "
            "every column and every 2x2 box holds 1, 2, 3 and 4. The answer is the complete grid "
            "as 16 digits."
        )

    def grid(self, text):
        """The characters of the answer without what one may set around them."""
        grid = answers.without_prose(answers.final_answer(text))
        latex = r"\\(?:begin|end)\{[a-z]*\}(?:\{[c|]*\})?|\\[a-z]+"
        return re.sub(latex + r"|[][\s,|(){}&;\\*`$+=-]", "", grid)

    def cells(self, problem, text):
        """d1's score: the share of blank cells that are right, givens changed or not."""
        cells = zip(problem["puzzle"], problem["solution"], self.grid(text).ljust(16), strict=False)
        blank = [cell == wanted for given, wanted, cell in cells if given == "0"]
        return sum(blank) / max(1, len(blank))

    def reward(self, problem, text):
        puzzle, solution, grid = problem["puzzle"], problem["solution"], self.grid(text)
        cells = list(zip(puzzle, solution, grid, strict=False))  # as many as there are
        if any(given not in ("0", cell) for given, _, cell in cells):
            return 0.0
        if is_solution_grid(grid):  # any valid completion, should a puzzle of a file have several
            return 1.0
        right = sum(given == "0" and cell == wanted for given, wanted, cell in cells)
        # A cell too many and a given that is missing count like one more blank that is wrong.
        lacking = max(len(grid) - 16, 0) + sum(given != "0" for given in puzzle[len(grid) :])
        tried = re.fullmatch("[0-4]{16}", grid) and grid != puzzle  # the first rung of the ladder
        return max(0.1 if tried else 0.0, right / max(1, puzzle.count("0") + lacking))

    def problem(self, row):
        blank = [row[name] for name in ("puzzle", "Puzzle", "input") if name in row]
        given = [row[name] for name in ("solution", "Solution", "output") if name in row]
        puzzle = "".join(blank[0].split())  # d1's, SPG's and Dream's files name it so
        solutions = self._completions(puzzle)
        solution = "".join(given[0].split()) if given else min(solutions, default=None)
        if not re.fullmatch("[0-4]{16}", puzzle) or solution not in solutions:
            raise ValueError
        return {"puzzle": puzzle, "solution": solution}
