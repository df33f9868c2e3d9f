"""A night in small, by hand: one long run, a fault every ten minutes, and what grew meanwhile.

    python tests/soak.py 120        minutes; faults of the second half end the process: it resumes

Each 10 s the process's memory, open files and threads are read from /proc (Linux). Told are their
slopes over the longest life of one process, without its first tenth, and that of the time of a
step. At the end each step has to stand in the log once.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from itertools import cycle
from pathlib import Path

import numpy

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import saving  # noqa: E402

FLAGS = "--task countdown --model tiny --steps 1000000 --save_every 25 --learning_rate 1e-5"
FLAGS += " --eval_problems 16 --frontier false"
EVERY = 600  # seconds from fault to fault


def command(folder, *more):
    return [sys.executable, str(ROOT / "train.py"), *more, "--run_dir", str(folder)]


def start(folder):
    more = ["--resume"] if (folder / "config.json").exists() else FLAGS.split()
    with open(folder.with_suffix(".txt"), "a") as log:
        return subprocess.Popen(command(folder, *more), stdout=log, stderr=log)


def in_use(process):
    """(KiB of memory, open files, threads) of a process."""
    folder = Path(f"/proc/{process.pid}")
    said = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
    files = len(list((folder / "fd").iterdir()))
    return int(said["VmRSS"].split()[0]), files, int(said["Threads"])


# ---- faults: what is done, and whether it went as it should --------------------------------------


def second_run(folder, process):
    done = subprocess.run(command(folder, "--resume"), capture_output=True, text=True)
    return done.returncode == 2 and "in use by another run" in done.stderr


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
    def fault(folder, process):
        process.send_signal(number)
        return process.wait(60) == (-number if number == signal.SIGKILL else 128 + number)

    return fault


def spoilt(name, how):
    """A file is damaged while nothing runs."""

    def fault(folder, process):
        process.kill()
        process.wait()
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(how(content))
        return True

    return fault


def flipped(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


LIVE = {
    "a second run in its folder": second_run,
    "stopped for 30 s": stopped_for_a_while,
    "the older checkpoint removed": older_checkpoint_gone,
    "half-written folders beside the checkpoint": stale_folders,
}
DEADLY = {
    "SIGKILL": ended_by(signal.SIGKILL),
    "SIGTERM": ended_by(signal.SIGTERM),
    "a bit of the adapter": spoilt("checkpoint/adapter_model.safetensors", flipped),
    "a garbage line in the log": spoilt("metrics.jsonl", lambda c: c + b"\0{]\n"),
    "half a line in the log": spoilt("metrics.jsonl", lambda c: c + b'{"step": '),
}


# ---- the soak ------------------------------------------------------------------------------------


def slope(x, y):
    """Of the least squares' line, per unit of x, without the first tenth."""
    start = len(x) // 10
    return numpy.polyfit(x[start:], y[start:], 1)[0] if len(x) - start > 2 else float("nan")


def main():
    minutes = float(sys.argv[1]) if len(sys.argv) > 1 else 120
    folder = Path(tempfile.mkdtemp()) / "run"
    every = min(EVERY, max(60, minutes * 5))  # a start has to be through
    process, began = start(folder), time.time()
    lives, failed, next_fault = [[]], False, began + every
    halves = cycle(LIVE.items()), cycle(DEADLY.items())
    end = began + 60 * minutes
    last_fault = end - every / 2  # the last life gets its time
    while time.time() < end:
        time.sleep(min(10, every / 5))
        if process.poll() is not None:
            print(f"ended by itself, {process.returncode}: {folder.with_suffix('.txt')} says why")
            return 1
        lives[-1].append((time.time(), *in_use(process)))
        if time.time() < next_fault or next_fault > last_fault:
            continue
        what, fault = next(halves[time.time() > began + 30 * minutes])
        went = fault(folder, process)
        failed, next_fault = failed or not went, next_fault + every
        said = "" if went else ", WENT WRONG"
        _, memory, files, threads = lives[-1][-1]
        before = f"before it {memory / 1024:.0f} MiB, {files} files, {threads} threads"
        print(f"{(time.time() - began) / 60:5.1f} min: {what}{said}; {before}", flush=True)
        if process.poll() is not None:
            process = start(folder)
            lives.append([])
    process.send_signal(signal.SIGTERM)  # a job in the background may be deaf to SIGINT
    failed |= process.wait(120) != 143
    rows = saving.read_lines(folder / "metrics.jsonl")
    numbers = [row["step"] for row in rows]
    once = numbers == [*range(1, len(rows) + 1)]
    print(f"{len(rows)} steps, {'each once' if once else 'NOT EACH ONCE'}")
    clock, memory, files, threads = map(numpy.array, zip(*max(lives, key=len), strict=True))
    hours = (clock - clock[0]) / 3600
    print(f"longest life of a process: {hours[-1]:.2f} h")
    print(f"memory {memory[-1] / 1024:.0f} MiB, {slope(hours, memory) / 1024:+.2f} an hour")
    for name, found in (("open files", files), ("threads", threads)):
        print(f"{name} {found.min()} to {found.max()}, {slope(hours, found):+.2f} an hour")
    for name in ("seconds_rollout", "seconds_update"):
        seconds = [row[name] for row in rows]
        each = slope(numpy.arange(len(rows)), numpy.array(seconds))
        print(f"{name}: mean {numpy.mean(seconds):.3f}, {1000 * each:+.4f} a thousand steps")
    return int(failed or not once)


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.exit(main())
