"""Reading answers: tags and boxes, arithmetic, plain numbers, LaTeX. Nothing here evaluates text.

A model is free in how it wraps an answer: tags, a box, dollar signs, a unit, "x = 37". It is not
free in the value: each reader knows a short grammar, and what that does not know is no answer.
"""

import logging
import operator
import re
from fractions import Fraction
from itertools import accumulate
from math import prod

LONGEST = 1000  # characters: a longer number or formula is no answer


def extract_answer(text):
    """What the last `<answer>...</answer>` holds, or ""; the first closing tag ends it.

    Where no pair is closed, the end of the text closes the last opening that something follows.
    """
    start = text.rfind("<answer>", 0, max(text.rfind("</answer>"), 0))
    if start >= 0:
        return text[start + len("<answer>") : text.find("</answer>", start)].strip()
    return next(filter(None, map(str.strip, reversed(text.split("<answer>")[1:]))), "")


def boxed(text):
    """The inside of the last \\boxed{...}, or ""; the end of the text closes an open one.

    A box that is part of a formula, as in -\\boxed{3}, \\boxed{3}! or \\boxed{3} million, is none.
    """
    before, box, after = text.rpartition("boxed{")
    depth, end = 1, len(after)
    for i, character in enumerate(after[:LONGEST]):
        depth += (character == "{") - (character == "}")
        if not depth:
            end = i
            break
    near = re.sub(r"<[^<>]*>", "\n", before[-30:])
    behind = after[end + 1 : end + 30]
    in_formula = (
        re.search(r"(?:[-+/^<>≠−–×÷] ?|\d)\\?$", near)
        or re.match(r"\d|\.\d| ?(?:[/^!_×÷+]|\*(?!\*)|- ?\d)", behind)
        or SCALES.match(behind)
    )
    return after[:end].strip() if box and not in_formula else ""


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


def plain(text, fraction=r" \1/\2 "):
    """Ordinary signs for LaTeX's and typography's: `3 \\times 4` is `3*4`."""
    text = " ".join(text.split()).replace("{,}", ",")
    for pattern, ordinary in (
        (r"\\(?:text|textbf|mathrm|mathbf|mbox) ?\{([^{}]*)\}", r"\1"),
        (r"\\[dt]?frac ?(\d) ?(\d)", r"\\frac{\1}{\2}"),
        (r"\\[dt]?frac ?\{([^{}]*)\} ?\{([^{}]*)\}", fraction),
        (r"\\(?:left|right)(?![a-z])|\\(?:q?quad|[()\[\],;:! ]|(?=[$%]))", ""),
        (r"\^ ?\{?\\circ\}?", "°"),
        (r" ?(?:\\times|\\cdot|[×·]|(?<=[\d) ])x(?=[\d( ])) ?", "*"),
        (r"\\div(?![a-z])|÷", "/"),
        ("[−–]", "-"),
        ("½", " 1/2 "),
        (r"\$", " "),
        (r"(?<!\.)\. *$", ""),
    ):
        text = re.sub(pattern, ordinary, text)
    return text.strip()


OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
BINDING = {"(": 0, ")": 1, "+": 2, "-": 2, "*": 3, "/": 3}


def arithmetic(text, numbers=None):
    """The exact value, a Fraction, of an expression of numbers, + - * / and parentheses.

    With `numbers` it has to use exactly these integers, which is looked at before anything is
    computed. Two stacks and one pass (Dijkstra's shunting yard): no recursion, so 10,000 nested
    parentheses cost only their length. Raises ValueError, ZeroDivisionError.
    """
    tokens = re.findall(r"[0-9]+(?:\.[0-9]+)?|\S", text)
    used = [token for token in tokens if token[0] in "0123456789"]
    if len(text) > LONGEST if numbers is None else sorted(used) != sorted(map(str, numbers)):
        raise ValueError("not exactly the given numbers, or more than we work out for anybody")
    values, waiting, previous = [], [], "("
    for token in ["(", *tokens, ")"]:
        number = token[0] in "0123456789"
        # Numbers and "(" stand after an operator or "("; all else stands after a number or ")".
        if not (number or token in BINDING) or (number or token == "(") != (previous in "(+-*/"):
            raise ValueError(f"{token} cannot follow {previous}")
        previous = token
        if number:
            values.append(Fraction(token))
            continue
        while token != "(" and waiting and BINDING[waiting[-1]] >= BINDING[token]:
            right, left = values.pop(), values.pop()
            values.append(OPERATIONS[waiting.pop()](left, right))
        if token != ")":
            waiting.append(token)
        elif not waiting or waiting.pop() != "(":
            raise ValueError("a parenthesis is closed that was not opened")
    if waiting:
        raise ValueError("a parenthesis is not closed, or closed too early")
    return values[0]


