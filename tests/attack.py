"""What breaks a run from outside, tried one by one: each ends in one line, never a traceback.

    python tests/attack.py              all parts, about 15 minutes
    python tests/attack.py models       a model folder's files, each edited by hand
    python tests/attack.py runs         a run folder's, edited; then resumed, measured, compared
    python tests/attack.py terminals    terminals that close, readers that leave, full disks

The first two call the programs' functions, and count an exception that leaves them as a traceback.
The last starts programs. tests/kill.py kills runs; EXPERIMENTS.md has the last results.
"""

import contextlib
import copy
import fcntl
import io
import json
import os
import pty
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
import traceback
import warnings
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from checkpoints import write_checkpoint
from safetensors.torch import load_file, save_file

import evaluate
import train
from experiments import compare
from models.loading import load_denoiser
from models.tiny import BASE
from training.files import write_checksums

ROOT = Path(__file__).resolve().parent.parent
SMALL = [
    *("--task", "countdown"),
    *("--model", "tiny"),
    *("--prompts_per_step", "4"),
    *("--eval_problems", "4"),
    *("--steps", "2"),
    *("--save_every", "1"),
]
ODD_VALUES = (None, [], {}, "x", "", -1, 0, 1e30, 2.5, True, float("nan"), [None], {"a": 1})
MEANT = (SystemExit, ValueError)  # how a refusal leaves a main function, or a function below it


class Count:
    """How many attempts there were, and which of them ended otherwise than they should."""

    def __init__(self, name):
        self.name = name
        self.attempts = 0
        self.failures = []

    def attempt(self, what, action):
        """Runs action(); its prints are dropped. What is no refusal counts as a traceback."""
        self.attempts += 1
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
                action()
        except MEANT as error:
            if "\n" in str(error):
                self.failures.append(what)
                print(f"{self.name}: {what}: several lines: {str(error)[:100]!r}", flush=True)
        except Exception as error:
            self.failures.append(what)
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(place.filename).name}:{place.lineno}"
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"
            print(f"{self.name}: {what}: {reason} ({where})", flush=True)

    def tell(self):
        print(f"{self.name}: {len(self.failures)} failures of {self.attempts}", flush=True)
        return bool(self.failures)


# ---- a model's folder ----------------------------------------------------------------------------


def attack_models(work):
    """Every field of config.json, and the tokenizer's files, with odd values."""
    count = Count("models")
    folders = {"tiny": BASE}
    for family in ("llada", "llada-moe", "dream", "a2d-qwen3", "sdar"):
        write_checkpoint(work / family, family)
        folders[family] = work / family
    for family, original in folders.items():
        config = json.loads((original / "config.json").read_text())
        edits = {
            f"{key} = {value!r}": config | {key: value} for key in config for value in ODD_VALUES
        }
        edits |= {f"without {key}": {k: config[k] for k in config if k != key} for key in config}
        edits |= {repr(value): value for value in ODD_VALUES}
        folder = work / "edited"
        shutil.copytree(original, folder)
        for what, edited in edits.items():
            (folder / "config.json").write_text(json.dumps(edited))
            count.attempt(f"{family}: {what}", partial(load_denoiser, str(folder)))
        (folder / "config.json").write_text(json.dumps(config))
        for file in folder.glob("*.json"):
            content = file.read_bytes()
            for text in ("", "{", "[]", "null", "3", '"x"', "{}", "\0"):
                file.write_text(text)
                what = f"{family}: {file.name} is {text!r}"
                count.attempt(what, partial(load_denoiser, str(folder)))
            file.write_bytes(content)
        shutil.rmtree(folder)
    return count.tell()


# ---- a run's folder ------------------------------------------------------------------------------

CORRUPTED_TEXTS = ("", "{", "[]", "{}", "null", '"x"', "[{}]", '{"step": 1}')


def edited_json(file):
    """(what was done, new text) for a JSON file: other contents, and odd values of its fields."""
    value = json.loads(file.read_text())
    for text in CORRUPTED_TEXTS:
        yield f"is {text!r}", text
    rows = value if isinstance(value, list) else [value]
    for key in rows[0]:
        for odd in (None, "x", [1]):
            changed = copy.deepcopy(rows)
            changed[0][key] = odd
            changed = changed if isinstance(value, list) else changed[0]
            yield f"{key} = {odd!r}", json.dumps(changed)


