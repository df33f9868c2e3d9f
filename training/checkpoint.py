"""Saving and restoring a run: all that the next step depends on but the seed."""

import json

import torch
from safetensors.torch import save_file

from training import distributed, files


def save_checkpoint(run_dir, policy, optimizers, step):
    """The state after `step` steps: all that the next one depends on but the seed.

    Whatever is split is put together first, so that any number of processes can go on from it.
    """
    weights, adapted = None, hasattr(policy.denoiser, "disable_adapter")
    if distributed.is_sharded(policy.denoiser):
        weights = policy.denoiser.state_dict().items()
        kept = "lora_" if adapted else ""  # of an adapted model the adapter alone
        weights = {k: distributed.gather_full_tensor(v) for k, v in weights if kept in k}
    states = [optimizer.state_dict() for optimizer in optimizers]
    for state in states:
        state["state"] = {
            i: {k: distributed.gather_full_tensor(v) for k, v in part.items()}
            for i, part in state["state"].items()
        }
    if not distributed.is_main_process():
        return
    for name in ("metrics.jsonl", "samples.jsonl"):  # the steps that it counts as done
        if (run_dir / name).exists():
            files.sync_to_disk(run_dir / name)
    with files.atomic_write(run_dir / "checkpoint", keep=True) as folder:
        if adapted:  # the adapter alone, which names its base
            how = {"save_embedding_layers": False, "state_dict": weights}
            policy.denoiser.save_pretrained(folder, **how)
        else:
            from models.export import export_model

            export_model(policy.denoiser, policy.tokenizer, folder, weights)
        save_file(policy.threshold_head.state_dict(), folder / "threshold_head.safetensors")
        torch.save({"step": step, "optimizers": states}, folder / "state.pt")
        files.write_checksums(folder)


def load_state(run_dir, optimizers):
    """Optimizers and logs back to where the last checkpoint was written, if any was. -> its step"""
    folder, step = run_dir / "checkpoint", 0
    if folder.exists():
        state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        step = state["step"]
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            weights = [p for group in optimizer.param_groups for p in group["params"]]
            for i, part in saved["state"].items():
                part |= {k: distributed.distribute_like(v, weights[i]) for k, v in part.items()}
            optimizer.load_state_dict(saved)
    if not distributed.is_main_process():
        return step
    for name in ("metrics.jsonl", "samples.jsonl"):
        kept = [row for row in files.read_log(run_dir / name) if row["step"] <= step]
        with files.atomic_write(run_dir / name) as aside:
            aside.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    return step
