"""Reading answers: tags and boxes, arithmetic, plain numbers, LaTeX. Nothing here evaluates text.

A model is free in how it wraps an answer: tags, a box, dollar signs, a unit, "x = 37". It is not
free in the value: each reader knows a short grammar, and what that does not know is no answer.
"""

import re
from contextlib import suppress
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate, permutations, product
from math import prod
from operator import add, mul, sub, truediv

from tasks.formulas import same_formula

LONGEST = 300  # characters of a number or a formula, digits of an expression: more are no answer


def extract_answer(text):
    """What the last `<answer>...</answer>` holds, or ""; the first closing tag ends it.

    Where no pair is closed, the end of the text closes the last opening that something follows.
    """
    parts = text.split("<answer>")[1:]
    closed = [part.partition("</answer>")[0] for part in parts if "</answer>" in part]
    return ((closed or [part for part in parts if part.strip()]) or [""])[-1].strip()


def boxed(text):
    """The inside of the last \\boxed{...}, or ""; the end of the text closes an open one.

    A box that is part of a formula, as in -\\boxed{3}, \\boxed{3}! or \\boxed{3} million, is none.
    """
    before, box, after = text.rpartition("boxed{")
    if not box:
        return ""
    braces = [*re.finditer("[{}]", after)]
    depths = accumulate(1 if brace[0] == "{" else -1 for brace in braces)
    closing = (brace.start() for brace, depth in zip(braces, depths, strict=True) if depth < 0)
    end = next(closing, len(after))
    near, behind = re.sub(r"<[^<>]*>", "\n", before[-30:]), after[end + 1 : end + 30]
    in_formula = (
        re.search(r"(?:[-+/^<>≠−–×÷] ?|\d)\\?$", near)
        or re.match(r"\.?\d| ?(?:[/^!_×÷+]|\*(?!\*)|- ?\d)", behind)
        or re.match(rf"(?i)(?:[ \\,;!]|text\{{)*\b(?:{SCALES})\b", behind)
    )
    return "" if in_formula else after[:end].strip()


# What stands around an answer: a label, Markdown's and LaTeX's signs, one period.
UNDRESS = re.compile(
    r"(?:(?i:(?:the )?(?:final )?(?:answer|expression|solution)(?: is)?:?\s))?\s*"
    r"(?:```[a-z]*\n|`|\*\*|\\\[|\\\()?(?P<answer>.*?)(?:```|`|\*\*|\\\]|\\\))?(?:(?<!\.)\.)?",
    re.DOTALL,
)


def final_answer(text):
    """What a completion answers: the box in its answer tags, else all there, else its last box."""
    inside = extract_answer(text) or boxed(text)
    return boxed(inside) or UNDRESS.fullmatch(inside)["answer"].strip()


def without_prose(text):
    """The lines that hold no word: "So we get:" above the answer is no part of it."""
    word = re.compile(r"(?<![A-Za-z\\])[A-Za-z]{2,}(?![A-Za-z0-9])")
    return "\n".join(line for line in text.splitlines() if not word.search(line))


PLAIN = {  # LaTeX's and typography's signs: the ordinary ones
    r"\\(?:text|textbf|mathrm|mathbf|mbox) ?\{([^{}]*)\}": r"\1",
    r"\{,\}": ",",
    r"\\[dt]?frac(?![a-z])": r"\\frac",
    r"\\frac ?(\d) ?(\d)": r"\\frac{\1}{\2}",
    "½": r"\\frac{1}{2}",
    r"(?<!\\)\\(?:(?:left|right)(?![a-z])|q?quad|[()\[\],;:! ]|(?=[$%]))": "",
    r"\^ ?\{?\\circ\}?": "°",
    r" ?(?:\\times|\\cdot|[×·]) ?": "*",
    r"\\div(?![a-z])|÷": "/",
    "[−–]": "-",
    r"(?<!\d)[$£€]|[$£€](?!\d)": " ",
    r"(?<!\.)\. *$": "",
}
FRACTION = re.compile(r"\\frac ?\{([^{}]*)\} ?\{([^{}]*)\}")
NAME = re.compile(r" *\\?[A-Za-z][A-Za-z ]*(?:_\{?\w+\}?)?(?:\([A-Za-z]\))? *")


def plain(text):
    """A text in ordinary signs: of `3 \\times 4` it is `3*4`."""
    text = " ".join(text.split())
    for pattern, ordinary in PLAIN.items():
        text = re.sub(pattern, ordinary, text)
    return text.strip()


