"""Run folders, flags and checkpoints: what keeps a run repeatable, resumable, never half-written.

    runs/NAME/  config.json      the settings; they alone repeat the run
                metrics.jsonl    one line a step            samples.jsonl  a few completions a step
                eval.json        base against trained       curves.png     the run at a glance
                frontier.json    both at several gammas     frontier.png   accuracy against NFE
                completions.json three of each              environment.txt  versions and device
                checkpoint/      model and tokenizer (save_pretrained) or adapter,
                                 threshold_head.safetensors, state.pt (optimizers, step)

Files and folders are written aside and renamed. Nothing is loaded by unrestricted pickle.
"""

import json
import platform
import shutil
import signal
import sys
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

import models
import tiny
import together
from diffusion_policy import DiffusionPolicy
from sampler import Decoder, ThresholdHead
from settings import FREE, RECIPES, Settings, settings_of

# ---- files ---------------------------------------------------------------------------------------


@contextmanager
def replacing(path):
    """Gives a path beside `path` to write to; when that went well, it takes the old one's place.

    A folder cannot be renamed onto another: for a moment there is only `path`.old (see `settle`).
    """
    settle(path)
    aside, old = Path(f"{path}.tmp"), Path(f"{path}.old")
    for left_over in (aside, old):
        shutil.rmtree(left_over, ignore_errors=True)
    yield aside
    if path.is_dir():
        path.rename(old)
    aside.replace(path)
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
    with models.one_line(f"cannot read {path}"):
        return json.loads(path.read_text(encoding="utf-8"))


def read_lines(path):
    """The rows of a JSON-lines file, if it is there, up to one that a kill left half-written."""
    rows = []
    with suppress(FileNotFoundError, json.JSONDecodeError):
        for line in path.read_text(encoding="utf-8").splitlines():
            rows.append(json.loads(line))
    return rows


# ---- flags, and what a run starts from -----------------------------------------------------------


def choose(given):
    """(settings, run_dir, resume, export) from the flags given (settings.read_flags).

    --resume keeps the run's own settings, but for the few that are FREE. Raises ValueError.
    """
    resume, export = given.pop("resume", False), given.pop("export", None)
    if resume and "run_dir" not in given:
        raise ValueError("--resume needs --run_dir, the folder of the run to go on with")
    if resume:
        saved = asdict(settings_of(read_json(file := Path(given["run_dir"]) / "config.json"), file))
        for name in sorted(given.keys() - FREE):
            if saved[name] != given[name]:
                raise ValueError(f"{file} has {name} = {saved[name]}: start a new run to change it")
        return Settings(**saved | given), file.parent, resume, export
    why = "as asked"
    if not given.get("model"):
        given["model"], why = models.default_model()
    print(f"model: {given['model']} ({why})", flush=True)
    if base_of(checkpoint_of(given["model"])):
        way_out = f"train.py --resume --run_dir {given['model']} --export DIR, then --model DIR"
        raise ValueError(f"{given['model']} is an adapter, and cannot carry another: {way_out}")
    if is_compact(given["model"]):
        settings = Settings(**RECIPES.get(given.get("task"), {}) | given)
    else:
        recipe, expect = models.recipe_of(given["model"])
        settings = Settings(**recipe | given)
        print(f"expected: {expect(settings)}", flush=True)
    name = "-".join(name.rpartition(":")[2] for name in settings.task.split(","))
    name = f"{name}-{settings.train}-{datetime.now():%Y%m%d-%H%M%S}"
    return settings, Path(settings.run_dir or f"runs/{name}"), resume, export


def decoder_of(settings, **how):
    """Entropy-bounded, as in rollouts: the learned gamma, unless the policy alone learns."""
    level = settings.gamma_0 if settings.train == "policy" else None
    how = {"level": level, "temperature": settings.temperature, "stop_at_eos": True} | how
    block = settings.block_length or None
    return Decoder("eb", block_length=block, cache=settings.cache, **how)


def prepare(settings, run_dir, resume, export):
    """(policy, task, held-out problems): what to go on with.

    Raises ValueError or OSError for all that would otherwise fail hours later.
    """
    decoder_of(settings)  # raises for a cache without blocks
    ThresholdHead(1, settings.gamma_0)  # raises for a gamma_0 outside its bounds
    if settings.dtype == "4bit" and not settings.lora_rank:
        raise ValueError("dtype 4bit learns by an adapter alone: give a --lora_rank above 0")
    for folder in filter(None, [None if resume else run_dir, export]):
        if Path(folder).exists() and any(Path(folder).iterdir()):
            raise ValueError(f"{folder} is in use: go on by --resume, or give a new --run_dir")
    compact, shipped = is_compact(settings.model), tiny.SHIPPED_TASKS.split(",")
    task = together.find(settings.task, compact, settings.data, settings.length)
    if settings.model == "tiny" and not {*settings.task.split(",")} <= {*shipped}:
        raise ValueError(
            f"the shipped base knows {tiny.SHIPPED_TASKS}; make one for this task by python tiny.py"
            f" --task {settings.task} --out bases/my and give --model bases/my"
        )
    problems = task.problems(settings.eval_split, settings.eval_problems, 0)  # before the weights
    settings.length = settings.length or (task.length if compact else 0)
    if not settings.length:
        raise ValueError("length = 0: this model's completions need one, such as --length 256")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    saved = checkpoint_of(run_dir) != run_dir
    policy = base_policy(settings, device, run_dir if saved else None)
    if settings.lora_rank:
        how = (settings.lora_rank, settings.lora_alpha, settings.lora_dropout, settings.seed)
        policy.denoiser = policy.denoiser if saved else models.add_lora(policy.denoiser, *how)
        print(models.describe_lora(policy.denoiser), flush=True)
    size = policy.denoiser.config.hidden_size
    head = policy.threshold_head or ThresholdHead(size, settings.gamma_0).to(device)
    policy.threshold_head, head.sigma = head, settings.head_sigma
    policy.encode([task.prompt(problem) for problem in problems], settings.length)  # do they fit?
    if not resume:
        create_run(run_dir)
    write_json(run_dir / "config.json", asdict(settings) | {"run_dir": str(run_dir)})
    return policy, task, problems


