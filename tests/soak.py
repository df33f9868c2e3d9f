"""A night in small, by hand: one long run, a fault every ten minutes, and what grew meanwhile.

    python tests/soak.py 120        minutes; faults of the second half end the process: it resumes

Every 10 s the process's memory, open files and threads are read from /proc (Linux). Printed are
their slopes over the longest life of one process, without its first tenth, and that of the time of
a step. At the end each step has to stand in the log once.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import numpy

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from training.files import read_log  # noqa: E402

FLAGS = [
    *("--task", "countdown"),
    *("--model", "tiny"),
    *("--steps", "1000000"),
    *("--save_every", "25"),
    *("--learning_rate", "1e-5"),
    *("--eval_problems", "16"),
    *("--frontier", "false"),
]
SECONDS_BETWEEN_FAULTS = 600


def command(folder, *flags):
    return [sys.executable, str(ROOT / "train.py"), *flags, "--run_dir", str(folder)]


def start(folder):
    """The process that starts the run, or goes on with it. Its output goes to a file beside it."""
    flags = ["--resume"] if (folder / "config.json").exists() else FLAGS
    with open(folder.with_suffix(".txt"), "a") as log:
        return subprocess.Popen(command(folder, *flags), stdout=log, stderr=log)


@dataclass
class Usage:
    """What a process uses at one moment."""

    time: float
    memory_kib: int
    open_files: int
    threads: int


def read_usage(process):
    folder = Path(f"/proc/{process.pid}")
    lines = (folder / "status").read_text().splitlines()
    status = dict(line.split(":", 1) for line in lines)
    return Usage(
        time=time.time(),
        memory_kib=int(status["VmRSS"].split()[0]),
        open_files=len(list((folder / "fd").iterdir())),
        threads=int(status["Threads"]),
    )


# ---- faults: each returns whether the run took it as it should -----------------------------------


def second_run(folder, process):
    second = subprocess.run(command(folder, "--resume"), capture_output=True, text=True)
    return second.returncode == 2 and "in use by another run" in second.stderr


def stopped_for_a_while(folder, process):
    process.send_signal(signal.SIGSTOP)
    time.sleep(30)
    process.send_signal(signal.SIGCONT)
    return True


def older_checkpoint_gone(folder, process):
    shutil.rmtree(folder / "checkpoint.old", ignore_errors=True)
    return True


def stale_folders(folder, process):
    """As a kill during saving leaves them."""
    for name in ("checkpoint.tmp", "checkpoint.old"):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "half").write_text("{")
    return True


def ended_by(number):
    """The process gets a signal."""
    expected_code = -number if number == signal.SIGKILL else 128 + number

    def fault(folder, process):
        process.send_signal(number)
        return process.wait(60) == expected_code

    return fault


def damaged(name, change):
    """A file's bytes are changed while nothing runs."""

    def fault(folder, process):
        process.kill()
        process.wait()
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(change(content))
        return True

    return fault


def flip_a_bit(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


LIVE_FAULTS = {
    "a second run in its folder": second_run,
    "stopped for 30 s": stopped_for_a_while,
    "the older checkpoint removed": older_checkpoint_gone,
    "half-written folders beside the checkpoint": stale_folders,
}
DEADLY_FAULTS = {
    "SIGKILL": ended_by(signal.SIGKILL),
    "SIGTERM": ended_by(signal.SIGTERM),
    "a bit of the adapter": damaged("checkpoint/adapter_model.safetensors", flip_a_bit),
    "a garbage line in the log": damaged("metrics.jsonl", lambda content: content + b"\0{]\n"),
    "half a line in the log": damaged("metrics.jsonl", lambda content: content + b'{"step": '),
}


# ---- the soak ------------------------------------------------------------------------------------


def slope(x, y):
    """Of the least squares' line, per unit of x, without the first tenth."""
    start = len(x) // 10
    if len(x) - start <= 2:
        return float("nan")
    return numpy.polyfit(x[start:], y[start:], 1)[0]


def print_growth(life, rows):
    """What grew in the longest life of a process, and how long the run's steps took."""
    hours = numpy.array([usage.time - life[0].time for usage in life]) / 3600
    memory = numpy.array([usage.memory_kib / 1024 for usage in life])
    print(f"longest life of a process: {hours[-1]:.2f} h")
    print(f"memory {memory[-1]:.0f} MiB, {slope(hours, memory):+.2f} an hour")
    for name in ("open_files", "threads"):
        counts = numpy.array([getattr(usage, name) for usage in life])
        print(f"{name} {counts.min()} to {counts.max()}, {slope(hours, counts):+.2f} an hour")
    for name in ("seconds_rollout", "seconds_update"):
        seconds = numpy.array([row[name] for row in rows])
        growth = 1000 * slope(numpy.arange(len(rows)), seconds)
        print(f"{name}: mean {seconds.mean():.3f}, {growth:+.4f} a thousand steps")


def main():
    if {"-h", "--help"} & {*sys.argv[1:]}:
        print(__doc__)
        return 0
    minutes = float(sys.argv[1]) if len(sys.argv) > 1 else 120
    # A run needs a minute to start before it can take a fault.
    seconds_between = min(SECONDS_BETWEEN_FAULTS, max(60, minutes * 5))
    folder = Path(tempfile.mkdtemp()) / "run"
    process = start(folder)
    began = time.time()
    end = began + 60 * minutes
    next_fault = began + seconds_between
    last_fault = end - seconds_between / 2  # the last life gets its time
    live_faults = cycle(LIVE_FAULTS.items())
    deadly_faults = cycle(DEADLY_FAULTS.items())
    lives = [[]]  # for each process a list of Usage
    failed = False
    while time.time() < end:
        time.sleep(min(10, seconds_between / 5))
        if process.poll() is not None:
            print(f"ended by itself, {process.returncode}: {folder.with_suffix('.txt')} says why")
            return 1
        usage = read_usage(process)
        lives[-1].append(usage)
        if time.time() < next_fault or next_fault > last_fault:
            continue
        is_second_half = time.time() > began + 30 * minutes
        name, fault = next(deadly_faults if is_second_half else live_faults)
        went_well = fault(folder, process)
        failed = failed or not went_well
        next_fault += seconds_between
        print(
            f"{(time.time() - began) / 60:5.1f} min: {name}{'' if went_well else ', WENT WRONG'}; "
            f"before it {usage.memory_kib / 1024:.0f} MiB, {usage.open_files} files, "
            f"{usage.threads} threads",
            flush=True,
        )
        if process.poll() is not None:
            process = start(folder)
            lives.append([])
    process.send_signal(signal.SIGTERM)  # a job in the background may be deaf to SIGINT
    code = process.wait(120)
    failed = failed or code != 143
    rows = read_log(folder / "metrics.jsonl")
    each_once = [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    print(f"{len(rows)} steps, {'each once' if each_once else 'NOT EACH ONCE'}")
    print_growth(max(lives, key=len), rows)
    return int(failed or not each_once)


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.exit(main())
