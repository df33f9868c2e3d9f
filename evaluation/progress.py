"""Progress lines for a long evaluation."""

import sys
import time

SECONDS_BETWEEN_LINES = 30


class Progress:
    """Counts completions and, every half minute, prints how many are done and the time left."""

    def __init__(self, name, total):
        """name: what is measured, for the line. total: the number of completions."""
        self.name = name
        self.total = total
        self.count = 0
        self.began = time.monotonic()
        self.last_line = self.began

    def add(self, count):
        """Call this after each batch of `count` completions."""
        self.count += count
        now = time.monotonic()
        if now - self.last_line < SECONDS_BETWEEN_LINES or self.count == self.total:
            return
        self.last_line = now
        minutes = (now - self.began) / 60
        minutes_left = minutes / self.count * (self.total - self.count)
        print(
            f"{self.name}: {self.count} of {self.total} completions in {minutes:.1f} minutes, "
            f"about {minutes_left:.1f} more",
            file=sys.stderr,
            flush=True,
        )
