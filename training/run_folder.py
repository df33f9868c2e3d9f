"""Run folders, flags and checkpoints: what keeps a run repeatable, resumable, never half-written.

    runs/NAME/  config.json      the config; they alone repeat the run
                metrics.jsonl    one line a step            samples.jsonl  a few completions a step
                eval.json        base against trained       curves.png     the run at a glance
                frontier.json    both at several gammas     frontier.png   accuracy against NFE
                completions.json three of each              environment.txt  versions and device
                checkpoint/      model and tokenizer (save_pretrained) or adapter,
                                 threshold_head.safetensors, state.pt (optimizers, step),
                                 sums.json (checksums); checkpoint.old/ is the one before

saving.py has how files survive. Nothing is loaded by unrestricted pickle.
"""

import platform
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

import torch
import transformers

from config import CHANGEABLE_ON_RESUME, RECIPES, Config, config_from_json
from models import loading, make_base
from models.checkpoints import (
    adapter_base,
    find_checkpoint,
    load_policy,
    read_json,
    reads_compact_prompts,
)
from models.device import pick_device
from models.prompting import encode_prompts
from sampler import Decoder, ThresholdHead
from tasks import registry
from training import distributed, files, recipe

# ---- flags, and what a run starts from -----------------------------------------------------------


def resolve_config(given):
    """(config, run_dir, resume, export) from the flags given (config.read_flags).

    --resume keeps the run's own config, except CHANGEABLE_ON_RESUME. Raises ValueError.
    """
    resume, export = given.pop("resume", False), given.pop("export", None)
    if resume and "run_dir" not in given:
        raise ValueError("--resume needs --run_dir, the folder of the run to go on with")
    if resume:
        file = Path(given["run_dir"]) / "config.json"
        saved = asdict(config_from_json(read_json(file), file))
        for name in sorted(given.keys() - CHANGEABLE_ON_RESUME):
            if saved[name] != given[name]:
                raise ValueError(f"{file} has {name} = {saved[name]}: start a new run to change it")
        return Config(**saved | given), file.parent, resume, export
    if distributed.world_size() > 1 and "run_dir" not in given:
        raise ValueError("several processes need one --run_dir, a new folder")
    why = "as asked"
    if not given.get("model"):
        given["model"], why = recipe.default_model()
    print(f"model: {given['model']} ({why})", flush=True)
    if adapter_base(find_checkpoint(given["model"])):
        way_out = f"train.py --resume --run_dir {given['model']} --export DIR, then --model DIR"
        raise ValueError(f"{given['model']} is an adapter, and cannot carry another: {way_out}")
    if reads_compact_prompts(given["model"]):
        config = Config(**RECIPES.get(given.get("task"), {}) | given)
    else:
        changes, expect = recipe.recipe_of(given["model"])
        config = Config(**changes | given)
        print(f"expected: {expect(config)}", flush=True)
    name = "-".join(name.rpartition(":")[2] for name in config.task.split(","))
    name = f"{name}-{config.train_target}-{datetime.now():%Y%m%d-%H%M%S}"
    return config, Path(config.run_dir or f"runs/{name}"), resume, export


def prepare(config, run_dir, resume, export):
    """(policy, task, held-out problems): what to go on with.

    Raises ValueError or OSError for all that would otherwise fail hours later.
    """
    Decoder(  # raises for a cache without blocks
        block_length=config.block_length or None, cache=config.cache
    )
    ThresholdHead(1, config.initial_threshold)  # raises for a initial_threshold outside its bounds
    if config.dtype == "4bit" and not config.lora_rank:
        raise ValueError("dtype 4bit learns by an adapter alone: give a --lora_rank above 0")
    check_processes(config, distributed.world_size(), export)
    if distributed.is_main_process():
        check_folders(run_dir, resume, export)
    distributed.barrier()
    compact, shipped = reads_compact_prompts(config.model), make_base.SHIPPED_TASKS.split(",")
    task = registry.load_task(config.task, compact, config.data, config.max_completion_length)
    if config.model == "tiny" and not {*config.task.split(",")} <= {*shipped}:
        raise ValueError(
            f"the shipped base knows {make_base.SHIPPED_TASKS}; make one for this task by "
            f"python -m models.tiny --task {config.task} --out bases/my and give --model bases/my"
        )
    problems = task.problems(config.eval_split, config.eval_problems, 0)  # before the weights
    config.max_completion_length = config.max_completion_length or (task.length if compact else 0)
    if not config.max_completion_length:
        raise ValueError(
            "length = 0: this model's completions need one, such as --max_completion_length 256"
        )
    device = pick_device(config.device)
    saved = find_checkpoint(run_dir) != run_dir
    policy = base_policy(config, device, run_dir if saved else None)
    if config.lora_rank:
        from models import lora  # peft takes a while to import

        how = (config.lora_rank, config.lora_alpha, config.lora_dropout, config.seed)
        policy.denoiser = policy.denoiser if saved else lora.add_lora(policy.denoiser, *how)
        print(lora.describe_lora(policy.denoiser), flush=True)
    if config.shard:
        distributed.shard_model(policy.denoiser, device)
    size = policy.denoiser.config.hidden_size
    head = policy.threshold_head or ThresholdHead(size, config.initial_threshold).to(device)
    policy.threshold_head, head.sigma = head, config.threshold_sigma
    for some in (problems, training_problems(task, config)):  # do they fit?
        encode_prompts(
            policy, [task.prompt(problem) for problem in some], config.max_completion_length
        )
    if distributed.is_main_process():
        if not resume:
            create_run(run_dir)
        files.write_json(run_dir / "config.json", asdict(config) | {"run_dir": str(run_dir)})
    return policy, task, problems


