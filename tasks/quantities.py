"""The number that a short text states: "12 apples", "$1,234.50", "x = 37", "3 + 4 = 7". For GSM8K.

A number may be written in many ways, but only known words may stand beside it (words.py).
"""

import re
from fractions import Fraction

from tasks.answers import boxed, equation_sides, normalise_signs
from tasks.expressions import FRACTION, arithmetic
from tasks.words import LEADING_WORDS, UNITS, are_known

# The most characters of a number with what is beside it. Anything longer is not an answer.
MAX_LENGTH = 300

NUMBER = r"""
    (?P<sign> [-+]? ) \ *
    (?: (?P<whole> [0-9]+ ) \ + (?= [0-9]+/ ) )?        # the 1 of 1 1/2
    (?= \.?[0-9] )
    (?P<above>                                          # the number, or the numerator
        (?: [0-9]{1,3} (?:,[0-9]{3})+ | [0-9]* )        # 1,234
        (?: \.[0-9]+ )?
    )
    (?: \ ?/\ ? (?P<below> [0-9]+ (?:\.[0-9]+)? )
      | (?: [eE] | \ ?\*\ ?10\ ?\^ ) \ ? \{? (?P<power> [-+]?[0-9]{1,3} ) \}?    # 1e3 or 1*10^3
    )?
"""
ONLY_NUMBER = re.compile(rf"\ * {NUMBER} \ *", re.VERBOSE)
NUMBER_WITH_WORDS = re.compile(
    rf"""
    (?P<leading> [A-Za-z ,:]* )                         # about; Total:
    {NUMBER} \ *
    (?P<unit>                                           # apples, %, km/h, cm^2, (apples)
        /? [A-Za-z%°(] [A-Za-z%°./,'()\ -]* (?: [²³] | \^\ ?\{{?[23]\}}? )?
    )?
    \ *
    """,
    re.VERBOSE,
)
# Markdown's asterisks around bold text, but not those of a power such as 2**3 or 2 ** 3.
BOLD_MARK = re.compile(r"(?<!\S)\*\*(?=\S)|(?<=\S)\*\*(?!\S)")


def exact_value(number):
    """Returns the value of a match of NUMBER as a Fraction; None if its denominator is zero."""
    below = Fraction(number["below"] or 1)
    if below == 0:
        return None
    value = Fraction(number["above"].replace(",", "")) / below
    value *= Fraction(10) ** int(number["power"] or 0)
    value += int(number["whole"] or 0)
    return -value if number["sign"] == "-" else value


def plain_number(text):
    """Returns the value of a text that is a number and nothing else as a Fraction, or None."""
    if len(text) > MAX_LENGTH:
        return None
    number = ONLY_NUMBER.fullmatch(FRACTION.sub(r" \1/\2 ", text))
    return exact_value(number) if number else None


def read_number(text, question_words=frozenset()):
    """Returns the one number that a short text states, exactly, as a Fraction, or None.

    50% is 50. In "3 + 4 = 7" each side has to be a name or have the same value as the others, and
    at least one side has to be a number rather than an expression.

    question_words: words of the question (words.words_of), which may also stand beside the number.
    """
    if len(text) > MAX_LENGTH:
        return None
    if "boxed{" in text:
        text = boxed(text)
    text = FRACTION.sub(r" \1/\2 ", normalise_signs(text))
    text = re.sub(r"\b([ap])\.m\b\.?", r"\1m", text)  # 5 p.m. -> 5 pm
    text = BOLD_MARK.sub(" ", text)
    text = re.sub(r"<<[^<>]*>>", "", text)  # GSM8K's calculator: 3 + 4 = <<3+4=7>>7
    text = re.sub(r"^\((-?[0-9.]+)\)$", r"\1", text)  # (-3)
    states_a_number = False
    values = set()
    try:
        for side in equation_sides(text.removeprefix("="), question_words):
            number = NUMBER_WITH_WORDS.fullmatch(side.strip())
            if number is None:
                values.add(arithmetic(side))
            elif are_known(number["leading"], LEADING_WORDS) and are_known(
                number["unit"] or "", UNITS, question_words
            ):
                states_a_number = True
                values.add(exact_value(number))
            else:
                return None
    except (ValueError, ZeroDivisionError):
        return None
    return values.pop() if states_a_number and len(values) == 1 else None