def attack_runs(work):
    """Files of a finished run, edited; then it is resumed, measured and compared."""
    count = Count("runs")
    run_dir = work / "run"
    train.draw_pictures = lambda config, run_dir: []  # slow, and of rows that were read before
    flags = [*SMALL, "--run_dir", str(run_dir)]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert train.main(flags) == 0
    shutil.copytree(run_dir, work / "whole")
    programs = {
        "resume": lambda: train.main(["--resume", "--run_dir", str(run_dir), "--steps", "3"]),
        "evaluate": lambda: evaluate.main([str(run_dir), "--problems", "2"]),
        "compare": lambda: compare.compare([str(run_dir), str(work / "whole")], work / "out"),
    }

    def attack(what, edit, names):
        for name in names:
            shutil.rmtree(run_dir)
            shutil.copytree(work / "whole", run_dir)
            edit()
            count.attempt(f"{name}: {what}", programs[name])

    readers = {
        "config.json": ("resume", "evaluate", "compare"),
        "inputs.json": ("resume", "evaluate", "compare"),
        "eval.json": ("resume", "compare"),
        "frontier.json": ("resume", "compare"),
        "completions.json": ("resume",),
    }
    for name, names in readers.items():
        file = run_dir / name
        edits = list(edited_json(work / "whole" / name))
        if name == "config.json":
            edits = edits[:8] + edits[8::3]  # one odd value of each setting: config.py checks them
        for what, text in edits:
            attack(f"{name} {what}", lambda file=file, text=text: file.write_text(text), names)
        attack(f"{name} is a folder", lambda file=file: make_folder(file), names)
    log = (work / "whole" / "metrics.jsonl").read_text()
    for text in (
        *CORRUPTED_TEXTS,
        log + log,
        log.replace("0.", "null"),
        log.replace("step", "stop"),
    ):
        edit = lambda text=text: (run_dir / "metrics.jsonl").write_text(text + "\n")  # noqa: E731
        attack(f"metrics.jsonl is {text[:20]!r}", edit, ("resume", "compare"))
    attack(
        "metrics.jsonl is a folder",
        lambda: make_folder(run_dir / "metrics.jsonl"),
        ("resume", "compare"),
    )

    checkpoint = run_dir / "checkpoint"
    for with_new_sums in (False, True):
        for what, edit in checkpoint_edits(checkpoint).items():

            def edit_checkpoint(edit=edit, with_new_sums=with_new_sums):
                shutil.rmtree(run_dir / "checkpoint.old")
                edit()
                if with_new_sums:
                    write_checksums(checkpoint)

            attack(f"checkpoint: {what}", edit_checkpoint, ("resume", "evaluate"))
    for text in CORRUPTED_TEXTS:

        def edit_sums(text=text):
            shutil.rmtree(run_dir / "checkpoint.old")
            (checkpoint / "sums.json").write_text(text)

        attack(f"sums.json is {text!r}", edit_sums, ("resume", "evaluate"))
    return count.tell()


def make_folder(file):
    file.unlink()
    file.mkdir()


def checkpoint_edits(checkpoint):
    """{what is done: a function that does it} for the files of a checkpoint."""
    edits = {}
    for text in CORRUPTED_TEXTS:
        for name in (
            "adapter_config.json",
            "adapter_model.safetensors",
            "threshold_head.safetensors",
            "state.pt",
        ):
            edits[f"{name} is {text!r}"] = lambda name=name, text=text: (
                checkpoint / name
            ).write_text(text)
    for key in (
        "base_model_name_or_path",
        "r",
        "lora_alpha",
        "target_modules",
        "peft_type",
        "bias",
    ):
        for odd in (None, [], {}, "x", -1, 2.5):
            edits[f"adapter_config.json: {key} = {odd!r}"] = lambda key=key, odd=odd: edit_json(
                checkpoint / "adapter_config.json", key, odd
            )
    states = {
        "a list": [],
        "a tensor": torch.zeros(3),
        "empty": {},
        "no step": {"optimizers": []},
        "no optimizers": {"step": 2},
        "a text for step": {"step": "2", "optimizers": [{}, {}]},
        "empty optimizers": {"step": 2, "optimizers": [{}, {}]},
        "one optimizer": {"step": 2, "optimizers": [{"state": {}, "param_groups": []}]},
        "optimizers of nothing": {
            "step": 2,
            "optimizers": [{"state": {}, "param_groups": []}, {"state": {}, "param_groups": []}],
        },
        "optimizers of lists": {"step": 2, "optimizers": [[], []]},
    }
    for name, state in states.items():
        edits[f"state.pt has {name}"] = lambda state=state: torch.save(
            state, checkpoint / "state.pt"
        )
    heads = {
        "no weights": {},
        "another width": {"linear.weight": torch.zeros(1, 7), "linear.bias": torch.zeros(1)},
        "other names": {"a": torch.zeros(1)},
    }
    for name, head in heads.items():
        file = checkpoint / "threshold_head.safetensors"
        edits[f"head has {name}"] = lambda file=file, head=head: save_file(head, file)
    edits["adapter has one weight less"] = lambda: drop_weight(
        checkpoint / "adapter_model.safetensors"
    )
    return edits


