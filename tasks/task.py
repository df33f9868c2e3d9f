"""What a task is: problems, prompts, and a reward that a program computes.

A task is any object with the methods of the first table. train.py and evaluate.py need nothing
else, so your own task needs no base class: define a class (or an instance) in a file of yours and
run `python train.py --task my_tasks.py:Addition`. A problem is a plain dict that JSON can
represent.

What every task offers:

    Call                      Returns         Meaning
    ------------------------  --------------  ------------------------------------------------------
    problems(split, n, seed)  list of dicts   n problems of the split "train", "validation" or
                                              "test". No two splits share anything that could leak.
                                              Held-out problems are distinct, and fewer than n if
                                              the task runs out of them; "train" gives exactly n.
    prompt(problem)           str             What the model reads.
    reward(problem, text)     float, 0 to 1   What training maximises. `text` is whatever the model
                                              wrote, so accept any string and never raise. A reward
                                              outside [0, 1] ends the run (checked.py).
    solved(problem, text)     bool            The strict yes or no that evaluations report.

What a task may also offer:

    Name                      Type            Meaning
    ------------------------  --------------  ------------------------------------------------------
    name                      str             What messages call the task.
    key(problem)              str             Near-duplicates share a key: they land in one split
                                              and count as one cluster in a confidence interval.
                                              Without this method the key is the prompt.
    load(path)                list of dicts   The problems in a file, for --data. Raises ValueError
                                              if the file is bad.
    cells(problem, text)      float, 0 to 1   A second score, which evaluate.py averages as well.
    scoring_threads           int             How many threads may score completions at the same
                                              time (default 1).

The embedded model "tiny" is too small to follow instructions. A task that it can learn also needs:

    Name                      Type            Meaning
    ------------------------  --------------  ------------------------------------------------------
    length                    int             Tokens in a completion, including the end token.
    demonstrations(           iterator of     n training problems, each with a text to imitate. A
      n, seed, careless)      (dict, str)     share `careless` of the texts is worse than it could
                                              be, which leaves the base model something to learn
                                              from rewards.
    compact                   task            Instead of these two: another task that has them, a
                                              small form of this one with its own short prompts.
"""

import json
import random
import sys
from pathlib import Path

from tasks.splits import read_rows, seeded

INSTRUCTION = (
    "Think step by step inside <reasoning> and </reasoning>. "
    "Then give the final answer, and nothing else, inside <answer> and </answer>.\n\n"
)
MAX_REPEATS = 2000  # after this many repeats in a row nearly every problem has been drawn


class Task:
    """Base class of the built-in tasks: what counts as solved, and how a file is read.

    A subclass has
        problem_from_row(row)  the problem in a row of a file; any exception means a bad row
        example_row            what such a row looks like, for error messages
    """

    def solved(self, problem, text):
        return self.reward(problem, text) == 1.0

    def load(self, path):
        """Returns the problems in a file: JSON lines, a JSON array, a .csv with a header, .parquet.

        Raises ValueError with the file and the line if anything in it is not a problem.
        """
        if not Path(path).is_file():
            raise ValueError(f"{path} does not exist, or is not a file")
        problems = []
        place = "line 1"
        row = None
        try:
            for place, row in read_rows(path):  # noqa: B007 (for the message)
                if isinstance(row, str):
                    row = json.loads(row)
                problems.append(self.problem_from_row(row))
        except Exception as error:  # the file may be unreadable, and a row may contain anything
            has = ""
            if isinstance(error, KeyError) and isinstance(row, dict) and row:
                has = f", and not {' '.join(', '.join(map(str, row)).split())[:80]}"
            reason = f"expected {self.example_row}{has} ({type(error).__name__})"
            raise ValueError(f"{path}, {place}: {reason}") from None
        if not problems:
            raise ValueError(f"{path} holds no problems: one JSON object per line is expected")
        return problems


class Generated(Task):
    """Base class of tasks that generate their own problems.

    Such a task has two forms: the full one, for models that follow instructions, and `compact`,
    with shorter problems and prompts, for the tiny model. A subclass has

        draw(split, rng)                       a random (problem, solution) of the split
        careless_solution(problem, solution)   a worse solution, for demonstrations
        varying_field                          the field in which problems of one key differ
    """

    def __init__(self, is_compact=False):
        self.is_compact = is_compact
        self.compact = self if is_compact else type(self)(is_compact=True)

    def solution_text(self, solution):
        """The completion that states a solution."""
        return f"<answer>{solution}</answer>"

    def problems(self, split, n, seed):
        """Returns n problems. Held-out ones are distinct, and fewer if nearly all are drawn."""
        rng = seeded(self.name, split, seed)
        if split == "train":
            return [self.draw(split, rng)[0] for _ in range(n)]

        distinct = {}  # (key, varying field) -> problem, in the order of the draws
        repeats = 0
        while len(distinct) < n and repeats < MAX_REPEATS:
            problem, _ = self.draw(split, rng)
            identity = (self.key(problem), problem[self.varying_field])
            if identity in distinct:
                repeats += 1
            else:
                repeats = 0
                distinct[identity] = problem
        if len(distinct) < n:
            print(f"{self.name} has only {len(distinct)} {split} problems", file=sys.stderr)
        return list(distinct.values())

    def demonstrations(self, n, seed, careless):
        """Yields n pairs (training problem, text to imitate); a share `careless` is careless."""
        rng = random.Random(f"{self.name} demonstrations {seed}")
        for _ in range(n):
            problem, solution = self.draw("train", rng)
            if rng.random() < careless:
                solution = self.careless_solution(problem, solution)
            yield problem, self.solution_text(solution)