def base_policy(settings, device, run_dir=None):
    """The policy before RL, without an adapter; with run_dir that run's, as it was saved last.

    Weights that learn stay float32: bfloat16 would round a step of 1e-6 away.
    """
    dtype = models.DTYPES[settings.dtype] or (None if settings.lora_rank else torch.float32)
    policy = load_policy(run_dir or settings.model, device, dtype, trainable=bool(run_dir))
    policy.prefill, policy.rows_at_once = settings.prefill, settings.rollout_batch_size
    return policy


def create_run(run_dir):
    """Make a run's folder and note in it what it runs on."""
    run_dir.mkdir(parents=True, exist_ok=True)
    device = f"cpu {platform.machine()}, {torch.get_num_threads()} threads"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else device
    versions = f"python {platform.python_version()}\ntorch {torch.__version__}\n"
    versions += f"transformers {transformers.__version__}\ndevice {device}\n"
    (run_dir / "environment.txt").write_text(versions, encoding="utf-8")


# ---- while it runs -------------------------------------------------------------------------------


class FinishTheStep:
    """The first Ctrl-C sets `asked`: the loop ends its step and saves. The second stops at once."""

    asked = False

    def __enter__(self):
        self.before = signal.signal(signal.SIGINT, self.note)
        return self

    def note(self, *_):
        self.asked = True
        self.__exit__()
        print("\nending this step, then saving; Ctrl-C once more stops at once", flush=True)

    def __exit__(self, *_):
        signal.signal(signal.SIGINT, self.before)


def peak_memory_gib():
    """The most memory used so far, of the GPU, or of the process; None where nobody tells."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def out_of_memory(error, lower):
    """One line for an out-of-memory error, with what to lower; any other error is raised again."""
    said = " ".join(str(error).split())
    if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "allocate" not in said:
        raise error
    used = peak_memory_gib()
    used = f", {used:.1f} GiB used at most" if used else ""
    return f"out of memory{used}: lower {lower} [{said[:160]}]"


# ---- checkpoints ---------------------------------------------------------------------------------


def save_checkpoint(run_dir, policy, optimizers, step):
    """The state after `step` steps: all that the next one depends on but the seed."""
    with replacing(run_dir / "checkpoint") as folder:
        if hasattr(policy.denoiser, "disable_adapter"):  # the adapter alone, which names its base
            policy.denoiser.save_pretrained(folder, save_embedding_layers=False)
        else:
            models.export(policy.denoiser, policy.tokenizer, folder)
        save_file(policy.threshold_head.state_dict(), folder / "threshold_head.safetensors")
        state = {"step": step, "optimizers": [o.state_dict() for o in optimizers]}
        torch.save(state, folder / "state.pt")


def load_state(run_dir, optimizers):
    """Optimizers and logs back to where the last checkpoint was written, if any was. -> its step"""
    folder, step = run_dir / "checkpoint", 0
    if folder.exists():
        state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        step = state["step"]
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    for name in ("metrics.jsonl", "samples.jsonl"):
        kept = [row for row in read_lines(run_dir / name) if row["step"] <= step]
        with replacing(run_dir / name) as aside:
            aside.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    return step


def checkpoint_of(path):
    """The checkpoint folder of a run folder; any other path as it is."""
    path = Path(path)
    settle(path / "checkpoint")
    is_run = (path / "config.json").exists() and (path / "checkpoint").is_dir()
    return path / "checkpoint" if is_run else path


def base_of(folder):
    """The name or folder of the model that the adapter in `folder` was trained on, or None."""
    found = folder / "adapter_config.json"
    return read_json(found).get("base_model_name_or_path") if found.is_file() else None


def is_compact(name_or_path):
    """Whether a model reads the tasks' compact prompts: "tiny", and what was trained from it."""
    folder = checkpoint_of(name_or_path)
    name = str(base_of(folder) or folder)
    file = Path(name) / "config.json"
    return name == "tiny" or bool(file.is_file() and read_json(file).get("compact_prompts"))


def load_policy(path, device="cpu", dtype=None, trainable=False, adapter=None):
    """The policy of a run folder, a checkpoint folder or a hub name, with `adapter` put onto it.

    An adapter's own folder will do as `path`: it names its base. Raises ValueError.
    """
    folder = checkpoint_of(path)
    base = base_of(folder)
    if base and (adapter or not Path(base).is_dir() and base.count("/") != 1 and base != "tiny"):
        raise ValueError(f"{path} is an adapter of {base}: give BASE_MODEL --adapter {path}")
    denoiser, tokenizer = models.load_denoiser(base or str(folder), device, dtype)
    if adapter or base:
        denoiser = models.load_lora(denoiser, adapter or folder, trainable)
    file = Path(adapter or folder) / "threshold_head.safetensors"
    policy = DiffusionPolicy(denoiser, tokenizer)
    if file.exists():
        policy.threshold_head = ThresholdHead(denoiser.config.hidden_size).to(device)
        policy.threshold_head.load_state_dict(load_file(file))
    return policy
