"""Countdown: reach a target with three given numbers."""

import re

from tasks import answers
from tasks.splits import split_of
from tasks.task import INSTRUCTION, Generated


class Countdown(Generated):
    """Reach the target with all the given numbers. Problem: {"numbers": [a, b, c], "target": t}.

    Splits share no multiset of numbers. Reward: 1 for the target, 0.1 for an expression of exactly
    the given numbers with another value, else 0.
    """

    name, asked = "countdown", "target"
    example = '{"numbers": [3, 4, 5], "target": 35} or {"input": "3,4,5", "output": "35"}'
    length = 10  # two tags, seven for ( a + b ) * c, [EOS]

    def key(self, problem):
        return "countdown " + " ".join(map(str, sorted(problem["numbers"])))

    def draw(self, split, rng):
        """Three numbers (small: of 1,540 multisets), and one of the targets that they reach."""
        while True:
            numbers = [rng.randint(1, 20 if self.small else 99) for _ in range(3)]
            if split_of(self.key({"numbers": numbers})) == split:
                reached = answers.solutions(*sorted(numbers, reverse=True))
                target = rng.choice(sorted(reached))
                return {"numbers": numbers, "target": target}, reached[target]

    def careless(self, problem, expression):
        """Forgets the inverse operations and writes + for - and * for /."""
        return expression.replace("-", "+").replace("/", "*")

    def prompt(self, problem):
        numbers, target = map(str, problem["numbers"]), problem["target"]
        if self.small:
            return f"{' '.join(sorted(numbers, key=int, reverse=True))} = {target}"
        return (
            INSTRUCTION + f"Numbers: {', '.join(numbers)}\nTarget: {target}\n"
            "Write an arithmetic expression whose value is the target. Use every number exactly "
            "once, the operations + - * / and parentheses. The answer is the expression alone, "
            "without an equals sign."
        )

    def reward(self, problem, text):
        """Of `35 = (3 + 4) * 5` one side is the expression, and the other has to be its value."""
        given, values, expressions = sorted(map(str, problem["numbers"])), set(), 0
        text = answers.without_prose(answers.final_answer(text))
        try:
            for side in answers.sides(answers.plain(text)):
                if sorted(re.findall("[0-9]+", side)) == given:
                    values.add(answers.arithmetic(side, problem["numbers"]))
                    expressions += 1
                else:
                    values.add(answers.read_number(side) or answers.arithmetic(side))
        except (ValueError, ZeroDivisionError):
            return 0.0
        return 0.0 if not expressions else 1.0 if values == {problem["target"]} else 0.1

    def problem(self, row):
        if "input" in row:  # d1's file; in Dream's the target is the last number of the input
            numbers, way = row["input"].split(","), row["output"]
            target = numbers.pop() if "=" in str(way) else way
        else:
            numbers, target = row["nums" if "nums" in row else "numbers"], row["target"]
        values = [*numbers, target]
        whole = [re.fullmatch(r"\s*[0-9]{1,9}\s*", str(x)) for x in values]  # not 3.7, true, "1_0"
        if not isinstance(numbers, list) or len(values) < 2 or not all(whole):
            raise ValueError
        *numbers, target = map(int, values)
        return {"numbers": numbers, "target": target}
