"""Problems, prompts and verifiable rewards.

A task is an object with these methods; a problem is a plain dict that JSON can hold.

    problems(split, n, seed)  n problems of "train", "validation" or "test", which share nothing
                              that could leak. Held-out ones are distinct, and fewer if the
                              task runs out of them.
    prompt(problem)           what the model reads
    reward(problem, text)     in [0, 1], for any text at all; never an exception
    solved(problem, text)     the strict yes or no that evaluations report
    key(problem)              optional: a string that near-duplicates share. They land in one split,
                              and are one cluster in an interval. Without it: the prompt.
    load(path)                optional: the problems of a file, for --data; ValueError for a bad one
    at_once                   optional: threads that may judge completions at the same time

The embedded model "tiny" is too small for instructions. A task that it can learn also has

    length                         tokens of a completion, its end token included
    demonstrations(n, seed, careless)  yields n pairs (problem, text) to imitate, a share `careless`
                                   of them worse: a base model that RL can improve
    compact                        or, in place of both, another such object: the task's small form

Your own task is an instance, or a class, in a file of yours: `--task my_tasks.py:Addition`.
"""

import json
import random
import sys

from tasks.splits import read_rows, seeded

INSTRUCTION = (
    "Think step by step inside <reasoning> and </reasoning>. "
    "Then give the final answer, and nothing else, inside <answer> and </answer>.\n\n"
)


class Task:
    """What the built-in tasks share."""

    def solved(self, problem, text):
        return self.reward(problem, text) == 1.0

    def load(self, path):
        """The problems of a file (splits.read_rows). Raises ValueError that names file and line."""
        problems, line = [], 1
        try:
            for at, row in read_rows(path):
                line = at
                problems.append(self.problem(json.loads(row) if isinstance(row, str) else row))
        except Exception as error:  # a file that cannot be read, and all that a row can be
            why = f"expected {self.example} ({type(error).__name__})"
            raise ValueError(f"{path}, line {line}: {why}") from None
        if not problems:
            raise ValueError(f"{path} holds no problems: one JSON object a line is expected")
        return problems


class Generated(Task):
    """A task that makes its problems, and has a small form, `compact`, for the tiny model.

    A subclass has `draw(split, rng)` -> (problem, solution), `careless(problem, solution)` -> a
    worse one, and `asked`, the field in which problems of one key differ.
    """

    written = "<answer>{}</answer>".format  # a solution's whole text

    def __init__(self, small=False):
        self.small = small
        self.compact = self if small else type(self)(small=True)

    def problems(self, split, n, seed):
        """Held-out ones end after 2,000 repeats in a row: these are about all there are."""
        rng, found, repeats = seeded(self.name, split, seed), {}, 0
        if split == "train":
            return [self.draw(split, rng)[0] for _ in range(n)]
        while len(found) < n and repeats < 2000:
            problem, _ = self.draw(split, rng)
            identity = self.key(problem), problem[self.asked]
            repeats = repeats + 1 if identity in found else 0
            found.setdefault(identity, problem)
        if len(found) < n:
            print(f"{self.name} has only {len(found)} {split} problems", file=sys.stderr)
        return list(found.values())

    def demonstrations(self, n, seed, careless):
        rng = random.Random(f"{self.name} demonstrations {seed}")
        for _ in range(n):
            problem, solution = self.draw("train", rng)
            solution = self.careless(problem, solution) if rng.random() < careless else solution
            yield problem, self.written(solution)