NUMBER = re.compile(
    r"""(?P<sign>[-+]?)\ ?[£€]?\ ?
    (?: (?P<whole>[0-9]+)\ +(?P<part>[0-9]+/[0-9]+)
      | (?P<above>[0-9]+(?:\.[0-9]+)?)\ ?/\ ?(?P<below>[0-9]+(?:\.[0-9]+)?)
      | (?=\.?[0-9])
        (?P<decimal>(?:[0-9]{1,3}(?:(?:,[0-9]{3})+|(?:\ [0-9]{3})+)|[0-9]*)(?:\.[0-9]+)?)
        (?:(?:e|\*10\ ?\^)\ ?\{?(?P<exponent>[-+]?[0-9]{1,3})\}?)? )
    \ *(?P<unit>[£€]|/?[A-Za-z%°][A-Za-z%°./,'()\ -]*(?:[²³]|\^\ ?\{?[23]\}?)?)?\ *""",
    re.VERBOSE,
)
# Words that make another number of the one beside them, scales behind a box too.
SCALES = re.compile(
    r"(?i)(?:[ \\,;!]|text\{)*\b(?:hundreds?|thousands?|k|[mbtr]+illions?|mil|mln|bn|dozens?|grand"
    r"|lakhs?|crores?|score|hal(?:f|ves)|(?:thir|four|fif|six|seven|eigh|nin|ten|hundred|thousand)"
    r"(?:d|th)s?)\b"
)
ALTERS = re.compile(
    r"(?i)\b(?:not|no|and|or|to|minus|negative|plus|point|over|pi|ln|log|sin|cos|tan|sqrt|root"
    r"|squared|cubed|twice|double|triple|factorial|never|wrong|except)\b|" + SCALES.pattern[4:]
)
VARIABLE = re.compile(r"\b[^\W\d_aghlmpsCFL]\b")  # one letter that is no unit's; k is a thousand
NAME = re.compile(r" *\\?[A-Za-z][A-Za-z ]*(?:_\{?\w+\}?)?(?:\([A-Za-z]\))? *")


def read_number(text):
    """The one number that a short text states, exactly, as a Fraction; None where there is none.

    50% is 50. In "3 + 4 = 7" every part has to be a name or to have the same value.
    """
    *before, last = plain(boxed(text) or text).split("=") if len(text) <= LONGEST else [""]
    found = NUMBER.fullmatch(last.strip())
    unit = found and found["unit"] or ""
    if not found or ALTERS.search(unit) or VARIABLE.search(unit):
        return None
    try:
        if found["whole"]:
            value = int(found["whole"]) + Fraction(found["part"])
        elif found["above"]:
            value = Fraction(found["above"]) / Fraction(found["below"])
        else:
            value = Fraction(re.sub("[, ]", "", found["decimal"]))
            value *= Fraction(10) ** int(found["exponent"] or 0)
        value = -value if found["sign"] == "-" else value
        same = (is_name(part) or arithmetic(part) == value for part in before)
        return value if all(same) else None
    except (ValueError, ZeroDivisionError):
        return None


def sides(text):
    """The sides of an equation but for names, each ready for `arithmetic`; a few at most."""
    parts = plain(text, fraction=r"((\1)/(\2))").split("=", 9)
    return [part for part in parts if not is_name(part)]


def is_name(text):
    return NAME.fullmatch(text) and not ALTERS.search(text)


# ---- formulas ----------------------------------------------------------------------------------

WORDS = re.compile(
    r"\\(?:text|textbf|mathrm|mbox) ?\{([^{}]*)\}( ?\^ ?\{?[23]\}?)?"
    r"|(?<=[\d}]) ([A-Za-z]{4,}|[ckm]m|in|ft|kg)( ?\^ ?\{?[23]\}?)?[ .]*$"
)


