r"""Finding the answer in a completion, and writing each sign in one way.

A model may wrap an answer as it likes: in tags, in a box, between dollar signs, as "x = 37". But
the value has to be unambiguous: whatever stands around a box or beside a number has to be on a list
of what may stand there. Anything else may change the value, so the completion then has no answer.

    extract_answer, boxed, final_answer, without_prose   find the answer in a completion
    normalise_signs, equation_sides                      write each sign in one way

Answers are then read by expressions.py (countdown), quantities.py (GSM8K) and latex.py (MATH).
"""

import re

from tasks.words import EQUATION_WORDS, INTRODUCTION_WORDS, are_known, is_name

# ---- which part of a completion is the answer ----------------------------------------------------


def extract_answer(text):
    """Returns the content of the last `<answer>...</answer>`, up to its first closing tag, or "".

    If no tag is closed, returns everything after the last opening tag that is followed by text.
    """
    parts = text.split("<answer>")[1:]
    closed = [part.partition("</answer>")[0] for part in parts if "</answer>" in part]
    if closed:
        return closed[-1].strip()
    unclosed = [part for part in parts if part.strip()]
    return unclosed[-1].strip() if unclosed else ""


TAG = re.compile(r"</?[a-z_]{2,}>|<\|[^<>]*\|>|<>")
# What may stand directly around a box: math delimiters, Markdown, LaTeX's spaces and sizes.
WRAPPING = r"""
    (?: \s | \$ | \\[][(),;:!] | \*\* | ` | & | [∴→⇒✓✅]
      | \\(?:displaystyle|q?quad|large|Large|huge|Huge|implies|therefore|Rightarrow)(?![a-z])
      | \\(?:begin|end)\{(?:align|aligned|equation|gather)\*?\} | \\\\ )*
"""
OPENING = re.compile(WRAPPING + "$", re.VERBOSE)
# The end of a sentence or heading; what follows is read on its own.
CLAUSE_END = re.compile(r"[.?;]\s+ | (?<= [A-Za-z)}\]$*] ) (?: [!:]\s | [.?;:]$ )", re.VERBOSE)
# How a sentence introduces its answer: "the answer is", "Therefore,".
INTRODUCING = r"""
    (?: is | are | be | was | were | becomes? | equals? | gives? | yields? | gets? | got | has
      | have | obtain(?:ed)? | finds? | found | that | makes? | costs? | needs? | takes?
      | earns? | pays? | spends? | saves? | sells? | buys? | uses? | weighs? | so | thus
      | therefore | hence | then | finally | rather | namely | giving | given\ by | making
      | leaving | leaves | (?: equal | comes | amounts | simplifies | reduces | evaluates ) \ to
    )
"""
INTRODUCTION = re.compile(rf"\b {INTRODUCING} [,:]? $", re.VERBOSE | re.IGNORECASE)
# Words alone before the equation at the end of a clause: "The total area is".
BEFORE_EQUATION = re.compile(
    rf"""
    [A-Za-z ,'’:]* \b (?: {INTRODUCING} [,:]? (?: \ a\ total\ of )? | for\ a\ total\ of ) \s
    """,
    re.VERBOSE | re.IGNORECASE,
)
# Words in bold, as in "**Final Answer:**".
BOLD_WORDS = re.compile(r"\*\*([A-Za-z][A-Za-z ,]*:?)\*\*")
# A line that is continued in the next one: it ends in an operator or a LaTeX command.
GOES_ON = re.compile(r"(?:[-+*/=<>^_({,&≠×÷·]|\\[a-zA-Z]+|\\\\) *$")
# A line that continues a formula from the line before.
CONTINUES = re.compile(r"\s*(?:[*/^×÷·]|[-+=<>] ?[\\0-9a-z]|\\(?:times|cdot|div|pm|le|ge|ne)\b)")
NEGATION = re.compile(
    r"(?i)\b(?:not|no|never|cannot|neither|nor|wrong|incorrect|false|unless|except)\b|n['’]t\b"
)
# A text command around words, so that it can be replaced by the words.
TEXT_COMMAND = re.compile(
    r"\\(?:text(?:bf|it|rm|tt|sf|normal)?|math(?:rm|bf|it|sf)|mbox) ?\{([^{}]*)\}"
)
# Words that change the number that a sentence states.
CHANGE = re.compile(
    r"""
    \b (?: half | twice | thrice | halved? | doubled? | tripled? | squared? | cubed? | minus | plus
         | times | negative | opposite | reciprocal | inverse | roots? | less | more | fewer
         | greater | incorrectly | wrongly ) \b
    """,
    re.VERBOSE | re.IGNORECASE,
)
# What may follow a box: a unit, which is part of the answer, and then the end of a clause.
BEHIND_BOX = re.compile(
    rf"""
    {WRAPPING}
    (?:
        (?P<unit>
            (?: [A-Za-z][A-Za-z '’]*? | {TEXT_COMMAND.pattern.replace(" ", "[ ]")}
              | \\?% | ° | \^[ ]?\{{?\\circ\}}? | \([a-z ]+\) )
            (?: [²³] | [ ]?\$?\^[ ]?\{{?[23]\}}? )?
        )
        (?: (?<=\bways) (?: (?! \b (?:and|or|but|not) \b ) [A-Za-z '’] )* )?    # "to seat them"
    )?
    {WRAPPING}
    (?: $ | \n | —\s[A-Za-z] | [.?] (?= \s | [$*`\\] | $ ) 
      | [,;:] (?= \s+ (?!(?:or|and|but|not)\b) [A-Za-z]{{2}} | $ ) )
    """,
    re.VERBOSE,
)
# What a question may ask for, as the left side of an equation: a + b, 100a + b, |AB|, f(g(2)),
# \gcd(24, 36).
TERM = r"[0-9]* (?: [a-z] | [A-Z]{1,2} ) (?: \^ \{? 2 \}? )?"
ASKED_FOR = re.compile(
    rf"""
    \s* (?: (?: {TERM} \s* [+-] \s* )+ {TERM}
          | [fghpqFGHPQ] \( [^()=]* (?: \( [^()=]* \) [^()=]* )? \)
          | \|[A-Z]{{2}}\|
          | \\(?:gcd|lcm|binom|dbinom|max|min|det)\b [^<>]* ) \s* $
    """,
    re.VERBOSE,
)
IS_THE_ANSWER = re.compile(
    r"^ *(?:is|as) (?:the|our|my)(?: final| correct| only)* (?:answer|solution|result)"
)


