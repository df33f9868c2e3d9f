"""Runs killed and resumed: each ends as one that was never killed.

    python tests/kill.py           20 runs, killed at random moments        about 15 minutes
    python tests/kill.py events    a kill before every file event           about 15 minutes
    python tests/kill.py cuts      6 runs, the disk's power cut (Linux, as root)    5 minutes

The first kills from outside, several times a run, at moments drawn from all of its life. The second
kills from inside, before the n-th time that a file is opened to be written, synced, renamed or
removed, for every n. The third shuts down a loop-mounted ext4 under the run, so that nothing is
left of what was not synced. EXPERIMENTS.md has the last results. (Two cores, nothing beside.)
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
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from toy import metrics_of, scores_of

ROOT = Path(__file__).resolve().parent.parent
FLAGS = "--task countdown --model tiny --prompts_per_step 4 --eval_problems 16"
LONG, SHORT = " --steps 12 --save_every 2", " --steps 3 --save_every 1 --frontier false"


def arguments(folder, flags):
    first = not (folder / "config.json").exists()
    return [*(flags.split() if first else ["--resume"]), "--run_dir", str(folder)]


def result(folder):
    """What has to be equal: every step's metrics but times, and the trained model's scores."""
    return metrics_of(folder), scores_of(folder)


@contextmanager
def disk(work):
    """A small file system of its own, and what takes it away as a power cut does: (path, cut)."""
    image, path = work / "disk.img", work / "disk"
    path.mkdir()
    subprocess.run(["truncate", "--size", "200M", image], check=True)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    mount = partial(subprocess.run, ["mount", "-o", "loop", image, path], check=True)
    unmount = partial(subprocess.run, ["umount", path], check=True)

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


def at_random(work, runs, place, stop):
    def command(folder):
        return [sys.executable, str(ROOT / "train.py"), *arguments(folder, FLAGS + LONG)]

    chance, kills, began = random.Random(0), 0, time.time()
    subprocess.run(command(work / "whole"), check=True, capture_output=True)
    took, expected = time.time() - began, result(work / "whole")
    for i in range(runs):
        folder = place / f"run-{i}"
        for _ in range(3):
            process = subprocess.Popen(command(folder), stdout=-3, stderr=-3)
            time.sleep(chance.uniform(0, took))
            if process.poll() is None:
                stop(process)
                kills += 1
            process.wait()
        done = subprocess.run(command(folder), capture_output=True, text=True)
        same = done.returncode == 0 and result(folder) == expected
        print(f"run {i}: {'equal' if same else 'NOT EQUAL: ' + done.stderr[-300:]}", flush=True)
        if not same:
            return 1
        shutil.rmtree(folder)
    print(f"{runs} runs, {kills} of these ends: all came out as the one that was left alone")


def run_until(folder, event, said):
    """A run that kills itself before its n-th file event in its folder; 0: never. Tells events."""
    import torch

    import train

    torch.set_num_threads(1)
    train.plot_curves = lambda run_dir: None  # slow
    sys.stdout = sys.stderr = open(said / "words", "w")  # noqa: SIM115
    seen = 0

    def counted(name, call, writes=lambda *_: True):
        def wrapped(path, *args, **how):
            nonlocal seen
            if str(folder) in str(path) and writes(*args):
                seen += 1
                (said / "events").write_text(f"{seen} {name} {Path(str(path)).name}")
                if seen == event:
                    os.kill(os.getpid(), signal.SIGKILL)
            return call(path, *args, **how)

        return wrapped

    # os.fsync takes a number, not a path: saving.fsync's own argument is counted.
    train.files.fsync = counted("sync", train.files.fsync)
    for name in ("rename", "replace", "unlink", "mkdir", "rmdir"):
        setattr(os, name, counted(name, getattr(os, name)))
    builtins.open = io.open = counted("open", open, lambda mode="r", *_: "r" not in mode)
    os._exit(train.main(arguments(folder, FLAGS + SHORT)))


def at_every_event(work):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "peft"])

    def run(folder, event, said):
        said.mkdir(exist_ok=True)
        process = context.Process(target=run_until, args=(folder, event, said))
        process.start()
        process.join()
        return process.exitcode

    said = work / "said"
    assert run(work / "whole", 0, said) == 0, (said / "words").read_text()
    expected, n = result(work / "whole"), 0
    while True:
        n, folder = n + 1, work / "run"
        code = run(folder, n, said)
        what = (said / "events").read_text()
        if code != -signal.SIGKILL:  # it has ended before its n-th event
            break
        code = run(folder, 0, said)
        same = code == 0 and result(folder) == expected
        print(f"before {what}: {'equal' if same else 'NOT EQUAL'}", flush=True)
        if not same:
            print((said / "words").read_text()[-500:])
            return 1
        shutil.rmtree(folder)
    print(f"killed before each of {n - 1} file events: all ended as the one that never was")


def main():
    work = Path(tempfile.mkdtemp())
    what, *runs = sys.argv[1:] or ["20"]
    if what == "events":
        failed = at_every_event(work)
    elif what == "cuts":
        with disk(work) as (place, cut):
            failed = at_random(work, int(runs[0]) if runs else 6, place, cut)
    else:
        failed = at_random(work, int(what), work, subprocess.Popen.kill)
    if not failed:
        shutil.rmtree(work)
    return failed


if __name__ == "__main__":
    sys.exit(main())
