"""Chain: start from a number and follow six signs, each of which maps a number to another.

A problem              {"start": 7, "signs": "+(-*/)"}
The tiny model reads   7 = + ( - * / )
A right answer         18 19 17 1 13 7      reward 1 if the last number is right, else 0
A careless answer      18 19 18 12 19 17    the third number is too large by 1; the rest follows it

This task is built so that its answer cannot be predicted from the all-masked state: each number is
a look-up in a table, TABLES[sign][previous number], so the last number needs all before it. A
denoiser with few layers cannot make six look-ups in one call, and a mean-field likelihood, which
scores all numbers in one call, knows little about most of them. We chose the task for this
property: it shows that a likelihood's error can decide what is learned, not that other tasks are
like it.

The careless habit has the same property. Whether a number is too large by 1 can only be seen from
the number before it. A habit that shows in each position's own distribution could be unlearned from
the all-masked state.

The signs decide the split: no two splits share a sequence of signs, whatever the start. Single
look-ups are shared; they are what there is to learn.
"""

import random

from tasks import answers
from tasks.splits import split_of
from tasks.task import INSTRUCTION, Generated

NUMBERS = 20
SIGNS = "+-*/()"  # each is one token of the tiny model; here a sign only names a table
# The numbers 0 to 19 in some order, for each sign.
TABLES = {sign: random.Random(f"chain {sign}").sample(range(NUMBERS), NUMBERS) for sign in SIGNS}


class Chain(Generated):
    """The task. `steps` is the number of signs; more signs take more calls."""

    name = "chain"
    varying_field = "start"
    example_row = '{"start": 7, "signs": "+(-*/)"}'

    def __init__(self, is_compact=False, steps=6):
        self.is_compact = is_compact
        self.steps = steps
        self.length = steps + 1  # the numbers, and [EOS]
        self.compact = self if is_compact else Chain(is_compact=True, steps=steps)

    def key(self, problem):
        return f"chain {problem['signs']}"

    def draw(self, split, rng):
        """Draws signs of the split, and a start. The solution is a list of numbers."""
        while True:
            signs = "".join(rng.choices(SIGNS, k=self.steps))
            if split_of(f"chain {signs}") == split:
                problem = {"start": rng.randrange(NUMBERS), "signs": signs}
                return problem, follow(problem)

    def demonstrations(self, n, seed, careless):
        """Yields n pairs (training problem, text to imitate).

        In each text, every number but the first is too large by 1 with probability `careless`.
        """
        rng = random.Random(f"chain demonstrations {seed}")
        for _ in range(n):
            problem, _ = self.draw("train", rng)
            errors = [False, *(rng.random() < careless for _ in range(self.steps - 1))]
            yield problem, " ".join(map(str, follow(problem, errors)))

    def prompt(self, problem):
        signs = " ".join(problem["signs"])
        if self.is_compact:
            return f"{problem['start']} = {signs}"
        tables = "\n".join(f"{sign} {' '.join(map(str, TABLES[sign]))}" for sign in SIGNS)
        return (
            f"{INSTRUCTION}"
            f"Each sign replaces a number of 0 to {NUMBERS - 1}. Behind a sign stands what it "
            f"makes of 0, of 1, and so on:\n{tables}\n"
            f"Start with {problem['start']} and apply these signs one after the other: {signs}\n"
            "The answer is the number after each sign, separated by spaces."
        )

    def reward(self, problem, text):
        """Returns 1.0 if the last number of the answer is right, else 0.0.

        A large model could write anything before it ("12 or 13"), so its answer has to consist of
        exactly one number per sign. The values of the other numbers do not matter.
        """
        numbers = (text if self.is_compact else answers.final_answer(text)).split()
        if not self.is_compact:
            is_whole = all(number.isdecimal() for number in numbers)
            if not is_whole or len(numbers) != self.steps:
                return 0.0
        return float(numbers[-1:] == [str(follow(problem)[-1])])

    def problem_from_row(self, row):
        start = row["start"]
        signs = row["signs"]
        if type(start) is not int or start not in range(NUMBERS) or set(signs) - set(SIGNS):
            raise ValueError(f"a start of 0 to {NUMBERS - 1}, and signs of {SIGNS}")
        if len(signs) != self.steps:
            raise ValueError(f"{self.steps} signs")
        return {"start": start, "signs": signs}


def follow(problem, errors=None):
    """Returns the number after each sign. errors: for each, whether it is too large by 1."""
    number = problem["start"]
    numbers = []
    for i, sign in enumerate(problem["signs"]):
        number = TABLES[sign][number]
        if errors and errors[i]:
            number = (number + 1) % NUMBERS
        numbers.append(number)
    return numbers
