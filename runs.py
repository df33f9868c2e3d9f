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
import traceback
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

from diffusion_policy import DiffusionPolicy
from models import export, load_denoiser, load_lora
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


METRICS = {  # every key of metrics.jsonl; the README's table is held equal to it by a test
    "step": "optimisation steps done",
    "reward_mean": "the verifier's reward of the step's rollouts, before speed counts",
    "speed_reward_mean": "what is maximised: the reward times 1 - lambda * NFE / L",
    "solved_mean": "share of rollouts that solve their problem",
    "nfe_mean": "denoiser calls per completion",
    "threshold_mean": "mean gamma, nats",
    "threshold_std": "its standard deviation over the batch, exploration included",
    "loss": "the model's objective, negated; about 0 at the first inner update by construction",
    "ratio_mean": "new over old surrogate; exactly 1 at the first inner update",
    "clip_share": "share of tokens whose gradient the clip has switched off",
    "is_weight_mean": "mean importance weight, capped",
    "is_weight_max": "largest importance weight before the cap",
    "is_capped_share": "share of tokens whose weight is capped",
    "ess_share": "effective sample size of the capped weights over the number of tokens",
    "surrogate_kl": "KL(true ‖ surrogate) per token in nats, before the update: how wrong the surrogate is",
    "reference_kl": "KL(new ‖ base model), k3 estimate, where kl_beta is above 0",
    "cache_kl": "KL(rollout ‖ exact policy) per token in nats, of one completion: what the block cache costs; null without one",
    "grad_norm": "norm of the denoiser's gradient before clipping",
    "threshold_loss": "the sampler's objective, negated",
    "threshold_ratio": "new over old density of gamma, last inner update",
    "threshold_clip_share": "share of completions whose gamma the clip has switched off",
    "seconds_rollout": "seconds to complete the batch",
    "seconds_update": "seconds to verify and learn from it",
    "tokens_per_second": "completion tokens per second of rollout",
    "peak_memory_gib": "largest memory so far: of the GPU, or of the process where there is none",
}


def log_step(run_dir, bar, step, problems, texts, rollout, reward, solved, speed_reward, metrics, times):
    """One line into metrics.jsonl, up to four completions into samples.jsonl, a few figures onto the progress bar."""
    began, rolled_out, ended = times
    has_gamma = not rollout.threshold.isnan().any()
    row = dict.fromkeys(METRICS) | metrics
    row |= {
        "step": step,
        "reward_mean": reward.mean().item(),
        "speed_reward_mean": speed_reward.mean().item(),
        "solved_mean": sum(solved) / len(solved),
        "nfe_mean": rollout.nfe.float().mean().item(),
        "threshold_mean": rollout.threshold.mean().item() if has_gamma else None,
        "threshold_std": rollout.threshold.std(unbiased=False).item() if has_gamma else None,
        "seconds_rollout": rolled_out - began,
        "seconds_update": ended - rolled_out,
        "tokens_per_second": rollout.token_mask.sum().item() / (rolled_out - began),
        "peak_memory_gib": peak_memory_gib(),
    }
    append_lines(run_dir / "metrics.jsonl", [row])
    samples = [
        {"step": step, "problem": problems[i], "text": texts[i], "reward": reward[i].item(), "nfe": rollout.nfe[i].item(),
         "threshold": rollout.threshold[i].item()} for i in range(min(4, len(texts)))
    ]  # fmt: skip
    append_lines(run_dir / "samples.jsonl", samples)
    shown = {"reward": row["reward_mean"], "solved": row["solved_mean"], "NFE": row["nfe_mean"], "γ": row["threshold_mean"]}
    bar.set_postfix_str(", ".join(f"{name} {value:.3f}" for name, value in shown.items() if value is not None))


class FinishTheStep:
    """The first Ctrl-C only sets `asked`, so that the loop ends its step and saves; the second one stops at once."""

    def __enter__(self):
        self.asked = False
        self.before = signal.signal(signal.SIGINT, self.note)
        return self

    def note(self, *_):
        self.asked = True
        signal.signal(signal.SIGINT, self.before)
        print("\nending this step, then saving; Ctrl-C once more stops at once", flush=True)

    def __exit__(self, *_):
        signal.signal(signal.SIGINT, self.before)


def out_of_memory(error, advice):
    """One line, with the figures and the advice, for an out-of-memory error; any other error is raised again."""
    said = " ".join(str(error).split())
    if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "allocate memory" not in said:
        raise error
    used = peak_memory_gib()
    return f"out of memory{f', {used:.1f} GiB used at most' if used else ''}: {advice} [{said[:160]}]"


def what_to_lower(error, settings):
    """Which settings of a training run would have needed less memory where this error was raised."""
    if any(frame.name == "update_denoiser" for frame in traceback.extract_tb(error.__traceback__)):
        advice = f"while learning, lower --micro_batch_size ({settings.micro_batch_size})"
        advice += "" if settings.gradient_checkpointing else " or set --gradient_checkpointing true"
        advice += ", both allowed on --resume"
        return advice + ("" if settings.lora_rank else "; --lora_rank 128 trains an adapter instead of every weight")
    sizes = (f"--{name} ({getattr(settings, name)})" for name in ("prompts_per_step", "group_size", "length"))
    advice = f"in a rollout or while loading, lower {', '.join(sizes)}"
    return advice + ("" if settings.cache == "none" else f", or set --cache none (not {settings.cache}), allowed on --resume")


def save_checkpoint(run_dir, policy, optimizers, step):
    """The state after `step` steps, with all that the next step depends on (its random draws depend on seed and step alone)."""
    with replacing(run_dir / "checkpoint") as folder:
        if hasattr(policy.denoiser, "disable_adapter"):  # LoRA: the adapter alone, which names its base
            policy.denoiser.save_pretrained(folder, save_embedding_layers=False)
        else:
            export(policy.denoiser, policy.tokenizer, folder)
        save_file(policy.threshold_head.state_dict(), folder / "threshold_head.safetensors")
        torch.save({"step": step, "optimizers": [optimizer.state_dict() for optimizer in optimizers]}, folder / "state.pt")


def checkpoint_of(path):
    """The checkpoint folder of a run folder; any other path as it is."""
    path = Path(path)
    settle(path / "checkpoint")
    return path / "checkpoint" if (path / "config.json").exists() and (path / "checkpoint").is_dir() else path


def base_of(folder):
    """The name or folder of the model that an adapter in `folder` was trained on; None where there is no adapter."""
    found = folder / "adapter_config.json"
    return read_json(found).get("base_model_name_or_path") if found.is_file() else None


def is_compact(name_or_path):
    """Whether a model reads the tasks' compact prompts: "tiny", and what was trained from it."""
    folder = checkpoint_of(name_or_path)
    folder = Path(base_of(folder) or folder)
    return name_or_path == "tiny" or (folder / "config.json").is_file() and bool(read_json(folder / "config.json").get("compact_prompts"))


def load_policy(path, device="cpu", head_sigma=0.5, dtype=None, trainable=False):
    """The policy of a run folder, of any checkpoint folder, or of a hub name (the last two mostly without a threshold head).

    An adapter is put onto its base model, to be trained on if `trainable`. Raises ValueError.
    """
    folder = checkpoint_of(path)
    base = base_of(folder)
    denoiser, tokenizer = load_denoiser(base or (str(folder) if folder.is_dir() else str(path)), device=device, dtype=dtype)
    if base:
        denoiser = load_lora(denoiser, folder, trainable)
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
