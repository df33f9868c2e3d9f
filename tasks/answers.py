r"""Reading answers: tags and boxes, expressions, numbers, LaTeX.

A model is free in how it wraps an answer: in tags, in a box, between dollar signs, with a unit, as
"x = 37". It is not free in the value: each reader knows a short grammar, and what does not fit into
it is no answer. Nothing here evaluates text.

    extract_answer, boxed, final_answer, without_prose   which part of a completion is the answer
    normalise_signs, equation_sides                      one way to write each sign
    arithmetic, solutions                                expressions: countdown
    read_number                                          numbers: GSM8K
    equivalent                                           LaTeX: MATH
"""

import re
from contextlib import suppress
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate, permutations, product
from math import prod
from operator import add, mul, sub, truediv

from tasks.formulas import same_formula

# Characters of a number or a formula, digits of an expression. Anything longer is no answer.
MAX_LENGTH = 300

# Words that make another number of the one beside them, as in "3 million" and "3 sevenths".
SCALE_WORDS = (
    "hundreds?|thousands?|k|[mbtr]+illions?|mil|mln|bn|dozens?|grand|lakhs?|crores?|score"
    "|hal(?:f|ves)|(?:thir|four|fif|six|seven|eigh|nin|ten|hundred|thousand)(?:d|th)s?"
)
# Those, and more words that change what is stated: "not 3", "3 or 4", "minus 3", "3 squared".
ALTERING_WORD = re.compile(
    r"(?i)\b(?:not|no|and|or|to|minus|negative|plus|point|over|pi|ln|log|sin|cos|tan|sqrt|root"
    rf"|squared|cubed|twice|double|triple|factorial|never|wrong|except|{SCALE_WORDS})\b"
)

# ---- which part of a completion is the answer ----------------------------------------------------


def extract_answer(text):
    """Returns what the last `<answer>...</answer>` holds, or "". The first closing tag ends it.

    Without any closed pair, the last opening tag that something follows is closed by the end of
    the text.
    """
    parts = text.split("<answer>")[1:]
    closed = [part.partition("</answer>")[0] for part in parts if "</answer>" in part]
    if closed:
        return closed[-1].strip()
    unclosed = [part for part in parts if part.strip()]
    return unclosed[-1].strip() if unclosed else ""


TAG = re.compile(r"<[^<>]*>")
# An operator, or a digit, at the end of what stands before a box: -\boxed{3}
OPERATOR_BEFORE_BOX = re.compile(r"(?:[-+/^<>≠−–×÷] ?|\d)\\?$")
# An operator, or a digit, at the beginning of what stands behind a box: \boxed{3}! But "**" is
# Markdown's, and a dash with a space behind it may be a dash.
OPERATOR_AFTER_BOX = re.compile(r"\.?\d| ?(?:[/^!_×÷+]|\*(?!\*)|- ?\d)")
# A word that scales the number in the box: \boxed{3} million
SCALE_AFTER_BOX = re.compile(rf"(?i)(?:[ \\,;!]|text\{{)*\b(?:{SCALE_WORDS})\b")


def boxed(text):
    r"""Returns the inside of the last \boxed{...}, or ""; the end of the text closes an open one.

    A box that is part of a formula, as in -\boxed{3}, \boxed{3}! or \boxed{3} million, is none.
    """
    before, box, after = text.rpartition("boxed{")
    if not box:
        return ""
    end = closing_brace(after)
    before = TAG.sub("\n", before[-30:])  # a tag ends what stands before it
    behind = after[end + 1 : end + 30]
    is_part_of_a_formula = (
        OPERATOR_BEFORE_BOX.search(before)
        or OPERATOR_AFTER_BOX.match(behind)
        or SCALE_AFTER_BOX.match(behind)
    )
    return "" if is_part_of_a_formula else after[:end].strip()


def closing_brace(text):
    """Returns where the brace that was opened before `text` is closed, at its end if nowhere."""
    depth = 1
    for brace in re.finditer("[{}]", text):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return brace.start()
    return len(text)


# An answer, and what a chat model puts around it.
WRAPPED_ANSWER = re.compile(
    r"""
    (?: (?i: (?:the\ )? (?:final\ )? (?:answer|expression|solution) (?:\ is)? :? \s ) )?
    \s*
    (?: ```[a-z]*\n | ` | \*\* | \\\[ | \\\( )?     # opened by Markdown or LaTeX
    (?P<answer> .*? )
    (?: ``` | ` | \*\* | \\\] | \\\) )?             # closed by it
    (?: (?<!\.) \. )?                               # one period, not three
    """,
    re.DOTALL | re.VERBOSE,
)


