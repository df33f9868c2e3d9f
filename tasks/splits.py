"""Which problems are for training, which for tuning, and which for the test.

Near-duplicates share a key, and the key's checksum decides the split: nothing is drawn. So a
problem of the training split is never tested, whatever the seed, the order and the number of
problems, and a file of problems splits as the generated ones do.
"""

import csv
import random
import zlib
from pathlib import Path

SPLITS = ("train", "validation", "test")


def split_of(key):
    """Returns the split of a key: 70% are "train", 10% "validation" (for tuning), 20% "test"."""
    bucket = zlib.crc32(key.encode(errors="surrogatepass")) % 10
    if bucket < 2:
        return "test"
    return "validation" if bucket == 2 else "train"


def seeded(source, split, seed):
    """Returns the random generator of a draw. Raises ValueError for an unknown split."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    return random.Random(f"{source} {split} {seed}")


def draw(pools, split, n, seed, source):
    """Draws n problems of a split, without repeats.

    A held-out split with fewer than n problems gives all of them. Training goes round again.

    pools: {split: all its problems}. source: the task's name or the file, for the seed and for
    messages. Raises ValueError if the split has no problem.
    """
    rng = seeded(source, split, seed)
    pool = pools[split]
    if not pool:
        total = sum(map(len, pools.values()))
        reason = f"of its {total} problems none is for {split}, by the checksums of their keys"
        raise ValueError(f"{source} holds too little: {reason}")
    drawn = rng.sample(pool, min(n, len(pool)))
    while split == "train" and len(drawn) < n:
        drawn += rng.sample(pool, min(n - len(drawn), len(pool)))
    return drawn


def read_rows(path):
    """Yields (line number, row) for each row of a file of JSON lines, or a .csv with a header.

    A row of a .csv is a dict. A row of JSON lines is the unparsed text, so that the caller can
    name the line if it is not JSON.
    """
    lines = Path(path).read_text("utf-8-sig").split("\n")
    if Path(path).suffix == ".csv":
        yield from enumerate(csv.DictReader(lines), start=2)
    else:
        for number, text in enumerate(lines, start=1):
            if text.strip():
                yield number, text


class ProblemsFromFile:
    """A task whose problems come from a file, split by the checksums of their keys."""

    def __init__(self, task, path):
        if not hasattr(task, "load"):
            raise ValueError(f"--data {path}: this task has no load(path) to read a file with")
        self.task = task
        self.path = path
        self.pools = {split: [] for split in SPLITS}
        key = getattr(task, "key", task.prompt)
        for problem in task.load(path):
            self.pools[split_of(key(problem))].append(problem)

    def __getattr__(self, name):
        """Everything but the problems is the task's own."""
        return getattr(self.task, name)

    def problems(self, split, n, seed):
        return draw(self.pools, split, n, seed, source=self.path)