def equivalent(answer, gold):
    """Whether two answers in LaTeX are the same: as text, as numbers, or for math-verify.

    Only its LaTeX grammar is used: its other ways in lead to sympy's parse_expr, and so to eval.
    """
    if not answer or max(len(answer), len(gold)) > LONGEST or "boxed" in answer:
        return False
    answer, gold = _tidy(answer), _tidy(gold)
    if WORDS.fullmatch(gold):
        return (
            re.sub(r"[\W_]", "", _glued(answer)).lower()
            == re.sub(r"[\W_]", "", _glued(gold)).lower()
        )
    if _glued(answer) == _glued(gold):
        return True
    if "=" in answer and "=" not in gold:
        *before, last = answer.split("=")
        before = [part for part in before if not is_name(part)]
        return len(before) < 4 and all(equivalent(part, gold) for part in [*before, last])
    if "=" in gold and "=" not in answer and is_name(gold.partition("=")[0]):
        gold = gold.partition("=")[2]
    if _overlooked(answer) != _overlooked(gold) or not _same_words(answer, gold):
        return False
    answer, gold = WORDS.sub(" ", answer), WORDS.sub(" ", gold)
    numbers = read_number(answer), read_number(gold)
    if None not in numbers:
        return numbers[0] == numbers[1]
    return not _hostile(answer) and not _hostile(gold) and _same_formula(answer, gold)


def _same_formula(answer, gold):
    from math_verify import LatexExtractionConfig, parse, verify
    from math_verify.errors import TimeoutException

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    # Its limit is an alarm, which the main thread alone can set: in another, no formula is equal.
    how = {"fallback_mode": "no_fallback", "parsing_timeout": 2}  # seconds
    try:
        gold, answer = (
            parse(f"\\boxed{{{text}}}", [LatexExtractionConfig()], **how) for text in (gold, answer)
        )
        return bool(gold and answer) and verify(gold, answer, timeout_seconds=2)
    except (Exception, TimeoutException):  # sympy raises anything, and the alarm is no Exception
        return False


def _tidy(text):
    """A LaTeX answer without what does not change its meaning."""
    text = re.sub(r"\\(?:left|right)(?![a-z])|\\[!,;:]", "", text.strip().strip("$"))
    text = re.sub(r"\\[dt]frac", r"\\frac", re.sub(r"(?<!\\)\\ ", " ", text))
    return re.sub(r"(?<!\.)\. *$", "", text.replace("°", "^\\circ").replace("½", "\\frac12"))


def _glued(text):
    """Without \\text and without spaces, but between digits: 1 2 is not 12."""
    return re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", WORDS.sub(r"\1\2\3\4", text))


def _overlooked(text):
    """What math-verify looks over: bases, primes, relations, loose letters, the kind of bracket."""
    text = WORDS.sub(" ", text).strip()
    ends = text[:2].strip("\\")[:1] + text[-1:]
    return (
        re.findall(r"_ ?\{?(\w+)|(['!])", text),
        bool(re.search(r"[<>≤≥≠]|\\(?:[lg]eq?|[lg]t|neq?)(?![a-z])", text)),
        {*re.findall("[A-Za-z]", re.sub(r"\\[A-Za-z]+(?:\{[a-z]+matrix\})?", " ", text))},
        ends if ends in ("()", "(]", "[)", "[]", "{}") and ("," in text or ends != "()") else "",
    )


def _same_words(answer, gold):
    """The same words in both, or a unit in one of them."""
    answer, gold = (" ".join(map("".join, WORDS.findall(text))) for text in (answer, gold))
    same = re.sub(r"[\W_]", "", answer.lower()) == re.sub(r"[\W_]", "", gold.lower())
    return same or not (answer and gold) and not ALTERS.search(answer + gold)


def _hostile(text):
    """Whether computing it could take for ever, or it would break out of the box it is put into.

    sympy's big integers do not hear an alarm, so large powers and the like are refused unread.
    """
    depths = list(accumulate((c == "{") - (c == "}") for c in re.sub(r"\\[{}]", "", text)))
    exponents = re.findall(r"\^\s*(\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\}|[0-9])", text)
    size = prod(max(1, int(n[:9])) for n in re.findall("[0-9]+", " ".join(exponents)))
    deep = text.count("^") > 12 or re.search(r"\^\s*\{[^{}]*(?:\{[^{}]*\{|\^)", text)
    odd = re.search(r"[0-9]{40}|!|\.\.|\\(?:binom|sum|prod|int|lim|uparrow)", text)
    return bool(
        len(text) > 300 or size > 1000 or deep or odd or min([0, *depths]) or depths[-1:] > [0]
    )
