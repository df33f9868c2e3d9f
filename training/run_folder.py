"""What a run starts from: its settings, its folder, its model and its problems.

    runs/NAME/  config.json       every setting; enough to repeat the run
                inputs.json       checksums of data, task file and base (models/inputs.py)
                metrics.jsonl     one line per step         samples.jsonl  a few completions of each
                eval.json         base against trained      curves.png     the run at a glance
                frontier.json     both at several gammas    frontier.png   accuracy against NFE
                completions.json  three of each model       environment.txt  versions and device
                tensorboard/      or tracker.json, the run's name in wandb or trackio (--report_to)
                checkpoint/       the model and tokenizer (save_pretrained) or the adapter,
                                  threshold_head.safetensors, state.pt (optimizers, step),
                                  sums.json (checksums); checkpoint.old/ is the previous one

files.py says how these survive a kill. Only tensors are unpickled (weights_only).
"""

import platform
import shlex
import sys
import time
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

import torch
import transformers

from config import CHANGEABLE_ON_RESUME, MOVABLE_ON_RESUME, TASK_RECIPES, Config
from models import inputs, loading, make_base
from models.checkpoints import (
    adapter_base,
    adapter_settings,
    find_checkpoint,
    load_policy,
    read_run_config,
    reads_compact_prompts,
)
from models.device import pick_device
from models.families import read_config
from models.prompting import encode_prompts
from sampler import ThresholdHead
from tasks import mixture, registry
from training import checkpoint, checks, distributed, estimate, files, recipe

# ---- settings ------------------------------------------------------------------------------------


def resolve_config(flags):
    """(config, run_dir, resume, export) from the flags that were given (training/flags.py).

    A new run uses the recipe for its task, or for its model and GPU, overridden by the flags.
    --resume keeps the run's own config, except for CHANGEABLE_ON_RESUME. Raises ValueError for
    settings that do not go together.
    """
    settings = with_absolute_paths(flags)
    resume = settings.pop("resume", False)
    export = settings.pop("export", None)
    if resume:
        config, run_dir = resumed_config(settings)
        return config, run_dir, resume, export
    if distributed.world_size() > 1 and "run_dir" not in settings:
        raise ValueError("several processes need one --run_dir, a new folder")
    reason = "from --model"
    gpu = gpu_with_least_free_memory(settings.get("device"))
    free_gib = gpu.free_gib if gpu else None
    if not settings.get("model"):
        settings["model"], reason = recipe.default_model(gpu)
    name = settings["model"]
    print(f"model: {name} ({reason})", flush=True)
    base = adapter_base(find_checkpoint(name))
    if base:
        raise ValueError(
            f"{name} is an adapter of {base}: train it further with --model {shlex.quote(base)} "
            f"--adapter {shlex.quote(name)}, or merge it by python -m models.merge "
            f"{shlex.quote(name)} DIR and give --model DIR"
        )
    if settings.get("adapter"):
        settings |= settings_of_adapter(settings)
    model_config, _ = read_config(loading.model_folder(name), name)
    block_size = getattr(model_config, "block_size", None)
    is_compact = reads_compact_prompts(name)
    if is_compact:
        tasks = sorted(settings.get("task", "").split(","))
        defaults = TASK_RECIPES.get(",".join(tasks), {})
        if block_size:  # a block-causal model has its own block size
            defaults = defaults | {"block_length": block_size}
    else:
        defaults = recipe.recipe_for(model_config, free_gib)
    config = Config(**defaults | settings)
    if block_size and (not config.block_length or block_size % config.block_length):
        raise ValueError(
            f"--block_length {config.block_length}: {name} is block-causal, in blocks of "
            f"{block_size}, and can only be decoded in these or equal parts of them: leave it out"
        )
    if not is_compact:
        processes = distributed.world_size()
        config = recipe.fit_to_memory(model_config, config, settings, free_gib, processes=processes)
        print(recipe.describe_expected(model_config, config, gpu, processes), flush=True)
    return config, Path(config.run_dir or default_run_dir(config)), resume, export


