"""A longer task, and an example of a task file: countdown with four numbers and written steps.

    9 7 4 2 = 31    9 * 4 = 36 36 - 7 = 29 29 + 2 = 31 <answer> ( ( 9 * 4 ) - 7 ) + 2 </answer>

    python -m models.make_base --task experiments/written.py:WrittenCountdown \
        --out bases/written \
        --steps 5000 --batch 128 --habit_steps 400 --careless 0.8
    python train.py --task experiments/written.py:WrittenCountdown --model bases/written \
        --block_length 8

A completion has 32 tokens, generated in blocks of 8, and each step needs the result of the step
before it. So no single denoiser call can write it, and the mean-field likelihood, which scores it
with a single call, is far off. Only the answer is rewarded, not the steps.

A solution is a chain such as (9, "*", 4, "-", 7, "+", 2), computed from left to right.
"""

from fractions import Fraction
from functools import lru_cache
from itertools import permutations, product

from tasks.countdown import Countdown
from tasks.expressions import OPERATIONS
from tasks.splits import split_of


def step_values(chain):
    """Returns the value after each step of a chain, up to the first step that is not allowed.

    A step is allowed if its value is a whole number from 1 to 99.
    """
    value = chain[0]
    values = []
    for operator, number in zip(chain[1::2], chain[2::2], strict=True):
        value = OPERATIONS[operator](Fraction(value), number)
        if value.denominator != 1 or not 1 <= value <= 99:
            break
        value = int(value)
        values.append(value)
    return values


@lru_cache(maxsize=1024)
def chains(numbers):
    """Returns {target: the tidiest chain of four numbers that reaches it}.

    Sums and products are preferred to differences and quotients, larger numbers come first.
    """
    orders = sorted(set(permutations(numbers)), reverse=True)
    operator_triples = sorted(
        product("+*-/", repeat=3),
        key=lambda operators: sum(operator in "-/" for operator in operators),
    )
    chain_to = {}
    for (first, second, third), (a, b, c, d) in product(operator_triples, orders):
        chain = (a, first, b, second, c, third, d)
        values = step_values(chain)
        if len(values) == 3:
            chain_to.setdefault(values[-1], chain)
    return chain_to


class WrittenCountdown(Countdown):
    """Problem: {"numbers": [a, b, c, d], "target": t}, of 715 multisets of numbers up to 10."""

    name = "written countdown"
    length = 32

    def __init__(self, is_compact=True):
        super().__init__(is_compact)

    def draw(self, split, rng):
        while True:
            numbers = [rng.randint(1, 10) for _ in range(4)]
            if split_of(self.key({"numbers": numbers})) == split:
                chain_to = chains(tuple(sorted(numbers, reverse=True)))
                target = rng.choice(sorted(chain_to))
                return {"numbers": numbers, "target": target}, chain_to[target]

    def careless_solution(self, problem, solution):
        """Writes + for - and * for /, wherever all values stay below 100."""
        chain = solution
        for place in (1, 3, 5):
            operator = {"-": "+", "/": "*"}.get(chain[place], chain[place])
            changed = (*chain[:place], operator, *chain[place + 1 :])
            if len(step_values(changed)) == 3:
                chain = changed
        return chain

    def solution_text(self, solution):
        """The three steps with their values, then the expression as the answer: 28 tokens."""
        a, first, b, second, c, third, d = solution
        x, y, z = step_values(solution)
        return (
            f"{a} {first} {b} = {x} {x} {second} {c} = {y} {y} {third} {d} = {z} "
            f"<answer>( ( {a} {first} {b} ) {second} {c} ) {third} {d}</answer>"
        )
