r"""Whether two formulas have the same value: parsed by math-verify, compared exactly.

math-verify turns LaTeX into a sympy expression. Its own comparison rounds to six places and takes
numbers below 1e-15 for equal, so expressions are compared here: decimals as exact fractions, to 40
digits, at a few random values of the variables.

Parsing and evaluating can take seconds, or for ever, over one hostile answer. math-verify's own
time limit is an alarm, which works in the main thread alone and does not interrupt arithmetic on
big integers. So all this runs in worker processes: a comparison that exceeds its limit of CPU time
counts as "not equal", and its worker is replaced. Nothing else is a verdict: a worker that ends for
any other reason is asked again, and one that cannot run at all is an error.

This file is both sides: the pool of workers, and, run as a program, the worker itself.
"""

import json
import logging
import os
import queue
import random
import signal
import subprocess
import sys
import threading
from functools import lru_cache

CPU_SECONDS_LIMIT = 0.5  # for one comparison
WALL_SECONDS_LIMIT = 20  # after which a worker is taken to be stopped, and another one is asked
STARTUP_SECONDS_LIMIT = 60  # for a worker's imports
MAX_ATTEMPTS = 5
NUM_WORKERS = min(4, os.cpu_count() or 1)

# ---- the pool ------------------------------------------------------------------------------------


class VerifierError(OSError):
    """No worker can compare formulas: no verdict, rather than a wrong one without a word."""


class Worker:
    """A process that compares formulas, for one thread at a time. It starts when first needed."""

    command = (sys.executable, "-P", __file__)  # -P: no module of this folder hides another one

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
            raise VerifierError(f"math-verify, which compares formulas, cannot be run: {reason}")

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
        """Whether two LaTeX formulas are equal, up to a tolerance; False beyond the CPU's limit.

        Raises VerifierError if several processes in a row end or stop without a verdict.
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
        raise VerifierError(
            f"math-verify, which compares formulas, ended {MAX_ATTEMPTS} times without a verdict"
        )

    def has_exceeded_limit(self):
        """Whether the process has ended by the signal of its timer of CPU time."""
        try:
            return self.process.wait(timeout=1) == -signal.SIGPROF
        except subprocess.TimeoutExpired:  # it is still there: stopped, or waiting for a CPU
            return False


# Last in, first out: the worker that was used last is used again, and others start only if needed.
idle_workers = queue.LifoQueue()
for _ in range(NUM_WORKERS):
    idle_workers.put(Worker())


@lru_cache(maxsize=100_000)  # each completion is compared twice, for its reward and for `solved`
def same_formula(answer, gold, tolerance="0"):
    """Whether two LaTeX formulas have the same value. For any thread.

    tolerance: how far apart two numbers may be, as text. Raises VerifierError.
    """
    worker = idle_workers.get()
    try:
        return worker.compare(answer, gold, tolerance)
    finally:
        idle_workers.put(worker)


# ---- the worker's process ------------------------------------------------------------------------

DIGITS = 40  # to which values have to agree
NUM_POINTS = 3  # random values of the variables


def parse_latex(formula):
    """Returns the sympy expression of a formula, or None. Decimals are exact, i is imaginary.

    Only math-verify's grammar for LaTeX is used: its other extractors lead to eval.
    """
    import sympy
    from math_verify import LatexExtractionConfig, parse

    parsed = parse(
        f"\\boxed{{{formula}}}",
        extraction_config=[LatexExtractionConfig()],
        fallback_mode="no_fallback",
        parsing_timeout=0,
    )
    if not parsed or not isinstance(parsed[0], sympy.Basic | sympy.MatrixBase):
        return None
    expression = parsed[0]
    replacements = {number: sympy.Rational(str(number)) for number in expression.atoms(sympy.Float)}
    replacements[sympy.Symbol("i")] = sympy.I
    return expression.xreplace(replacements)


def equal_formulas(answer, gold, tolerance):
    """Whether two LaTeX formulas have the same value, without a time limit."""
    from math_verify import verify
    from sympy import Expr, MatrixBase, Rational
    from sympy.core.relational import Relational

    answer = parse_latex(answer)
    gold = parse_latex(gold)
    if answer is None or gold is None:
        return False
    if answer == gold:
        return True
    if isinstance(answer, Expr) and isinstance(gold, Expr):
        return equal_expressions(answer, gold, Rational(tolerance))
    if isinstance(answer, MatrixBase) and isinstance(gold, MatrixBase):
        return answer.shape == gold.shape and all(
            equal_expressions(*pair, Rational(tolerance)) for pair in zip(answer, gold, strict=True)
        )
    if isinstance(answer, Relational) and isinstance(gold, Relational):
        return verify(gold, answer, timeout_seconds=0)
    return False


def equal_expressions(answer, gold, tolerance):
    """Whether two sympy expressions have the same value wherever they are tried."""
    import sympy

    variables = sorted(answer.free_symbols | gold.free_symbols, key=str)
    rng = random.Random(0)
    num_comparisons = 0
    for _ in range(NUM_POINTS if variables else 1):
        point = {variable: sympy.Rational(rng.randint(-999, 999), 100) for variable in variables}
        answer_value = sympy.N(answer.subs(point), DIGITS + 20)
        gold_value = sympy.N(gold.subs(point), DIGITS + 20)
        if not (answer_value.is_number and gold_value.is_number):
            return False
        if not (answer_value.is_finite and gold_value.is_finite):
            if answer_value != gold_value:
                return False
            continue
        num_comparisons += 1
        allowed = tolerance + abs(gold_value) * sympy.Rational(1, 10**DIGITS)
        if abs(answer_value - gold_value) > allowed:
            return False
    return num_comparisons > 0 or not variables


def serve():
    """Reads requests from stdin, one JSON list per line, and prints a verdict for each."""
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    try:
        equal_formulas(r"\frac{1}{2}", "0.5", "0")  # the first comparison is slow
    except Exception as error:  # anything may be wrong with an installation
        print(" ".join(f"{type(error).__name__}: {error}".split()), flush=True)
        return
    print("ready", flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS_LIMIT)  # no handler: it ends this process
        answer, gold, tolerance = json.loads(line)
        try:
            equal = equal_formulas(answer, gold, tolerance)
        except (MemoryError, ImportError):  # no verdict: this process ends, and another is asked
            raise
        except Exception:  # math-verify and sympy raise anything over what they cannot read
            equal = False
        print("equal" if equal else "unequal", flush=True)


if __name__ == "__main__":
    serve()
