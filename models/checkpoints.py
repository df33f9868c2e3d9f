"""Reading what a run wrote: its checkpoint, its adapter and threshold head, as a policy."""

import hashlib
import json
from pathlib import Path

from safetensors.torch import load_file

from diffusion_policy import DiffusionPolicy
from models import loading
from models.families import one_line
from models.prompting import end_token_ids
from sampler import ThresholdHead

CHECKSUMS = "sums.json"  # {file: its checksum}, in a checkpoint's folder


def read_json(path):
    """Raises ValueError where the file is missing or broken."""
    with one_line(f"cannot read {path}"):
        return json.loads(path.read_text(encoding="utf-8"))


def checksum(file):
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def verify_checksums(folder):
    """Raises ValueError, naming the file, unless a checkpoint is as it was written."""
    if not (folder / CHECKSUMS).is_file():
        return  # of an older version, or not of a run
    for name, expected in read_json(folder / CHECKSUMS).items():
        if not (folder / name).is_file() or checksum(folder / name) != expected:
            raise ValueError(f"{folder / name} is not as it was written")


def find_checkpoint(path):
    """The checkpoint folder of a run folder; any other path as it is."""
    path = Path(path)
    if (path / "config.json").exists():
        for name in ("checkpoint", "checkpoint.old"):  # .old alone: a kill between two renames
            if (path / name).is_dir():
                return path / name
    return path


def adapter_base(folder):
    """The name or folder of the model that the adapter in `folder` was trained on, or None."""
    found = folder / "adapter_config.json"
    return read_json(found).get("base_model_name_or_path") if found.is_file() else None


def reads_compact_prompts(name_or_path):
    """Whether a model reads the tasks' compact prompts: "tiny", and what was trained from it."""
    folder = find_checkpoint(name_or_path)
    name = str(adapter_base(folder) or folder)
    file = Path(name) / "config.json"
    return name == "tiny" or bool(file.is_file() and read_json(file).get("compact_prompts"))


def load_policy(path, device="cpu", dtype=None, trainable=False, adapter=None, on_host=False):
    """The policy of a run folder, a checkpoint folder or a hub name, with `adapter` put onto it.

    An adapter's own folder will do as `path`: it names its base. on_host: see load_denoiser.
    Raises ValueError.
    """
    folder = find_checkpoint(path)
    verify_checksums(folder)
    base = adapter_base(folder)
    if base and (adapter or not Path(base).is_dir() and base.count("/") != 1 and base != "tiny"):
        raise ValueError(f"{path} is an adapter of {base}: give BASE_MODEL --adapter {path}")
    denoiser, tokenizer = loading.load_denoiser(base or str(folder), device, dtype, on_host)
    if adapter or base:
        from models.lora import load_lora  # peft takes a while to import

        denoiser = load_lora(denoiser, adapter or folder, trainable)
    file = Path(adapter or folder) / "threshold_head.safetensors"
    policy = DiffusionPolicy(denoiser, tokenizer, end_ids=end_token_ids(tokenizer))
    if file.exists():
        policy.threshold_head = ThresholdHead(denoiser.config.hidden_size).to(device)
        policy.threshold_head.load_state_dict(load_file(file))
    return policy
