r"""Whether two formulas have the same value: parsed by math-verify's parser, compared exactly.

The parser turns LaTeX into a sympy expression. math-verify's own comparison would round to six
places, treat numbers below 1e-15 as equal, and judge only the part of an answer that it can read.
So expressions are compared here: rational values exactly, others to 2,600 digits, at a few random
values of the variables.

Parsing and evaluating one hostile answer can take seconds, or forever, and an alarm does not
interrupt arithmetic on big integers. So this runs in worker processes: a comparison that exceeds
its limit of CPU time counts as "not equal", and its worker is replaced. If a worker ends for any
other reason, the comparison is repeated; if no worker can run, that is an error.

This file contains both sides: the pool of workers and, run as a program, the worker itself.
"""

import json
import os
import queue
import random
import re
import resource
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from functools import lru_cache

CPU_SECONDS_LIMIT = 0.5  # for one comparison
MEMORY_LIMIT = 4 * 2**30  # bytes per worker, on systems that support such a limit
WALL_SECONDS_LIMIT = 20  # after which a worker is assumed to be stopped, and another one is asked
STARTUP_SECONDS_LIMIT = 60  # for a worker's imports
MAX_ATTEMPTS = 5
NUM_WORKERS = min(4, os.cpu_count() or 1)

# ---- the pool ------------------------------------------------------------------------------------


class VerifierError(OSError):
    """Raised if no worker can compare formulas, rather than silently giving a wrong verdict."""


class Worker:
    """A process that compares formulas, for one thread at a time. It starts when first needed."""

    command = (sys.executable, "-P", __file__)  # -P: modules of this folder cannot hide others

    def __init__(self):
        self.process = None
        self.replies = None  # a queue of the lines that the process prints; None when it has ended

    def start(self):
        """Starts the process. Raises VerifierError if it cannot run."""
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # so that Ctrl-C does not reach it
        )
        self.replies = queue.Queue()
        # A thread reads the pipe, because reading from a pipe has no time limit.
        threading.Thread(
            target=self._read_replies, args=(self.process, self.replies), daemon=True
        ).start()
        try:
            reply = self.replies.get(timeout=STARTUP_SECONDS_LIMIT)
        except queue.Empty:
            reply = f"it does not start within {STARTUP_SECONDS_LIMIT} s"
        if reply != "ready":
            self.stop()
            reason = reply or "its process ends at once"
            raise VerifierError(f"the formula parser cannot be run: {reason}")

    @staticmethod
    def _read_replies(process, replies):
        for line in process.stdout:
            replies.put(line.strip())
        replies.put(None)

    def stop(self):
        self.process.kill()
        self.process.wait()
        self.process = None

    def compare(self, answer, gold, tolerance):
        """Whether two LaTeX formulas are equal, up to a tolerance; False beyond a limit.

        A formula that ends several processes in a row counts as not equal, provided that they can
        compare a plain one. Raises VerifierError if they cannot.
        """
        request = json.dumps([answer, gold, tolerance]) + "\n"
        for _ in range(MAX_ATTEMPTS):
            if self.process is None or self.process.poll() is not None:
                self.start()
            try:
                self.process.stdin.write(request)
                self.process.stdin.flush()
                reply = self.replies.get(timeout=WALL_SECONDS_LIMIT)
            except (queue.Empty, OSError):
                reply = None
            if reply is not None:
                return reply == "equal"
            exceeded_limit = self.has_exceeded_limit()
            self.stop()
            if exceeded_limit:
                return False
        is_plain = (answer, gold) == ("1", "1")
        if not is_plain and self.compare("1", "1", "0"):
            return False
        raise VerifierError(f"the formula parser ended {MAX_ATTEMPTS} times without a verdict")

    def has_exceeded_limit(self):
        """Whether the process was ended by the signal of its CPU timer."""
        try:
            return self.process.wait(timeout=1) == -signal.SIGPROF
        except subprocess.TimeoutExpired:  # still alive: stopped, or waiting for a CPU
            return False


# Last in, first out: the worker that was used last is used again, and others start only if needed.
idle_workers = queue.LifoQueue()
for _ in range(NUM_WORKERS):
    idle_workers.put(Worker())


