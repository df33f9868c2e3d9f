r"""Whether two answers in LaTeX are the same, for MATH.

An answer is taken apart into single values, which are compared exactly:

    Tuesday, \text{(B)}             words                 as words
    x = 3,  x \in [0,1)             a named value         without its name
    0.56 = 56\%                     a chain of values     each has to be right
    \sqrt{2} \approx 1.41           an approximation      the value, and its digits
    2 < x \le 5                     an inequality         as the interval (2,5]
    (-1,0) \cup (2,5]               a union               in any order
    1, -2   1 and -2   \{1,-2\}     several values        in any order
    (1,2)  [0,1)                    tuples, intervals     the same brackets, one by one
    \begin{pmatrix} ... \end        matrices              one by one
    15\text{ cm}^2,  50\%           a value with a unit   the units, if both have one, and the value
    \frac{1}{2},  2\sqrt{3}         a value               as a fraction, or by formulas.py

What stands beside a value has to be known (words.py), and so does each LaTeX command in it.
"""

import re
from functools import lru_cache
from math import prod

from tasks.answers import TEXT_COMMAND, WORD, closing_brace, normalise_signs
from tasks.expressions import is_balanced
from tasks.formulas import same_formula
from tasks.quantities import plain_number
from tasks.words import FONT, GREEK, LEADING_WORDS, UNITS, WORDS_BESIDE, are_known, is_name

# The most characters of a formula, and values of a list. Anything longer is not an answer.
MAX_LENGTH = 300
MAX_VALUES = 20


def equivalent(answer, gold, question_words=frozenset()):
    """Whether an answer in LaTeX says the same as the gold answer.

    question_words: words of the question (words.words_of), which may also stand beside a value.
    Raises formulas.VerifierError if formulas cannot be compared on this machine.
    """
    if not answer or max(len(answer), len(gold)) > MAX_LENGTH or "boxed" in answer:
        return False
    if is_words(gold) and same_words(without_value_of_option(answer), gold):
        return True
    # 100,200 is a number, unless 100, 200 in the other text says that there is a list.
    has_list = re.search("[0-9], +[0-9]", f"{answer} {gold}") is not None
    answer = tidy(answer, question_words, joins_thousands=not has_list)
    gold = tidy(gold, question_words, joins_thousands=not has_list)
    return answer == gold or same_answer(answer, gold, question_words)


# ---- words ---------------------------------------------------------------------------------------


def is_words(gold):
    r"""Whether a gold answer is words: \text{(B)}, Tuesday, x. (Not (a,b), -x or ab.)"""
    has_text_command = TEXT_COMMAND.search(gold) is not None
    words = TEXT_COMMAND.sub(r"\1", gold).strip(" .")
    if not re.fullmatch(r"[A-Za-z(][A-Za-z ,.'()-]*", words):
        return False
    return has_text_command or re.fullmatch(r"[A-Za-z]|\([A-Z]\)|[A-Za-z -]{3,}", words) is not None


OPTIONS = re.compile(r"\(?[A-Z]\)?(?:(?:, ?| and |, and )\(?[A-Z]\)?)+")


# An option's letter, and its value behind it: \textbf{(B)}\ 12.
OPTION_AND_VALUE = re.compile(
    r"""
    (?P<option> \\(?:text|math)(?:bf|rm)?\{\([A-Z]\)\} )
    (?: \\\ | ~ | \\q?quad )+
    (?P<value> [^A-Z]* )                                # in capitals it may be another option
    """,
    re.VERBOSE,
)
# A letter in brackets may be another option; logical signs and commands are not part of a value.
NO_VALUE = re.compile(
    r"(?<![A-Za-z])\([a-z]\)|\\(?:ne|neq|neg|not|lnot|lor|land|vee|cancel)(?![a-z])|✗"
)


def without_value_of_option(answer):
    r"""Returns only the letter of an option that is followed by its value: `(B)\ 12` gives (B)."""
    option = OPTION_AND_VALUE.fullmatch(answer)
    if not option or WORD.search(option["value"]) or TEXT_COMMAND.search(option["value"]):
        return answer
    if not re.search(r"[0-9]|\\pi", option["value"]) or NO_VALUE.search(option["value"]):
        return answer
    return option["option"]


