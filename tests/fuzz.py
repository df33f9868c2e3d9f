"""A million completions through the four verifiers: none fails, none is slow, none is paid wrongly.

    python tests/fuzz.py [N] [SEED] [TASK ...]    250,000 each: about half an hour of one core;
                                                  EXPERIMENTS.md has the last result

Each completion is made from parts whose truth is known: a value, a dress, a hostile surrounding. A
wrong one that counts as solved is printed; so is a right one that is missed, as a share only, since
what a verifier does not understand earns nothing. The time is the processor's, of this process
alone: math-verify has its own, and its own limit.
"""

import random
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fractions import Fraction

from tasks.registry import TASKS

LIMIT = 0.005  # seconds of the processor for one completion
DRESSES = ("{}", "{}", " {} ", "\n{}\n", "**{}**", "`{}`", "${}$", "\\( {} \\)", "\\boxed{{{}}}")
DRESSES += ("$\\boxed{{{}}}$", "The answer is: {}", "{}.", "\\[\\boxed{{{}}}\\]")
AROUND = ("<answer>{}</answer>",) * 4 + (
    "<reasoning>it is 7</reasoning><answer>{}</answer>", "<answer>99</answer><answer>{}</answer>",
    "<answer></answer>{0}<answer>{0}</answer>", "so <answer>{}</answer> or so", "<answer>{}",
)  # fmt: skip
NOISE = (
    *"\0\u202e\ufeff￼𝟟٣\\{}$`(^=%/-., \n7", "<|eot_id|>", "<answer>", "</answer>", "\\boxed{",
    "\\frac", "\\text{",
)  # fmt: skip
BEFORE = (
    "-", "minus ", "negative ", "not ", "not equal to ", ">", "<", "≠", "≥", "\\neq ", "half of ",
    "ln ", "log ", "\\sqrt ", "sqrt ", "1/", "10^", "twice ", "double ", "\\frac{1}", "x + ",
)  # fmt: skip
BEHIND = (
    " thousand", "k", " million", "bn", " dozen", "!", "^2", "²", " squared", "/2", "e2", " + 1",
    " or 3", " and 4", "_8", " hundred", " * 2", "/7", "\\cdot 2", "-1", " to 99", "\\%x", "^{2}",
    "x", "y + 1", " halves", " tenths", ", 5", "'", " = 5", "\\pi", "i", ".5",
)  # fmt: skip