def boxed(text):
    r"""Returns the content of the last \boxed{...}, or "". An open box ends with the text.

    What stands around the box has to be known. A unit after it and an equation before it are
    returned with the content: `3 + 4 = \boxed{7} apples` gives `3 + 4 =7 apples`. A box that is
    part of another formula or of an unknown phrase does not count: -\boxed{3}, \boxed{3}!, not
    \boxed{3}.
    """
    before, box, after = text.rpartition("boxed{")
    if not box:
        return ""
    end = closing_brace(after)
    inside = after[:end].strip()

    behind = TAG.sub("\n\n", after[end + 1 :].lstrip(" ")[:80])
    behind, _, next_line = behind.partition("\n")
    if CONTINUES.match(next_line) and not re.search(r"\$|\\[)\]]", behind):
        return ""
    behind = IS_THE_ANSWER.sub("", behind, count=1)
    behind_box = BEHIND_BOX.match(behind)
    if not behind_box:
        return ""
    if behind_box["unit"]:
        inside = f"{inside} {behind_box['unit']}"

    clause = clause_before(before)
    phrase = clause.rpartition(", ")[2]
    is_formula = clause.endswith(("=", "\\in"))
    if "boxed{" in (clause if is_formula else phrase):  # this is one of several boxes
        return ""
    if clause.endswith("="):
        sides = without_introduction(clause).split("=")[:-1]
        stated_sides = [side for side in sides if not is_name(side) and not ASKED_FOR.match(side)]
        return "=".join([side for side in stated_sides if side.strip()] + [inside])
    if clause.endswith("\\in"):
        name = without_introduction(clause.removesuffix("\\in"))
        return f"{name} \\in {inside}" if is_name(name) else ""
    has_verb = INTRODUCTION.search(clause) is not None
    is_heading = are_known(phrase, INTRODUCTION_WORDS) and re.fullmatch("[A-Za-z ,:]*", phrase)
    negated = phrase if len(phrase.split()) > 2 else clause
    is_introduced = (has_verb or is_heading) and not NEGATION.search(negated)
    return inside if not clause or is_introduced else ""