def same_words(answer, gold):
    """Whether two texts have the same words; the case of a single letter outside \\text counts."""
    is_variable = len(gold) == 1
    answer = plain_words(answer)
    gold = plain_words(gold)
    if OPTIONS.fullmatch(answer) and OPTIONS.fullmatch(gold):  # (A), (C), (D)
        return sorted(re.findall("[A-Z]", answer)) == sorted(re.findall("[A-Z]", gold))
    return answer == gold if is_variable else answer.lower() == gold.lower()


def plain_words(text):
    r"""Returns the words of a text without wrapping: \textbf{(B)}. gives B."""
    words = TEXT_COMMAND.sub(r"\1", text).replace("$", "").strip(" .")
    words = re.sub(r"^([\"'])(.*)\1$", r"\2", words)
    words = re.sub(r"^(?:an?|the|[Oo]ption|[Cc]hoice) (?=.)", "", words)
    return re.sub(r"^\((\w+)\)$", r"\1", words.strip())


# ---- one way to write a formula ------------------------------------------------------------------

# \mathbf{v} -> v, but words stay words
LETTER_IN_A_FONT = re.compile(
    rf"{FONT} ?(?:\{{ ?([A-Za-z]|[0-9.]+) ?\}}|([A-Za-z0-9])(?![A-Za-z0-9]))"
)
UNIT_OF_ONE_LETTER = re.compile(
    r"(?<=[0-9)}])(?:\\[,;: ]|[ ~])*\\(?:text|mathrm|mbox) ?\{[~ ]*([mgLshCF]) *\}"
)
# Words beside a number without a text command: 12 units, 15 cm^2, about 12.
WORDS_AT_THE_END = re.compile(
    r"(?:(?<=[0-9)}⟧])|(?<=\\pi)) ([A-Za-z]{2,}[A-Za-z /.]*)(?=(?: ?\^ ?\{?[23]\}?)?$)"
)
WORDS_AT_THE_START = re.compile(r"^([A-Za-z]{2,}(?: [A-Za-z]+)*) (?=[-0-9\\])")
WORDS = re.compile(r"(?<![\\A-Za-z⟦])[A-Za-z](?:[A-Za-z .'()/-]*[A-Za-z.)])?")
AND_OR = re.compile(r"(?<![A-Za-z\\⟦])(?:and/or|and|or)(?![A-Za-z])")
THOUSANDS = re.compile(r"(?<![0-9,.])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])")
REPEATING = re.compile(
    r"(?<![0-9!.])(?<![0-9!] )([0-9]*)\.([0-9]*)\\(?:overline|bar) ?(?:\{([0-9]+)\}|([0-9]))"
)
TIME_OF_DAY = re.compile(r"\b([AaPp])(?:\. ?)?[Mm]\b\.?")
ROOT = re.compile("√ ?([0-9]+)")
PLAIN_COMMANDS = str.maketrans(
    {
        "≤": r"\le ",
        "⩽": r"\le ",
        "≥": r"\ge ",
        "⩾": r"\ge ",
        "≠": r"\ne ",
        "≈": r"\approx ",
        "±": r"\pm ",
        "∞": r"\infty ",
        "π": r"\pi ",
        "√": r"\sqrt ",
        "∪": r"\cup ",
        "∈": r"\in ",
        "∅": r"\emptyset ",
        "ℝ": r"\mathbb{R}",
        "²": "^2",
        "³": "^3",
        "£": "⟦pound⟧",
        "€": "⟦euro⟧",
        "¢": "⟦cent⟧",
    }
)
SAME_COMMANDS = {
    r"\\(?:bigg?|Bigg?)[lr]?(?![a-z])": "",
    r"\\(?:text)?color\{[a-z]*\}": "",
    r"\\(?:leq|leqslant|le)(?![a-z]) ?": r"\\le ",
    r"\\(?:geq|geqslant|ge)(?![a-z]) ?": r"\\ge ",
    r"(?:\\(?:neq|ne)(?![a-z])|\\not ?=) ?": r"\\ne ",
    r"\\lt(?![a-z])": "<",
    r"\\gt(?![a-z])": ">",
    r"\\(?:simeq|sim|cong|doteq|approx)(?![a-z]) ?": r"\\approx ",
    r"\\[lr]?vert(?![a-z]) ?": "|",
    r"\\lbrace(?![a-z])": r"\\{",
    r"\\rbrace(?![a-z])": r"\\}",
    r"\\bigcup(?![a-z])": r"\\cup",
    r"\\varnothing(?![a-z])": r"\\emptyset",
    r"\\[dt]binom(?![a-z])": r"\\binom",
    r"\\degree(?![a-z])": "°",
    r"\\lor(?![a-z])|\\vee(?![a-z])": "⟦or⟧",
    r"\\&": "⟦and⟧",
    # 2516_{8} and (2516)_8 -> 2516_8
    r"(?<=[0-9A-Za-z)])(?<!\\log)_ ?\{ ?(\w+) ?\}": r"_\1",
    r"^\(([0-9A-F]+)\)_": r"\1_",
    # \log_2 8 -> \log_{2}8, so that 2 and 8 are not side by side
    r"\\log ?_ ?([0-9a-z]) ?": r"\\log_{\1}",
    # a matrix, however it is written
    r"\( ?\\begin\{(?:matrix|array)\}(?:\{[clr|]*\})?(.*?)\\end\{(?:matrix|array)\} ?\)": (
        r"\\begin{pmatrix}\1\\end{pmatrix}"
    ),
    r"\[ ?\\begin\{(?:matrix|array)\}(?:\{[clr|]*\})?(.*?)\\end\{(?:matrix|array)\} ?\]": (
        r"\\begin{pmatrix}\1\\end{pmatrix}"
    ),
    r"\\begin\{[pb]matrix\} ?": r"\\begin{pmatrix}",
    r" ?(?:\\\\ ?)?\\end\{[pb]matrix\}": r"\\end{pmatrix}",
    r"\\\\ ?\[[0-9a-z]*\]": r"\\\\",
}
SAME_COMMAND_PATTERNS = {re.compile(pattern): sign for pattern, sign in SAME_COMMANDS.items()}
# Braces that only group, as in {5} or {90}^\circ.
IDLE_BRACES = re.compile(r"(?<![A-Za-z_^}\]\\])\{([^{}\\]*)\}(?!\{)")
# Only spaces that keep two letters, or two numbers, apart are left.
IDLE_SPACE = re.compile(r"(?<![A-Za-z0-9.]) +| +(?![A-Za-z0-9.])|(?<=[0-9]) +(?=[A-Za-z])")
# Degrees that are an argument: \sin 30°, but not 30°.
FUNCTION = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-z])")
DEGREES = re.compile(r"([0-9]+(?:\.[0-9]+)?)°")