def edit_json(file, key, value):
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))


def drop_weight(file):
    weights = load_file(file)
    weights.pop(sorted(weights)[0])
    save_file(weights, file)


# ---- terminals -----------------------------------------------------------------------------------

LONG = [*SMALL[:-4], "--frontier", "false", "--steps", "60", "--save_every", "1000"]
REDIRECTIONS = {
    "| head -1": {128 + signal.SIGPIPE},
    "| head -4": {128 + signal.SIGPIPE},
    "2>&1 | head -1": {128 + signal.SIGPIPE},
    ">&-": {0},
    "2>&-": {0},
    "<&- >&- 2>&-": {0},
    "> /dev/full": {0},
    "2> /dev/full": {0},
}


def run_in_closing_terminal(command, seconds):
    """The status of a program whose terminal is closed `seconds` after its bar has appeared."""
    process, terminal = pty.fork()
    if process == 0:
        os.execv(command[0], command)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    printed = b""
    while b"joint" not in printed:
        printed += os.read(terminal, 1000)
    time.sleep(seconds)
    os.close(terminal)
    _, status = os.waitpid(process, 0)
    return os.waitstatus_to_exitcode(status)


def attack_terminals(work):
    """The step is finished and saved, and the run can go on; the status says what ended it."""
    count = Count("terminals")
    program = [sys.executable, str(ROOT / "train.py")]
    os.environ["OMP_NUM_THREADS"] = "1"

    def check(run_dir, status, expected):
        assert status in expected, f"status {status}"
        steps = len((run_dir / "metrics.jsonl").read_text().splitlines())
        assert (run_dir / "checkpoint" / "state.pt").exists(), f"nothing saved of {steps} steps"
        flags = ["--resume", "--run_dir", str(run_dir), "--steps", str(steps + 1)]
        if status == 0:
            assert steps == 60
        assert subprocess.run([*program, *flags], capture_output=True).returncode == 0

    def redirect(redirection, run_dir, expected):
        command = " ".join([*program, *LONG, "--run_dir", str(run_dir)])
        script = f"set -o pipefail; {command} {redirection}"
        done = subprocess.run(["bash", "-c", script], capture_output=True)
        check(run_dir, done.returncode, expected)

    def close(seconds, run_dir):
        command = [*program, *LONG, "--run_dir", str(run_dir)]
        check(run_dir, run_in_closing_terminal(command, seconds), {128 + signal.SIGHUP})

    for number, (redirection, expected) in enumerate(REDIRECTIONS.items()):
        run_dir = work / f"run-{number}"
        count.attempt(redirection, partial(redirect, redirection, run_dir, expected))
    for seconds in (0.5, 3):
        what = f"a terminal that is closed after {seconds} s"
        count.attempt(what, partial(close, seconds, work / f"closed-{seconds}"))
    return count.tell()


# ---- the program ---------------------------------------------------------------------------------

PARTS = {
    "models": attack_models,
    "runs": attack_runs,
    "terminals": attack_terminals,
}


def main():
    if {"-h", "--help"} & {*sys.argv[1:]}:
        print(__doc__)
        return 0
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    names = sys.argv[1:] or list(PARTS)
    if not set(names) <= PARTS.keys():
        print(f"attack.py: the parts are {', '.join(PARTS)}", file=sys.stderr)
        return 2
    failed = False
    for name in names:
        with tempfile.TemporaryDirectory() as work:
            failed |= PARTS[name](Path(work).resolve())
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
