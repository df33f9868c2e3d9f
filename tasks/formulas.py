"""Whether two formulas are equal, by math-verify in a process of its own.

math-verify and sympy can take seconds, or for ever, for one hostile answer, and their own limit is
an alarm that works in the main thread alone and that big integers do not hear. So they run in a
worker: what takes longer than LIMIT is not equal, and the worker is started afresh. The limit is of
the processor's time, so that the verdict does not depend on what else a machine does.
"""

import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
from functools import lru_cache

LIMIT = 0.5  # seconds of the processor for one comparison
PATIENCE = 20  # seconds by the clock, where the system has no such timer
START = 60  # for a worker's imports
AT_ONCE = min(4, os.cpu_count() or 1)  # workers, for as many threads


class Worker:
    """One process that compares, for one thread at a time."""

    def __init__(self):
        self.process, self.said = None, None

    def start(self):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen([sys.executable, __file__], text=True, **pipes)
        self.said = queue.Queue()
        threading.Thread(target=self.listen, args=(self.process, self.said), daemon=True).start()
        self.said.get(timeout=START)

    @staticmethod
    def listen(process, said):
        for line in process.stdout:
            said.put(line.strip())
        said.put(None)  # it has ended

    def compare(self, answer, gold):
        if self.process is None or self.process.poll() is not None:
            self.start()
        try:
            self.process.stdin.write(json.dumps([answer, gold]) + "\n")
            self.process.stdin.flush()
            verdict = self.said.get(timeout=PATIENCE)
        except (queue.Empty, OSError):
            verdict = None
        if verdict is None:
            self.process.kill()
            self.process.wait()
            self.process = None
        return verdict == "equal"


FREE = queue.LifoQueue()  # the last one that was used comes first: others start only when needed
for _ in range(AT_ONCE):
    FREE.put(Worker())


@lru_cache(maxsize=100_000)  # a completion is asked about twice: its reward, and if it is solved
def same_formula(answer, gold):
    """Whether math-verify finds two LaTeX formulas equal, within the limit."""
    worker = FREE.get()
    try:
        return worker.compare(answer, gold)
    finally:
        FREE.put(worker)


def compare(answer, gold):
    """In the worker. Only the LaTeX grammar is used: math-verify's other ways in lead to eval."""
    from math_verify import LatexExtractionConfig, parse, verify

    how = {"fallback_mode": "no_fallback", "parsing_timeout": 0}
    answer, gold = (
        parse(f"\\boxed{{{text}}}", [LatexExtractionConfig()], **how) for text in (answer, gold)
    )
    return bool(gold and answer) and verify(gold, answer, timeout_seconds=0)


def serve():
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    print("ready" if compare(r"\frac{1}{2}", "0.5") else "odd", flush=True)  # the first is slow
    for line in sys.stdin:
        if hasattr(signal, "setitimer"):  # its signal has no handler, so it ends the process
            signal.setitimer(signal.ITIMER_PROF, LIMIT)
        try:
            equal = compare(*json.loads(line))
        except Exception:  # sympy raises anything
            equal = False
        print("equal" if equal else "unequal", flush=True)


if __name__ == "__main__":
    serve()