@lru_cache(maxsize=10_000)  # each answer is read for its reward and for `solved`
def tidy(text, question_words, joins_thousands=True):
    """Returns a formula with each thing written in one way, and words between ⟦ and ⟧."""
    text = without_outer_braces(text.replace("⟦", "").replace("⟧", "").strip())
    text = TIME_OF_DAY.sub(r"\1m", text)
    text = ROOT.sub(r"\\sqrt{\1}", text.replace("<=", "≤").replace(">=", "≥"))
    text = text.translate(PLAIN_COMMANDS)
    if "\\" in text:
        text = UNIT_OF_ONE_LETTER.sub(r"⟦\1⟧", text)
        text = LETTER_IN_A_FONT.sub(r" \1\2 ", text)
        text = TEXT_COMMAND.sub(lambda match: mark_words(match[1]), text)
        text = text.replace(r"\$", "⟦dollar⟧")
    text = REPEATING.sub(repeating_decimal, text)
    text = IDLE_BRACES.sub(r" \1 ", normalise_signs(text))
    text = AND_OR.sub(mark_and_or, text)
    for pattern in (WORDS_AT_THE_START, WORDS_AT_THE_END):
        words = pattern.search(text)
        if words and are_known(words[1], WORDS_BESIDE, question_words):
            text = pattern.sub(r"⟦\1⟧", text)
    if "," in text and joins_thousands:
        text = join_thousands(text)
    if "\\" in text or "_" in text:
        for pattern, sign in SAME_COMMAND_PATTERNS.items():
            text = pattern.sub(sign, text)
    if FUNCTION.search(text):
        text = DEGREES.sub(r"(\1\\frac{\\pi}{180})", text)
    elif re.fullmatch("[^-+]+°(?: ?[-+][^-+]+°)+", text):  # of each term
        text = text.replace("°", "") + "°"
    return IDLE_SPACE.sub("", " ".join(text.split()))


