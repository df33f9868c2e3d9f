"""The words and names that may stand beside a number without changing its value.

"12 apples" states 12. "12 twelfths", "12 times two" and "12 is incorrect" do not, and no list of
bad words would ever be complete. So this is a list of good words: a word that is neither on it nor
in the problem's own question invalidates the answer.
"""

import re
from functools import lru_cache

# What a number may count or measure. The plural in -s or -es need not be listed.
UNITS = set(
    """
    dollar cent euro pound usd penny pennies buck coin
    second minute hour day week month year sec min hr hrs h s am pm
    mm cm m km in inch foot feet ft yard yd mile mi meter metre centimeter centimetre millimeter
    millimetre kilometer kilometre square cubic sq unit
    ml l L liter litre milliliter millilitre gallon cup ounce oz pint quart tablespoon teaspoon acre
    mg g kg gram kilogram lb lbs ton tonne
    degree celsius fahrenheit C F radian percent point mph
    people person child children kid man men woman women boy girl student teacher friend
    apple orange egg book page pencil pen ball box bag bottle car ticket toy flower tree fish dog
    cat animal bird cow chicken marble candy candies cookie cake pizza slice piece card stamp
    sticker letter word question problem game player step lap trip room house seat table chair
    shirt shoe sack item number way solution tea
    integer digit root triangle arrangement permutation combination
    left more remaining total altogether such possible different old ways usd rad
    of per a an each in the
    """.split()
)

# What may stand before a number: "about 12", "the answer is 12".
LEADING_WORDS = set(
    """
    about approximately roughly around exactly so therefore thus the final answer result is a total
    of it he she they there are has have costs cost earns makes needs pays spends gets takes
    """.split()
)

# What may stand on either side of a number.
WORDS_BESIDE = UNITS | LEADING_WORDS

# Words that may stand on the left of an equals sign, like a name such as x: "total = 12".
QUANTITIES = set(
    """
    answer result total sum cost price value area perimeter volume length width height distance
    speed time age profit amount number probability expression solution grid triangle circle
    rectangle region of the
    """.split()
)

# The words of an introduction that does not end in a verb: "final answer:", "for a total of".
INTRODUCTION_WORDS = (
    QUANTITIES | LEADING_WORDS | {"our", "my", "we", "get", "giving", "for", "final"}
)

# The words before an equation: "so we get x = ", "the answer is 3 + 4 = ".
EQUATION_WORDS = set(
    """
    so thus therefore hence then we get have obtain find finally now and that this gives is the
    answer final which means it follows since because
    """.split()
)

# Words that change the number beside them even if they are in the question, as in "3 million".
ALTERING_WORD = re.compile(
    r"""
    (?: zero | one | two | three | four | five | six | seven | eight | nine | ten | eleven | twelve
      | (?: thir | four | fif | six | seven | eigh | nine ) teen (?: th )?
      | (?: twen | thir | for | fif | six | seven | eigh | nine ) (?: ty | tieth )
      | hundred | thousand | [mbtr]+illion | dozen | score | pair | couple | half | halve | quarter
      | first | third
      | (?: four | fif | six | seven | eigh | nin | ten | eleven | twelf | hundred | thousand
          | [mbtr]+illion ) th
      | lakh | crore | grand | gross | mil | mln | bn
    ) (?: e?s )?
    | not | no | none? | never | nor | or | and | but | except | than | from | to | by | if | is
    | isn | are | was | be | wrong | false | incorrect | minus | negative | plus | add | added
    | less | fewer | under | over | above | below | most | least | between | point | base | root
    | squared | cubed | doubled? | tripled? | halved | increased? | decreased? | reduced | twice
    | thrice | factorial | power | reciprocal | inverse | opposite | divided | multiplied
    | multiple | without | off | log | ln | sin | cos | tan | sqrt | pi
    """,
    re.VERBOSE,
)

WORD = re.compile(r"[A-Za-z]+")
# The parts of a question that are not prose: formulas, commands and names such as AB. Several words
# between two dollar signs are prose: "It costs $5 to get in and $3 to".
FORMULA = re.compile(
    r"\$(?![^$]*[a-z]{3} [a-z]{2})[^$]*\$|\\\(.*?\\\)|\\\[.*?\\\]|\\[A-Za-z]+|[A-Z]{2,}", re.DOTALL
)


@lru_cache(maxsize=4096)  # each question is read several times
def words_of(question):
    """Returns the words of a question that may stand beside its answer, in lower case, as a set."""
    prose = FORMULA.sub(" ", question)
    words = {word.lower() for word in WORD.findall(prose)}
    return frozenset(word for word in words if len(word) > 1 and not ALTERING_WORD.fullmatch(word))


def are_known(text, known_words, question_words=frozenset()):
    """Whether every word of a text is in one of the two sets, in singular, plural or capitals."""
    return all(
        is_known(word, known_words) or is_known(word, question_words) for word in WORD.findall(text)
    )


def is_known(word, known_words):
    """Whether a word, its singular or its plural is in a set; a letter has to match as is."""
    if word in known_words:
        return True
    if len(word) == 1:
        return False
    word = word.lower()
    singular = word.removesuffix("s")
    return not known_words.isdisjoint({word, singular, singular.removesuffix("e"), word + "s"})


# Names in a formula: x, x_1, x', \theta, f(x), f^{-1}(x), AB, \mathbf{v}, \angle ABC, (x,y).
FONT = r"\\(?:mathbf|mathrm|mathit|mathcal|boldsymbol|bold|bf|vec)(?![a-z])"
GREEK = (
    r"\\(?:alpha|beta|gamma|delta|epsilon|theta|lambda|mu|rho|sigma|tau|phi|omega|ell"
    r"|Delta|Theta|Omega)(?![a-z])"
)
NAME_PATTERN = rf"""
    (?: (?: m\ ?)? \\(?:measured)?angle\ ? \{{?\ ? )?
    (?: [A-Za-z] | [A-Z]{{2,4}} | {GREEK}
      | (?: {FONT} | \\(?:hat|overline|overrightarrow)(?![a-z]) )\ ?
        (?: \{{\ ?[A-Za-z]{{1,3}}\ ?\}} | [A-Za-z] ) )
    '? (?: _\ ?(?: \w | \{{\w{{1,5}}\}} ) )? '? \}}?
    (?: (?: \^\{{-1\}} )? \ ?\(\ ?[A-Za-z0-9]{{1,3}}\ ?\) )?
"""
NAME = re.compile(
    rf"\s* (?: {NAME_PATTERN} | \( {NAME_PATTERN} (?: ,\s? {NAME_PATTERN} )+ \) ) \s*", re.VERBOSE
)
MAX_NAME_LENGTH = 60


def is_name(text, question_words=frozenset()):
    """Whether a text may be a side of an equation besides a value: x, f(x), total cost."""
    if len(text) > MAX_NAME_LENGTH:
        return False
    if NAME.fullmatch(text):
        return True
    is_words = re.fullmatch(r"[A-Za-z][A-Za-z ]*", text.strip())
    return bool(is_words) and are_known(text, QUANTITIES, question_words)
