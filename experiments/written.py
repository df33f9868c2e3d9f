"""A longer task, and an example of a task file: countdown with four numbers and written steps.

    9 7 4 2 = 31    9 * 4 = 36 36 - 7 = 29 29 + 2 = 31 <answer> ( ( 9 * 4 ) - 7 ) + 2 </answer>

    python -m models.tiny --task experiments/written.py:WrittenCountdown --out bases/written \
        --steps 5000 --batch 128
    python train.py --task experiments/written.py:WrittenCountdown --model bases/written \
        --block_length 8

A completion has 32 tokens, done in blocks of 8, and each step needs the one before it. So no single
call can write it, and the mean-field likelihood, which scores from a single call, is far off.
"""

from fractions import Fraction
from functools import lru_cache
from itertools import permutations, product

from tasks.answers import OPERATIONS
from tasks.countdown import Countdown
from tasks.splits import split_of


def values(chain):
    """The value after each step of (a, "+", b, "*", c, ...), left to right; a step whose value is
    not a whole number of 1 to 99 ends the list early.
    """
    value, found = chain[0], []
    for sign, number in zip(chain[1::2], chain[2::2], strict=True):
        if sign == "/" and value % number:
            break
        value = int(OPERATIONS[sign](Fraction(value), number))
        if not 1 <= value <= 99:
            break
        found.append(value)
    return found


@lru_cache(maxsize=1024)
def chains(numbers):
    """{target: the tidiest chain of four numbers that reaches it}: sums and products come first."""
    signs = sorted(product("+*-/", repeat=3), key=lambda signs: sum(map("-/".count, signs)))
    found = {}
    for (s, t, u), (a, b, c, d) in product(signs, sorted({*permutations(numbers)}, reverse=True)):
        reached = values(chain := (a, s, b, t, c, u, d))
        if len(reached) == 3:
            found.setdefault(reached[-1], chain)
    return found


def written(chain):
    """Its three steps with their values, then the expression as the answer: 28 tokens."""
    (a, s, b, t, c, u, d), (x, y, z) = chain, values(chain)
    steps = f"{a} {s} {b} = {x} {x} {t} {c} = {y} {y} {u} {d} = {z}"
    return f"{steps} <answer>( ( {a} {s} {b} ) {t} {c} ) {u} {d}</answer>"


class WrittenCountdown(Countdown):
    """Problem: {"numbers": [a, b, c, d], "target": t}, of 715 multisets. Only the answer counts."""

    name = "written countdown"
    length = 32
    solution_text = staticmethod(written)

    def __init__(self, is_compact=True):
        super().__init__(is_compact)

    def draw(self, split, rng):
        while True:
            numbers = [rng.randint(1, 10) for _ in range(4)]
            if split_of(self.key({"numbers": numbers})) == split:
                reached = chains(tuple(sorted(numbers, reverse=True)))
                target = rng.choice(sorted(reached))
                return {"numbers": numbers, "target": target}, reached[target]

    def careless_solution(self, problem, chain):
        """Forgets the inverse operations, + for - and * for /, where the values stay below 100."""
        for i in (1, 3, 5):
            other = (*chain[:i], {"-": "+", "/": "*"}.get(chain[i], chain[i]), *chain[i + 1 :])
            chain = other if len(values(other)) == 3 else chain
        return chain