def without_outer_braces(text):
    """Returns a text without braces around all of it."""
    while text.startswith("{") and closing_brace(text[1:]) == len(text) - 2:
        text = text[1:-1].strip()
    return text


def mark_and_or(words):
    return "⟦and⟧" if words[0] == "and" else "⟦or⟧"


def mark_words(text):
    """Returns the content of a text command with its words marked, but not its numbers."""
    text = WORDS.sub(mark_unless_a_letter, AND_OR.sub(mark_and_or, text))
    return f" {text} "


def mark_unless_a_letter(words):
    words = words[0].strip()
    return f"⟦{words}⟧" if len(words) > 1 else f" {words} "


def repeating_decimal(number):
    r"""Returns the fraction that a match of REPEATING stands for: 15/90 for 0.1\overline{6}."""
    whole, fixed, period = number[1] or "0", number[2], number[3] or number[4]
    numerator = int(whole + fixed + period) - int(whole + fixed)
    denominator = 10 ** len(fixed) * (10 ** len(period) - 1)
    return f"\\frac{{{numerator}}}{{{denominator}}}"


def join_thousands(text):
    r"""Returns a text with 1234 for 1,234, unless the comma is inside brackets, as in (1,234).

    Braces that only group do not count: \frac{1}{1,234} gives \frac{1}{1234}.
    """
    depth = depths(re.sub(r"(?<!\\)[{}]", " ", text))
    return THOUSANDS.sub(
        lambda number: number[0] if depth[number.start()] else number[0].replace(",", ""), text
    )


# ---- taking an answer apart ----------------------------------------------------------------------

SEPARATOR = r"[,;]? ?⟦(?:and|or)⟧|[,;]"  # of several values
UNION = r"\\cup(?![a-z]) ?"
MATRIX = re.compile(
    r"(-?(?:[0-9]+|\\frac\{[^{}]*\}\{[^{}]*\})?)\*?\\begin\{pmatrix\}(.*)\\end\{pmatrix\}",
    re.DOTALL,
)
RELATION = re.compile(r"\\(?:le|ge|ne)(?![a-z]) ?|[<>]")
REVERSED = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le"}


def same_answer(answer, gold, question_words, is_part=False):
    """Whether two tidy answers are the same, as described at the top of this file.

    is_part: whether they are parts of a list, tuple or matrix, where a unit must not be added.
    """
    answer_name, answer_value = without_name(answer, question_words)
    gold_name, gold_value = without_name(gold, question_words)
    if gold_name and not answer_name and "=" in answer:  # 2x + y = 5 for y = 5 - 2x
        return same_value(answer, gold)
    if answer_name and not gold_name and "=" in gold and has_variables(gold):
        return same_value(answer, gold)
    if answer_name and gold_name and answer_name != gold_name:
        return False
    answer = answer_value
    gold = gold_value
    if answer == gold:
        return True

    answer_kind, answer_values = several_values(answer, question_words)
    gold_kind, gold_values = several_values(gold, question_words)
    if len(answer_values) > 1 or len(gold_values) > 1:
        return answer_kind == gold_kind and same_values(answer_values, gold_values, question_words)

    if "=" in gold:
        if has_variables(gold):
            return same_value(answer, gold)
        return any(same_answer(answer, side, question_words) for side in gold.split("="))
    if "=" in answer:
        sides = [
            side
            for side in answer.split("=")
            if side.startswith("(") or not is_name(side, question_words)
        ]
        return 0 < len(sides) < 5 and all(
            same_answer(side, gold, question_words, is_part) for side in sides
        )
    if "\\approx" in answer and "\\approx" not in gold:
        value, *approximations = answer.split("\\approx")
        return same_answer(value, gold, question_words, is_part) and all(
            rounds_to(gold, approximation) for approximation in approximations
        )

    if RELATION.search(answer) or RELATION.search(gold):
        answer_name, answer_interval = as_interval(answer, question_words)
        gold_name, gold_interval = as_interval(gold, question_words)
        if answer_interval is None or gold_interval is None:
            return same_value(answer, gold)
        if answer_name and gold_name and answer_name != gold_name:
            return False
        answer = answer_interval
        gold = gold_interval

    answer_parts = bracketed(answer)
    gold_parts = bracketed(gold)
    if answer_parts and gold_parts:
        return (
            answer[0] == gold[0]
            and answer[-1] == gold[-1]
            and same_one_by_one(answer_parts, gold_parts, question_words)
        )
    answer_rows = matrix_rows(answer)
    gold_rows = matrix_rows(gold)
    if answer_rows and gold_rows:
        return len(answer_rows) == len(gold_rows) and all(
            same_one_by_one(answer_row, gold_row, question_words)
            for answer_row, gold_row in zip(answer_rows, gold_rows, strict=True)
        )
    if answer_parts or gold_parts or answer_rows or gold_rows:
        return False
    return same_quantity(answer, gold, question_words, is_part)


