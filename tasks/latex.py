r"""Whether two answers in LaTeX are the same: for MATH.

An answer is taken apart until single values are left, and those are compared exactly:

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

from tasks.answers import TEXT_COMMAND, closing_brace, normalise_signs
from tasks.formulas import same_formula
from tasks.quantities import plain_number
from tasks.words import FONT, GREEK, LEADING_WORDS, UNITS, are_known, is_name

# Characters of a formula, and values of a list. Anything longer is no answer.
MAX_LENGTH = 300
MAX_VALUES = 20


def equivalent(answer, gold, question_words=frozenset()):
    """Whether an answer in LaTeX says the same as the gold answer.

    question_words: words of the question (words.words_of), which may stand beside a value too.
    Raises formulas.VerifierError if formulas cannot be compared on this machine.
    """
    if not answer or max(len(answer), len(gold)) > MAX_LENGTH or "boxed" in answer:
        return False
    if is_words(gold) and same_words(answer, gold):
        return True
    answer = tidy(answer, question_words)
    gold = tidy(gold, question_words)
    return answer == gold or same_answer(answer, gold, question_words)


# ---- words ---------------------------------------------------------------------------------------


def is_words(gold):
    r"""Whether a gold answer is words: \text{(B)}, Tuesday, x. (Not (a,b), and not ab.)"""
    has_only_words = re.fullmatch(r"[A-Za-z ,.'()-]+", TEXT_COMMAND.sub(r"\1", gold))
    is_formula = re.fullmatch(r"[^A-Za-z]*[A-Za-z]+[^A-Za-z]+[A-Za-z].*|[A-Za-z]{2}", gold)
    return bool(has_only_words) and (bool(re.search("[A-Za-z]{3}", gold)) or not is_formula)


def same_words(answer, gold):
    """Whether two texts have the same letters; single letters outside of a text the same case."""
    is_variable = len(gold) == 1
    answer = letters_only(TEXT_COMMAND.sub(r"\1", answer))
    gold = letters_only(TEXT_COMMAND.sub(r"\1", gold))
    return answer == gold or (not is_variable and answer.lower() == gold.lower())


def letters_only(text):
    """Returns a text without spaces and punctuation."""
    return re.sub(r"[ ,.'()$]", "", text)


# ---- one way to write a formula ------------------------------------------------------------------

# \mathbf{v} -> v, but words stay words
LETTER_IN_A_FONT = re.compile(rf"{FONT} ?(?:\{{ ?([A-Za-z]) ?\}}|([A-Za-z])(?![A-Za-z]))")
# Words at the end without a text command: 12 units, 5 cm. Four letters, or a known unit.
WORDS_AT_THE_END = re.compile(
    r"(?<=[0-9)}⟧]) ?([A-Za-z]{2,}(?: [A-Za-z]+)*)(?=(?: ?\^ ?\{?[23]\}?)?$)"
)
WORDS_AT_THE_START = re.compile(r"^([A-Za-z]{2,}(?: [A-Za-z]+)*) (?=[-0-9\\])")
THOUSANDS = re.compile(r"(?<![0-9,.])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])")
PLAIN_COMMANDS = str.maketrans(
    {
        "≤": r"\le ",
        "≥": r"\ge ",
        "≠": r"\ne ",
        "≈": r"\approx ",
        "±": r"\pm ",
        "∞": r"\infty ",
        "π": r"\pi ",
        "√": r"\sqrt ",
        "∪": r"\cup ",
        "∈": r"\in ",
        "⟦": "",
        "⟧": "",
    }
)
SAME_COMMANDS = {
    r"\\(?:bigg?|Bigg?)[lr]?(?![a-z])": "",
    r"\\(?:leq|leqslant|le)(?![a-z]) ?": r"\\le ",
    r"\\(?:geq|geqslant|ge)(?![a-z]) ?": r"\\ge ",
    r"\\lt(?![a-z])": "<",
    r"\\gt(?![a-z])": ">",
    r"\\(?:simeq|sim|cong|doteq|approx)(?![a-z]) ?": r"\\approx ",
    # \log_2 8 -> \log_{2}8, so that 2 and 8 are not side by side
    r"\\log ?_ ?([0-9a-z]) ?": r"\\log_{\1}",
}
SAME_COMMAND_PATTERNS = {re.compile(pattern): sign for pattern, sign in SAME_COMMANDS.items()}
AND_OR = re.compile(r"(?<![A-Za-z\\⟦])(and|or)(?![A-Za-z])")
# Only spaces that keep two letters, or two numbers, apart are left.
IDLE_SPACE = re.compile(r"(?<![A-Za-z0-9.]) +| +(?![A-Za-z0-9.])|(?<=[0-9]) +(?=[A-Za-z])")


@lru_cache(maxsize=10_000)  # each answer is read for its reward and for `solved`
def tidy(text, question_words):
    """Returns a formula with each thing written in one way, and words between ⟦ and ⟧."""
    text = text.translate(PLAIN_COMMANDS)
    if "\\" in text:
        text = LETTER_IN_A_FONT.sub(r" \1\2 ", text)
        text = TEXT_COMMAND.sub(lambda match: mark_words(match[1]), text)
        text = text.replace(r"\$", "⟦dollar⟧")
    text = normalise_signs(text)
    text = AND_OR.sub(r"⟦\1⟧", text)
    text = WORDS_AT_THE_START.sub(r"⟦\1⟧", text)
    words_at_the_end = WORDS_AT_THE_END.search(text)
    if words_at_the_end and (
        re.search("[A-Za-z]{4}", words_at_the_end[1])
        or are_known(words_at_the_end[1], UNITS, question_words)
    ):
        text = WORDS_AT_THE_END.sub(r"⟦\1⟧", text)
    if "," in text:
        text = join_thousands(text)
    if "\\" in text:
        for pattern, sign in SAME_COMMAND_PATTERNS.items():
            text = pattern.sub(sign, text)
    return IDLE_SPACE.sub("", text).strip()


def join_thousands(text):
    """Returns a text with 1234 for 1,234, unless the comma is inside brackets, as in (1,234)."""
    depth = depths(text)
    return THOUSANDS.sub(
        lambda number: number[0] if depth[number.start()] else number[0].replace(",", ""), text
    )


def mark_words(text):
    """Returns what a text command holds, with its words marked; numbers belong to the formula."""
    return re.sub(
        r"[A-Za-z](?:[A-Za-z ,.'()/-]*[A-Za-z.)])?",
        lambda match: f"⟦{match[0].strip()}⟧",
        f" {text} ",
    )


# ---- taking an answer apart ----------------------------------------------------------------------

SEPARATOR = re.compile(r"⟦(?:and|or|,? ?and|,? ?or)⟧|[,;]")
MATRIX = re.compile(r"\\begin\{([pb]matrix)\}(.*)\\end\{\1\}", re.DOTALL)
RELATION = re.compile(r"\\(?:le|ge|neq?)(?![a-z]) ?|[<>≠]")
REVERSED = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le"}


def same_answer(answer, gold, question_words):
    """Whether two tidy answers are the same, as the head of this file says."""
    answer_name, answer = without_name(answer, question_words)
    gold_name, gold = without_name(gold, question_words)
    if answer_name and gold_name and answer_name != gold_name:
        return False
    if answer == gold:
        return True

    answer_kind, answer_values = several_values(answer, question_words)
    gold_kind, gold_values = several_values(gold, question_words)
    if len(answer_values) > 1 or len(gold_values) > 1:
        return answer_kind == gold_kind and same_values(answer_values, gold_values, question_words)

    if "=" in gold:
        gold_sides = gold.split("=")
        if re.search("[A-Za-z]", gold):  # an equation between variables
            return same_value(answer, gold)
        return any(same_answer(answer, side, question_words) for side in gold_sides)
    if "=" in answer:
        sides = [side for side in answer.split("=") if not is_name(side, question_words)]
        return 0 < len(sides) < 5 and all(same_answer(s, gold, question_words) for s in sides)
    if "\\approx" in answer and "\\approx" not in gold:
        value, *approximations = answer.split("\\approx")
        return same_answer(value, gold, question_words) and all(
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
    answer_matrix = MATRIX.fullmatch(answer)
    gold_matrix = MATRIX.fullmatch(gold)
    if answer_matrix and gold_matrix:
        answer_rows = answer_matrix[2].split("\\\\")
        gold_rows = gold_matrix[2].split("\\\\")
        return len(answer_rows) == len(gold_rows) and all(
            same_one_by_one(answer_row.split("&"), gold_row.split("&"), question_words)
            for answer_row, gold_row in zip(answer_rows, gold_rows, strict=True)
        )
    if answer_parts or gold_parts or answer_matrix or gold_matrix:
        return False
    return same_quantity(answer, gold, question_words)


def same_one_by_one(answer_parts, gold_parts, question_words):
    return len(answer_parts) == len(gold_parts) and all(
        same_answer(answer, gold, question_words)
        for answer, gold in zip(answer_parts, gold_parts, strict=True)
    )


def without_name(text, question_words):
    r"""Returns (name, value): of `x=3` and `x\in[0,1]` the two sides, else (None, text)."""
    named = re.match(r"([^=]*?)(?:=|\\in(?![a-z]) ?)([^=]+)$", text)
    name = named[1].strip("⟦⟧ ") if named else ""
    if name and is_name(name, question_words):
        return name, named[2]
    return None, text


def split_outside(pattern, text):
    """Returns the parts of a text between matches of a pattern that are inside no bracket."""
    parts = []
    depth = 0
    start = 0
    for sign in re.finditer(rf"\\?[([{{]|\\?[])}}]|{pattern.pattern}", text):
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
    parts = split_outside(re.compile(r"\\cup(?![a-z]) ?"), text)
    if len(parts) > 1:
        return "union", parts
    is_set = re.fullmatch(r"\\\{.*\\\}", text) is not None
    inside = text[2:-2] if is_set else text
    values = [value for value in split_outside(SEPARATOR, inside) if value]
    values = [value for listed in values for value in both_signs(listed)]
    if is_set and len(values) < 2:
        return "list", [text]
    are_relations = len(values) > 1 and all(RELATION.search(value) for value in values)
    if are_relations and "⟦and⟧" not in text:
        return "union", [as_interval(value, question_words)[1] or value for value in values]
    return "list", values


def both_signs(value):
    r"""Returns the two values that a formula with one \pm stands for, or the value alone."""
    if value.count("\\pm") != 1:
        return [value]
    return [re.sub(r"\\pm ?", "+", value), re.sub(r"\\pm ?", "-", value)]


def same_values(answers, golds, question_words):
    """Whether two lists hold the same values, in any order, under the same names or none."""
    if len(answers) != len(golds) or len(golds) > MAX_VALUES:
        return False
    answer_names = {without_name(answer, question_words)[0] for answer in answers} - {None}
    gold_names = {without_name(gold, question_words)[0] for gold in golds} - {None}
    if len(gold_names) > 1 and answer_names != gold_names:
        return False
    if len(gold_names) < 2 and len(answer_names | gold_names) > 1:
        return False
    remaining = list(answers)
    for gold in golds:
        for answer in remaining:
            if same_answer(answer, gold, question_words):
                remaining.remove(answer)
                break
        else:
            return False
    return True


def as_interval(text, question_words):
    r"""Returns (name, interval) of an inequality: of `2<x\le5` it is ("x", "(2,5]"), or Nones.

    An interval is returned as it is, without a name.
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
    """Returns the parts of a tuple or interval, two or more between brackets, or None."""
    if not text or text[0] not in "([" or text[-1] not in ")]":
        return None
    inside = text[1:-1]
    parts = split_outside(re.compile(","), inside)
    closes_early = min(depths(inside)) < 0
    return parts if len(parts) > 1 and not closes_early else None


