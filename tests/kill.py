"""Twenty runs killed at random moments and resumed: each ends as one that was never killed.

    python tests/kill.py        about 15 minutes on two cores; EXPERIMENTS.md has the last result

SIGKILL, several times a run, at moments drawn from all of its life: before the first step, while
the base is measured, while a checkpoint is written.
"""

import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLAGS = "--task countdown --model tiny --steps 12 --save_every 2 --prompts_per_step 4"
FLAGS += " --eval_problems 16"


def command(folder):
    first = not (folder / "config.json").exists()
    flags = [*FLAGS.split()] if first else ["--resume"]
    return [sys.executable, str(ROOT / "train.py"), *flags, "--run_dir", str(folder)]


def result(folder):
    """What has to be equal: every step's metrics but times, and the trained model's scores."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [
        {k: v for k, v in row.items() if "second" not in k and "memory" not in k} for row in rows
    ]
    rows = json.loads((folder / "eval.json").read_text())
    return steps, [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def main():
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    work, chance = Path(tempfile.mkdtemp()), random.Random(0)
    began = time.time()
    subprocess.run(command(work / "whole"), check=True, capture_output=True)
    took, expected, kills = time.time() - began, result(work / "whole"), 0
    for i in range(runs):
        folder = work / f"run-{i}"
        for _ in range(3):
            process = subprocess.Popen(command(folder), stdout=-3, stderr=-3)
            time.sleep(chance.uniform(0, took))
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                kills += 1
            process.wait()
        done = subprocess.run(command(folder), capture_output=True, text=True)
        same = done.returncode == 0 and result(folder) == expected
        print(f"run {i}: {'equal' if same else 'NOT EQUAL: ' + done.stderr[-300:]}", flush=True)
        if not same:
            return 1
        shutil.rmtree(folder)
    print(f"{runs} runs, {kills} kills: all ended as the one that was never killed")
    shutil.rmtree(work)


if __name__ == "__main__":
    sys.exit(main())