def check_processes(config, N, export=None):
    """Raises ValueError for what N processes, or split weights, cannot do."""
    prompts = config.prompts_per_step
    if prompts < N:
        least = f"it has to be at least 1 for each of the {N} processes"
        raise ValueError(f"prompts_per_step = {prompts}: {least}")
    if not config.shard:
        return
    if N == 1:
        raise ValueError("--shard splits the weights over processes: start them by torchrun")
    if prompts % N:
        raise ValueError(f"--shard with {N} processes takes --prompts_per_step a multiple of {N}")
    if config.dtype == "4bit":
        raise ValueError("--shard splits no weights of --dtype 4bit: take bfloat16")
    if export:
        raise ValueError("--export is for one process: --resume --shard false after the run")


def check_folders(run_dir, resume, export):
    """The folders to write to. Raises ValueError for one that is taken."""
    left = {".lock", "environment.txt", "config.json.tmp"}  # by a kill before the first step
    if not resume and run_dir.is_dir() and {file.name for file in run_dir.iterdir()} - left:
        raise ValueError(f"{run_dir} is in use: go on by --resume, or give a new --run_dir")
    if export and Path(export).exists() and any(Path(export).iterdir()):
        raise ValueError(f"--export {export}: the folder is not empty")
    files.recover_interrupted_rename(run_dir / "checkpoint")
    if (run_dir / "checkpoint").is_dir():
        files.restore_previous_checkpoint(run_dir / "checkpoint")


def training_problems(task, config):
    """All that a file has for training, or some that a task makes. ValueError where it has none."""
    pools = getattr(task, "pools", None)
    n = len(pools["train"]) if pools else config.prompts_per_step
    return task.problems("train", max(1, n), config.seed)


def base_policy(config, device, run_dir=None):
    """The policy before RL, without an adapter; with run_dir that run's, as it was saved last.

    Weights that learn stay float32: bfloat16 would round a step of 1e-6 away.
    """
    dtype = loading.DTYPES[config.dtype] or (None if config.lora_rank else torch.float32)
    how = {"trainable": bool(run_dir), "on_host": config.shard}  # layers leave it in parts
    policy = load_policy(run_dir or config.model, device, dtype, **how)
    policy.prefill, policy.rollout_batch_size = config.prefill, config.rollout_batch_size
    return policy


def reference_policy(config, policy):
    """The base model that beta keeps the policy near: without adapter, or as a second model."""
    if config.lora_rank:
        return policy.without_adapter()
    device = policy.denoiser.device
    reference = base_policy(config, device)
    if config.shard:
        distributed.shard_model(reference.denoiser, device)
    return reference


def create_run(run_dir):
    """Make a run's folder and note in it what it runs on."""
    run_dir.mkdir(parents=True, exist_ok=True)
    device = f"cpu {platform.machine()}, {torch.get_num_threads()} threads"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else device
    versions = f"python {platform.python_version()}\ntorch {torch.__version__}\n"
    versions += f"transformers {transformers.__version__}\ndevice {device}\n"
    versions += f"processes {distributed.world_size()}\n"
    (run_dir / "environment.txt").write_text(versions, encoding="utf-8")