def depths(text):
    """Returns how many brackets are open behind each sign of a text, and 0 for its beginning."""
    result = [0]
    for sign in text:
        result.append(result[-1] + (sign in "([{") - (sign in ")]}"))
    return result


# ---- a value with a unit -------------------------------------------------------------------------

QUANTITY = re.compile(
    r"(?P<leading>(?:⟦[^⟧]*⟧)*)(?P<value>[^⟦⟧%°]*)(?P<unit>(?:⟦[^⟧]*⟧|%|°)*(?:\^\{?[23]\}?|[²³])?)"
)
SAME_UNIT = {"°": "degree", "degrees": "degree", "%": "percent", "dollars": "dollar"}


def same_quantity(answer, gold, question_words):
    """Whether two values with units are the same. If only one has a unit, it does not count."""
    answer_quantity = QUANTITY.fullmatch(answer)
    gold_quantity = QUANTITY.fullmatch(gold)
    if not answer_quantity or not gold_quantity or not answer_quantity["value"]:
        return False
    answer_unit = unit_of(answer_quantity)
    gold_unit = unit_of(gold_quantity)
    if answer_unit and gold_unit and answer_unit != gold_unit:
        return False
    if answer_unit != gold_unit and not are_known(answer_quantity["unit"], UNITS, question_words):
        return False
    leading_words = LEADING_WORDS | set(gold_quantity["leading"].split()) | {"dollar"}
    if not are_known(answer_quantity["leading"], leading_words):
        return False

    answer = answer_quantity["value"]
    gold = gold_quantity["value"]
    if answer_unit == "percent" != gold_unit:  # 50% is 1/2, and is 50 where percents are asked for
        is_asked_in_percent = re.fullmatch(r"[1-9][0-9]*(\.[0-9]+)?", gold)
        return same_value(f"\\frac{{{answer}}}{{100}}", gold) or (
            is_asked_in_percent is not None and same_value(answer, gold)
        )
    if gold_unit == "percent" != answer_unit:
        return same_value(answer, gold) or same_value(answer, f"\\frac{{{gold}}}{{100}}")
    return same_value(answer, gold)