def clause_before(text):
    """Returns the clause at the end of a text, without the delimiters around formulas."""
    text = TAG.sub("\n", text[-300:].removesuffix("\\"))  # a tag ends the clause before it
    text = BOLD_WORDS.sub(plain_heading, text)
    *lines, clause = text.split("\n")
    while lines and (GOES_ON.search(lines[-1]) or re.match(r"\s*&?\s*=", clause)):
        clause = f"{lines.pop()} {clause}"
    clause = OPENING.sub("", CLAUSE_END.split(clause)[-1])
    clause = re.sub(
        r"\\(?:begin|end)\{[a-z]+\*?\}|\$|\\[()\[\]]|\\\\|&", " ", TEXT_COMMAND.sub(r" \1 ", clause)
    )
    return " ".join(clause.split())


def plain_heading(bold):
    """The words of a match of BOLD_WORDS, without the asterisks if they introduce an answer."""
    is_heading = are_known(bold[1], INTRODUCTION_WORDS | EQUATION_WORDS)
    return bold[1] if is_heading else bold[0]


def without_introduction(clause):
    """Returns a clause without the words before its equation: "so we get x =" gives "x ="."""
    introduction = BEFORE_EQUATION.match(clause)
    if introduction and not NEGATION.search(clause) and not CHANGE.search(introduction[0]):
        clause = clause.removeprefix(introduction[0])
    words = clause.split()
    while len(words) > 1 and words[0].strip(",:").lower() in EQUATION_WORDS:
        words.pop(0)
    return " ".join(words)


def last_box(text):
    r"""Returns the content of the last \boxed{...}, whatever is around it, or "". For solutions."""
    _, _, after = text.rpartition("boxed{")
    return after[: closing_brace(after)].strip() if "boxed{" in text else ""


def closing_brace(text):
    """Returns the index that closes a brace opened before `text`; len(text) if nothing does."""
    depth = 1
    for brace in re.finditer("[{}]", text):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return brace.start()
    return len(text)


