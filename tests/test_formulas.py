"""Formulas compared in a worker: right, in any thread, and never for longer than its limit."""

import queue
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tasks import formulas
from tasks.formulas import Worker, same_formula


@pytest.fixture(scope="module")
def worker():
    worker = Worker()
    worker.start()
    yield worker
    worker.process.kill()


def test_equal_formulas_are_equal_and_others_are_not(worker):
    assert worker.compare(r"\frac{2}{4}", "0.5")
    assert worker.compare("x^2+2x+1", "(x+1)^2")
    assert not worker.compare("x+1", "x+2")
    assert not worker.compare("}{", "1")
    assert not worker.compare("1\n2", "12")
    assert worker.compare(r"\sqrt{4}", "2")


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
    assert not worker.compare(r"(x+1)^{9999}", r"(x+2)^{9999}")
    assert time.perf_counter() - began < formulas.WALL_SECONDS_LIMIT
    assert worker.process is None
    assert worker.compare("1/2", "0.5")  # by a new process


def test_a_worker_that_has_died_is_started_again(worker):
    worker.compare("1", "2")
    worker.process.kill()
    worker.process.wait()
    assert worker.compare(r"\frac{1}{4}", "0.25")


def test_a_pair_is_compared_once(monkeypatch):
    compared = []

    def compare(self, answer, gold):
        compared.append((answer, gold))
        return True

    monkeypatch.setattr(Worker, "compare", compare)
    same_formula.cache_clear()
    assert same_formula("a", "b")
    assert same_formula("a", "b")
    assert compared == [("a", "b")]
    same_formula.cache_clear()