def final_answer(text):
    """Returns the answer of a completion, or "".

    That is the box in its answer tags; without a box, all that they hold; without tags, the last
    box in the text.
    """
    answer = extract_answer(text) or boxed(text)
    return boxed(answer) or WRAPPED_ANSWER.fullmatch(answer)["answer"].strip()


# Two letters or more that belong to no LaTeX command and to no name such as x1.
WORD = re.compile(r"(?<![A-Za-z\\])[A-Za-z]{2,}(?![A-Za-z0-9])")


def without_prose(text):
    """Returns the lines that hold no word: "So we get:" above an answer is no part of it."""
    return "\n".join(line for line in text.splitlines() if not WORD.search(line))


# ---- one way to write each sign ------------------------------------------------------------------

# LaTeX's and typography's signs, and the plain ones that replace them, in this order.
PLAIN_SIGNS = {
    # \text{5 apples} -> 5 apples
    r"\\(?:text|textbf|mathrm|mathbf|mbox) ?\{([^{}]*)\}": r"\1",
    # 1{,}234 -> 1,234
    r"\{,\}": ",",
    # \dfrac, \tfrac -> \frac
    r"\\[dt]?frac(?![a-z])": r"\\frac",
    # \frac12 -> \frac{1}{2}
    r"\\frac ?(\d) ?(\d)": r"\\frac{\1}{\2}",
    "½": r"\\frac{1}{2}",
    # \left( -> (, and no \quad, \( \) \[ \] or LaTeX spaces; of \$ and \% the sign stays
    r"(?<!\\)\\(?:(?:left|right)(?![a-z])|q?quad|[()\[\],;:! ]|(?=[$%]))": "",
    # ^\circ, ^{\circ} -> °
    r"\^ ?\{?\\circ\}?": "°",
    # \times, \cdot, ×, · -> *
    r" ?(?:\\times|\\cdot|[×·]) ?": "*",
    # \div, ÷ -> /
    r"\\div(?![a-z])|÷": "/",
    # the minus sign and the dash -> -
    "[−–]": "-",
    # no dollars, pounds and euros, unless between two digits
    r"(?<!\d)[$£€]|[$£€](?!\d)": " ",
    # no period at the end, unless it is the last of several
    r"(?<!\.)\. *$": "",
}
FRACTION = re.compile(r"\\frac ?\{([^{}]*)\} ?\{([^{}]*)\}")


def normalise_signs(text):
    r"""Returns a text in plain signs and on one line: of `3 \times 4` it is `3*4`."""
    text = " ".join(text.split())
    for pattern, plain_sign in PLAIN_SIGNS.items():
        text = re.sub(pattern, plain_sign, text)
    return text.strip()


# A name that may stand on one side of an equation: x, \theta, a_1, f(x), total cost.
NAME = re.compile(r" *\\?[A-Za-z][A-Za-z ]*(?:_\{?\w+\}?)?(?:\([A-Za-z]\))? *")


def equation_sides(text):
    """Returns the sides of an equation, ten at most, without names: of "x = 37" it is [" 37"]."""
    sides = text.split("=", 9)
    return [side for side in sides if not NAME.fullmatch(side) or ALTERING_WORD.search(side)]


# ---- expressions ---------------------------------------------------------------------------------

OPERATIONS = {"+": add, "-": sub, "*": mul, "x": mul, "/": truediv}
PRECEDENCE = {"(": 0, ")": 1, "+": 2, "-": 2, "*": 3, "/": 3, "x": 3}
TOKEN = re.compile(r"[0-9]+(?:\.[0-9]+)?|\S")
# In a string with n for each number: a number or "(" that does not stand after an operator or "(",
# or anything else that does not stand after a number or ")", or an unknown sign.
MISPLACED = re.compile(r"[n)][n(]|[-(+*/x][-)+*/x]|[^-n()+*/x]")


