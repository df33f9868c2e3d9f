"""Which problem is for training, which for tuning, and which for the test.

Near-duplicates share a key, and a key belongs to one split for ever: it is hashed, not drawn. So
nothing that was trained on is tested, whatever the seed, the order and the number of problems.
"""

import csv
import random
import zlib
from pathlib import Path

SPLITS = ("train", "validation", "test")


def split_of(key):
    """Which split a key belongs to, by its checksum: 20% test, 10% validation, 70% train.

    It depends on no seed, order or number of draws. Config are tuned on "validation".
    """
    bucket = zlib.crc32(key.encode(errors="surrogatepass")) % 10  # 0 to 9
    return "test" if bucket < 2 else "validation" if bucket == 2 else "train"


def seeded(source, split, seed):
    """The random numbers of a draw. Raises ValueError for an unknown split."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    return random.Random(f"{source} {split} {seed}")


def draw(pools, split, n, seed, source):
    """n problems of a split's pool, none twice; only training goes round again to have as many."""
    rng, pool, drawn = seeded(source, split, seed), pools[split], []
    if not pool:
        total = sum(map(len, pools.values()))
        why = f"of its {total} problems none is for {split}, by the checksums of their keys"
        raise ValueError(f"{source} holds too little: {why}")
    while len(drawn) < n and (split == "train" or not drawn):
        drawn += rng.sample(pool, min(n - len(drawn), len(pool)))
    return drawn


def read_rows(path):
    """Yields (line, row) of a file, JSON lines or .csv with a header: a dict, or what fails to be
    one: the error is then the caller's to tell, with the line.
    """
    lines = Path(path).read_text("utf-8-sig").split("\n")
    if Path(path).suffix == ".csv":
        yield from enumerate(csv.DictReader(lines), 2)
        return
    for line, text in enumerate(lines, 1):
        if text.strip():
            yield line, text


class ProblemsFromFile:
    """A task whose problems come from a file, split by the checksums of their keys."""

    def __init__(self, task, path):
        if not hasattr(task, "load"):
            raise ValueError(f"--data {path}: this task has no load(path) to read a file with")
        self.task, self.path, self.pools = task, path, {split: [] for split in SPLITS}
        for problem in task.load(path):
            self.pools[split_of(getattr(task, "key", task.prompt)(problem))].append(problem)

    def __getattr__(self, name):  # all but the problems is the task's own
        return getattr(self.task, name)

    def problems(self, split, n, seed):
        return draw(self.pools, split, n, seed, self.path)