def device_flag(flags):
    """The device of a run, before its config exists: the flag's, or that of the run to resume."""
    if flags.get("resume") and "device" not in flags and "run_dir" in flags:
        return read_run_config(Path(flags["run_dir"])).device
    return flags.get("device", "auto")


def gpu_with_least_free_memory(device):
    """The recipe.Gpu whose memory decides the settings, or None if the run is on a CPU.

    Several processes have to choose the same settings, so the smallest free memory counts.
    """
    gpu = None if device == "cpu" else recipe.find_gpu()
    if gpu:
        gpu.free_gib = distributed.all_reduce_min(gpu.free_gib)
    return gpu


def settings_of_adapter(flags):
    """The rank and alpha of the --adapter to start from. Raises ValueError if a flag differs."""
    settings = adapter_settings(flags["adapter"])
    for name, value in settings.items():
        if flags.get(name, value) != value:
            raise ValueError(
                f"--{name} {flags[name]}: {flags['adapter']} has {value}. Leave it out, or merge "
                "the adapter by python -m models.merge and train a new one on the merged model"
            )
    return settings


def with_absolute_paths(flags):
    """The flags with all paths made absolute, so that a run can be resumed from any folder."""
    settings = dict(flags)
    if settings.get("data"):
        settings["data"] = str(Path(settings["data"]).absolute())
    for name in ("model", "adapter"):
        path = settings.get(name)
        if path and path != "tiny" and Path(path).is_dir():
            settings[name] = str(Path(path).absolute())
    if "task" in settings:
        settings["task"] = inputs.absolute_task(settings["task"])
    return settings


def resumed_config(settings):
    """(config, run_dir) of the run to resume: its own config, with the changes that are allowed.

    Data, task file and base are compared by content with those that the run started with. Raises
    ValueError for a change that is not allowed.
    """
    if "run_dir" not in settings:
        raise ValueError("--resume needs --run_dir, the folder of the run to resume")
    run_dir = Path(settings["run_dir"])
    saved_config = read_run_config(run_dir)
    saved = asdict(saved_config)
    for name in sorted(settings.keys() - {*CHANGEABLE_ON_RESUME, *MOVABLE_ON_RESUME}):
        if saved[name] != settings[name]:
            raise ValueError(
                f"{run_dir}/config.json has {name} = {saved[name]}: start a new run to change it"
            )
    config = Config(**saved | settings)
    if distributed.is_main_process():
        if "task" not in settings:
            inputs.require_typed_task(run_dir, config.task)
        saved_inputs = inputs.read_inputs(run_dir)
        inputs.verify_settings(run_dir, saved_config, saved_inputs)
        inputs.verify_task(run_dir, config.task, saved["task"], saved_inputs)
        inputs.verify_data(run_dir, config.data, saved_inputs)
        inputs.verify_model(run_dir, config.model, saved_inputs)
        # With a checkpoint the starting adapter is no longer needed for training, but it may still
        # have to be measured at the end.
        is_to_be_measured = config.frontier and not checks.is_base_frontier_measured(run_dir)
        if find_checkpoint(run_dir) == run_dir or is_to_be_measured:
            inputs.verify_adapter(run_dir, config.adapter, saved_inputs)
    return config, run_dir


def default_run_dir(config):
    """runs/TASK-TARGET-TIME. For a task FILE.py:NAME, TASK is NAME."""
    task = "-".join(inputs.bare_names(config.task))
    return f"runs/{task}-{config.train_target}-{datetime.now():%Y%m%d-%H%M%S}"


# ---- what a run starts from ----------------------------------------------------------------------