def matrix_rows(text):
    r"""Returns the rows of a matrix, each a list of entries, or None.

    A number before the matrix is multiplied in: \frac{1}{2}\begin{pmatrix}1\\3\end{pmatrix} has the
    rows 1/2 and 3/2.
    """
    matrix = MATRIX.fullmatch(text)
    if not matrix:
        return None
    factor, inside = matrix.groups()
    rows = [row.split("&") for row in inside.split("\\\\")]
    return [[f"{factor}({entry})" for entry in row] for row in rows] if factor else rows


def same_one_by_one(answer_parts, gold_parts, question_words):
    return len(answer_parts) == len(gold_parts) and all(
        same_answer(answer, gold, question_words, is_part=True)
        for answer, gold in zip(answer_parts, gold_parts, strict=True)
    )


def has_variables(text):
    return re.search("[A-Za-z]", COMMAND.sub("", text)) is not None


def without_name(text, question_words):
    r"""Returns (name, value): the two sides of `x=3` or `x\in[0,1]`, else (None, text)."""
    named = re.match(r"([^=]*?)(=|\\in(?![a-z]) ?)([^=]+)$", text)
    name = named[1].strip("⟦⟧ ") if named else ""
    if not name or not is_name(name, question_words):
        return None, text
    value = named[3]
    if named[2] != "=" and not value.startswith(("(", "[", "\\{", "\\mathbb")):
        return None, text
    if name.startswith("("):  # (x,y)=(1,2), but not (y,x), and not (x,y)=3
        letters = [letter for letter in name[1:-1].split(",") if letter.isalpha()]
        if letters != sorted(letters) or not value.startswith("("):
            return None, text
    return name, value


def split_outside(pattern, text):
    """Returns the parts of a text between matches of a regex that are outside all brackets."""
    parts = []
    depth = 0
    start = 0
    for sign in re.finditer(rf"\\?[([{{]|\\?[])}}]|{pattern}", text):
        if sign[0][-1] in "([{":
            depth += 1
        elif sign[0][-1] in ")]}":
            depth -= 1
        elif depth == 0:
            parts.append(text[start : sign.start()])
            start = sign.end()
    return [*parts, text[start:]]


def several_values(text, question_words):
    r"""Returns (kind, values): kind is "union" for (0,1)\cup(2,3) or x<1 or x>2, else "list"."""
    parts = split_outside(UNION, text)
    if len(parts) > 1:
        return "union", parts
    is_set = re.fullmatch(r"\\\{.*\\\}", text) is not None
    inside = text[2:-2] if is_set else text
    values = split_outside(SEPARATOR, inside)
    values = [value for listed in values for value in both_signs(listed)]
    if is_set and len(values) < 2:
        return "list", [text]
    are_relations = len(values) > 1 and all(RELATION.search(value) for value in values)
    if are_relations and "⟦and⟧" not in text:
        names = {as_interval(value, question_words)[0] for value in values}
        return ("union" if len(names) == 1 else "list"), values
    return "list", values


def both_signs(value):
    r"""Returns the two values that a formula with one \pm stands for, or the value alone."""
    if value.count("\\pm") != 1:
        return [value]
    return [re.sub(r"\\pm ?", "+", value), re.sub(r"\\pm ?", "-", value)]


