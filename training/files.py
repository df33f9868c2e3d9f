"""Files that survive a kill, a power cut and a full disk; a lock, so that a folder has one run.

A file or folder is written beside its final place, synced to disk, and renamed: a reader finds the
old or the new one, never half of it. Only the holder of the lock renames or removes files. The
previous checkpoint is kept as checkpoint.old. Both have checksums, so a damaged checkpoint is
noticed and the run continues from the previous one.
"""

import fcntl
import json
import os
import shutil
import signal
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

from models.checkpoints import (
    CHECKSUMS,
    NOT_CHECKED,
    checksum,
    has_type,
    is_run,
    verify_checksums,
)
from models.errors import as_value_error
from training import distributed

PRIVATE = ".diffpo-"  # how the names of unfinished files begin

# ---- writing -------------------------------------------------------------------------------------


@contextmanager
def atomic_write(path, keep=False):
    """Yields a temporary path to write a file or folder to, which then replaces `path`.

    If the block raises, `path` stays as it was. The temporary path is in a new folder beside `path`
    with a unique name, so no existing file is touched. A folder cannot be renamed onto another one:
    with `keep` the old one becomes `path`.old, replacing any earlier one (see
    recover_interrupted_rename); without it, `path` must not exist or must be an empty folder.
    Raises a one-line ValueError if something cannot be written.
    """
    path = Path(path)
    old = Path(f"{path}.old")
    assert_still_locked(path.parent)
    with (
        as_value_error(f"{path} cannot be written"),
        plain_disk_errors(path),
        tempfile.TemporaryDirectory(prefix=PRIVATE, dir=path.parent) as private,
    ):
        temporary_path = Path(private) / path.name
        yield temporary_path
        sync_to_disk(temporary_path)
        assert_still_locked(path.parent)
        if keep and path.is_dir():
            remove(old)
            path.rename(old)
        temporary_path.replace(path)
        fsync(path.parent)


@contextmanager
def plain_disk_errors(path):
    """Replaces the failed assertion that torch.save reports on a full disk by a clear OSError."""
    try:
        yield
    except RuntimeError as error:
        message = str(error)
        if "enforce fail" not in message and "PytorchStreamWriter" not in message:
            raise
        free = shutil.disk_usage(Path(path).absolute().parent).free
        if free < 2**20 or "No space left" in message:
            raise OSError("No space left on device") from None
        raise OSError("torch.save failed: is there a quota, or is the disk failing?") from None


def remove(path):
    """Remove a file, a link (not what it points to) or a folder, if it is there."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def recover_interrupted_rename(path):
    """After a kill between the two renames of a folder, rename `path`.old back to `path`.

    Call it only while holding the run's lock: otherwise a live run may just be renaming.
    """
    old = Path(f"{path}.old")
    if old.exists() and not path.exists():
        old.rename(path)


def remove_unfinished(folder):
    """Remove what a killed atomic_write left in a run's folder. Call it while holding the lock."""
    for unfinished in folder.glob(f"{PRIVATE}*"):
        remove(unfinished)


def sync_to_disk(path):
    """Flush a file, or a folder with everything in it, to the disk."""
    if path.is_dir():
        for part in path.rglob("*"):
            fsync(part)
    fsync(path)


def fsync(path):
    """os.fsync of a file or a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path, value):
    """Write a JSON file, whole or not at all."""
    with atomic_write(path) as temporary_path:
        temporary_path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


# ---- logs ----------------------------------------------------------------------------------------


def read_log(path, fields=None):
    """The rows of a run's log, a list of dicts with a "step"; [] if there is no file.

    fields: {name: type} that each row also has to have.

    Other lines are skipped, with a message about the first. A kill may leave an incomplete last
    line, which is skipped silently.
    """
    if not path.exists():
        return []
    rows = []
    bad_lines = []
    with as_value_error(f"cannot read {path}"):
        # utf-8-sig: an editor may have added a byte order mark.
        lines = path.read_text(encoding="utf-8-sig", errors="replace").split("\n")
    for number, line in enumerate(lines, start=1):
        row = parse_log_row(line, fields or {})
        if row is not None:
            rows.append(row)
        elif line and number < len(lines):
            bad_lines.append(number)
    if bad_lines:
        print(f"{path}: line {bad_lines[0]} is not a row of a log and is skipped", file=sys.stderr)
    return rows


def parse_log_row(line, fields):
    """The dict of a log's line, if it has an integer "step" and the fields; else None."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    fields = {"step": int} | fields
    if isinstance(row, dict) and all(has_type(row.get(name), fields[name]) for name in fields):
        return row
    return None


