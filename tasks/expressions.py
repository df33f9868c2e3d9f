"""The exact value of expressions of numbers, + - * / and parentheses, without eval()."""

import re
from contextlib import suppress
from fractions import Fraction
from functools import lru_cache
from itertools import permutations, product
from operator import add, mul, sub, truediv

# The most digits of all numbers together. Anything longer does not count as an answer.
MAX_DIGITS = 300

# Brackets of any kind are parentheses, if each is closed by its own kind.
CLOSED_BY = {"(": ")", "[": "]", "{": "}"}
PARENTHESES = str.maketrans("[]{}", "()()")

OPERATIONS = {"+": add, "-": sub, "*": mul, "x": mul, "X": mul, "/": truediv}
PRECEDENCE = {"(": 0, ")": 1, "+": 2, "-": 2, "*": 3, "/": 3, "x": 3, "X": 3}
FRACTION = re.compile(r"\\frac ?\{([^{}]+)\} ?\{([^{}]+)\}")
TOKEN = re.compile(r"[0-9]+(?:\.[0-9]+)?|\S")
# Errors in a string with n for each number: a number or "(" that follows a number or ")", an
# operator or ")" that follows an operator or "(", or an unknown sign.
MISPLACED = re.compile(r"[n)][n(]|[-(+*/xX][-)+*/xX]|[^-n()+*/xX]")


def arithmetic(text, numbers=None):
    """Returns the exact value of an expression of numbers, + - * / and brackets, a Fraction.

    A minus may also be a sign at the beginning or after an opening bracket: -3 + 4 is 1.

    numbers: if given, the expression has to use exactly these integers. This is checked before
    anything is computed. Raises ValueError if the text is not such an expression, and
    ZeroDivisionError.

    Dijkstra's shunting yard needs two stacks and one pass, but no recursion, so that the time for
    10,000 nested parentheses is linear.
    """
    text = text.replace("\\{", "{").replace("\\}", "}")
    text = FRACTION.sub(r"((\1)/(\2))", text)
    if not is_balanced(text):
        raise ValueError("not an expression")
    tokens = ["(", *TOKEN.findall(text.translate(PARENTHESES)), ")"]
    operands = [token for token in tokens if token not in PRECEDENCE]
    if numbers and sorted(operands) != sorted(map(str, numbers)):
        raise ValueError("not an expression of exactly these numbers")
    if len("".join(operands)) > MAX_DIGITS:
        raise ValueError("an expression of too many digits")

    # A minus after an opening bracket subtracts from 0.
    previous_tokens = ["", *tokens]
    with_zeros = []
    for previous, token in zip(previous_tokens, tokens, strict=False):
        if token == "-" and previous == "(":
            with_zeros.append("0")
        with_zeros.append(token)
    shape = "".join("n" if token[0] in "0123456789" else token for token in with_zeros)
    if MISPLACED.search(shape):
        raise ValueError("not an expression")

    values = []
    operators = []  # operators and open parentheses that wait for what follows
    for token in with_zeros:
        if token not in PRECEDENCE:
            values.append(Fraction(token))
        elif token == "(":
            operators.append(token)
        else:
            while PRECEDENCE[operators[-1]] >= PRECEDENCE[token]:
                right = values.pop()
                left = values.pop()
                values.append(OPERATIONS[operators.pop()](left, right))
            if token == ")":
                operators.pop()  # its "("
            else:
                operators.append(token)
    return values[0]


def is_balanced(text):
    """Whether each bracket of a text is closed by its own kind, in the right order."""
    waiting = []  # the closing brackets still expected, the next one last
    for sign in re.findall(r"[][(){}]", text):
        if sign in CLOSED_BY:
            waiting.append(CLOSED_BY[sign])
        elif not waiting or waiting.pop() != sign:
            return False
    return not waiting


@lru_cache(maxsize=4096)
def solutions(*numbers):
    """Returns {target: expression} for each target from 1 to 99 that three numbers can reach.

    Of several expressions it takes the tidiest: sums and products are preferred to differences and
    quotients, and larger numbers come before smaller ones.
    """
    orders = sorted(set(permutations(numbers)), reverse=True)
    operator_pairs = sorted(
        product("+*-/", repeat=2),
        key=lambda operators: sum(operator in "-/" for operator in operators),
    )
    expressions = {}
    for (inner, outer), (a, b, c) in product(operator_pairs, orders):
        if inner in "+*" and a < b:  # b + a is the same, and tidier
            continue
        inner_value = OPERATIONS[inner](Fraction(a), b)
        inner_text = f"( {a} {inner} {b} )"
        candidates = [(inner_value, c, f"{inner_text} {outer} {c}")]
        if outer in "-/":
            candidates.append((Fraction(c), inner_value, f"{c} {outer} {inner_text}"))
        for left, right, expression in candidates:
            with suppress(ZeroDivisionError):
                target = OPERATIONS[outer](left, right)
                if target.denominator == 1 and 1 <= target <= 99:
                    expressions.setdefault(int(target), expression)
    return expressions
