"""Others' prompts: what it takes to measure beside published numbers.

    python evaluate.py GSAI-ML/LLaDA-8B-Instruct --task countdown --prompt d1 --data FILE.jsonl
    python evaluate.py GSAI-ML/LLaDA-8B-Instruct --task sudoku --prompt d1 --shots 3 --data FILE.csv

d1's prompts (Zhao et al. 2025), in fields, tags, rules and example; the words are ours. SPG (2025)
puts three solved puzzles before a sudoku.
"""

import sys

from tasks.splits import split_of
from tasks.sudoku import BOXES, COLUMNS, ROWS
from tasks.task import Generated

FORM = "Respond in this format:\n<reasoning>\nyour reasoning\n</reasoning>\n<answer>\n%s\n</answer>"
MATHS = (
    "You are an expert in mathematics. Solve the question step by step, and put the final answer "
    "into a \\boxed{}.\n" + FORM % "\\boxed{...}"
)
RULES = {
    "countdown": "Write an arithmetic expression of the given numbers alone whose value is exactly "
    "the target. The operations + - * / are allowed, and every number has to be used exactly once. "
    "Think step by step. Then give the expression alone, inside \\boxed{}, without an equals sign "
    "and without the target. For example: \\boxed{a + b * c}\n" + FORM % "\\boxed{...}",
    "gsm8k": MATHS,
    "math": MATHS,
    "sudoku": "Solve a 4x4 sudoku. It is given as 16 characters, from left to right and from top "
    "to bottom; 0 is an empty cell.\nRules:\n- Only the digits 1 to 4.\n- Every row holds each "
    "digit once.\n- Every column holds each digit once.\n- Every 2x2 box holds each digit once.\n"
    "The answer has to be the complete grid, 16 digits.\n" + FORM % "16 digits, without spaces",
}
PUZZLE = "Solve the following Sudoku puzzle: "
SHOTS = (  # SPG's, in their order
    ("3014002020004130", "3214142323414132"),
    ("0000100420013142", "4213132424313142"),
    ("2001403002001420", "2341413232141423"),
)


def asked(task, prompt, shots):
    """The task with its prompts in d1's form, `shots` solved examples first. Raises ValueError."""
    name = getattr(task, "name", "this task")
    if prompt not in ("", "d1") or prompt and name not in RULES:
        raise ValueError(f"no prompt {prompt!r} of {name}: there is d1, of {', '.join(RULES)}")
    if shots and not (prompt and name == "sudoku" and shots <= len(SHOTS)):
        raise ValueError(f"shots = {shots}: there are up to 3, of sudoku, with --prompt d1")
    return Asked(task, shots) if prompt else task


class Asked:
    """A task that asks in d1's form."""

    def __init__(self, task, shots):
        self.task, self.shots = task, SHOTS[:shots]

    def __getattr__(self, name):  # all but the prompt is the task's own
        return getattr(self.task, name)

    def prompt(self, problem):
        rules = RULES[self.task.name]
        if self.task.name == "countdown":
            return f"{rules}\n\nNumbers: {problem['numbers']}\nTarget: {problem['target']}"
        if self.task.name != "sudoku":
            return f"{rules}\n\n{problem['question']}"
        puzzle = PUZZLE + problem["puzzle"] + "\n"
        shots = [shot(*pair) for pair in self.shots]
        puzzle = f"Question: {puzzle}\nAnswer:\n" if shots else puzzle
        return "\n\n".join([rules, *shots, puzzle])


def shot(puzzle, solution):
    """A solved example: the grid, cell after cell that only one digit fits, the finished grid."""
    pair, cells, found = (puzzle, solution), list(puzzle), []
    while "0" in cells:
        for i in range(16):
            seen = {cells[j] for unit in (*ROWS, *COLUMNS, *BOXES) if i in unit for j in unit}
            if cells[i] == "0" and len(left := {*"1234"} - seen) == 1:
                cells[i] = left.pop()
                found.append(f"R{i // 4 + 1}C{i % 4 + 1} = {cells[i]}")
    assert "".join(cells) == solution
    rows = [[f"R{r + 1}: {' '.join(grid[4 * r : 4 * r + 4])}" for r in range(4)] for grid in pair]
    how = ["The four rows:", *rows[0], "", "One digit fits:", ", ".join(found), "", "The grid:"]
    how = "\n".join([*how, *rows[1]])
    tags = f"<reasoning>\n{how}\n</reasoning>\n<answer>\n{solution}\n</answer>"
    return f"Question:\n{PUZZLE}{puzzle}\nAnswer:\n{tags}"


def warn_of_training(options, own, problems):
    """Says how many of a new file's problems a run may have met, where it made its own problems.

    own: the task without the file. Most grids of d1's and SPG's sudoku files are among training's.
    """
    if isinstance(own, Generated):
        n = sum(split_of(own.key(problem)) == "train" for problem in problems)
        what = "a solution grid" if own.name == "sudoku" else "their numbers"
        said = f"{n} of {len(problems)} problems of {options.data} share {what} with"
        print(f"{said} problems that {options.path} may have trained on", file=sys.stderr)