def same_values(answers, golds, question_words):
    """Whether two lists have the same values in any order, with the same names or without names."""
    if len(answers) != len(golds) or len(golds) > MAX_VALUES:
        return False
    answer_names = {without_name(answer, question_words)[0] for answer in answers} - {None}
    gold_names = {without_name(gold, question_words)[0] for gold in golds} - {None}
    if len(gold_names) > 1:
        if answer_names != gold_names:
            return False
    else:  # x_1 and x_2 are two values of x
        names = {re.sub(r"_[0-9]$", "", name) for name in answer_names | gold_names}
        if len(names) > 1 or 1 < len(answer_names) < len(answers):
            return False
        answers = [without_name(answer, question_words)[1] for answer in answers]
    remaining = list(answers)
    for gold in golds:
        for answer in remaining:
            if same_answer(answer, gold, question_words, is_part=True):
                remaining.remove(answer)
                break
        else:
            return False
    return True


def as_interval(text, question_words):
    r"""Returns (name, interval) for an inequality: ("x", "(2,5]") for `2<x\le5`. Else (None, None).

    An interval is returned unchanged, with the name None.
    """
    signs = [sign.strip() for sign in RELATION.findall(text)]
    sides = RELATION.split(text)
    if not signs and bracketed(text):
        return None, text
    if not 1 <= len(signs) <= 2 or not set(signs) <= set(REVERSED):
        return None, None
    if len(signs) == 1 and not is_name(sides[0], question_words):
        sides.reverse()
        signs = [REVERSED[signs[0]]]
    if len(signs) == 2 and signs[0] in (">", "\\ge"):
        sides.reverse()
        signs = [REVERSED[sign] for sign in reversed(signs)]
    if len(signs) == 1:  # x < b, or x > a
        name, bound = sides
        bounds = ("-\\infty", bound) if signs[0] in ("<", "\\le") else (bound, "\\infty")
        opening = "[" if signs[0] == "\\ge" else "("
        closing = "]" if signs[0] == "\\le" else ")"
    else:  # a < x < b
        name = sides[1]
        bounds = (sides[0], sides[2])
        opening = "[" if signs[0] == "\\le" else "("
        closing = "]" if signs[1] == "\\le" else ")"
        if signs[1] in (">", "\\ge"):
            return None, None
    if not is_name(name, question_words):
        return None, None
    return name, f"{opening}{bounds[0]},{bounds[1]}{closing}"


def bracketed(text):
    """Returns the parts of a tuple or interval (two or more between brackets), or None."""
    if not text or text[0] not in "([" or text[-1] not in ")]":
        return None
    inside = text[1:-1]
    parts = split_outside(",", inside)
    depth = depths(inside)
    is_balanced = min(depth) >= 0 and depth[-1] == 0
    return parts if len(parts) > 1 and is_balanced else None


def depths(text):
    """Returns how many brackets are open after each character of a text; first 0, for its start."""
    result = [0]
    for sign in text:
        result.append(result[-1] + (sign in "([{") - (sign in ")]}"))
    return result


# ---- a value with a unit -------------------------------------------------------------------------

QUANTITY = re.compile(
    r"(?P<leading>(?:⟦[^⟧]*⟧)*)(?P<value>[^⟦⟧%°]*)(?P<unit>[%°]?(?:⟦[^⟧]*⟧)*(?:(?<=⟧)\^\{?[23]\}?)?)"
)
SAME_UNIT = {
    "°": "degree",
    "%": "percent",
    "feet": "foot",
    "ft": "foot",
    "in": "inch",
    "millimeter": "mm",
    "millimetre": "mm",
    "centimeter": "cm",
    "centimetre": "cm",
    "meter": "m",
    "metre": "m",
    "kilometer": "km",
    "kilometre": "km",
    "mile": "mi",
    "yard": "yd",
    "gram": "g",
    "gm": "g",
    "kilogram": "kg",
    "lbs": "lb",
    "pound": "lb",
    "ounce": "oz",
    "liter": "l",
    "litre": "l",
    "milliliter": "ml",
    "millilitre": "ml",
    "mph": "mi per hour",
    "/": "per",
    "hr": "hour",
    "hrs": "hour",
    "h": "hour",
    "min": "minute",
    "sec": "second",
    "s": "second",
    "usd": "dollar",
    "rad": "radian",
    "sq": "square",
    "percentage": "percent",
}
# Units that scale the value, so that no other unit may stand beside them: 5 cents, not $5 cents.
SCALES = {"percent", "degree", "cent", "dollar", "pound", "euro"}


