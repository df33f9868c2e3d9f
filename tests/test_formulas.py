"""Formulas compared in a worker: right, in any thread, and never for longer than its limit."""

import math
import os
import queue
import random
import re
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import pytest
from sympy import Rational

from tasks import formulas
from tasks.formulas import VerifierError, Worker, same_formula
from tasks.latex import tidy


@pytest.fixture(scope="module")
def worker():
    worker = Worker()
    worker.start()
    yield worker
    worker.process.kill()


def test_equal_formulas_are_equal_and_others_are_not(worker):
    assert worker.compare(r"\frac{2}{4}", "0.5", "0")
    assert worker.compare("x^2+2x+1", "(x+1)^2", "0")
    assert not worker.compare("x+1", "x+2", "0")
    assert not worker.compare("}{", "1", "0")
    assert not worker.compare("1\n2", "12", "0")
    assert worker.compare(r"\sqrt{4}", "2", "0")
    assert worker.compare(r"\sqrt[3]{8}", "2", "0")
    assert worker.compare("x^2+y^2=1", "y^2+x^2=1", "0")
    assert not worker.compare("x<1", "x<2", "0")
    assert worker.compare("\\infty", "+\\infty", "0")
    assert not worker.compare("\\infty", "-\\infty", "0")


def test_values_are_compared_exactly(worker):
    assert not worker.compare(r"\frac{1}{2^{98}}", r"\frac{1}{2^{97}}", "0")
    assert not worker.compare("0.0", r"\frac{1}{10^{20}}", "0")
    assert not worker.compare("1.4142135623730950488", r"\sqrt{2}", "0")
    assert not worker.compare("1.0000001x", "x", "0")
    assert worker.compare(r"\frac{1}{3}+\frac{1}{6}", "0.5", "0")


def test_a_tolerance_is_kept(worker):
    assert worker.compare("1.414", r"\sqrt{2}", "5e-4")
    assert not worker.compare("1.413", r"\sqrt{2}", "5e-4")


def test_it_works_in_any_thread():
    verdicts = []
    thread = threading.Thread(target=lambda: verdicts.append(same_formula(r"\sqrt{9}", "3")))
    thread.start()
    thread.join()
    assert verdicts == [True]


def test_several_threads_have_a_worker_each_and_the_same_verdicts(monkeypatch):
    idle_workers = queue.LifoQueue()
    monkeypatch.setattr(formulas, "idle_workers", idle_workers)
    workers = [Worker(), Worker()]
    for worker in workers:
        idle_workers.put(worker)
    pairs = [(f"\\sqrt{{{n * n}}}", str(n + n % 2)) for n in range(2, 30)]
    with ThreadPoolExecutor(4) as pool:  # more than there are workers
        verdicts = list(pool.map(lambda pair: same_formula(*pair), pairs))
    assert verdicts == [n % 2 == 0 for n in range(2, 30)]
    assert all(worker.process.poll() is None for worker in workers)
    assert idle_workers.qsize() == 2
    for worker in workers:
        worker.process.kill()


def test_what_takes_longer_than_the_limit_is_not_equal_and_the_next_one_is_compared(worker):
    began = time.perf_counter()
    assert not worker.compare("9^{9^{9^{9}}}", "1.5", "0")
    assert time.perf_counter() - began < formulas.WALL_SECONDS_LIMIT
    assert worker.process is None
    assert worker.compare("1/2", "0.5", "0")  # by a new process


def test_a_worker_that_has_died_is_started_again(worker):
    worker.compare("1", "2", "0")
    worker.process.kill()
    worker.process.wait()
    assert worker.compare(r"\frac{1}{4}", "0.25", "0")


# A worker that ends without a verdict as often as its file says, and then answers "equal".
ENDS_SOME_TIMES = """
import pathlib, sys
print("ready", flush=True)
sys.stdin.readline()
file = pathlib.Path(sys.argv[1])
times_left = int(file.read_text())
file.write_text(str(times_left - 1))
if times_left <= 0:
    print("equal", flush=True)
"""


@pytest.mark.parametrize("times", [1, 4])
def test_a_worker_that_ends_without_a_verdict_is_asked_again(tmp_path, times):
    file = tmp_path / "times"
    file.write_text(str(times))
    worker = Worker()
    worker.command = (sys.executable, "-c", ENDS_SOME_TIMES, str(file))
    assert worker.compare("1", "1", "0")
    assert int(file.read_text()) == -1
    worker.stop()


def test_workers_that_never_give_a_verdict_are_an_error_which_is_not_cached(tmp_path, monkeypatch):
    file = tmp_path / "times"
    file.write_text("1000")
    worker = Worker()
    worker.command = (sys.executable, "-c", ENDS_SOME_TIMES, str(file))
    idle_workers = queue.LifoQueue()
    idle_workers.put(worker)
    monkeypatch.setattr(formulas, "idle_workers", idle_workers)
    same_formula.cache_clear()
    with pytest.raises(VerifierError, match="without a verdict"):
        same_formula("1", "1")
    file.write_text("0")
    assert same_formula("1", "1")
    same_formula.cache_clear()
    worker.stop()


