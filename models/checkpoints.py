"""A run's checkpoint, read back as a policy: its weights or adapter, and its threshold head.

    checkpoint/  adapter_model.safetensors, adapter_config.json   LoRA; they name their base model
                 model.safetensors, config.json, tokenizer.json   or the whole model
                 threshold_head.safetensors                       the learned threshold
                 state.pt                                         optimizers and step, for --resume
                 sums.json                                        checksums of all the others

training/checkpoint.py writes it.
"""

import hashlib
import json
from pathlib import Path

from safetensors.torch import load_file

from config import config_from_json
from diffusion_policy import DiffusionPolicy
from models.families import one_line
from models.loading import load_denoiser
from models.prompting import end_token_ids
from sampler import ThresholdHead

CHECKSUMS = "sums.json"  # {file name: its checksum}, in a checkpoint's folder


# ---- files ---------------------------------------------------------------------------------------


def read_json(path):
    """The value in a JSON file. Raises ValueError if the file is missing or broken."""
    with one_line(f"cannot read {path}"):
        return json.loads(path.read_text(encoding="utf-8"))


def read_run_config(run_dir):
    """The Config of a run's folder. Raises ValueError if config.json is missing, or of another
    version of train.py.
    """
    file = Path(run_dir) / "config.json"
    return config_from_json(read_json(file), file)


def checksum(path):
    """The SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify_checksums(folder):
    """Raises ValueError, naming the file, unless a checkpoint is as it was written."""
    if not (folder / CHECKSUMS).is_file():
        return  # written by an older version, or not by a run
    for name, expected in read_json(folder / CHECKSUMS).items():
        file = folder / name
        if not file.is_file() or checksum(file) != expected:
            raise ValueError(f"{file} is not as it was written")


# ---- checkpoints ---------------------------------------------------------------------------------


def find_checkpoint(path):
    """The checkpoint's folder in a run's folder; any other path as it is."""
    path = Path(path)
    if (path / "config.json").exists():
        for name in ("checkpoint", "checkpoint.old"):  # .old alone: a kill between two renames
            if (path / name).is_dir():
                return path / name
    return path


def adapter_base(folder):
    """The name or folder of the model that the adapter in `folder` was trained on, or None."""
    file = folder / "adapter_config.json"
    if not file.is_file():
        return None
    return read_json(file).get("base_model_name_or_path")


def reads_compact_prompts(name_or_path):
    """Whether a model reads the tasks' compact prompts: "tiny", and what was trained from it."""
    folder = find_checkpoint(name_or_path)
    name = str(adapter_base(folder) or folder)
    if name == "tiny":
        return True
    file = Path(name) / "config.json"
    return file.is_file() and bool(read_json(file).get("compact_prompts"))


def load_policy(path, device="cpu", dtype=None, trainable=False, adapter=None, on_host=False):
    """The policy of a run's folder, a checkpoint's folder or a hub name.

    device, dtype, on_host  see models.loading.load_denoiser
    trainable               whether a LoRA adapter's weights require gradients
    adapter                 the folder or hub name of a LoRA adapter to put onto the model

    `path` may also be an adapter's own folder, which names its base. Raises ValueError.
    """
    folder = find_checkpoint(path)
    verify_checksums(folder)
    base = adapter_base(folder)
    if base:
        is_loadable = base == "tiny" or base.count("/") == 1 or Path(base).is_dir()
        if adapter or not is_loadable:
            raise ValueError(f"{path} is an adapter of {base}: give BASE_MODEL --adapter {path}")
        adapter = folder

    denoiser, tokenizer = load_denoiser(base or str(folder), device, dtype, on_host)
    if adapter:
        from models.lora import load_lora  # peft takes a while to import

        denoiser = load_lora(denoiser, adapter, trainable)
    policy = DiffusionPolicy(denoiser, tokenizer, end_ids=end_token_ids(tokenizer))
    head_file = Path(adapter or folder) / "threshold_head.safetensors"
    if head_file.exists():
        policy.threshold_head = ThresholdHead(denoiser.config.hidden_size).to(device)
        policy.threshold_head.load_state_dict(load_file(head_file))
    return policy