def sides(text):
    """The sides of an equation, a few at most, but for names: of "x = 37" it is ["37"]."""
    parts = text.split("=", 9)
    return [part for part in parts if not NAME.fullmatch(part) or ALTERS.search(part)]


# ---- numbers -----------------------------------------------------------------------------------

OPERATIONS = {"+": add, "-": sub, "*": mul, "x": mul, "/": truediv}
BINDING = {"(": 0, ")": 1, "+": 2, "-": 2, "*": 3, "/": 3, "x": 3}


def arithmetic(text, numbers=None):
    """The exact value, a Fraction, of an expression of numbers, + - * / and parentheses.

    With `numbers` it has to use exactly these integers, which is looked at before anything is
    computed. Two stacks and one pass (Dijkstra's shunting yard): no recursion, so 10,000 nested
    parentheses cost only their length. Raises ValueError, ZeroDivisionError.
    """
    text = FRACTION.sub(r"((\1)/(\2))", text)
    tokens = ["(", *re.findall(r"[0-9]+(?:\.[0-9]+)?|\S", text), ")"]
    used = [token for token in tokens if token not in BINDING]
    shape = "".join("n" if token[0] in "0123456789" else token for token in tokens)
    depths = list(accumulate((token == "(") - (token == ")") for token in tokens))
    # A number and "(" stand after an operator or "("; all else after a number or ")".
    misplaced = re.search(r"[n)][n(]|[-(+*/x][-)+*/x]|[^-n()+*/x]", shape)
    if misplaced or min(depths[:-1]) < 1 or depths[-1] != 0:
        raise ValueError("no arithmetic")
    if len("".join(used)) > LONGEST or sorted(used) != sorted(map(str, numbers or used)):
        raise ValueError("not exactly the given numbers, or more than we work out for anybody")
    values, waiting = [], []
    for token in tokens:
        if token not in BINDING:
            values.append(Fraction(token))
            continue
        while token != "(" and waiting and BINDING[waiting[-1]] >= BINDING[token]:
            right, left = values.pop(), values.pop()
            values.append(OPERATIONS[waiting.pop()](left, right))
        if token == ")":
            waiting.pop()  # its "("
        else:
            waiting.append(token)
    return values[0]


@lru_cache(maxsize=4096)
def solutions(*numbers):
    """{target of 1 to 99: the tidiest expression of three numbers that reaches it}

    Sums and products come before differences and quotients, larger numbers before smaller ones.
    """
    found, orders = {}, sorted({*permutations(numbers)}, reverse=True)
    pairs = sorted(product("+*-/", repeat=2), key=lambda pair: sum(map("-/".count, pair)))
    for (inner, outer), (a, b, c) in product(pairs, orders):
        if inner in "+*" and a < b:
            continue
        value, text = OPERATIONS[inner](Fraction(a), b), f"( {a} {inner} {b} )"
        ways = [(value, c, f"{text} {outer} {c}"), (Fraction(c), value, f"{c} {outer} {text}")]
        for left, right, text in ways[: 1 + (outer in "-/")]:
            with suppress(ZeroDivisionError):
                reached = OPERATIONS[outer](left, right)
                if reached.denominator == 1 and 1 <= reached <= 99:
                    found.setdefault(int(reached), text)
    return found


NUMBER = re.compile(
    r"""(?P<sign>[-+]?)\ *(?:(?P<whole>[0-9]+)\ +(?=[0-9]+/))?(?=\.?[0-9])
    (?P<above>(?:[0-9]{1,3}(?:(?:,[0-9]{3})+|(?:\ [0-9]{3})+)|[0-9]*)(?:\.[0-9]+)?)
    (?:\ ?/\ ?(?P<below>[0-9]+(?:\.[0-9]+)?)|(?:e|\*10\ ?\^)\ ?\{?(?P<power>[-+]?[0-9]{1,3})\}?)?
    \ *(?P<unit>/?[A-Za-z%°][A-Za-z%°./,'()\ -]*(?:[²³]|\^\ ?\{?[23]\}?)?)?\ *""",
    re.VERBOSE,
)
# Words that make another number of the one beside them. Scales do so behind a box too.
SCALES = (
    "hundreds?|thousands?|k|[mbtr]+illions?|mil|mln|bn|dozens?|grand|lakhs?|crores?|score"
    "|hal(?:f|ves)|(?:thir|four|fif|six|seven|eigh|nin|ten|hundred|thousand)(?:d|th)s?"
)
ALTERS = re.compile(
    r"(?i)\b(?:not|no|and|or|to|minus|negative|plus|point|over|pi|ln|log|sin|cos|tan|sqrt|root"
    rf"|squared|cubed|twice|double|triple|factorial|never|wrong|except|{SCALES})\b"
)
VARIABLE = re.compile(r"\b[^\W\d_aghlmpsCFL]\b")  # one letter that is no unit's; k is a thousand