@lru_cache(maxsize=100_000)  # each completion is compared twice, for its reward and for `solved`
def same_formula(answer, gold, tolerance="0"):
    """Whether two LaTeX formulas have the same value. Thread-safe.

    tolerance: how far apart two numbers may be, as text. Raises VerifierError if no worker can run.
    """
    worker = idle_workers.get()
    try:
        return worker.compare(answer, gold, tolerance)
    finally:
        idle_workers.put(worker)


# ---- the worker's process ------------------------------------------------------------------------

# Pairs (number of random points for the variables, digits to which irrational values have to agree
# there): first many points of several sizes, so that |x - 10| differs from 10 - x; then more digits
# than exponents may have (latex.MAX_EXPONENT), so that sqrt(2) differs from sqrt(2) + 10^{-100}.
POINTS_AND_DIGITS = ((8, 30), (1, 2600))


# A function's name, with its base or power: \log_{2}, \sin^2.
FUNCTION = r"""
    \\(?:arcsin|arccos|arctan|sin|cos|tan|cot|sec|csc|log|ln)(?![a-z])
    (?: \ ?[_^]\ ? (?: \w | \{[^{}]*\} ) )*
"""
BRACES = r"\{ (?: [^{}] | \{[^{}]*\} )* \}"
# A function's argument without brackets; it ends before a * or another function: the 2x of
# \sin 2x * y, the x of \sin x \cos x.
ARGUMENT = re.compile(
    rf"""
    (?P<function> {FUNCTION} ) \ ?
    (?P<argument>
        (?:
            (?: [0-9.]++ | [A-Za-z] (?: _ (?: \w | \{{\w+\}} ) )? | \|[^|]+\|
              | \\sqrt (?: \[[^]]*\] )? {BRACES} | \\(?:frac|binom) {BRACES} {BRACES}
              | \\(?:pi|alpha|beta|gamma|delta|epsilon|theta|lambda|mu|rho|sigma|tau|phi|omega|ell
                  |Delta|Theta|Omega)(?![a-z]) )
            !? (?: \^ (?: \w | \{{[^{{}}]*\}} ) )?
        )+
    )
    \ ? (?= \* | {FUNCTION} )
    """,
    re.VERBOSE,
)
# The place between two adjacent factors: 2(3), (2)3, \binom{4}{2}\binom{3}{1}. A function and its
# argument, \sin^{2}(x), and a mixed number match too, in groups of their own, and stay as they are.
FACTORS = re.compile(
    rf"""
    (?P<function> {FUNCTION} \ ? (?: \( | \\(?:frac|binom) )? )
    | (?<=[0-9]) (?P<mixed> \ ? \\frac\{{[0-9]+\}}\{{[0-9]+\}} )
    | (?: (?<=[0-9)}}]) | (?<=\\pi) ) \ ? (?= \( | \\(?:frac|binom) )
    | (?<=\)) \ ? (?= [0-9] )
    """,
    re.VERBOSE,
)


def parse(formula):
    r"""Returns the sympy expression of a formula in LaTeX; raises whatever the parser raises.

    Decimals become exact fractions, and i becomes the imaginary unit. What the parser would misread
    is written out first: 2(3), which it takes for the mixed number 5, becomes 2*(3), and
    \sin x * 2, which it takes for \sin(2x), becomes \sin(x) * 2.
    """
    import sympy
    from math_verify.parser import latex2sympy

    formula = ARGUMENT.sub(r"\g<function>(\g<argument>)", formula)
    formula = FACTORS.sub(lambda match: match["function"] or match["mixed"] or "*", formula)
    expression = latex2sympy(formula)
    replacements = {number: sympy.Rational(str(number)) for number in expression.atoms(sympy.Float)}
    replacements[sympy.Symbol("i")] = sympy.I
    return expression.xreplace(replacements)


def equal_formulas(answer, gold, tolerance):
    """Whether two LaTeX formulas have the same value, without a time limit."""
    from sympy import Expr, Rational
    from sympy.core.relational import Relational

    answer = parse(answer)
    gold = parse(gold)
    if isinstance(answer, Expr) and isinstance(gold, Expr):
        return equal_expressions(answer, gold, Rational(tolerance))
    if isinstance(answer, Relational) and isinstance(gold, Relational):
        return equal_relations(answer, gold)
    return False


