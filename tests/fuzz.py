"""A million completions through the verifiers: none fails, none is slow, none is paid wrongly.

    python tests/fuzz.py [N] [SEED] [TASK ...]    250,000 each: about half an hour of one core;
                                                  EXPERIMENTS.md has the last result

Before these, all wrong answers of verdict_kinds.py are judged, some 70,000, and single signs,
repeated to 80,000 characters.

Each completion is made from parts whose truth is known: a value, what is written around it, noise.
A wrong completion that counts as solved is printed. A right one that is missed is only counted,
since what a verifier does not understand earns nothing. The time is the CPU time of this process
alone: math-verify has processes of its own, and a limit of its own.
"""

import itertools
import random
import sys
import time
from collections import Counter
from fractions import Fraction
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import verdict_kinds

from tasks.chain import SIGNS, TABLES
from tasks.registry import TASKS

CPU_SECONDS_LIMIT = 0.005  # for one completion
GRIDS = TASKS["sudoku"].problems("validation", 40, 0)

# ---- what completions are made of; a part that stands twice is twice as likely -------------------

WRAPPINGS = (
    "{}",
    "{}",
    " {} ",
    "\n{}\n",
    "**{}**",
    "`{}`",
    "${}$",
    "\\( {} \\)",
    "\\boxed{{{}}}",
    "$\\boxed{{{}}}$",
    "The answer is: {}",
    "{}.",
    "\\[\\boxed{{{}}}\\]",
)
COMPLETIONS = (
    "<answer>{}</answer>",
    "<answer>{}</answer>",
    "<answer>{}</answer>",
    "<answer>{}</answer>",
    "<reasoning>it is 7</reasoning><answer>{}</answer>",
    "<answer>99</answer><answer>{}</answer>",
    "<answer></answer>{0}<answer>{0}</answer>",
    "so <answer>{}</answer> or so",
    "<answer>{}",
)
NOISE = (
    *"\0\u202e\ufeff￼𝟟٣\\{}$`(^=%/-., \n7",
    "<|eot_id|>",
    "<answer>",
    "</answer>",
    "\\boxed{",
    "\\frac",
    "\\text{",
)
NUMBER_FORMS = ("{}", "{}", "{}.0", "+{}", "\\text{{{}}}", "${}", "{} apples", "{} ", "{{{}}}")
# What makes another number of the one behind it, or in front of it.
BEFORE = (
    "-",
    "minus ",
    "negative ",
    "not ",
    "not equal to ",
    ">",
    "<",
    "≠",
    "≥",
    "\\neq ",
    "half of ",
    "ln ",
    "log ",
    "\\sqrt ",
    "sqrt ",
    "1/",
    "10^",
    "twice ",
    "double ",
    "\\frac{1}",
    "x + ",
)
BEHIND = (
    " thousand",
    "k",
    " million",
    "bn",
    " dozen",
    "!",
    "^2",
    "²",
    " squared",
    "/2",
    "e2",
    " + 1",
    " or 3",
    " and 4",
    "_8",
    " hundred",
    " * 2",
    "/7",
    "\\cdot 2",
    "-1",
    " to 99",
    "\\%x",
    "^{2}",
    "x",
    "y + 1",
    " halves",
    " tenths",
    ", 5",
    "'",
    " = 5",
    "\\pi",
    "i",
    ".5",
)


# ---- one maker per task: (problem, answer, whether it is right) ----------------------------------