def same_quantity(answer, gold, question_words, is_part):
    """Whether two values with units are the same. If only one has a unit, the unit is ignored."""
    answer_quantity = QUANTITY.fullmatch(answer)
    gold_quantity = QUANTITY.fullmatch(gold)
    if not answer_quantity or not gold_quantity or not answer_quantity["value"]:
        return False
    answer_unit = unit_of(answer_quantity)
    gold_unit = unit_of(gold_quantity)
    if answer_unit and answer_unit != gold_unit:
        words = set(answer_unit.split())
        above, _, below = answer_unit.partition(" per ")
        if "percent" not in words and not set(below.split()) & SCALES:
            words = set(above.split())  # dollars per hour are dollars, cents per dollar are not
        is_scale_of_another = len(words) > 1 and words & SCALES
        is_added = not gold_unit and not is_part and not is_scale_of_another
        if not (is_added and are_known(answer_quantity["unit"], UNITS, question_words)):
            return False
    # Words before the value: the gold's own, or words that do not change the value.
    answer_leading = answer_quantity["leading"].replace("⟦dollar⟧", "")
    gold_leading = gold_quantity["leading"].replace("⟦dollar⟧", "")
    if answer_leading != gold_leading and not are_known(
        answer_leading + gold_leading, LEADING_WORDS
    ):
        return False

    answer = answer_quantity["value"]
    gold = gold_quantity["value"]
    is_scale = answer_unit in ("percent", "degree")
    if answer_unit != gold_unit and is_scale and plain_number(answer) is None:
        return False
    if answer_unit == "percent" != gold_unit:  # 50% is 1/2, and is 50 where percents are asked for
        is_asked_in_percent = re.fullmatch(r"[1-9][0-9]*(\.[0-9]+)?", gold)
        return same_value(f"\\frac{{{answer}}}{{100}}", gold) or (
            is_asked_in_percent is not None and same_value(answer, gold)
        )
    if gold_unit == "percent" != answer_unit:
        return same_value(answer, gold) or same_value(answer, f"\\frac{{{gold}}}{{100}}")
    return same_value(answer, gold)


def unit_of(quantity):
    """Returns the unit of a quantity in a standard spelling, "" if none: foot^2 for 3 sq ft."""
    words = re.findall(r"[a-z]+|[°%/]|\^\{?[23]\}?", quantity["unit"].lower().replace(".", ""))
    if "⟦dollar⟧" in quantity["leading"] and not {"dollar", "dollars"} & set(words):
        words.insert(0, "dollar")
    unit = []
    power = ""
    for word in words:
        word = SAME_UNIT.get(word, word)
        singular = word if word in UNITS else word.removesuffix("s")
        singular = singular if singular in UNITS else word.removesuffix("es")
        singular = SAME_UNIT.get(singular, singular)
        if singular in ("square", "cubic") and len(words) > 1:
            power += "^2" if singular == "square" else "^3"
        elif singular[0] == "^":
            power += singular.replace("{", "").replace("}", "")
        elif singular not in ("old", "left", "more"):
            unit.append(singular)
    return " ".join(unit) + power


def rounds_to(gold, approximation):
    """Whether a decimal number is the gold value rounded to the number's own digits."""
    number = re.fullmatch(r"(-?[0-9]+(?:\.([0-9]+))?)((?:⟦[^⟧]*⟧)*)", approximation.strip())
    if not number or not are_known(number[3], UNITS):
        return False
    tolerance = f"5e-{len(number[2] or '') + 1}"
    gold_quantity = QUANTITY.fullmatch(gold)
    return gold_quantity is not None and same_formula(number[1], gold_quantity["value"], tolerance)


# ---- a value -------------------------------------------------------------------------------------