def unit_of(quantity):
    """Returns the unit of a quantity in one spelling, "" if it has none. Words before it may be."""
    leading = [word for word in re.findall("⟦([^⟧]*)⟧", quantity["leading"])]
    words = re.sub("[⟦⟧. ()]|\\^|[{}]", "", quantity["unit"])
    if "dollar" in leading:
        words = f"{words}dollar" if words not in ("dollar", "dollars") else words
    words = SAME_UNIT.get(words, words)
    return words


def rounds_to(gold, approximation):
    """Whether a decimal number is a value rounded to the digits that it has."""
    number = re.fullmatch(r"(-?[0-9]+(?:\.([0-9]+))?)(?:⟦[^⟧]*⟧|%|°)*", approximation.strip())
    if not number:
        return False
    tolerance = f"5e-{len(number[2] or '') + 1}"
    gold_quantity = QUANTITY.fullmatch(gold)
    return gold_quantity is not None and same_formula(number[1], gold_quantity["value"], tolerance)


# ---- a value -------------------------------------------------------------------------------------

COMMAND = re.compile(r"\\[A-Za-z]+|\\.")
KNOWN_COMMANDS = re.compile(
    rf"""
    \\(?: frac | sqrt | pi | infty | sin | cos | tan | cot | sec | csc | arcsin | arccos | arctan
        | log | ln | exp | le | ge | lfloor | rfloor | lceil | rceil | [{{}}] ) (?![a-z])
    | {GREEK}
    """,
    re.VERBOSE,
)
KNOWN_SIGNS = re.compile(r"[A-Za-z0-9.+*/^_(){}\[\]|<>=, -]*")
# Two numbers side by side are no number: 1 2.
SIDE_BY_SIDE = re.compile(r"[0-9.] +[0-9.]")
SUBSCRIPT_OR_LETTER = re.compile(r"_ ?\{?(\w+)|([A-Za-z])")


