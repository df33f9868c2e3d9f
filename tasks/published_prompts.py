"""Prompts in the form of published work, to compare with its numbers.

    python evaluate.py GSAI-ML/LLaDA-8B-Instruct --task countdown --prompt d1 --data FILE.jsonl
    python evaluate.py GSAI-ML/LLaDA-8B-Instruct --task sudoku --prompt d1 --shots 3 --data FILE.csv

The prompts have the fields, tags, rules and examples of d1's (Zhao et al. 2025), in our own words.
SPG (2025) shows three solved puzzles before a sudoku: --shots 3.
"""

import sys

from tasks.splits import ProblemsFromFile, split_of
from tasks.sudoku import DIGITS, UNITS
from tasks.task import Generated

FORM = "Respond in this format:\n<reasoning>\nyour reasoning\n</reasoning>\n<answer>\n%s\n</answer>"
MATHS_RULES = (
    "You are an expert in mathematics. Solve the question step by step, and put the final answer "
    "into a \\boxed{}.\n" + FORM % "\\boxed{...}"
)
COUNTDOWN_RULES = (
    "Write an arithmetic expression of the given numbers alone whose value is exactly "
    "the target. The operations + - * / are allowed, and every number has to be used exactly once. "
    "Think step by step. Then give the expression alone, inside \\boxed{}, without an equals sign "
    "and without the target. For example: \\boxed{a + b * c}\n" + FORM % "\\boxed{...}"
)
SUDOKU_RULES = (
    "Solve a 4x4 sudoku. It is given as 16 characters, from left to right and from top "
    "to bottom; 0 is an empty cell.\nRules:\n- Only the digits 1 to 4.\n- Every row holds each "
    "digit once.\n- Every column holds each digit once.\n- Every 2x2 box holds each digit once.\n"
    "The answer has to be the complete grid, 16 digits.\n" + FORM % "16 digits, without spaces"
)
RULES = {
    "countdown": COUNTDOWN_RULES,
    "gsm8k": MATHS_RULES,
    "math": MATHS_RULES,
    "sudoku": SUDOKU_RULES,
}
PUZZLE = "Solve the following Sudoku puzzle: "
SHOTS = (  # SPG's puzzles and their solutions, in SPG's order
    ("3014002020004130", "3214142323414132"),
    ("0000100420013142", "4213132424313142"),
    ("2001403002001420", "2341413232141423"),
)


def with_published_prompts(task, prompt, shots):
    """Returns the task with prompts in d1's form, or as it is.

    prompt: "d1", or "" for the task's own prompts. shots: how many solved puzzles, 0 to 3, precede
    a sudoku. Raises ValueError if this task has no such prompt or shots.
    """
    name = getattr(task, "name", "this task")
    if prompt not in ("", "d1") or prompt and name not in RULES:
        raise ValueError(f"{name} has no prompt {prompt!r}: there is d1, for {', '.join(RULES)}")
    if shots and not (prompt and name == "sudoku" and shots <= len(SHOTS)):
        raise ValueError(f"shots = {shots}: only sudoku has shots, up to 3, with --prompt d1")
    return PublishedPrompts(task, shots) if prompt else task


class PublishedPrompts:
    """A task with prompts in d1's form. Everything else is the task's own."""

    def __init__(self, task, shots):
        self.task = task
        self.shots = SHOTS[:shots]

    def __getattr__(self, name):
        return getattr(self.task, name)

    def prompt(self, problem):
        rules = RULES[self.task.name]
        if self.task.name == "countdown":
            return f"{rules}\n\nNumbers: {problem['numbers']}\nTarget: {problem['target']}"
        if self.task.name != "sudoku":
            return f"{rules}\n\n{problem['question']}"
        if not self.shots:
            return f"{rules}\n\n{PUZZLE}{problem['puzzle']}\n"
        examples = [solved_example(puzzle, solution) for puzzle, solution in self.shots]
        question = f"Question: {PUZZLE}{problem['puzzle']}\n\nAnswer:\n"
        return "\n\n".join([rules, *examples, question])


def solved_example(puzzle, solution):
    """Returns a solved puzzle as text: its grid, the cells in the order of filling, the solution.

    A cell is filled when its row, column and box leave one digit; this solves all of SHOTS.
    """
    cells = list(puzzle)
    steps = []
    while "0" in cells:
        for i in range(16):
            seen = {cells[j] for unit in UNITS if i in unit for j in unit}
            left = DIGITS - seen
            if cells[i] == "0" and len(left) == 1:
                cells[i] = left.pop()
                steps.append(f"R{i // 4 + 1}C{i % 4 + 1} = {cells[i]}")
    assert "".join(cells) == solution
    return (
        f"Question:\n{PUZZLE}{puzzle}\n"
        "Answer:\n"
        "<reasoning>\n"
        f"The four rows:\n{drawn_grid(puzzle)}\n\n"
        f"One digit fits:\n{', '.join(steps)}\n\n"
        f"The grid:\n{drawn_grid(solution)}\n"
        "</reasoning>\n"
        f"<answer>\n{solution}\n</answer>"
    )


def drawn_grid(grid):
    return "\n".join(f"R{row + 1}: {' '.join(grid[4 * row : 4 * row + 4])}" for row in range(4))


def warn_of_training_overlap(problems, task, data, run):
    """Prints how many problems of a new file the run may have met in training.

    problems   those of the new file
    task       the run's task, with its own file if it was trained on one. Nothing is printed for
               other tasks that do not generate their problems
    data, run  the paths of the new file and of the run, for the message

    This matters: most grids of d1's and SPG's sudoku files are in our training split.
    """
    if isinstance(task, ProblemsFromFile):
        key = getattr(task, "key", task.prompt)
        trained_keys = {key(problem) for problem in task.pools["train"]}
        num_shared = sum(key(problem) in trained_keys for problem in problems)
        shared = "their key"
    elif isinstance(getattr(task, "task", task), Generated):  # built-in or the user's
        num_shared = sum(split_of(task.key(problem)) == "train" for problem in problems)
        shared = "a solution grid" if task.name == "sudoku" else "their numbers"
    else:
        return
    print(
        f"{num_shared} of {len(problems)} problems of {data} share {shared} with problems that "
        f"{run} may have trained on",
        file=sys.stderr,
    )