def arithmetic(text, numbers=None):
    """Returns the exact value of an expression of numbers, + - * / and parentheses, a Fraction.

    numbers: if given, the expression has to use exactly these integers. This is checked before
    anything is computed. Raises ValueError for what is no such expression, ZeroDivisionError.

    Two stacks and one pass (Dijkstra's shunting yard) do without recursion, so that 10,000 nested
    parentheses cost no more than their length.
    """
    text = FRACTION.sub(r"((\1)/(\2))", text)
    tokens = ["(", *TOKEN.findall(text), ")"]
    operands = [token for token in tokens if token not in PRECEDENCE]

    shape = "".join("n" if token[0] in "0123456789" else token for token in tokens)
    depths = list(accumulate((token == "(") - (token == ")") for token in tokens))
    is_balanced = min(depths[:-1]) >= 1 and depths[-1] == 0
    if MISPLACED.search(shape) or not is_balanced:
        raise ValueError("not an expression")
    if numbers and sorted(operands) != sorted(map(str, numbers)):
        raise ValueError("not an expression of exactly these numbers")
    if len("".join(operands)) > MAX_LENGTH:
        raise ValueError("an expression of too many digits")

    values = []
    operators = []  # and open parentheses, which wait for what stands to their right
    for token in tokens:
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


