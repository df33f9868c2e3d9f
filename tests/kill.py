"""Runs killed and resumed: each ends as one that was never killed.

    python tests/kill.py           20 runs, killed at random moments        about 15 minutes
    python tests/kill.py events    a kill before every file event           about 15 minutes
    python tests/kill.py cuts      6 runs, the disk's power cut (Linux, as root)    5 minutes

The first kills from outside, several times a run, at random moments of its life. The second kills
from inside, before the n-th time that a file is opened to be written, synced, renamed or removed,
for every n. The third shuts down a loop-mounted ext4 under the run, so that nothing is left of what
was not synced. EXPERIMENTS.md has the last results. (On two cores, with nothing beside it.)
"""

import builtins
import fcntl
import io
import multiprocessing
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from toy import metrics_of, scores_of

ROOT = Path(__file__).resolve().parent.parent
FLAGS = [
    *("--task", "countdown"),
    *("--model", "tiny"),
    *("--prompts_per_step", "4"),
    *("--eval_problems", "16"),
]
LONG = [*FLAGS, "--steps", "12", "--save_every", "2"]
SHORT = [*FLAGS, "--steps", "3", "--save_every", "1"]


def arguments(folder, flags):
    """train.py's: to start the run in a folder or, if it has begun, to go on with it."""
    if (folder / "config.json").exists():
        flags = ["--resume"]
    return [*flags, "--run_dir", str(folder)]


def result(folder):
    """What has to be equal, but for times: every step's metrics, and both models' scores."""
    return metrics_of(folder), scores_of(folder), scores_of(folder, "frontier.json")


# ---- killed from outside -------------------------------------------------------------------------


@contextmanager
def small_disk(work):
    """Yields (path, cut): a file system of its own, and a function that cuts its power.

    cut(process) also kills the process that ran on it, and mounts the disk again.
    """
    image = work / "disk.img"
    path = work / "disk"
    path.mkdir()
    subprocess.run(["truncate", "--size", "200M", image], check=True)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)

    def mount():
        subprocess.run(["mount", "-o", "loop", image, path], check=True)

    def unmount():
        subprocess.run(["umount", path], check=True)

    def cut(process):
        handle = os.open(path, os.O_RDONLY)
        # EXT4_IOC_SHUTDOWN without a flush: what was not synced is lost, as is the journal's end.
        fcntl.ioctl(handle, 0x8004587D, struct.pack("I", 2))
        os.close(handle)
        process.kill()
        process.wait()
        unmount()
        mount()

    mount()
    try:
        yield path, cut
    finally:
        unmount()


def kill_at_random(work, runs, place, stop):
    """Stops runs in `place` by stop(process), three times each. Returns 1 if one ends otherwise."""

    def command(folder):
        return [sys.executable, str(ROOT / "train.py"), *arguments(folder, LONG)]

    rng = random.Random(0)
    began = time.time()
    subprocess.run(command(work / "whole"), check=True, capture_output=True)
    seconds = time.time() - began
    expected = result(work / "whole")
    kills = 0
    for i in range(runs):
        folder = place / f"run-{i}"
        for _ in range(3):
            process = subprocess.Popen(
                command(folder), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            time.sleep(rng.uniform(0, seconds))
            if process.poll() is None:
                stop(process)
                kills += 1
            process.wait()
        last = subprocess.run(command(folder), capture_output=True, text=True)
        is_equal = last.returncode == 0 and result(folder) == expected
        print(f"run {i}: {'equal' if is_equal else 'NOT EQUAL: ' + last.stderr[-300:]}", flush=True)
        if not is_equal:
            return 1
        shutil.rmtree(folder)
    print(f"{runs} runs, {kills} kills: all ended as the one that was left alone")
    return 0


# ---- killed from inside --------------------------------------------------------------------------


def run_until(folder, event, notes):
    """A run that kills itself before its n-th file event in its folder; 0: never.

    Its output goes to notes/output, and each event's number and name to notes/event.
    """
    import torch

    import train
    from training import files

    torch.set_num_threads(1)
    train.draw_pictures = lambda config, run_dir: []  # slow
    sys.stdout = sys.stderr = open(notes / "output", "w")  # noqa: SIM115
    events = 0

    def counted(name, function, writes=lambda *_: True):
        """The function, as an event if its path is in the folder."""

        def wrapped(path, *args, **kwargs):
            nonlocal events
            if str(folder) in str(path) and writes(*args):
                events += 1
                (notes / "event").write_text(f"{events} {name} {Path(str(path)).name}")
                if events == event:
                    os.kill(os.getpid(), signal.SIGKILL)
            return function(path, *args, **kwargs)

        return wrapped

    files.fsync = counted("sync", files.fsync)  # not os.fsync, which takes a number, not a path
    for name in ("rename", "replace", "unlink", "mkdir", "rmdir"):
        setattr(os, name, counted(name, getattr(os, name)))
    builtins.open = io.open = counted("open", open, writes=lambda mode="r", *_: "r" not in mode)
    os._exit(train.main(arguments(folder, SHORT)))


def kill_at_every_event(work):
    """Returns 1 if a run that was killed before some event ends otherwise."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "peft"])
    notes = work / "notes"
    notes.mkdir()

    def run(folder, event):
        process = context.Process(target=run_until, args=(folder, event, notes))
        process.start()
        process.join()
        return process.exitcode

    assert run(work / "whole", event=0) == 0, (notes / "output").read_text()
    expected = result(work / "whole")
    folder = work / "run"
    event = 1
    while run(folder, event) == -signal.SIGKILL:  # else it has ended before its n-th event
        name = (notes / "event").read_text()
        is_equal = run(folder, event=0) == 0 and result(folder) == expected
        print(f"before {name}: {'equal' if is_equal else 'NOT EQUAL'}", flush=True)
        if not is_equal:
            print((notes / "output").read_text()[-500:])
            return 1
        shutil.rmtree(folder)
        event += 1
    print(f"killed before each of {event - 1} file events: all ended as the one left alone")
    return 0


def main():
    if {"-h", "--help"} & {*sys.argv[1:]}:
        print(__doc__)
        return 0
    work = Path(tempfile.mkdtemp())
    mode = sys.argv[1] if len(sys.argv) > 1 else "20"
    if mode == "events":
        failed = kill_at_every_event(work)
    elif mode == "cuts":
        runs = int(sys.argv[2]) if len(sys.argv) > 2 else 6
        with small_disk(work) as (place, cut):
            failed = kill_at_random(work, runs, place, stop=cut)
    else:
        failed = kill_at_random(work, int(mode), work, stop=subprocess.Popen.kill)
    if not failed:
        shutil.rmtree(work)
    return failed


if __name__ == "__main__":
    sys.exit(main())