def number(rng, gold):
    """A text, and whether it states the number `gold`, 2 or more."""
    kind = rng.random()
    if kind < 0.3:
        return rng.choice(NUMBER_FORMS).format(gold), True
    if kind < 0.5:
        other = rng.choice((gold + 1, gold - 1, gold * 10, gold + 100, -gold, gold // 2, 10**30))
        return rng.choice(NUMBER_FORMS).format(other), False
    if kind < 0.75:
        return rng.choice(BEFORE) + str(gold), False
    behind = rng.choice(BEHIND)
    return f"{gold}{behind}", gold == 2 and behind == "!"  # 2! is 2


def expression(rng, numbers):
    """The text and exact value of a random expression of all the numbers; None: it has no value."""
    if len(numbers) == 1:
        return str(numbers[0]), Fraction(numbers[0])
    cut = rng.randrange(1, len(numbers))
    left_text, left = expression(rng, numbers[:cut])
    right_text, right = expression(rng, numbers[cut:])
    sign = rng.choice("+-*/×÷−")
    text = f"({left_text} {sign} {right_text})"
    if left is None or right is None:
        return text, None
    if sign == "+":
        return text, left + right
    if sign in "-−":
        return text, left - right
    if sign in "*×":
        return text, left * right
    return text, left / right if right else None


def countdown(rng):
    numbers = [rng.randrange(1, 30) for _ in range(rng.choice((3, 3, 4)))]
    used = rng.sample(numbers, len(numbers))
    kind = rng.random()
    if kind < 0.15:
        used = used[1:]  # one is missing
    elif kind < 0.3:
        used = [*used, rng.randrange(1, 30)]  # one too many
    text, value = expression(rng, used)
    is_right = sorted(used) == sorted(numbers) and value is not None
    is_whole = is_right and value.denominator == 1
    target = int(value) if is_whole and rng.random() < 0.6 else rng.randrange(1, 100)
    if rng.random() < 0.3:
        claimed = target if rng.random() < 0.7 else target + 1
        text = f"{text} = {claimed}"
        is_right = is_right and claimed == target
    return {"numbers": numbers, "target": target}, text, bool(is_right and value == target)


def sudoku(rng):
    problem = rng.choice(GRIDS)
    cells = list(problem["solution"])
    for _ in range(rng.choice((0, 0, 1, 3))):
        i = rng.randrange(16)
        cells[i] = rng.choice("01234５④9x")
    is_right = "".join(cells) == problem["solution"]
    if rng.random() < 0.1:
        cells.append("1")
        is_right = False
    rows = ["".join(cells[i : i + 4]) for i in range(0, len(cells), 4)]
    text = rng.choice(("", " ", "\n", ",", " | ", "; ")).join(rows)
    return problem, text, is_right


def gsm8k(rng):
    gold = rng.choice((2, 3, 12, 72, 250, 1234))
    text, is_right = number(rng, gold)
    return {"question": "q", "answer": str(gold)}, text, is_right


def math(rng):
    if rng.random() < 0.5:
        return gsm8k(rng)
    a, b = rng.sample(range(2, 13), 2)
    gold, same, other = rng.choice(
        (
            (f"\\frac{{{a}}}{{{b}}}", f"\\dfrac{{{a}}}{{{b}}}", f"\\frac{{{a}}}{{{b + 1}}}"),
            (f"{a}\\sqrt{{{b}}}", f"{a} \\sqrt {{{b}}}", f"{a + 1}\\sqrt{{{b}}}"),
            (f"({a}, {b})", f"({a},{b})", f"[{a}, {b}]"),
            (f"x^2 + {a}x", f"{a}x + x^2", f"x^2 - {a}x"),
            (f"\\{{{a}, {a + b}\\}}", f"\\{{ {a}, {a + b} \\}}", f"({a}, {a + b})"),
            (f"{a}^{{\\circ}}", f"{a}^\\circ", f"{a + 1}^\\circ"),
            (f"{a}_8", f"{a}_{{8}}", f"{a}_7"),
            (f"{a}\\text{{ cm}}", f"{a}", f"{a}\\text{{ m}}"),
            (f"\\frac{{\\pi}}{{{b}}}", f"\\frac {{\\pi}} {{{b}}}", f"\\frac{{\\pi}}{{{b + 1}}}"),
        )
    )
    is_right = rng.random() < 0.4
    text = same if is_right else other
    if rng.random() < 0.2:
        behind = rng.choice(("!", "^9", " + 1", " \\text{ or } 1"))
        text = same + behind
        is_right = text == "2!"  # which is 2
    return {"question": "q", "answer": gold}, text, is_right


def chain(rng):
    signs = "".join(rng.choices(SIGNS, k=6))
    problem = {"start": rng.randrange(20), "signs": signs}
    numbers = [problem["start"]]
    for sign in signs:
        numbers.append(TABLES[sign][numbers[-1]])
    words = list(map(str, numbers[1:]))
    is_right = True
    kind = rng.random()
    if kind < 0.3:
        words[-1] = str((numbers[-1] + rng.randrange(1, 20)) % 20)
        is_right = False
    elif kind < 0.4:
        words[rng.randrange(5)] = rng.choice(("or", "5④9x", "1.5", "not"))
        is_right = False
    elif kind < 0.5:
        words = words[rng.randrange(1, 6) :]
        is_right = False
    return problem, " ".join(words), is_right


MAKERS = {"countdown": countdown, "sudoku": sudoku, "gsm8k": gsm8k, "math": math, "chain": chain}


def completion(name, rng):
    """A random completion: (problem, text, whether it is right; None if noise may have changed it).

    name: the task's.
    """
    problem, text, is_right = MAKERS[name](rng)
    text = rng.choice(COMPLETIONS).format(rng.choice(WRAPPINGS).format(text))
    if rng.random() < 0.2:
        is_right = None
        for _ in range(rng.choice((1, 2, 20))):
            start = rng.randrange(len(text) + 1)
            noise = rng.choice(NOISE)
            end = start + rng.choice((0, 0, 1, 5))
            text = text[:start] + noise * rng.choice((1, 1, 1, 2, 300)) + text[end:]
    return problem, text, is_right


# ---- the run -------------------------------------------------------------------------------------


def score(name, problem, text):
    """(solved, seconds of CPU time). Raises AssertionError for a reward outside 0 to 1."""
    began = time.thread_time()
    reward = TASKS[name].reward(problem, text)
    solved = TASKS[name].solved(problem, text)
    seconds = time.thread_time() - began
    assert 0 <= reward <= 1 and isinstance(solved, bool), (name, problem, text, reward, solved)
    return solved, seconds


def fuzz_task(name, n, seed):
    """Scores n completions and prints a summary. Returns how many were paid wrongly, and slow."""
    rng = random.Random(f"{seed} {name}")
    counts = Counter()  # (whether it is right, whether it counts as solved)
    milliseconds = []
    num_slow = 0
    for _ in range(n):
        problem, text, is_right = completion(name, rng)
        solved, seconds = score(name, problem, text)
        counts[is_right, solved] += 1
        milliseconds.append(1000 * seconds)
        if solved and is_right is False:
            print("PAID WRONGLY", name, problem, repr(text)[:200], flush=True)
        if seconds > CPU_SECONDS_LIMIT:  # always, or just this once?
            fastest = min(score(name, problem, text)[1] for _ in range(3))
            if fastest > CPU_SECONDS_LIMIT:
                num_slow += 1
                print(f"SLOW {1000 * fastest:.1f} ms", name, repr(text)[:200], flush=True)
    milliseconds.sort()
    num_wrong = counts[False, False] + counts[False, True]
    num_right = counts[True, False] + counts[True, True]
    print(
        f"{name}: solved are {counts[False, True]} of {num_wrong} wrong ones, "
        f"{counts[True, True]} of {num_right} right ones; "
        f"median {milliseconds[n // 2]:.2f} ms, 99.99% {milliseconds[int(n * 0.9999)]:.1f}",
        flush=True,
    )
    return counts[False, True], num_slow


def judge_kinds():
    """Judges all wrong answers of verdict_kinds.py. Returns how many were paid."""
    num_paid = 0
    for maker in (
        verdict_kinds.boxes_in_formulas,
        verdict_kinds.altered_numbers,
        verdict_kinds.glued_digits,
        verdict_kinds.golds_moved_by_one,
    ):
        answers = list(maker())
        paid = verdict_kinds.solved_among(answers)
        for task, gold, text in paid:
            print("PAID WRONGLY", task, repr(gold), repr(text)[:200], flush=True)
        print(f"{maker.__name__}: solved are {len(paid)} of {len(answers)} wrong ones", flush=True)
        num_paid += len(paid)
    return num_paid


REPEATED = (
    *"{}()[]$^`' \n1aX|&=-",
    "\\boxed{",
    "<answer>",
    "</answer>",
    "<a>",
    "1,",
    "a ",
    "1 ",
    "x=",
    "=1",
    "0.",
    ". ",
    "**",
    "\\",
    "\\ ",
    "\\text{",
    "\\frac{",
    "\\quad ",
    "\\cup",
    "\\frac{1}{2}",
    "\\text{1}",
    "1\n",
    "Row 1",
    "is ",
    "not ",
)
FRAMES = (
    "{}",
    "<answer>{}</answer>",
    "<answer>a{}!</answer>",
    "<answer>\\boxed{{{}}}</answer>",
    "{0}\\boxed{{12}}{0}",
    "<answer>1{}",
)


def judge_lengths(name, problem):
    """Judges one sign repeated to 10, 20, 40 and 80 thousand characters. Returns the slow ones.

    Slow is what takes more than a tenth of a second at 80 thousand characters, and more than three
    times as long as at 40 thousand.
    """
    slow = []
    longest = 0.0
    for sign, frame in itertools.product(REPEATED, FRAMES):
        seconds = []
        for length in (10_000, 20_000, 40_000, 80_000):
            text = frame.format(sign * (length // len(sign)))
            seconds.append(min(score(name, problem, text)[1] for _ in range(2)))
        longest = max(longest, seconds[-1])
        if seconds[-1] > 0.1 and seconds[-1] > 3 * seconds[-2]:
            slow.append((sign, frame, seconds))
            print("NOT LINEAR", name, repr(sign), repr(frame), seconds, flush=True)
    print(f"{name}: 80,000 characters take at most {1000 * longest:.0f} ms", flush=True)
    return slow


def main():
    if {"-h", "--help"} & {*sys.argv[1:]}:
        print(__doc__)
        return 0
    num_paid_of_kinds = judge_kinds()
    num_slow_lengths = 0
    for name in sys.argv[3:] or MAKERS:
        problem, _, _ = MAKERS[name](random.Random(0))
        num_slow_lengths += len(judge_lengths(name, problem))
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    seed = sys.argv[2] if len(sys.argv) > 2 else "0"
    results = [fuzz_task(name, n // len(MAKERS), seed) for name in sys.argv[3:] or MAKERS]
    num_paid_wrongly = num_paid_of_kinds + sum(paid_wrongly for paid_wrongly, _ in results)
    num_slow = num_slow_lengths + sum(slow for _, slow in results)
    print(
        f"no exception, {num_paid_wrongly} wrong ones paid, "
        f"{num_slow} slower than {1000 * CPU_SECONDS_LIMIT:.0f} ms"
    )
    return int(num_paid_wrongly > 0 or num_slow > 0)


if __name__ == "__main__":
    sys.exit(main())
