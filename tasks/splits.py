"""Which problems are for training, which for validation (tuning), and which for the test.

Near-duplicates share a key, and the key's checksum decides the split, not chance. So a training
problem is never in the test, whatever the seed, order or number of problems, and the problems of a
file are split like generated ones.
"""

import csv
import json
import random
import tempfile
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
    """Returns the random generator for a draw. Raises ValueError for an unknown split."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    return random.Random(f"{source} {split} {seed}")


def draw(pools, split, n, seed, source):
    """Draws n problems of a split, without repeats.

    A held-out split with fewer than n problems gives all of them; for training, problems are then
    repeated.

    pools: {split: all its problems}. source: the task's name or the file, for the seed and for
    messages. Raises ValueError if the split has no problem.
    """
    rng = seeded(source, split, seed)
    pool = pools[split]
    if not pool:
        total = sum(map(len, pools.values()))
        raise ValueError(
            f"{source} is too small: of its {total} problem{'s' * (total != 1)} none is for "
            f"{split}, by the checksums of their keys. To train and measure on all of them, use "
            "train.py's --eval_split all or evaluate.py's --split all"
        )
    drawn = rng.sample(pool, min(n, len(pool)))
    while split == "train" and len(drawn) < n:
        drawn += rng.sample(pool, min(n - len(drawn), len(pool)))
    return drawn


def read_rows(path):
    """Yields (place, row) for each row of a file, with "line 3" or "row 3" as its place.

    The file is JSON lines, one JSON array, a .csv with a header, or a .parquet. A row is a dict,
    but for JSON lines the unparsed text, so that the caller can name a line that is not JSON.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind == ".parquet":
        import datasets

        datasets.disable_progress_bars()
        with tempfile.TemporaryDirectory() as cache:
            table = datasets.Dataset.from_parquet(str(path), cache_dir=cache, keep_in_memory=True)
            for number, row in enumerate(table, start=1):
                yield f"row {number}", row
    elif kind == ".csv":
        with open(path, encoding="utf-8-sig", newline="") as file:  # keeps line ends in fields
            rows = csv.DictReader(file)
            line = rows.line_num
            for row in rows:
                yield f"line {line + 1}", row
                line = rows.line_num
    else:
        text = path.read_text("utf-8-sig")
        if is_json_array(text):
            for number, row in enumerate(json.loads(text), start=1):
                yield f"row {number}", row
            return
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                yield f"line {number}", line


def is_json_array(text):
    """Whether a text is one JSON array of objects, and not JSON lines."""
    start = text.lstrip()[:200]
    return start.startswith("[") and start[1:].lstrip().startswith(("{", "]"))


class ProblemsFromFile:
    """A task whose problems come from a file, split by the checksums of their keys.

    The split "all" is the whole file. With `train_on_all` the training split is the whole file too,
    to see a few problems learned by heart.
    """

    def __init__(self, task, path, train_on_all=False):
        if not hasattr(task, "load"):
            raise ValueError(f"--data {path}: this task has no load(path) to read a file with")
        self.task = task
        self.path = path
        self.pools = {split: [] for split in SPLITS}
        self.all_problems = task.load(path)
        key = getattr(task, "key", task.prompt)
        for problem in self.all_problems:
            self.pools[split_of(key(problem))].append(problem)
        if train_on_all:
            self.pools = {"train": self.all_problems, "validation": [], "test": []}

    def __getattr__(self, name):
        """Everything except the problems is the task's own."""
        return getattr(self.task, name)

    def problems(self, split, n, seed):
        if split == "all":
            return self.all_problems[:n]
        return draw(self.pools, split, n, seed, source=self.path)