def number(chance, gold):
    """(a text, whether it states `gold`, 2 or more)."""
    kind = chance.random()
    forms = ("{}", "{}", "{}.0", "+{}", "\\text{{{}}}", "${}", "{} apples", "{} ", "{{{}}}")
    if kind < 0.3:
        return chance.choice(forms).format(gold), True
    if kind < 0.5:
        other = chance.choice((gold + 1, gold - 1, gold * 10, gold + 100, -gold, gold // 2, 10**30))
        return chance.choice(forms).format(other), False
    if kind < 0.75:
        return chance.choice(BEFORE) + str(gold), False
    return f"{gold}{chance.choice(BEHIND)}", False


def tree(chance, numbers):
    """(text, exact value or None) of a random expression of all the numbers."""
    if len(numbers) == 1:
        return str(numbers[0]), Fraction(numbers[0])
    cut = chance.randrange(1, len(numbers))
    (a, x), (b, y) = tree(chance, numbers[:cut]), tree(chance, numbers[cut:])
    sign = chance.choice("+-*/×÷−")
    text = f"({a} {sign} {b})"
    if None in (x, y) or sign in "/÷" and y == 0:
        return text, None
    return text, x + y if sign == "+" else x - y if sign in "-−" else (
        x * y if sign in "*×" else x / y
    )  # fmt: skip


def countdown(chance):
    numbers = [chance.randrange(1, 30) for _ in range(chance.choice((3, 3, 4)))]
    used = chance.sample(numbers, len(numbers))
    kind = chance.random()
    if kind < 0.15:
        used = used[1:]  # one is missing
    elif kind < 0.3:
        used = [*used, chance.randrange(1, 30)]  # one too many
    text, value = tree(chance, used)
    right = sorted(used) == sorted(numbers) and value is not None
    whole = right and value.denominator == 1
    target = int(value) if whole and chance.random() < 0.6 else chance.randrange(1, 100)
    if chance.random() < 0.3:
        claimed = target if chance.random() < 0.7 else target + 1
        text, right = f"{text} = {claimed}", right and claimed == target
    return {"numbers": numbers, "target": target}, text, bool(right and value == target)


def sudoku(chance):
    problem = chance.choice(GRIDS)
    cells, right = list(problem["solution"]), True
    for _ in range(chance.choice((0, 0, 1, 3))):
        i = chance.randrange(16)
        cells[i] = chance.choice("01234５④9x")
    right = "".join(cells) == problem["solution"]
    if chance.random() < 0.1:
        cells.append("1")
        right = False
    rows = ["".join(cells[i : i + 4]) for i in range(0, len(cells), 4)]
    joined = chance.choice(("", " ", "\n", ",", " | ", "; ")).join(rows)
    return problem, joined, right


def gsm8k(chance):
    gold = chance.choice((2, 3, 12, 72, 250, 1234))
    text, right = number(chance, gold)
    return {"question": "q", "answer": str(gold)}, text, right


def math(chance):
    if chance.random() < 0.5:
        problem, text, right = gsm8k(chance)
        return problem, text, right
    a, b = chance.sample(range(2, 13), 2)
    gold, same, other = chance.choice((
        (f"\\frac{{{a}}}{{{b}}}", f"\\dfrac{{{a}}}{{{b}}}", f"\\frac{{{a}}}{{{b + 1}}}"),
        (f"{a}\\sqrt{{{b}}}", f"{a} \\sqrt {{{b}}}", f"{a + 1}\\sqrt{{{b}}}"),
        (f"({a}, {b})", f"({a},{b})", f"[{a}, {b}]"),
        (f"x^2 + {a}x", f"{a}x + x^2", f"x^2 - {a}x"),
        (f"\\{{{a}, {a + b}\\}}", f"\\{{ {a}, {a + b} \\}}", f"({a}, {a + b})"),
        (f"{a}^{{\\circ}}", f"{a}^\\circ", f"{a + 1}^\\circ"),
        (f"{a}_8", f"{a}_{{8}}", f"{a}_7"),
        (f"{a}\\text{{ cm}}", f"{a}", f"{a}\\text{{ m}}"),
        (f"\\frac{{\\pi}}{{{b}}}", f"\\frac {{\\pi}} {{{b}}}", f"\\frac{{\\pi}}{{{b + 1}}}"),
    ))  # fmt: skip
    right = chance.random() < 0.4
    text = same if right else other
    if chance.random() < 0.2:
        text, right = same + chance.choice(("!", "^9", " + 1", " \\text{ or } 1")), False
    return {"question": "q", "answer": gold}, text, right


MAKERS = {"countdown": countdown, "sudoku": sudoku, "gsm8k": gsm8k, "math": math}
GRIDS = TASKS["sudoku"].problems("validation", 40, 0)


def completion(name, chance):
    """(problem, text, whether it is right; None: nobody knows) of a random completion."""
    problem, text, right = MAKERS[name](chance)
    text = chance.choice(AROUND).format(chance.choice(DRESSES).format(text))
    if chance.random() < 0.2:  # then what it says may have changed
        right = None
        for _ in range(chance.choice((1, 2, 20))):
            at, noise = chance.randrange(len(text) + 1), chance.choice(NOISE)
            cut = at + chance.choice((0, 0, 1, 5))
            text = text[:at] + noise * chance.choice((1, 1, 1, 2, 300)) + text[cut:]
    return problem, text, right


def judged(name, problem, text):
    """(solved, seconds of the processor). Raises AssertionError for a reward outside [0, 1]."""
    began = time.thread_time()
    reward, solved = TASKS[name].reward(problem, text), TASKS[name].solved(problem, text)
    took = time.thread_time() - began
    assert 0 <= reward <= 1 and isinstance(solved, bool), (name, problem, text, reward, solved)
    return solved, took


def main():
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    seed = sys.argv[2] if len(sys.argv) > 2 else "0"
    wrong = slow = 0
    for name in sys.argv[3:] or MAKERS:
        chance, seen, times = random.Random(f"{seed} {name}"), Counter(), []
        for _ in range(n // 4):
            problem, text, right = completion(name, chance)
            solved, took = judged(name, problem, text)
            seen[right, solved] += 1
            times.append(took)
            if solved and right is False:
                wrong += 1
                print("PAID WRONGLY", name, problem, repr(text)[:200], flush=True)
            if took > LIMIT:
                again = min(judged(name, problem, text)[1] for _ in range(3))  # not just once
                slow += again > LIMIT
                if again > LIMIT:
                    print(f"SLOW {1000 * again:.1f} ms", name, repr(text)[:200], flush=True)
        parts = (f"{seen[truth, True]} of {seen[truth, True] + seen[truth, False]}" for truth in
                 (False, True))  # fmt: skip
        said = "solved are {} wrong ones, {} right ones".format(*parts)
        times = [1000 * sorted(times)[int(len(times) * share)] for share in (0.5, 0.9999)]
        print(f"{name}: {said}; median {times[0]:.2f} ms, 99.99% {times[1]:.1f}", flush=True)
    print(f"no exception, {wrong} wrong ones paid, {slow} slower than {1000 * LIMIT:.0f} ms")
    return int(bool(wrong or slow))


if __name__ == "__main__":
    sys.exit(main())
