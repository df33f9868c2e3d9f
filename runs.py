"""Run folders and checkpoints: what keeps a run repeatable, resumable and never half-written.

    runs/NAME/  config.json      the settings; they alone repeat the run
                metrics.jsonl    one line a step            samples.jsonl  a few completions a step
                eval.json        before against after       curves.png     the run at a glance
                environment.txt  versions and device
                checkpoint/      model and tokenizer (save_pretrained), threshold_head.safetensors, state.pt (optimizers, step)

Files and folders are written aside and renamed, and nothing is loaded by unrestricted pickle.
"""

import json
import os
import platform
import shutil
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

from diffusion_policy import DiffusionPolicy
from models import load_denoiser
from sampler import ThresholdHead

try:
    import resource  # not on Windows
except ImportError:
    resource = None


@contextmanager
def replacing(path):
    """Gives a path beside `path` to write a file or folder to; when that went well, it takes the old one's place.

    A folder cannot be renamed onto another, so for a moment there is only `path`.old; `settle` finishes what a kill cut short.
    """
    aside, old = Path(f"{path}.tmp"), Path(f"{path}.old")
    shutil.rmtree(aside, ignore_errors=True)
    yield aside
    if path.is_dir():
        path.rename(old)
    os.replace(aside, path)
    shutil.rmtree(old, ignore_errors=True)


def settle(path):
    """After a kill between two renames the folder has its old name: give it back."""
    old = Path(f"{path}.old")
    if old.exists() and not path.exists():
        old.rename(path)


def write_json(path, value):
    with replacing(path) as aside:
        aside.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def read_json(path):
    """Raises ValueError where the file is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None


def append_lines(path, rows):
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def read_lines(path):
    """The rows of a JSON-lines file, up to the first that a kill left half-written."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def refuse_used(run_dir):
    """Raises ValueError if the folder holds anything already."""
    if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        raise ValueError(f"{run_dir} already holds another run: choose a new --run_dir, or go on with that run by --resume")


def create_run(run_dir):
    """Make a run's folder and note in it what it runs on."""
    run_dir.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu {platform.machine()}, {torch.get_num_threads()} threads"
    versions = f"python {platform.python_version()}\ntorch {torch.__version__}\ntransformers {transformers.__version__}\n"
    (run_dir / "environment.txt").write_text(versions + device + "\n", encoding="utf-8")


def peak_memory_gib():
    """The most memory used so far, in GiB: of the GPU, or of the process; None where the system does not tell (Windows)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    if resource is None:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30


class FinishTheStep:
    """The first Ctrl-C only sets `asked`, so that the loop ends its step and saves; the second one stops at once."""

    def __init__(self):
        self.asked = False
        self.before = signal.signal(signal.SIGINT, self.note)

    def note(self, *_):
        self.asked = True
        self.restore()
        print("\nending this step, then saving; Ctrl-C once more stops at once", flush=True)

    def restore(self):
        signal.signal(signal.SIGINT, self.before)


def save_checkpoint(run_dir, policy, optimizers, step):
    """The state after `step` steps, with all that the next step depends on (its random draws depend on seed and step alone)."""
    with replacing(run_dir / "checkpoint") as folder:
        policy.denoiser.save_pretrained(folder)
        policy.tokenizer.save_pretrained(folder)
        save_file(policy.threshold_head.state_dict(), folder / "threshold_head.safetensors")
        torch.save({"step": step, "optimizers": [optimizer.state_dict() for optimizer in optimizers]}, folder / "state.pt")


def load_policy(path, device="cpu", head_sigma=0.5):
    """The policy of a run folder, or of any checkpoint folder (then without a threshold head). Raises ValueError."""
    path = Path(path)
    settle(path / "checkpoint")
    folder = path / "checkpoint" if (path / "config.json").exists() and (path / "checkpoint").is_dir() else path
    denoiser, tokenizer = load_denoiser(str(folder), device=device)
    head = None
    if (folder / "threshold_head.safetensors").exists():
        head = ThresholdHead(denoiser.config.hidden_size, sigma=head_sigma).to(device)
        head.load_state_dict(load_file(folder / "threshold_head.safetensors"))
    return DiffusionPolicy(denoiser, tokenizer, head)


def load_state(run_dir, optimizers):
    """Put the optimizers back where the checkpoint was written, and cut the logs there. Returns its step."""
    state = torch.load(run_dir / "checkpoint" / "state.pt", map_location="cpu", weights_only=True)
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    for name in ("metrics.jsonl", "samples.jsonl"):
        kept = [row for row in read_lines(run_dir / name) if row["step"] <= state["step"]]
        with replacing(run_dir / name) as aside:
            aside.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    return state["step"]
