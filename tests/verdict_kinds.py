"""Completions of known truth, made of contexts, dresses and values: what may be paid.

Three makers give wrong answers that look right: the right number in a box inside a formula, beside
words that change it, or made of digits that do not belong together. The fourth gives answers that
were written by hand. fuzz.py judges all of them, test_verdicts.py a sample.
"""

import itertools
import re
import tomllib
from pathlib import Path

from tasks.registry import TASKS

VALUES = ("12", "3", "-7", "250", "\\frac{1}{2}", "2.5")
DRESSES = (
    "{}",
    "${}$",
    "\\({}\\)",
    "\\[ {} \\]",
    "**{}**",
    "{}.",
    "x = {}",
    "$x = {}$",
    "The answer is {}",
    "The answer is ${}$.",
    "Therefore, {}",
    "\\text{{So }}{}",
)
TAGS = ("<answer>{}</answer>", "{}", "<answer>{}")

# ---- a box inside a formula ----------------------------------------------------------------------

BOX = "\\boxed{{{}}}"
BOX_CONTEXTS = (
    "-#",
    "- #",
    "−#",
    "+-#",
    "\\pm #",
    "\\sqrt{#}",
    "\\sqrt#",
    "\\sqrt[3]{#}",
    "\\frac{1}{#}",
    "\\frac{#}{2}",
    "\\frac{#}{#}",
    "\\dfrac{3}{#}",
    "\\neq#",
    "\\ne #",
    "≠ #",
    "\\not= #",
    "< #",
    "> #",
    "\\le #",
    "\\geq #",
    "\\approx #",
    "\\sim #",
    "not #",
    "is not #",
    "isn't #",
    "never #",
    "cannot be #",
    "half of #",
    "twice #",
    "more than #",
    "at least #",
    "at most #",
    "the square of #",
    "the reciprocal of #",
    "minus #",
    "negative #",
    "either 5 or #",
    "5 and #",
    "2*#",
    "2 * #",
    "2 \\times #",
    "2\\cdot #",
    "2 #",
    "2#",
    "2x#",
    "x#",
    "\\pi #",
    "10^{#}",
    "10^#",
    "2^{-#}",
    "e^{#}",
    "0.#",
    "5.#",
    "1,#",
    "1{,}#",
    "1/#",
    "1 + #",
    "x + #",
    "5 - #",
    "100 \\div #",
    "\\log #",
    "\\ln(#)",
    "\\sin #",
    "f(#)",
    "(#)^2",
    "(#, 5)",
    "[#, 5)",
    "\\{#, 5\\}",
    "\\overline{#}",
    "\\text{not }#",
    "\\text{minus }#",
    "5 = #",
    "5 = 6 = #",
    "2x = #",
    "-x = #",
    "x^2 = #",
    "xy = #",
    "eleven = #",
    "half = #",
    "square of x = #",
    "x \\in #",
    "the area is 5 + 6 = #",
    "the area is not #",
    "the total is 5 or #",
    "half of the total is 5 = #",
    "so we get 2x = #",
    "for x = 5, we have -x = #",
    "**minus** #",
    "**half of** #",
    "#!",
    "# !",
    "#^2",
    "#^{-1}",
    "#²",
    "#_8",
    "#'",
    "#/2",
    "# / 2",
    "#\\times 2",
    "# \\cdot 5",
    "#*2",
    "# * 2",
    "#x",
    "# y",
    "#\\pi",
    "#\\sqrt{2}",
    "#i",
    "#,000",
    "#{,}000",
    "#.5",
    "#5",
    "# 5",
    "# + 1",
    "# - 1",
    "#-1",
    "# \\pm 1",
    "#:30",
    "# < x",
    "# = 5",
    "# \\approx 5",
    "#...",
    "#\\ldots",
    "#, 5",
    "#k",
    "# thousand",
    "#\\text{ thousand}",
    "# million",
    "# dozen",
    "#\\text{ dozen}",
    "# hundredths",
    "# halves",
    "# times two",
    "# less five",
    "# squared",
    "# or 5",
    "# and 5",
    "# \\text{ or } 5",
    "# and a half",
    "# to 99",
    "# percent of 5",
    "# dozen that we need",
    "# dollars to 5",
    "# is wrong",
    "# is incorrect",
    "# is not the answer",
    "# base eight",
)


def boxes_in_formulas():
    """Yields (task, gold, completion): the box holds the gold value, the formula another one."""
    for context, dress, value, tags in itertools.product(BOX_CONTEXTS, DRESSES, VALUES, TAGS):
        text = tags.format(dress.format(context.replace("#", BOX.format(value))))
        yield "math", value, text
        yield "gsm8k", value, text


# ---- words that change a number ------------------------------------------------------------------

