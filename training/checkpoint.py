"""Saving and restoring a run: everything that the next step depends on, except the seed."""

import json
import sys

import torch
from safetensors.torch import save_file

from models.checkpoints import find_checkpoint, read_state
from models.errors import as_value_error
from models.permissions import apply_umask
from training import distributed, files, logging

LOGS = ("metrics.jsonl", "samples.jsonl")


def save_checkpoint(run_dir, policy, optimizers, step):
    """Write the state after `step` steps to RUN/checkpoint; the old one is kept beside it.

    Split tensors are gathered first, so that any number of processes can resume. Every process has
    to call this; the main one writes, and the others wait for it.
    """
    denoiser = policy.denoiser
    has_adapter = hasattr(denoiser, "disable_adapter")
    weights = None  # None: save_pretrained uses the model's own
    if distributed.is_sharded(denoiser):
        weights = {
            name: distributed.gather_full_tensor(weight)
            for name, weight in denoiser.state_dict().items()
            if "lora_" in name or not has_adapter
        }
    optimizer_states = [optimizer.state_dict() for optimizer in optimizers]
    for optimizer_state in optimizer_states:
        optimizer_state["state"] = {
            index: {
                name: distributed.gather_full_tensor(tensor) for name, tensor in moments.items()
            }
            for index, moments in optimizer_state["state"].items()
        }
    if distributed.is_main_process():
        write_checkpoint(run_dir, policy, optimizer_states, weights, step)
    distributed.barrier()


def write_checkpoint(run_dir, policy, optimizer_states, weights, step):
    """Write the files of save_checkpoint.

    weights: the whole state dict if the model's own weights are split, or None.

    The logs are synced to disk first: once the checkpoint exists, their rows up to this step count
    as done.
    """
    for name in LOGS:
        if (run_dir / name).exists():
            files.sync_to_disk(run_dir / name)
    with files.atomic_write(run_dir / "checkpoint", keep=True) as folder:
        if hasattr(policy.denoiser, "disable_adapter"):
            from models.lora import save_adapter  # peft takes a while to import

            save_adapter(policy.denoiser, folder, state_dict=weights)
        else:
            from models.export import export_model

            export_model(policy.denoiser, policy.tokenizer, folder, weights)
        save_file(policy.threshold_head.state_dict(), folder / "threshold_head.safetensors")
        torch.save({"step": step, "optimizers": optimizer_states}, folder / "state.pt")
        apply_umask(folder)
        files.write_checksums(folder)


def saved_step(run_dir):
    """The step of a run's last checkpoint, 0 without one. Raises ValueError if it is broken."""
    folder = find_checkpoint(run_dir)
    return 0 if folder == run_dir else read_state(folder, mmap=True)["step"]


def load_state(run_dir, optimizers):
    """Reset optimizers and logs to the last checkpoint, or to the start if there is none.

    Returns the number of steps done. (run_folder.prepare loads the weights.)
    """
    step = 0
    folder = find_checkpoint(run_dir)
    if folder != run_dir:
        state = read_state(folder)
        step = state["step"]
        with as_value_error(f"{folder / 'state.pt'} does not fit this run"):
            for optimizer, optimizer_state in zip(optimizers, state["optimizers"], strict=True):
                weights = [p for group in optimizer.param_groups for p in group["params"]]
                optimizer_state["state"] = {
                    index: {
                        name: distributed.distribute_like(tensor, weights[index])
                        for name, tensor in moments.items()
                    }
                    for index, moments in optimizer_state["state"].items()
                }
                optimizer.load_state_dict(optimizer_state)
    if distributed.is_main_process():
        # Steps after the checkpoint are repeated, so their rows are dropped.
        logs = {
            "metrics.jsonl": logging.read_metrics(run_dir),
            "samples.jsonl": files.read_log(run_dir / "samples.jsonl"),
        }
        if len(logs["metrics.jsonl"]) < step:
            print(
                f"{run_dir / 'metrics.jsonl'} has only {len(logs['metrics.jsonl'])} of the {step} "
                "steps done: the curves will lack the others",
                file=sys.stderr,
            )
        for name, rows in logs.items():
            lines = [json.dumps(row) + "\n" for row in rows if row["step"] <= step]
            with files.atomic_write(run_dir / name) as temporary_path:
                temporary_path.write_text("".join(lines), encoding="utf-8")
    return step