# An answer with whatever a chat model puts around it.
WRAPPED_ANSWER = re.compile(
    r"""
    \#* \ ? (?: \*\* )?                              # a heading, bold words
    (?:
        (?i: (?: (?:so|thus|hence|therefore),?\ )? (?:(?:the|our)\ )? (?:final\ )?
             (?:answer|expression|solution|result|value|probability) (?:\ is)? )
        (?: : | \*\* )* \s
    )?
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

    This is the box inside the answer tags; without a box, all that the tags hold; without tags, the
    last box in the text.
    """
    text = text.replace("\\fbox{", "\\boxed{")
    answer = extract_answer(text) or boxed(text)
    if "boxed{" in answer:
        return boxed(answer)
    return WRAPPED_ANSWER.fullmatch(answer)["answer"].strip()


# Two or more letters that belong neither to a LaTeX command nor to a name such as x1.
WORD = re.compile(r"(?<![A-Za-z\\])[A-Za-z]{2,}(?![A-Za-z0-9])")


def without_prose(text):
    """Returns the lines without words: "So we get:" above an answer does not belong to it."""
    return "\n".join(line for line in text.splitlines() if not WORD.search(line))


# ---- one way to write each sign ------------------------------------------------------------------

# Typographic signs and their plain forms: minus and dash, multiplication, division.
PLAIN_SIGNS = str.maketrans(
    {"½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "~": " "}
    | dict.fromkeys("−–", "-")
    | dict.fromkeys("×·⋅∙•∗", "*")
    | dict.fromkeys("÷∕⁄", "/")
)
THOUSANDS_APART = re.compile(r"(?<![0-9.,])(?<![0-9.,] )([0-9]{1,3}(?: [0-9]{3})+)(?! ?[0-9/])")
# LaTeX's signs and the plain signs that replace them, in this order.
LATEX_SIGNS = {
    # \text{5 apples} -> 5 apples
    TEXT_COMMAND.pattern: r" \1 ",
    # 1{,}234 and 1\,234 and 1,\!234 and 1, \! 234 -> 1234
    r"(?<=[0-9])(?:\{,\}|\\,|(?:, ?)?\\! ?)(?=[0-9]{3}(?![0-9]))": "",
    # \sqrt {2} -> \sqrt{2}
    r"(\\(?:sqrt|[dtc]?frac|[dt]?binom)) +(?=[{\[])": r"\1",
    # \dfrac, \tfrac -> \frac
    r"\\[dtc]?frac(?![a-z])": r"\\frac",
    # \frac12 -> \frac{1}{2}, \frac{270}7 -> \frac{270}{7}, \frac\pi4 -> \frac{\pi}{4}
    r"\\frac ?([0-9]|\\pi(?![a-z])|(?<= )[a-zA-Z]) ?(?=[\\{0-9a-zA-Z])": r"\\frac{\1}",
    r"(\\frac ?\{[^{}]*\}) ?([0-9a-zA-Z]|\\pi(?![a-z]))": r"\1{\2}",
    # \sqrt2 -> \sqrt{2}
    r"\\sqrt ?(\[[0-9]\])? ?([0-9A-Za-z])": r"\\sqrt\1{\2}",
    # no \left, \quad, \( \) \[ \] or LaTeX spaces; of \$ and \% the sign stays
    r"\\(?:left|right|q?quad|displaystyle|textstyle|[lL]arge|huge)(?![a-z])": " ",
    r"(?<!\\)\\[()\[\],;:! ]": " ",
    r"\\(?=[$%])": "",
    # ^\circ, ^{\circ} -> °
    r" ?\^ ?(?:\\circ|\{\\circ\})": "°",
    # \times, \cdot -> *
    r"\\(?:times|cdot|ast)(?![a-z])": "*",
    r"\\div(?![a-z])": "/",
}
LATEX_SIGN_PATTERNS = {re.compile(pattern): sign for pattern, sign in LATEX_SIGNS.items()}
DIGITS_ON_TWO_LINES = re.compile(r"(?<=[0-9])[^\S\n]*\n\s*(?=[0-9])")
# Dollars, pounds and euros, unless between two digits.
CURRENCY = re.compile(r"(?<![0-9])[$£€]|[$£€](?![0-9])")


def normalise_signs(text):
    r"""Returns a text in plain signs and on one line: `3 \times 4` becomes `3 * 4`."""
    text = DIGITS_ON_TWO_LINES.sub(";", text.strip())  # these are not one number
    # 1 234 -> 1,234, before other things become spaces
    text = THOUSANDS_APART.sub(lambda number: number[0].replace(" ", ","), text)
    text = " ".join(text.split()).translate(PLAIN_SIGNS)
    if "\\" in text or "{" in text:
        for pattern, plain_sign in LATEX_SIGN_PATTERNS.items():
            text = pattern.sub(plain_sign, text)
    text = " ".join(CURRENCY.sub(" ", text).split())
    # No period at the end, unless it is the last of several.
    return text if text.endswith("..") else text.removesuffix(".").rstrip()


def equation_sides(text, question_words=frozenset()):
    """Returns the sides of an equation, at most ten, without names: "x = 37" gives [" 37"]."""
    return [side for side in text.split("=", 9) if not is_name(side, question_words)]