def prepare(config, run_dir, resume, export):
    """(policy, task, held-out problems) to start or resume with. Creates the folder of a new run.

    Sets config.max_completion_length to the task's own if it is 0. Raises ValueError or OSError for
    everything that would otherwise fail hours later.
    """
    checks.check_settings(config, export)
    if distributed.is_main_process():
        checks.check_folders(config, run_dir, resume, export)
    distributed.barrier()

    task = load_run_task(config)
    problems = task.problems(config.eval_split, config.eval_problems, 0)  # fails before loading
    device = pick_device(config.device)
    policy = load_run_policy(config, run_dir, device)
    mixture.score_completions(task, problems[:1], [""])  # raises for invalid rewards
    for pool in (problems, training_problems(task, config)):  # raises for prompts that do not fit
        prompts = [task.prompt(problem) for problem in pool]
        encode_prompts(policy, prompts, config.max_completion_length)

    if distributed.is_main_process():
        if resume:
            compare_environments(run_dir, device)
        else:
            create_run(run_dir, device)
            files.write_json(run_dir / inputs.INPUTS, inputs.input_checksums(config))
        write_config(run_dir, config)
    if device.type == "cpu" and not policy.compact_prompts:
        line = describe_step_time(config, policy, task.prompt(problems[0]))
        if distributed.is_main_process():  # all processes made the call: weights may be split
            print(line, flush=True)
    return policy, task, problems


def describe_step_time(config, policy, prompt):
    """A line on the least time of a step on this CPU, where a large model's step can take a day.

    It is computed from the time of one call, which is measured here.
    """
    prompt_ids, prompt_mask = encode_prompts(policy, [prompt])  # (1, P)
    masks = prompt_ids.new_full((1, config.max_completion_length), policy.mask_id)  # (1, L)
    canvas = torch.cat([prompt_ids, masks], dim=1)
    began = time.perf_counter()
    with torch.no_grad():
        policy.hidden(canvas, torch.cat([prompt_mask, torch.ones_like(masks).bool()], dim=1))
    seconds_of_a_call = time.perf_counter() - began
    seconds = estimate.least_step_seconds(config, seconds_of_a_call, policy.block_size)
    seconds /= distributed.world_size()
    return (
        f"on this CPU a call of one row takes {seconds_of_a_call:.2g} s, so each of the "
        f"{config.steps} steps takes at least {estimate.describe_time(seconds)}"
    )


def load_run_task(config):
    """The run's task. Sets config.max_completion_length to the task's own if it is 0."""
    compact = reads_compact_prompts(config.model)
    task = registry.load_task(
        config.task,
        compact,
        config.data,
        config.max_completion_length,
        train_on_all=config.eval_split == "all",
    )
    shipped_tasks = make_base.SHIPPED_TASKS.split(",")
    if config.model == "tiny" and not set(config.task.split(",")) <= set(shipped_tasks):
        raise ValueError(
            f"the shipped base only knows {make_base.SHIPPED_TASKS}: make one for this task by "
            f"python -m models.make_base --task {shlex.quote(config.task)} --out bases/my and give "
            "--model bases/my"
        )
    if not config.max_completion_length and compact:
        config.max_completion_length = task.length
    if not config.max_completion_length:
        raise ValueError(
            "this model's completions need a length, such as --max_completion_length 256"
        )
    return task


def load_run_policy(config, run_dir, device):
    """The run's policy as last saved, or the base with a new adapter and threshold head."""
    has_checkpoint = find_checkpoint(run_dir) != run_dir
    if has_checkpoint:
        policy = saved_policy(config, device, run_dir)
    else:
        policy = starting_policy(config, device)
    if config.lora_rank:
        from models import lora  # peft takes a while to import

        if not has_checkpoint and not config.adapter:
            policy.denoiser = lora.add_lora(
                policy.denoiser,
                rank=config.lora_rank,
                alpha=config.lora_alpha,
                dropout=config.lora_dropout,
                seed=config.seed,
            )
        print(lora.describe_lora(policy.denoiser), flush=True)
    if config.shard:
        distributed.shard_model(policy.denoiser, device)
    if config.compile:
        policy.compile_cached_calls()
    prepare_threshold_head(policy, config, device)
    return policy