ALTERED = (
    "# twelfths",
    "# thirds",
    "# times two",
    "# times as many",
    "# times",
    "# less five",
    "# less than 5",
    "# base eight",
    "# is incorrect",
    "# is wrong",
    "# is not it",
    "#None",
    "# None",
    "# none",
    "# hundred",
    "# thousand",
    "#k",
    "#K",
    "#M",
    "#bn",
    "# dozen",
    "# squared",
    "# cubed",
    "# factorial",
    "# over 2",
    "# plus one",
    "# minus one",
    "# or so",
    "# or more",
    "# at most",
    "# point five",
    "# and a half",
    "# to the fifth",
    "# modulo 5",
    "# mod 5",
    "# choose 2",
    "# percent of ten",
    "# score",
    "# in base 8",
    "# multiplied by two",
    "# divided by two",
    "# halves",
    "# tenths",
    "# per mille",
    "not #",
    "minus #",
    "negative #",
    "half of #",
    "twice #",
    "at most #",
    "at least #",
    "less than #",
    "more than #",
    "almost #",
    "square of #",
    "reciprocal of #",
    "reciprocal of x = #",
    "square of x = #",
    "eleven = #",
    "half = #",
    "twice x = #",
    "sqrt x = #",
    "xy = #",
    "2x = #",
    "-x = #",
    "x + 1 = #",
    "x^2 = #",
    "\\frac{1}{x} = #",
    "\\text{reciprocal of }#",
    "\\text{at most }#",
    "\\text{not }#",
    "\\text{half of }#",
    "\\text{minus }#",
    "#\\text{ thousand}",
    "#\\text{ dozen}",
    "#\\text{ halves}",
    "#\\text{ is wrong}",
    "#\\text{ times two}",
    "#\\text{ per mille}",
    "#\\ldots",
    "#...",
    "#\\dots",
    "# \\approx 5",
    "# \\sim 5",
    "#!",
    "#'",
    "#x",
    "#\\pi",
    "#_5",
    "#^2",
)
WORD_DRESSES = (
    "{}",
    "\\boxed{{{}}}",
    "${}$",
    "$\\boxed{{{}}}$",
    "The answer is {}",
    "{}.",
    "**{}**",
)
WHOLE = ("12", "3", "250", "2.5", "1000")


def altered_numbers():
    """Yields (task, gold, completion): what stands beside the gold number makes it another one."""
    for context, dress, value in itertools.product(ALTERED, WORD_DRESSES, WHOLE):
        text = f"<answer>{dress.format(context.replace('#', value))}</answer>"
        yield "math", value, text
        yield "gsm8k", value, text


# ---- digits that do not belong together ----------------------------------------------------------

BETWEEN_DIGITS = (
    "\\quad",
    "\\quad ",
    "\\qquad",
    "\\;",
    "\\:",
    "\\ ",
    "~",
    " ",
    "  ",
    "\n",
    "\n\n",
    " \n ",
    "\t",
    "\\text{}",
    "\\text{ }",
    "\\hspace{1em}",
    "\\\\",
    "|",
    "&",
    "$ $",
    "{}",
    ";",
    ", ",
    ". ",
    "_",
    "\\cdot",
    "*",
    "\u200b",
)
GLUED = (("1", "2"), ("12", "3"), ("1", "234"), ("2", "5"), ("10", "00"))


def glued_digits():
    """Yields (task, gold, completion): the answer shows the digits of the gold number, apart."""
    for between, (left, right), dress in itertools.product(BETWEEN_DIGITS, GLUED, WORD_DRESSES):
        if len(right) == 3 and not between.strip(" "):
            continue  # 1 234 is a way to write 1234
        pairs = (
            f"{left}{between}{right}",
            f"\\text{{{left}}}{between}\\text{{{right}}}",
            f"\\mathrm{{{left}}}{between}{right}",
        )
        for pair in pairs:
            text = f"<answer>{dress.format(pair)}</answer>"
            yield "math", left + right, text
            yield "gsm8k", left + right, text


# ---- answers as people and models write them -----------------------------------------------------


def hand_written():
    """Yields (task, gold, completion, whether it is right), from verdicts.toml.

    Under "math" and "gsm8k" it has answers; under "whole" whole completions, for both tasks; under
    "lines" such of several lines, with | for a line end.
    """
    for section, row in written_rows():
        for is_right, texts in ((True, row.get("right", [])), (False, row.get("wrong", []))):
            for text in texts:
                if section in ("math", "gsm8k"):
                    yield section, row["gold"], f"<answer>{text}</answer>", is_right
                    yield section, row["gold"], f"<answer>\\boxed{{{text}}}</answer>", is_right
                else:
                    text = text.replace("|", "\n") if section == "lines" else text
                    for task, tags in itertools.product(("math", "gsm8k"), TAGS):
                        yield task, row["gold"], tags.format(text), is_right


def written_rows():
    """Yields (section, row) of verdicts.toml."""
    verdicts = tomllib.loads(Path(__file__).with_name("verdicts.toml").read_text("utf-8"))
    for section, rows in verdicts.items():
        for row in rows:
            yield section, row


def solved_among(answers):
    """Returns those of many (task, gold, completion) that count as solved."""
    return [
        (task, gold, text)
        for task, gold, text in answers
        if TASKS[task].solved({"question": "", "answer": gold}, text)
    ]


def moved_by_one(gold):
    """Yields a gold answer with one of its numbers moved up or down by one, for each of them."""
    for number in re.finditer(r"[0-9]+", gold):
        for step in (-1, 1):
            moved = int(number[0]) + step
            if moved >= 0:
                yield f"{gold[: number.start()]}{moved}{gold[number.end() :]}"


def golds_moved_by_one():
    """Yields (task, gold, completion): golds of verdicts.toml, one number of each moved by one."""
    for section, row in written_rows():
        if section in ("math", "gsm8k"):
            for moved in moved_by_one(row["gold"]):
                yield section, row["gold"], f"<answer>\\boxed{{{moved}}}</answer>"