@lru_cache(maxsize=4096)
def solutions(*numbers):
    """Returns {target: expression} for each target of 1 to 99 that three numbers can reach.

    Of several expressions it is the tidiest: sums and products come before differences and
    quotients, and larger numbers before smaller ones.
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


# ---- numbers -------------------------------------------------------------------------------------

NUMBER = re.compile(
    r"""
    (?P<sign> [-+]? ) \ *
    (?: (?P<whole> [0-9]+ ) \ + (?= [0-9]+/ ) )?        # the 1 of 1 1/2
    (?= \.?[0-9] )
    (?P<above>                                          # the number, or above the fraction line
        (?: [0-9]{1,3} (?: (?:,[0-9]{3})+ | (?:\ [0-9]{3})+ )   # 1,234 or 1 234
          | [0-9]* )
        (?: \.[0-9]+ )?
    )
    (?: \ ?/\ ? (?P<below> [0-9]+ (?:\.[0-9]+)? )
      | (?: e | \*10\ ?\^ ) \ ? \{? (?P<power> [-+]?[0-9]{1,3} ) \}?    # 1e3 or 1*10^3
    )?
    \ *
    (?P<unit>                                           # apples, %, km/h, cm^2
        /? [A-Za-z%°] [A-Za-z%°./,'()\ -]* (?: [²³] | \^\ ?\{?[23]\}? )?
    )?
    \ *
    """,
    re.VERBOSE,
)
# A single letter that is no unit's: a number beside it is a factor. (k, a thousand, counts as one.)
VARIABLE = re.compile(r"\b[^\W\d_aghlmpsCFL]\b")


def read_number(text):
    """Returns the one number that a short text states, exactly, as a Fraction, or None.

    50% is 50. In "3 + 4 = 7" every side has to be a name or to have the same value.
    """
    if len(text) > MAX_LENGTH:
        return None
    plain_text = FRACTION.sub(r" \1/\2 ", normalise_signs(boxed(text) or text))
    *other_sides, last_side = equation_sides(plain_text) or [""]
    number = NUMBER.fullmatch(last_side.strip())
    if not number:
        return None
    unit = number["unit"] or ""
    if ALTERING_WORD.search(unit) or VARIABLE.search(unit):
        return None
    try:
        value = Fraction(re.sub("[, ]", "", number["above"])) / Fraction(number["below"] or 1)
        value *= Fraction(10) ** int(number["power"] or 0)
        value += int(number["whole"] or 0)
        if number["sign"] == "-":
            value = -value
        agrees = all(arithmetic(side) == value for side in other_sides)
        return value if agrees else None
    except (ValueError, ZeroDivisionError):
        return None


# ---- LaTeX ---------------------------------------------------------------------------------------

# Words in LaTeX's text commands, a unit at the end, each with its power, and degrees.
WORDS_AND_UNITS = re.compile(
    r"""
    \\(?:text|textbf|mathrm|mbox)\ ?\{([^{}]*)\} (\ ?\^\ ?\{?[23]\}?)?
    | (?<=[\d}])\ ([A-Za-z]{4,}|[ckm]m|in|ft|kg) (\ ?\^\ ?\{?[23]\}?)? [\ .]*$
    | \^\ ?\{?\\circ\}?
    | °
    """,
    re.VERBOSE,
)


def equivalent(answer, gold):
    """Whether two answers in LaTeX are the same: as text, as numbers, or for math-verify.

    Words and units are compared apart from the formula; where one of the two has none, they do not
    count.
    """
    if not answer or max(len(answer), len(gold)) > MAX_LENGTH or "boxed" in answer:
        return False

    # Of an equation, every side has to be the right answer, unless the right answer is one itself.
    if "=" in answer and "=" not in gold:
        sides = equation_sides(answer)
        return 0 < len(sides) < 5 and all(equivalent(side.strip(), gold) for side in sides)
    if "=" not in answer:
        gold_sides = equation_sides(gold)
        if len(gold_sides) == 1:
            gold = gold_sides[0]

    answer_words = words_and_units(answer)
    gold_words = words_and_units(gold)
    answer_formula = WORDS_AND_UNITS.sub(" ", answer).strip()
    gold_formula = WORDS_AND_UNITS.sub(" ", gold).strip()
    if not gold_formula:  # the answer is a word: Tuesday
        return letters_only(normalise_signs(answer)) == letters_only(normalise_signs(gold))
    if letters_only(answer_words) != letters_only(gold_words):
        if answer_words and gold_words:
            return False
        if ALTERING_WORD.search(answer_words + gold_words):
            return False

    answer = normalise_signs(answer_formula)
    gold = normalise_signs(gold_formula)
    if answer == gold:
        return True
    if details_that_math_verify_ignores(answer) != details_that_math_verify_ignores(gold):
        return False
    answer_number = read_number(answer)
    gold_number = read_number(gold)
    if answer_number is not None and gold_number is not None:
        return answer_number == gold_number
    return not too_hard(answer) and not too_hard(gold) and same_formula(answer, gold)


def words_and_units(text):
    """Returns the words and units of an answer in LaTeX, as one string."""
    return " ".join("".join(groups) for groups in WORDS_AND_UNITS.findall(text)).strip()


def letters_only(text):
    """Returns a text in lower case, without anything but letters, digits and hyphens."""
    return re.sub(r"[^\w-]|_", "", text).lower()


LATEX_COMMAND = re.compile(r"\\[A-Za-z]+(?:\{[a-z]+matrix\})?")
SUBSCRIPT_OR_LETTER = re.compile(r"_ ?\{?(\w+)|([A-Za-z'!])")
RELATION = re.compile(r"[<>≤≥≠]|\\(?:[lg]eq?|[lg]t|neq?)(?![a-z])")
BRACKET = re.compile(r"[][]|\\[{}]")


def details_that_math_verify_ignores(text):
    """Returns what has to be equal in two formulas besides what math-verify compares.

    That is: number bases and other subscripts, primes, factorials and variables; whether there is
    a relation such as <; square brackets and braces; whether it is a tuple in parentheses.
    """
    return (
        set(SUBSCRIPT_OR_LETTER.findall(LATEX_COMMAND.sub(" ", text))),
        RELATION.search(text) is None,
        BRACKET.findall(text),
        text.startswith("(") and "," in text,
    )


# Forty digits in a row, factorials, and what stands for a long computation.
EXPENSIVE = re.compile(r"[0-9]{40}|!|\.\.|\\(?:binom|sum|prod|int|lim|uparrow)")
# An exponent in braces, a digit or a letter, with no further exponent behind it.
EXPONENT = re.compile(r"\^ ?(\d|[A-Za-z]|\{[^{}^]*(?:\{[^{}^]*\}[^{}^]*)*\})(?! ?\^)")
MAX_EXPONENT = 1000  # of all exponents' numbers, multiplied


def too_hard(text):
    """Whether to refuse a formula, since computing it could take very long, or since it would
    break out of the box that it is put into.

    sympy's big integers do not react to an alarm, so large powers and the like are never computed.
    """
    exponents = EXPONENT.findall(text)
    exponent_numbers = re.findall("[0-9]+", " ".join(exponents))
    total_exponent = prod(max(1, int(number)) for number in exponent_numbers)
    has_nested_exponents = len(exponents) < text.count("^")
    breaks_out = boxed(f"boxed{{{text}}}") != text
    return (
        EXPENSIVE.search(text) is not None
        or total_exponent > MAX_EXPONENT
        or has_nested_exponents
        or breaks_out
    )
