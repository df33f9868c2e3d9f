"""Files that survive a kill, a power cut and a full disk; and one run a folder.

What is written goes aside, is synced to the disk, and is renamed: a reader finds the old or the
new, never a half. A checkpoint keeps the one before it as checkpoint.old, and checksums of both. So
a broken one is noticed, and the one before it goes on.
"""

import json
import os
import shutil
import signal
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

from models.checkpoints import CHECKSUMS, checksum, verify_checksums
from models.families import one_line
from training import distributed


def remove(path):
    """A file, a link or a folder; nothing where there is none."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def sync_to_disk(path):
    """Have the disk itself hold a file, or a folder and all that is in it."""
    for part in [*path.rglob("*"), path] if path.is_dir() else [path]:
        fsync(part)


def fsync(path):
    with suppress(PermissionError):  # Windows opens no folders
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def atomic_write(path, keep=False):
    """Gives a path beside `path` to write to; when that went well, it takes the old one's place.

    A folder cannot be renamed onto another: for a moment there is only `path`.old (see `settle`).
    That one stays if `keep`. Raises ValueError in one line for a disk that is full, say.
    """
    path = Path(path)
    recover_interrupted_rename(path)
    aside, old = Path(f"{path}.tmp"), Path(f"{path}.old")
    remove(aside)
    with one_line(f"{path} cannot be written"):
        yield aside
        sync_to_disk(aside)
        if path.is_dir():
            remove(old)
            path.rename(old)
        aside.replace(path)
        fsync(path.parent)
    if not keep:
        remove(old)


def recover_interrupted_rename(path):
    """After a kill between two renames the folder has its old name: give it back."""
    old = Path(f"{path}.old")
    if old.exists() and not path.exists():
        old.rename(path)


def write_json(path, value):
    with atomic_write(path) as aside:
        aside.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def parse_log_row(line):
    """The row that a line of a log is, a dict with a step; None for any other line."""
    try:
        row = json.loads(line)
        return row if isinstance(row["step"], int) else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def read_log(path):
    """The rows of a run's log, dicts with a step. What is none is left out, and told.

    A kill leaves half a last line; that is not worth a word.
    """
    rows, bad = [], []
    with suppress(FileNotFoundError):
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        for number, line in enumerate(lines, 1):
            if row := parse_log_row(line):
                rows.append(row)
            elif line and number < len(lines):
                bad.append(number)
    if bad:
        print(f"{path}: line {bad[0]} is no row of a log and is left out", file=sys.stderr)
    return rows


# ---- checkpoints ---------------------------------------------------------------------------------


def write_checksums(folder):
    sums = {file.name: checksum(file) for file in sorted(folder.iterdir()) if file.is_file()}
    (folder / CHECKSUMS).write_text(json.dumps(sums, indent=1) + "\n", encoding="utf-8")


def restore_previous_checkpoint(path):
    """If a checkpoint is broken and the one before it is not, put that in its place, and say so."""
    old = Path(f"{path}.old")
    try:
        verify_checksums(path)
    except ValueError as error:
        if not old.is_dir():
            raise
        verify_checksums(old)
        print(f"{error}: going on from the checkpoint before it", file=sys.stderr)
        broken = Path(f"{path}.broken")
        remove(broken)
        path.rename(broken)
        old.rename(path)


# ---- one run a folder, and signals ---------------------------------------------------------------


@contextmanager
def run_lock(folder):
    """Holds a run's folder. Raises ValueError if another run does; a kill leaves no lock behind."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / ".lock"
    with open(file, "a") as handle:
        with suppress(ImportError):  # Windows has no fcntl: there nothing is locked
            import fcntl

            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ValueError(f"{folder} is in use by another run") from None
        try:
            yield
        finally:
            file.unlink(missing_ok=True)
            if not any(folder.iterdir()):  # nothing came of it
                folder.rmdir()


class GracefulInterrupt:
    """The first Ctrl-C, SIGTERM or SIGHUP sets `asked`, its number: the loop ends its step and
    saves. The second stops at once; not under torchrun, which repeats a Ctrl-C to its processes.
    """

    asked = 0

    def __enter__(self):
        numbers = filter(None, map(vars(signal).get, ("SIGINT", "SIGTERM", "SIGHUP")))
        self.before = {number: signal.signal(number, self.note) for number in numbers}
        return self

    def note(self, number, _):
        if self.asked:
            return
        self.asked, more = number, ""
        if not distributed.is_distributed():
            self.__exit__("not yet")
            what = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
            more = f"; {what} once more stops at once"
        print(f"\nending this step, then saving{more}", flush=True)

    def __exit__(self, error, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.asked and not error:  # after the last step
            raise KeyboardInterrupt(self.asked)