def equal_expressions(answer, gold, tolerance):
    """Whether two sympy expressions have the same value wherever they are tried."""
    return all(
        close(answer_value, gold_value, tolerance, digits)
        for num_points, digits in POINTS_AND_DIGITS
        for answer_value, gold_value in values_at_random_points(
            answer, gold, num_points=num_points, digits=digits
        )
    )


def equal_relations(answer, gold):
    """Whether two equations or inequalities are equivalent: their differences are proportional.

    So x + y = 2 equals 2y = 4 - 2x, and x + y < 2 equals 2 > x + y.
    """
    from sympy import Eq, Ge, Gt, Ne

    mirrored = (Gt, Ge)
    answer = answer.reversed if isinstance(answer, mirrored) else answer
    gold = gold.reversed if isinstance(gold, mirrored) else gold
    if type(answer) is not type(gold):
        return False
    num_points = POINTS_AND_DIGITS[0][0]
    digits = POINTS_AND_DIGITS[-1][1]
    pairs = list(
        values_at_random_points(
            answer.lhs - answer.rhs,
            gold.lhs - gold.rhs,
            num_points=num_points,
            digits=digits,
        )
    )
    first_answer, first_gold = pairs[0]
    if first_gold == 0 or len(pairs) < num_points:
        return answer == gold
    factor = first_answer / first_gold
    has_direction = not isinstance(answer, Eq | Ne)
    if factor == 0 or (has_direction and not factor > 0):
        return False
    return all(
        close(answer_value, to_number(factor * gold_value, digits), 0, digits - 20)
        for answer_value, gold_value in pairs
    )


def values_at_random_points(*expressions, num_points, digits):
    """Yields the values of expressions, each time with other values of their variables.

    Rational values are exact, others have some more digits than asked for. The variables' values
    have different sizes and are real, except for z and w, which stand for complex numbers.
    """
    import sympy

    variables = sorted(set().union(*(e.free_symbols for e in expressions)), key=str)
    rng = random.Random(0)
    for i in range(num_points if variables else 1):
        size = 10 ** (i % 4)
        point = {}
        for variable in variables:
            point[variable] = sympy.Rational(size * rng.randint(-999, 999), 100)
            if str(variable) in ("z", "w"):
                point[variable] += sympy.I * sympy.Rational(rng.randint(1, 999), 100)
        yield [to_number(expression.subs(point).doit(), digits) for expression in expressions]


def to_number(value, digits):
    """Returns the value of a sympy expression: exact if rational, else to `digits` + 20 digits."""
    import sympy

    return value if value.is_Rational else sympy.N(value, digits + 20)


def close(value, other, tolerance, digits):
    """Whether two sympy numbers are equal: exactly, to `digits` digits, or up to a tolerance."""
    import sympy

    if value == other:
        return value is not sympy.nan
    if not (value.is_number and other.is_number and value.is_finite and other.is_finite):
        return False
    if tolerance == 0 and value.is_Rational and other.is_Rational:
        return False
    return bool(abs(value - other) <= tolerance + abs(other) * sympy.Rational(1, 10**digits))


def serve():
    """Reads requests from stdin, one JSON list per line, and prints a verdict for each."""
    try:
        equal_formulas(r"\frac{1}{2}", "0.5", "0")  # the first comparison is slow
    except Exception as error:  # anything may be wrong with an installation
        print(" ".join(f"{type(error).__name__}: {error}".split()), flush=True)
        return
    with suppress(ValueError, OSError):  # not every system has this limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    print("ready", flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS_LIMIT)  # its signal ends this process
        answer, gold, tolerance = json.loads(line)
        try:
            equal = equal_formulas(answer, gold, tolerance)
        except ImportError:  # not a verdict: this process ends, and another one is asked
            raise
        except Exception:  # the parser and sympy raise anything over what they cannot read
            equal = False
        print("equal" if equal else "unequal", flush=True)


if __name__ == "__main__":
    serve()