COMMAND = re.compile(r"\\[A-Za-z]+|\\.")
KNOWN_COMMANDS = re.compile(
    rf"""
    \\(?: frac | sqrt | pi | sin | cos | tan | cot | sec | csc | arcsin | arccos | arctan
        | log | ln | binom | le | ge | ne | lfloor | rfloor | lceil | rceil | [{{}}]
      ) (?![a-z])
    | {GREEK}
    """,
    re.VERBOSE,
)
KNOWN_SIGNS = re.compile(r"[A-Za-z0-9.+*/^_(){}\[\]|<>=!, -]*")
# Two numbers side by side, two signs, nothing between braces, arithmetic with a number base.
MEANINGLESS = re.compile(
    r"[0-9.] +[0-9.]|\.[0-9]*\.|[}!] ?[0-9.]|[-+] ?[-+]|\{ *\}|[0-9)] ?_|[-+*/^_] *$|!!"
)
SUBSCRIPT_OR_LETTER = re.compile(r"_ ?\{?(\w+)|([A-Za-z])")
LOGARITHM_BASE = re.compile(r"\\log ?_ ?(\w|\{\w+\})")
SMALL_FACTORIAL = re.compile(r"(?<![0-9.])[0-9]{1,2}!")


def same_value(answer, gold):
    """Whether two formulas without words have the same value."""
    if answer.removeprefix("+") == gold:
        return True
    answer_number = plain_number(answer)
    gold_number = plain_number(gold)
    if answer_number is not None and gold_number is not None:
        return answer_number == gold_number
    return (
        is_safe(answer)
        and is_safe(gold)
        and details(answer) == details(gold)
        and same_formula(answer, gold)
    )


def details(text):
    """Returns what has to be equal in two formulas in addition to their values.

    These are the variables (with their case), number bases and other subscripts; whether there is a
    relation; square brackets and braces.
    """
    text = LOGARITHM_BASE.sub(" ", text)  # a logarithm's base is part of the value
    commands = COMMAND.findall(text)
    letters = COMMAND.sub(" ", text)
    return (
        set(SUBSCRIPT_OR_LETTER.findall(letters)) - {("", "e"), ("", "i")},  # which are numbers
        {command for command in commands if re.fullmatch(GREEK, command)},
        re.search("[<>=]", letters) is None and not {"\\le", "\\ge"} & set(commands),
        re.findall(r"\\[{}]|[][]", re.sub(r"\\sqrt\[[^]]*\]", "", text)),
    )


EXPENSIVE = re.compile(r"[0-9]{40}|binom\{[0-9]{4}")
# An exponent in braces, a digit or a letter, with no further exponent behind it.
EXPONENT = re.compile(r"\^ ?(\d+|[A-Za-z]|\{[^{}^]*(?:\{[^{}^]*\}[^{}^]*)*\})(?! ?\^)")
MAX_EXPONENT = 2500  # of all exponents' numbers, multiplied; those of letters are added
POWER_OF_LETTER = re.compile(r"[A-Za-z] ?\^ ?(?:(\d+)|\{(\d+)\})")


def is_safe(text):
    """Whether a formula has only known commands and signs, and is quick to compute.

    A time limit cannot interrupt sympy's big integers, so large powers are never computed.
    """
    exponents = EXPONENT.findall(text)
    letters = COMMAND.sub(" ", text)
    powers_of_letters = [int(a or b) for a, b in POWER_OF_LETTER.findall(letters)]
    other_exponents = " ".join(EXPONENT.findall(POWER_OF_LETTER.sub(" ", letters)))
    other_numbers = [max(1, int(number)) for number in re.findall("[0-9]+", other_exponents)]
    total_exponent = max(1, sum(powers_of_letters)) * prod(other_numbers)
    return (
        KNOWN_SIGNS.fullmatch(KNOWN_COMMANDS.sub(" ", text)) is not None
        and MEANINGLESS.search(LOGARITHM_BASE.sub(" ", text)) is None
        and "!" not in SMALL_FACTORIAL.sub("", text)
        and text.count("|") % 2 == 0
        and is_balanced(text.replace("\\{", "").replace("\\}", ""))
        and EXPENSIVE.search(text) is None
        and total_exponent <= MAX_EXPONENT
        and not re.search(r"!|binom|\.0", " ".join(exponents))
        and text.count("}{") == len(re.findall(r"\\(?:frac|binom)(?![a-z])", text))
        and len(exponents) == text.count("^")
    )