ENDS_OVER_TWOS = """
import json, sys
print("ready", flush=True)
for line in sys.stdin:
    if "2" in json.loads(line)[0]:
        sys.exit(1)
    print("equal", flush=True)
"""


def test_a_formula_that_ends_every_worker_is_not_equal_if_others_are_compared():
    worker = Worker()
    worker.command = (sys.executable, "-c", ENDS_OVER_TWOS)
    assert not worker.compare("2", "2", "0")
    assert worker.compare("3", "3", "0")
    worker.stop()


def test_math_verify_that_cannot_be_imported_is_an_error_of_one_line(tmp_path, monkeypatch):
    (tmp_path / "math_verify.py").write_text("raise ImportError('a broken\\ninstallation')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(VerifierError, match="cannot be run: ImportError: a broken installation"):
        Worker().compare("1", "2", "0")


def test_a_worker_that_cannot_be_started_is_an_error():
    worker = Worker()
    worker.command = (sys.executable, "-c", "")
    with pytest.raises(VerifierError, match="ends at once"):
        worker.compare("1", "2", "0")


def test_a_stopped_worker_is_replaced(worker, monkeypatch):
    monkeypatch.setattr(formulas, "WALL_SECONDS_LIMIT", 1)
    worker.compare("1", "2", "0")
    os.kill(worker.process.pid, signal.SIGSTOP)
    monkeypatch.setattr(formulas, "MAX_ATTEMPTS", 20)  # a busy machine may need more than a second
    assert worker.compare(r"\frac{1}{8}", "0.125", "0")


def test_ctrl_c_in_a_terminal_does_not_reach_a_worker(worker):
    worker.compare("1", "2", "0")
    assert os.getpgid(worker.process.pid) != os.getpgid(0)


def test_a_pair_is_compared_once(monkeypatch):
    compared = []

    def compare(self, answer, gold, tolerance):
        compared.append((answer, gold))
        return True

    monkeypatch.setattr(Worker, "compare", compare)
    same_formula.cache_clear()
    assert same_formula("a", "b")
    assert same_formula("a", "b")
    assert compared == [("a", "b")]
    same_formula.cache_clear()


# ---- how formulas are read -----------------------------------------------------------------------


class RandomFormulas:
    """Formulas in LaTeX as people write them, with their exact values.

    A method returns (text, value). Factors stand side by side wherever mathematicians read a
    product: not before a digit, not behind a function's argument without brackets, and not between
    an integer and a fraction, which is a mixed number.
    """

    def __init__(self, seed):
        self.rng = random.Random(seed)

    def sum(self, depth):
        text, value = self.product(depth)
        for _ in range(self.rng.randrange(3)):
            term, term_value = self.product(depth)
            sign = self.rng.choice("+-")
            text += f" {sign} {term}"
            value += term_value if sign == "+" else -term_value
        return text, value

    def product(self, depth):
        text, value = self.factor(depth)
        for _ in range(self.rng.randrange(3)):
            factor, factor_value = self.factor(depth)
            is_mixed_number = text[-1].isdigit() and factor.startswith("\\frac")
            is_argument = re.search(r"\\log_\{\d\} \d+$", text)
            signs = [" \\cdot ", "\\times ", "*"]
            if not factor[0].isdigit() and not is_mixed_number and not is_argument:
                signs += ["", " "]
            text += self.rng.choice(signs) + factor
            value *= factor_value
        return text, value

    def factor(self, depth):
        n = self.rng.randint(2, 9)
        kind = self.rng.randrange(8 if depth else 5)
        if kind == 0:
            return str(n), Fraction(n)
        if kind == 1:
            k = self.rng.randint(1, n - 1)
            return f"\\binom{{{n}}}{{{k}}}", Fraction(math.comb(n, k))
        if kind == 2:
            return f"\\sqrt{{{n * n}}}", Fraction(n)
        if kind == 3:
            return f"\\frac{{{n}}}{{7}}", Fraction(n, 7)
        if kind == 4:
            return f"\\log_{{{n}}} {n**2}", Fraction(2)
        text, value = self.sum(depth - 1)
        if kind == 5:
            return f"\\left({text}\\right)", value
        if kind == 6:
            return f"({text})^{{2}}", value**2
        return f"\\frac{{{text}}}{{{n}}}", value / n


def test_random_formulas_have_the_values_that_they_were_made_with():
    formula = RandomFormulas(seed=0)
    for _ in range(60):
        text, value = formula.sum(depth=1)
        expression = formulas.parse(tidy(text, question_words=frozenset()))
        read = expression.evalf(50)
        assert abs(read - Rational(value.numerator, value.denominator)) < 1e-30, text