LOGARITHM_BASE = re.compile(r"\\log ?_ ?(\w|\{\w+\})")


def same_value(answer, gold):
    """Whether two formulas without words have the same value."""
    if answer == gold:
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
    """Returns what has to be equal in two formulas besides their values.

    That is: variables in their case, number bases and other subscripts; whether there is a
    relation; square brackets and braces.
    """
    text = LOGARITHM_BASE.sub("", text)  # which is a part of the value
    commands = COMMAND.findall(text)
    letters = COMMAND.sub(" ", text)
    return (
        set(SUBSCRIPT_OR_LETTER.findall(letters)),
        {command for command in commands if re.fullmatch(GREEK, command)},
        re.search("[<>=]", letters) is None and not {"\\le", "\\ge"} & set(commands),
        [sign for sign in re.findall(r"\\[{}]|[][]", re.sub(r"\\sqrt\[[^]]*\]", "", text))],
    )


# Forty digits in a row.
EXPENSIVE = re.compile(r"[0-9]{40}")
# An exponent in braces, a digit or a letter, with no further exponent behind it.
EXPONENT = re.compile(r"\^ ?(\d|[A-Za-z]|\{[^{}^]*(?:\{[^{}^]*\}[^{}^]*)*\})(?! ?\^)")
MAX_EXPONENT = 1000  # of all exponents' numbers, multiplied


def is_safe(text):
    """Whether a formula has known commands and signs alone, and is quick to compute.

    sympy's big integers do not react to a time limit, so large powers are never computed. A formula
    must not break out of the box that it is put into either.
    """
    exponents = EXPONENT.findall(text)
    exponent_numbers = re.findall("[0-9]+", " ".join(exponents))
    total_exponent = prod(max(1, int(number)) for number in exponent_numbers)
    return (
        KNOWN_SIGNS.fullmatch(KNOWN_COMMANDS.sub(" ", text)) is not None
        and SIDE_BY_SIDE.search(text) is None
        and EXPENSIVE.search(text) is None
        and total_exponent <= MAX_EXPONENT
        and len(exponents) == text.count("^")
        and closing_brace(text + "}") == len(text)
    )