def read_number(text):
    """The one number that a short text states, exactly, as a Fraction; None where there is none.

    50% is 50. In "3 + 4 = 7" every part has to be a name or to have the same value.
    """
    if len(text) > LONGEST:
        return None
    *before, last = sides(FRACTION.sub(r" \1/\2 ", plain(boxed(text) or text))) or [""]
    found = NUMBER.fullmatch(last.strip())
    unit = found and found["unit"] or ""
    if not found or ALTERS.search(unit) or VARIABLE.search(unit):
        return None
    try:
        value = Fraction(re.sub("[, ]", "", found["above"])) / Fraction(found["below"] or 1)
        value = value * Fraction(10) ** int(found["power"] or 0) + int(found["whole"] or 0)
        value = -value if found["sign"] == "-" else value
        return value if all(arithmetic(part) == value for part in before) else None
    except (ValueError, ZeroDivisionError):
        return None


# ---- formulas ----------------------------------------------------------------------------------

WORDS = re.compile(
    r"\\(?:text|textbf|mathrm|mbox) ?\{([^{}]*)\}( ?\^ ?\{?[23]\}?)?"
    r"|(?<=[\d}]) ([A-Za-z]{4,}|[ckm]m|in|ft|kg)( ?\^ ?\{?[23]\}?)?[ .]*$|\^ ?\{?\\circ\}?|°"
)


def equivalent(answer, gold):
    """Whether two answers in LaTeX are the same: as text, as numbers, or for math-verify."""
    if not answer or max(len(answer), len(gold)) > LONGEST or "boxed" in answer:
        return False
    if "=" in answer and "=" not in gold:
        stated = sides(answer)
        return 0 < len(stated) < 5 and all(equivalent(side.strip(), gold) for side in stated)
    if "=" not in answer and len(sides(gold)) == 1:
        [gold] = sides(gold)
    formulas = [WORDS.sub(" ", text).strip() for text in (answer, gold)]
    words = [" ".join(map("".join, WORDS.findall(text))).strip() for text in (answer, gold)]
    if not formulas[1]:  # the answer is a word: Tuesday
        return letters(plain(answer)) == letters(plain(gold))
    differ = letters(words[0]) != letters(words[1])
    if differ and (all(words) or ALTERS.search("".join(words))):
        return False
    answer, gold = map(plain, formulas)
    if answer == gold or overlooked(answer) != overlooked(gold):
        return answer == gold
    numbers = read_number(answer), read_number(gold)
    if None not in numbers:
        return numbers[0] == numbers[1]
    return not too_hard(answer) and not too_hard(gold) and same_formula(answer, gold)


def letters(text):
    return re.sub(r"[^\w-]|_", "", text).lower()


def overlooked(text):
    """What math-verify looks over: bases, primes, relations, loose letters, the kind of bracket."""
    loose = re.sub(r"\\[A-Za-z]+(?:\{[a-z]+matrix\})?", " ", text)
    return (
        {*re.findall(r"_ ?\{?(\w+)|([A-Za-z'!])", loose)},
        re.search(r"[<>≤≥≠]|\\(?:[lg]eq?|[lg]t|neq?)(?![a-z])", text) is None,
        re.findall(r"[][]|\\[{}]", text),
        text.startswith("(") and "," in text,
    )


def too_hard(text):
    """Whether computing it could take for ever, or it would break out of the box it is put into.

    sympy's big integers do not hear an alarm, so large powers and the like are refused unread.
    """
    exponent = r"\^ ?(\d|[A-Za-z]|\{[^{}^]*(?:\{[^{}^]*\}[^{}^]*)*\})(?! ?\^)"
    exponents = re.findall(exponent, text)
    size = prod(max(1, int(n)) for n in re.findall("[0-9]+", " ".join(exponents)))
    odd = re.search(r"[0-9]{40}|!|\.\.|\\(?:binom|sum|prod|int|lim|uparrow)", text)
    nested = len(exponents) < text.count("^") or boxed(f"boxed{{{text}}}") != text
    return bool(odd or nested or size > 1000)
