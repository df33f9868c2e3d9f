"""Problems with known answers for the tests of tasks/, and solvers written without its code."""

import itertools
import json
import operator
from fractions import Fraction

SPLITS = ("train", "validation", "test")
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}

EASY = {"numbers": [3, 4, 5], "target": 35}
RIGHT = "(3 + 4) * 5"
GRID = {"puzzle": "1200341221434321", "solution": "1234341221434321"}
OTHER_GRID = "1243431221343421"  # also a finished grid


def answer(text):
    return f"<answer>{text}</answer>"


def write_rows(path, *rows):
    """Writes a file of JSON lines; a row that is a string is written as it is. Returns the path."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


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
        solution
        for digit in "1234"
        if digit not in seen
        for solution in sudoku_solutions(puzzle[:i] + digit + puzzle[i + 1 :])
    ]
