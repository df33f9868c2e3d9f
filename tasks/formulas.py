"""Whether two formulas are equal, decided by math-verify in processes of its own.

math-verify and sympy can take seconds, or for ever, over one hostile answer. Their own time limit
is an alarm, which works in the main thread alone and does not interrupt arithmetic on big integers.
So they run in worker processes: a comparison that exceeds its limit counts as "not equal", and its
worker is ended and started afresh. The limit is on CPU time, so that a verdict does not depend on
what else the machine is doing.

This file is both sides: the pool of workers, and, run as a program, the worker itself.
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

CPU_SECONDS_LIMIT = 0.5  # for one comparison, on systems with a timer of CPU time
WALL_SECONDS_LIMIT = 20  # for one comparison, everywhere
STARTUP_SECONDS_LIMIT = 60  # for a worker's imports
NUM_WORKERS = min(4, os.cpu_count() or 1)

# ---- the pool ------------------------------------------------------------------------------------


class Worker:
    """A process that compares formulas, for one thread at a time. It starts when first needed."""

    def __init__(self):
        self.process = None
        self.replies = None  # a queue of the lines that the process prints; None when it has ended

    def start(self):
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.replies = queue.Queue()
        # A thread reads the pipe, because reading from a pipe has no time limit.
        threading.Thread(
            target=self._read_replies, args=(self.process, self.replies), daemon=True
        ).start()
        self.replies.get(timeout=STARTUP_SECONDS_LIMIT)

    @staticmethod
    def _read_replies(process, replies):
        for line in process.stdout:
            replies.put(line.strip())
        replies.put(None)

    def compare(self, answer, gold):
        """Whether two LaTeX formulas are equal; False if the comparison exceeds a limit."""
        if self.process is None or self.process.poll() is not None:
            self.start()
        try:
            self.process.stdin.write(json.dumps([answer, gold]) + "\n")
            self.process.stdin.flush()
            reply = self.replies.get(timeout=WALL_SECONDS_LIMIT)
        except (queue.Empty, OSError):
            reply = None
        if reply is None:
            self.process.kill()
            self.process.wait()
            self.process = None
        return reply == "equal"


# Last in, first out: the worker that was used last is used again, and others start only if needed.
idle_workers = queue.LifoQueue()
for _ in range(NUM_WORKERS):
    idle_workers.put(Worker())


@lru_cache(maxsize=100_000)  # each completion is compared twice, for its reward and for `solved`
def same_formula(answer, gold):
    """Whether math-verify finds two LaTeX formulas equal within the limit. For any thread."""
    worker = idle_workers.get()
    try:
        return worker.compare(answer, gold)
    finally:
        idle_workers.put(worker)


# ---- the worker's process ------------------------------------------------------------------------


def math_verify_equal(answer, gold):
    """Whether math-verify finds two LaTeX formulas equal, without a time limit.

    Only its grammar for LaTeX is used: its other extractors lead to eval.
    """
    from math_verify import verify

    parsed_answer = parse_latex(answer)
    parsed_gold = parse_latex(gold)
    return bool(parsed_gold and parsed_answer) and verify(
        parsed_gold, parsed_answer, timeout_seconds=0
    )


def parse_latex(formula):
    from math_verify import LatexExtractionConfig, parse

    return parse(
        f"\\boxed{{{formula}}}",
        extraction_config=[LatexExtractionConfig()],
        fallback_mode="no_fallback",
        parsing_timeout=0,
    )


def serve():
    """Reads pairs of formulas from stdin, one JSON list per line, and prints a verdict for each."""
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    math_verify_equal(r"\frac{1}{2}", "0.5")  # the first comparison is slow
    print("ready", flush=True)
    for line in sys.stdin:
        if hasattr(signal, "setitimer"):  # its signal has no handler, so it ends this process
            signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS_LIMIT)
        answer, gold = json.loads(line)
        try:
            equal = math_verify_equal(answer, gold)
        except Exception:  # sympy raises anything
            equal = False
        print("equal" if equal else "unequal", flush=True)


if __name__ == "__main__":
    serve()