def append_lines(path, rows):
    """Append rows to a file of JSON lines. Raises a one-line ValueError on a full disk, say."""
    assert_still_locked(path.parent)
    with as_value_error(f"{path} cannot be written"), open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


# ---- checkpoints ---------------------------------------------------------------------------------


def write_checksums(folder):
    """Write the checksums of a checkpoint's files into its folder."""
    checksums = {
        file.name: checksum(file)
        for file in sorted(folder.iterdir())
        if file.is_file() and file.name not in NOT_CHECKED
    }
    text = json.dumps(checksums, indent=1) + "\n"
    (folder / CHECKSUMS).write_text(text, encoding="utf-8")


def restore_previous_checkpoint(path):
    """If a checkpoint is damaged but the previous one is intact, restore that and print a message.

    The damaged one becomes `path`.broken. Raises ValueError if both are damaged.
    """
    previous = Path(f"{path}.old")
    try:
        verify_checksums(path)
    except ValueError as error:
        if not previous.is_dir():
            raise
        verify_checksums(previous)
        print(f"{error}: continuing from the previous checkpoint", file=sys.stderr)
        broken = Path(f"{path}.broken")
        remove(broken)
        path.rename(broken)
        previous.rename(path)


# ---- one run a folder, and signals ---------------------------------------------------------------


held_locks = {}  # {a run's folder: the open file that holds its lock}


@contextmanager
def run_lock(folder):
    """Locks a run's folder, and creates it if it is missing. A killed run leaves no lock behind.

    Raises ValueError if another run holds the lock.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: a run needs a folder")
    is_new_folder = not folder.exists()
    while True:
        with as_value_error(f"{folder} cannot be made"):
            folder.mkdir(parents=True, exist_ok=True)
        is_new_lock = not (folder / ".lock").exists()
        with as_value_error(f"{folder} cannot be written to"):
            handle = open(folder / ".lock", "a")  # noqa: SIM115
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            handle.close()
            raise ValueError(
                f"{folder} is in use by another run: wait for its end, or give another --run_dir"
            ) from None
        if is_same_file(handle, folder / ".lock"):
            break
        handle.close()  # the previous run removed the file just before we locked it
    held_locks[folder] = handle
    try:
        yield
    finally:
        del held_locks[folder]
        # A .lock that already existed may be a killed run's, or another program's in its own
        # folder.
        if is_same_file(handle, folder / ".lock") and (is_new_lock or is_run(folder)):
            (folder / ".lock").unlink()
            if is_new_folder and not any(folder.iterdir()):  # the run was refused before it wrote
                folder.rmdir()
        handle.close()


def is_same_file(handle, path):
    """Whether an open file is still the one at `path`, so it was not removed or moved."""
    try:
        return os.path.samestat(os.fstat(handle.fileno()), os.stat(path))
    except OSError:
        return False


def assert_still_locked(folder):
    """Raises ValueError if a run's folder that this process has locked was moved or removed.

    Otherwise the run would continue to write into somebody else's folder, or into a new one without
    the checkpoint.
    """
    if folder in held_locks and not is_same_file(held_locks[folder], folder / ".lock"):
        raise ValueError(
            f"{folder} was moved or removed while the run was writing to it (or its task has "
            "changed the current folder): resume with --resume --run_dir and its new place"
        )


class GracefulInterrupt:
    """Within its block, the first Ctrl-C, SIGTERM, SIGHUP or SIGPIPE only sets `signal_number`.

    The training loop reads it, finishes its step and saves. A second signal stops the program at
    once, except under torchrun, which passes a Ctrl-C to its processes several times. SIGPIPE comes
    from a reader that exits, such as `| head` (models/terminal.py). An ignored SIGHUP stays
    ignored: nohup ignores it so that a run outlives its terminal.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE)

    def __init__(self):
        self.signal_number = 0
        self.previous_handlers = {}

    def __enter__(self):
        for number in self.SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self.previous_handlers[number] = signal.signal(number, self.handle)
        if getattr(sys.stdout, "reader_left", False):  # it left before this block
            self.signal_number = signal.SIGPIPE
        return self

    def __exit__(self, error_type, error, traceback):
        self.restore_handlers()
        if self.signal_number and error_type is None:  # the signal came after the last step
            raise KeyboardInterrupt(self.signal_number)

    def handle(self, number, frame):
        if self.signal_number:
            return
        self.signal_number = number
        if distributed.is_distributed():
            print(
                "\nfinishing this step, then saving; torchrun waits for 30 s, unless it was "
                "started with a longer --shutdown-timeout",
                flush=True,
            )
            return
        self.restore_handlers()
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        print(f"\nfinishing this step, then saving; {name} again stops at once", flush=True)

    def restore_handlers(self):
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)
