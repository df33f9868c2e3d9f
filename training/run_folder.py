"""Run folders, flags and checkpoints: what keeps a run repeatable, resumable, never half-written.

    runs/NAME/  config.json      the settings; they alone repeat the run
                metrics.jsonl    one line a step            samples.jsonl  a few completions a step
                eval.json        base against trained       curves.png     the run at a glance
                frontier.json    both at several gammas     frontier.png   accuracy against NFE
                completions.json three of each              environment.txt  versions and device
                checkpoint/      model and tokenizer (save_pretrained) or adapter,
                                 threshold_head.safetensors, state.pt (optimizers, step),
                                 sums.json (checksums); checkpoint.old/ is the one before

saving.py has how files survive. Nothing is loaded by unrestricted pickle.
"""

import json
import platform
import sys
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

from config import FREE, RECIPES, Settings, settings_of
from diffusion_policy import DiffusionPolicy
from models import loading, tiny
from sampler import Decoder, ThresholdHead
from tasks import mixture
from training import distributed, files

# ---- flags, and what a run starts from -----------------------------------------------------------


def choose(given):
    """(settings, run_dir, resume, export) from the flags given (settings.read_flags).

    --resume keeps the run's own settings, but for the few that are FREE. Raises ValueError.
    """
    resume, export = given.pop("resume", False), given.pop("export", None)
    if resume and "run_dir" not in given:
        raise ValueError("--resume needs --run_dir, the folder of the run to go on with")
    if resume:
        file = Path(given["run_dir"]) / "config.json"
        saved = asdict(settings_of(files.read_json(file), file))
        for name in sorted(given.keys() - FREE):
            if saved[name] != given[name]:
                raise ValueError(f"{file} has {name} = {saved[name]}: start a new run to change it")
        return Settings(**saved | given), file.parent, resume, export
    if distributed.count() > 1 and "run_dir" not in given:
        raise ValueError("several processes need one --run_dir, a new folder")
    why = "as asked"
    if not given.get("model"):
        given["model"], why = loading.default_model()
    print(f"model: {given['model']} ({why})", flush=True)
    if base_of(checkpoint_of(given["model"])):
        way_out = f"train.py --resume --run_dir {given['model']} --export DIR, then --model DIR"
        raise ValueError(f"{given['model']} is an adapter, and cannot carry another: {way_out}")
    if is_compact(given["model"]):
        settings = Settings(**RECIPES.get(given.get("task"), {}) | given)
    else:
        recipe, expect = loading.recipe_of(given["model"])
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
    check_processes(settings, distributed.count(), export)
    if distributed.is_first():
        look_over(run_dir, resume, export)
    distributed.wait()
    compact, shipped = is_compact(settings.model), tiny.SHIPPED_TASKS.split(",")
    task = mixture.find(settings.task, compact, settings.data, settings.length)
    if settings.model == "tiny" and not {*settings.task.split(",")} <= {*shipped}:
        raise ValueError(
            f"the shipped base knows {tiny.SHIPPED_TASKS}; make one for this task by "
            f"python -m models.tiny --task {settings.task} --out bases/my and give --model bases/my"
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
        policy.denoiser = policy.denoiser if saved else loading.add_lora(policy.denoiser, *how)
        print(loading.describe_lora(policy.denoiser), flush=True)
    if settings.shard:
        distributed.shard(policy.denoiser, device)
    size = policy.denoiser.config.hidden_size
    head = policy.threshold_head or ThresholdHead(size, settings.gamma_0).to(device)
    policy.threshold_head, head.sigma = head, settings.head_sigma
    for some in (problems, training_problems(task, settings)):  # do they fit?
        policy.encode([task.prompt(problem) for problem in some], settings.length)
    if distributed.is_first():
        if not resume:
            create_run(run_dir)
        files.write_json(run_dir / "config.json", asdict(settings) | {"run_dir": str(run_dir)})
    return policy, task, problems


def check_processes(settings, N, export=None):
    """Raises ValueError for what N processes, or split weights, cannot do."""
    prompts = settings.prompts_per_step
    if prompts < N:
        least = f"it has to be at least 1 for each of the {N} processes"
        raise ValueError(f"prompts_per_step = {prompts}: {least}")
    if not settings.shard:
        return
    if N == 1:
        raise ValueError("--shard splits the weights over processes: start them by torchrun")
    if prompts % N:
        raise ValueError(f"--shard with {N} processes takes --prompts_per_step a multiple of {N}")
    if settings.dtype == "4bit":
        raise ValueError("--shard splits no weights of --dtype 4bit: take bfloat16")
    if export:
        raise ValueError("--export is for one process: --resume --shard false after the run")


def look_over(run_dir, resume, export):
    """The folders to write to. Raises ValueError for one that is taken."""
    left = {".lock", "environment.txt", "config.json.tmp"}  # by a kill before the first step
    if not resume and run_dir.is_dir() and {file.name for file in run_dir.iterdir()} - left:
        raise ValueError(f"{run_dir} is in use: go on by --resume, or give a new --run_dir")
    if export and Path(export).exists() and any(Path(export).iterdir()):
        raise ValueError(f"--export {export}: the folder is not empty")
    if checkpoint_of(run_dir) != run_dir:
        files.fall_back(run_dir / "checkpoint")


def training_problems(task, settings):
    """All that a file has for training, or some that a task makes. ValueError where it has none."""
    pools = getattr(task, "pools", None)
    n = len(pools["train"]) if pools else settings.prompts_per_step
    return task.problems("train", max(1, n), settings.seed)


def base_policy(settings, device, run_dir=None):
    """The policy before RL, without an adapter; with run_dir that run's, as it was saved last.

    Weights that learn stay float32: bfloat16 would round a step of 1e-6 away.
    """
    dtype = loading.DTYPES[settings.dtype] or (None if settings.lora_rank else torch.float32)
    how = {"trainable": bool(run_dir), "on_host": settings.shard}  # layers leave it in parts
    policy = load_policy(run_dir or settings.model, device, dtype, **how)
    policy.prefill, policy.rows_at_once = settings.prefill, settings.rollout_batch_size
    return policy


def create_run(run_dir):
    """Make a run's folder and note in it what it runs on."""
    run_dir.mkdir(parents=True, exist_ok=True)
    device = f"cpu {platform.machine()}, {torch.get_num_threads()} threads"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else device
    versions = f"python {platform.python_version()}\ntorch {torch.__version__}\n"
    versions += f"transformers {transformers.__version__}\ndevice {device}\n"
    versions += f"processes {distributed.count()}\n"
    (run_dir / "environment.txt").write_text(versions, encoding="utf-8")


# ---- while it runs -------------------------------------------------------------------------------


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
    """The state after `step` steps: all that the next one depends on but the seed.

    Whatever is split is put together first, so that any number of processes can go on from it.
    """
    weights, adapted = None, hasattr(policy.denoiser, "disable_adapter")
    if distributed.is_sharded(policy.denoiser):
        weights = policy.denoiser.state_dict().items()
        kept = "lora_" if adapted else ""  # of an adapted model the adapter alone
        weights = {k: distributed.whole(v) for k, v in weights if kept in k}
    states = [optimizer.state_dict() for optimizer in optimizers]
    for state in states:
        state["state"] = {
            i: {k: distributed.whole(v) for k, v in part.items()}
            for i, part in state["state"].items()
        }
    if not distributed.is_first():
        return
    for name in ("metrics.jsonl", "samples.jsonl"):  # the steps that it counts as done
        if (run_dir / name).exists():
            files.sync(run_dir / name)
    with files.replacing(run_dir / "checkpoint", keep=True) as folder:
        if adapted:  # the adapter alone, which names its base
            how = {"save_embedding_layers": False, "state_dict": weights}
            policy.denoiser.save_pretrained(folder, **how)
        else:
            loading.export(policy.denoiser, policy.tokenizer, folder, weights)
        save_file(policy.threshold_head.state_dict(), folder / "threshold_head.safetensors")
        torch.save({"step": step, "optimizers": states}, folder / "state.pt")
        files.write_sums(folder)


def load_state(run_dir, optimizers):
    """Optimizers and logs back to where the last checkpoint was written, if any was. -> its step"""
    folder, step = run_dir / "checkpoint", 0
    if folder.exists():
        state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        step = state["step"]
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            weights = [p for group in optimizer.param_groups for p in group["params"]]
            for i, part in saved["state"].items():
                part |= {k: distributed.split_as(v, weights[i]) for k, v in part.items()}
            optimizer.load_state_dict(saved)
    if not distributed.is_first():
        return step
    for name in ("metrics.jsonl", "samples.jsonl"):
        kept = [row for row in files.read_lines(run_dir / name) if row["step"] <= step]
        with files.replacing(run_dir / name) as aside:
            aside.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    return step


def checkpoint_of(path):
    """The checkpoint folder of a run folder; any other path as it is."""
    path = Path(path)
    files.settle(path / "checkpoint")
    is_run = (path / "config.json").exists() and (path / "checkpoint").is_dir()
    return path / "checkpoint" if is_run else path


def base_of(folder):
    """The name or folder of the model that the adapter in `folder` was trained on, or None."""
    found = folder / "adapter_config.json"
    return files.read_json(found).get("base_model_name_or_path") if found.is_file() else None


def is_compact(name_or_path):
    """Whether a model reads the tasks' compact prompts: "tiny", and what was trained from it."""
    folder = checkpoint_of(name_or_path)
    name = str(base_of(folder) or folder)
    file = Path(name) / "config.json"
    return name == "tiny" or bool(file.is_file() and files.read_json(file).get("compact_prompts"))


def load_policy(path, device="cpu", dtype=None, trainable=False, adapter=None, on_host=False):
    """The policy of a run folder, a checkpoint folder or a hub name, with `adapter` put onto it.

    An adapter's own folder will do as `path`: it names its base. on_host: see load_denoiser.
    Raises ValueError.
    """
    folder = checkpoint_of(path)
    files.verify(folder)
    base = base_of(folder)
    if base and (adapter or not Path(base).is_dir() and base.count("/") != 1 and base != "tiny"):
        raise ValueError(f"{path} is an adapter of {base}: give BASE_MODEL --adapter {path}")
    denoiser, tokenizer = loading.load_denoiser(base or str(folder), device, dtype, on_host)
    if adapter or base:
        denoiser = loading.load_lora(denoiser, adapter or folder, trainable)
    file = Path(adapter or folder) / "threshold_head.safetensors"
    policy = DiffusionPolicy(denoiser, tokenizer)
    if file.exists():
        policy.threshold_head = ThresholdHead(denoiser.config.hidden_size).to(device)
        policy.threshold_head.load_state_dict(load_file(file))
    return policy
