"""Countdown: combine three given numbers into an expression whose value is a target.

A problem              {"numbers": [20, 20, 12], "target": 12}
The tiny model reads   20 20 12 = 12
A right answer         <answer>( 20 + 12 ) - 20</answer>     reward 1
A careless answer      <answer>( 20 + 12 ) + 20</answer>     reward 0.1: its value is 52

Every number is used exactly once, with + - * / and parentheses. The reward is 1 if the value is the
target, 0.1 for an expression of exactly the given numbers with another value, and 0 otherwise.

Three numbers seen in training are easier in any order and with any target. Therefore the multiset
of numbers decides the split: no two splits share one.
"""

import re

from tasks import answers
from tasks.expressions import arithmetic, solutions
from tasks.quantities import read_number
from tasks.splits import split_of
from tasks.task import INSTRUCTION, Generated


class Countdown(Generated):
    """The task. Numbers are 1 to 99 (1 to 20 in the compact form), targets are 1 to 99."""

    name = "countdown"
    varying_field = "target"
    example_row = '{"numbers": [3, 4, 5], "target": 35} or {"input": "3,4,5", "output": "35"}'
    length = 10  # the two tags, seven tokens for ( a + b ) * c, and [EOS]

    def key(self, problem):
        return "countdown " + " ".join(map(str, sorted(problem["numbers"])))

    def draw(self, split, rng):
        """Draws three numbers of the split and a target that they can reach."""
        highest = 20 if self.is_compact else 99  # up to 20 there are 1,540 multisets
        while True:
            numbers = [rng.randint(1, highest) for _ in range(3)]
            if split_of(self.key({"numbers": numbers})) == split:
                expressions = solutions(*sorted(numbers, reverse=True))
                target = rng.choice(sorted(expressions))
                return {"numbers": numbers, "target": target}, expressions[target]

    def careless_solution(self, problem, solution):
        """Forgets the inverse operations: writes + for - and * for /."""
        return solution.replace("-", "+").replace("/", "*")

    def prompt(self, problem):
        if self.is_compact:
            numbers = sorted(problem["numbers"], reverse=True)
            return f"{' '.join(map(str, numbers))} = {problem['target']}"
        return (
            f"{INSTRUCTION}"
            f"Numbers: {', '.join(map(str, problem['numbers']))}\n"
            f"Target: {problem['target']}\n"
            "Write an arithmetic expression whose value is the target. Use every number exactly "
            "once, the operations + - * / and parentheses. The answer is the expression alone, "
            "without an equals sign."
        )

    def reward(self, problem, text):
        """Returns 1.0, 0.1 or 0.0, as described at the top of this file.

        The answer may be an equation: in `35 = (3 + 4) * 5` one side is the expression, and every
        other side has to have the same value.
        """
        given_numbers = sorted(map(str, problem["numbers"]))
        answer = answers.without_prose(answers.final_answer(text))
        has_expression = False
        values = set()  # of the sides of the equation
        try:
            for side in answers.equation_sides(answers.normalise_signs(answer)):
                if sorted(re.findall("[0-9]+", side)) == given_numbers:
                    has_expression = True
                    values.add(arithmetic(side, numbers=problem["numbers"]))
                else:
                    value = read_number(side)
                    values.add(arithmetic(side) if value is None else value)
        except (ValueError, ZeroDivisionError):
            return 0.0
        if not has_expression:
            return 0.0
        return 1.0 if values == {problem["target"]} else 0.1

    def problem_from_row(self, row):
        """Reads our own rows and those of Jiayi Pan's ("nums"), d1's and Dream's files."""
        if "input" in row:
            numbers = row["input"].split(",")
            target = row["output"]
            if "=" in str(target):  # Dream's output is the solution; its input ends in the target
                target = numbers.pop()
        else:
            numbers = row["nums" if "nums" in row else "numbers"]
            target = row["target"]
        values = [*numbers, target]
        # int() alone would accept 3.7, true and "1_0".
        are_whole = all(re.fullmatch(r"\s*[0-9]{1,9}\s*", str(value)) for value in values)
        if not isinstance(numbers, list) or not numbers or not are_whole:
            raise ValueError("the numbers and the target of a problem have to be whole")
        return {"numbers": [int(number) for number in numbers], "target": int(target)}