def prepare_threshold_head(policy, config, device):
    """Adds a threshold head if the policy has none, and sets its sigma to the config's."""
    if policy.threshold_head is None:
        hidden_size = policy.denoiser.config.hidden_size
        policy.threshold_head = ThresholdHead(hidden_size, config.initial_threshold).to(device)
    policy.threshold_head.sigma = config.threshold_sigma


def training_problems(task, config):
    """All training problems of a file, or one step's worth if the task generates them.

    Raises ValueError if there are none.
    """
    pools = getattr(task, "pools", None)
    n = len(pools["train"]) if pools else config.prompts_per_step
    return task.problems("train", max(1, n), config.seed)


def base_policy(config, device):
    """The policy before RL, without an adapter."""
    return loaded_policy(config, device, config.model)


def starting_policy(config, device):
    """The policy before RL: the base, or the base with the adapter that the run starts from.

    If that adapter comes from another run, its threshold head is loaded too.
    """
    if not config.adapter:
        return base_policy(config, device)
    from models import lora  # peft takes a while to import

    policy = loaded_policy(config, device, config.model, adapter=config.adapter)
    lora.set_dropout(policy.denoiser, config.lora_dropout)
    return policy


def saved_policy(config, device, run_dir):
    """The policy of a run's checkpoint. An adapter is applied to config.model."""
    if config.lora_rank:
        return loaded_policy(config, device, config.model, adapter=run_dir)
    return loaded_policy(config, device, run_dir)


def loaded_policy(config, device, path, adapter=None):
    """load_policy with a run's settings.

    Trained weights are float32: bfloat16 would round a step of 1e-6 away.
    """
    dtype = loading.DTYPES[config.dtype]
    if dtype is None and not config.lora_rank:
        dtype = torch.float32
    policy = load_policy(
        path,
        device,
        dtype,
        trainable=True,
        adapter=adapter,
        on_host=config.shard,  # shard_model moves each process's part of the layers
    )
    policy.prefill = config.prefill
    policy.rollout_batch_size = config.rollout_batch_size
    return policy


def reference_policy(config, policy):
    """The reference of the KL penalty: the base without the adapter, or a second model."""
    if config.lora_rank:
        reference = policy.without_adapter()
        reference.rollout_batch_size = config.rollout_batch_size
        return reference
    device = policy.denoiser.device
    reference = base_policy(config, device)
    if config.shard:
        distributed.shard_model(reference.denoiser, device)
    return reference


def untrained_policy(config, policy, run_dir):
    """The policy to measure as the base: `policy` itself if it has not learned anything yet."""
    if checkpoint.saved_step(run_dir) == 0:
        return policy
    if not config.adapter:
        return reference_policy(config, policy)
    device = policy.denoiser.device
    start = starting_policy(config, device)
    if config.shard:
        distributed.shard_model(start.denoiser, device)
    return start


def write_config(run_dir, config):
    """Write config.json. It comes last, because a folder with it counts as a run."""
    files.write_json(run_dir / "config.json", asdict(config) | {"run_dir": str(run_dir)})


def create_run(run_dir, device):
    """Create a run's folder and record versions and device in environment.txt."""
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "environment.txt").write_text(describe_environment(device), encoding="utf-8")


def compare_environments(run_dir, device):
    """Warns if a run is resumed in another environment, where the last digits may differ."""
    file = run_dir / "environment.txt"
    if not file.is_file():
        return
    before = file.read_text(encoding="utf-8", errors="replace").splitlines()
    differing = [line for line in describe_environment(device).splitlines() if line not in before]
    if differing:
        print(
            f"{', '.join(differing)}: {file} differs, so sums may be rounded differently than in a "
            "run that was never interrupted, and a GPU draws other random numbers than a CPU",
            file=sys.stderr,
        )


def describe_environment(device):
    """The lines of environment.txt: what a seeded result may depend on."""
    name = f"cpu {platform.machine()}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
    lines = [
        f"python {platform.python_version()}",
        f"torch {torch.__version__}",
        f"transformers {transformers.__version__}",
        f"device {name}",
        f"processes {distributed.world_size()}",
    ]
    return "\n".join(lines) + "\n"
