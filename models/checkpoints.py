"""Reading a run's checkpoint back as a policy: its weights or adapter, and its threshold head.

    checkpoint/  adapter_model.safetensors, adapter_config.json   a LoRA adapter, naming its base;
                 model.safetensors, config.json, tokenizer.json   or the whole model
                 threshold_head.safetensors                       the learned threshold
                 state.pt                                         optimizers and step, for --resume
                 sums.json                                        checksums of all the others

training/checkpoint.py writes it. All code that reads a run uses the functions below: for anything
that a run cannot have written, they raise a one-line ValueError that names the file.
"""

import hashlib
import json
import shlex
from pathlib import Path

import torch

from config import config_from_json
from models.block_causal import make_policy
from models.errors import as_value_error
from models.hub import is_hub_name
from models.loading import load_denoiser, model_folder
from models.prompting import end_token_ids
from models.weights import read_weights
from sampler import ThresholdHead

CHECKSUMS = "sums.json"  # {file name: its checksum}, in a checkpoint's folder
NOT_CHECKED = (CHECKSUMS, "README.md")  # a model card may be edited
LOADING_TRIES = 3  # if a run replaces its checkpoint while it is being read


# ---- files ---------------------------------------------------------------------------------------


def read_json(path):
    """The value in a JSON file. Raises ValueError if the file is missing or broken.

    A byte order mark, which some editors add, is accepted.
    """
    with as_value_error(f"cannot read {path}"):
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))


def read_json_object(path):
    """The dict in a JSON file. Raises ValueError for anything else."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"cannot read {path} (it holds no JSON object)")
    return value


def has_type(value, expected):
    """Whether a JSON value has a type. An int counts as a float too, a bool not as a number."""
    if isinstance(value, bool):
        return expected is bool
    return isinstance(value, int | float if expected is float else expected)


def check_fields(row, fields, where):
    """Raises ValueError, beginning with `where`, unless a row is a dict with {field: type}."""
    if not isinstance(row, dict):
        raise ValueError(f"{where} is no JSON object")
    for name, expected in fields.items():
        if not has_type(row.get(name), expected):
            type_name = getattr(expected, "__name__", str(expected))
            raise ValueError(f"{where} has no {name} of type {type_name}")


def read_rows(path, fields):
    """The list of dicts in a JSON file. Each must have the `fields`, {name: type}.

    Raises ValueError for a file that is missing or broken, and for a row without a field.
    """
    rows = read_json(path)
    if not isinstance(rows, list):
        raise ValueError(f"cannot read {path} (it holds no list of rows)")
    for number, row in enumerate(rows, start=1):
        check_fields(row, fields, where=f"cannot read {path}: row {number}")
    return rows


def read_run_config(run_dir):
    """The Config of a run's folder. Raises ValueError if config.json is missing, or was written by
    another version of train.py.
    """
    file = Path(run_dir) / "config.json"
    if not file.is_file():
        raise ValueError(
            f"{run_dir} holds no run: it has no config.json, which a run writes before it trains"
        )
    return config_from_json(read_json_object(file), file)


def read_state(folder, mmap=False):
    """A checkpoint's state.pt: {"step": int, "optimizers": two state dicts}. Raises ValueError.

    mmap: leave the optimizers' tensors on disk, if only the step is needed.
    """
    file = Path(folder) / "state.pt"
    with as_value_error(f"cannot read {file}"):
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
        if not has_type(state["step"], int) or not has_type(state["optimizers"], list):
            raise ValueError("step is not a number, or optimizers not a list")
    return state


def checksum(path):
    """The SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify_checksums(folder):
    """Raises ValueError, naming the file, if a checkpoint has changed since it was written.

    A folder without a state.pt was not written by a run, so it may lack checksums.
    """
    sums_file = folder / CHECKSUMS
    if not sums_file.is_file():
        if (folder / "state.pt").exists():
            raise ValueError(f"{sums_file} is missing: the checkpoint is not as it was written")
        return
    saved = read_json_object(sums_file)
    files = {file.name for file in folder.iterdir() if file.is_file()}
    for name in sorted((files | saved.keys()) - {*NOT_CHECKED}):
        file = folder / name
        is_here = Path(name).name == name and file.is_file()  # excludes ../
        if not is_here or name not in saved or checksum(file) != saved[name]:
            raise ValueError(f"{file} is not as it was written: it is damaged")


# ---- checkpoints ---------------------------------------------------------------------------------


def find_checkpoint(path):
    """The checkpoint's folder inside a run's folder; any other path is returned unchanged."""
    path = Path(path)
    if (path / "config.json").exists():
        # Only checkpoint.old is left if a run is killed between two renames.
        for name in ("checkpoint", "checkpoint.old"):
            if (path / name).is_dir():
                return path / name
    return path


def is_run(path):
    """Whether a path is the folder of a run, with or without a checkpoint."""
    return (Path(path) / "config.json").is_file() and (Path(path) / "environment.txt").is_file()


def run_of_checkpoint(path):
    """The run's folder, given that folder or its checkpoint's; None for any other path."""
    folder = find_checkpoint(path)
    is_checkpoint = folder.name in ("checkpoint", "checkpoint.old")
    return folder.parent if is_checkpoint and is_run(folder.parent) else None


def adapter_base(folder):
    """The name or folder of the model that the adapter in `folder` was trained on, or None.

    Raises ValueError for an adapter_config.json that is broken or names no base.
    """
    file = folder / "adapter_config.json"
    if not file.is_file():
        return None
    base = read_json_object(file).get("base_model_name_or_path")
    if base is not None and not isinstance(base, str):
        raise ValueError(f"cannot read {file} (base_model_name_or_path is not a text)")
    return base


def adapter_settings(name_or_path):
    """{"lora_rank": int, "lora_alpha": number} of an adapter, given a folder, a run or a hub name.

    Raises ValueError if its adapter_config.json cannot be read.
    """
    folder = find_checkpoint(name_or_path)
    if not folder.is_dir():
        folder = model_folder(name_or_path)
    file = folder / "adapter_config.json"
    saved = read_json_object(file)
    check_fields(saved, {"r": int, "lora_alpha": float}, where=f"cannot read {file}: it")
    return {"lora_rank": saved["r"], "lora_alpha": saved["lora_alpha"]}


def is_loadable(base):
    """Whether a model's name is "tiny", an existing folder, or possibly a name on the hub."""
    return base == "tiny" or Path(base).is_dir() or is_hub_name(base)


def reads_compact_prompts(name_or_path):
    """Whether a model reads the tasks' compact prompts: tiny and models trained from it do."""
    folder = find_checkpoint(name_or_path)
    name = str(adapter_base(folder) or folder)
    if name == "tiny":
        return True
    file = Path(name) / "config.json"
    return file.is_file() and bool(read_json_object(file).get("compact_prompts"))


def load_policy(path, device="cpu", dtype=None, trainable=False, adapter=None, on_host=False):
    """Load the policy of a run's folder, a checkpoint's folder or a hub name.

    device, dtype, on_host  see models.loading.load_denoiser
    trainable               whether a LoRA adapter's weights require gradients
    adapter                 the folder or hub name of a LoRA adapter to add to the model

    `path` may also be an adapter's own folder, which names its base. The policy's attribute `step`
    is the run's step, or None. If a run replaces its checkpoint while it is being read, it is read
    again, so that all parts of a policy come from one checkpoint. Raises ValueError if something
    cannot be loaded.
    """
    for _ in range(LOADING_TRIES):
        before = checkpoint_identity(adapter or path)
        error = None
        try:
            policy = load_checkpoint(path, device, dtype, trainable, adapter, on_host)
        except (ValueError, OSError) as raised:
            error = raised
        if checkpoint_identity(adapter or path) == before:
            if error is not None:
                raise error
            return policy
    raise ValueError(f"{path} is replaced faster than it can be read: copy its checkpoint first")


def revision(policy):
    """Identifies a checkpoint's version: a run's step, a hub model's commit, or None."""
    if policy.step is not None:
        return policy.step
    hub_folder = getattr(policy.denoiser, "hub_folder", None)
    if hub_folder and hub_folder.parent.name == "snapshots":
        return hub_folder.name
    return None


def checkpoint_identity(path):
    """A text that changes whenever a run replaces its checkpoint (its checksums), or None."""
    try:
        return (find_checkpoint(path) / CHECKSUMS).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def load_checkpoint(path, device, dtype, trainable, adapter, on_host):
    """What load_policy does, for a checkpoint that is not replaced while it is read."""
    folder = find_checkpoint(path)
    if folder == Path(path) and is_run(path):
        raise ValueError(f"{path} has no checkpoint yet")
    verify_checksums(folder)
    base = adapter_base(folder)
    if base and any(folder.glob("model*.safetensors")):
        raise ValueError(
            f"{folder} holds full weights and an adapter of {base}: remove one of them"
        )
    if base:
        if adapter or not is_loadable(base):
            raise ValueError(
                f"{path} is an adapter of {base}: "
                f"give BASE_MODEL --adapter {shlex.quote(str(folder))}"
            )
        adapter = folder
    elif adapter and Path(adapter).is_dir():
        adapter = find_checkpoint(adapter)
        verify_checksums(adapter)

    denoiser, tokenizer = load_denoiser(base or str(folder), device, dtype, on_host)
    if adapter:
        from models.lora import load_lora  # peft takes a while to import

        denoiser = load_lora(denoiser, adapter, trainable)
    policy = make_policy(denoiser, tokenizer, end_ids=end_token_ids(tokenizer))
    saved = Path(adapter or folder)
    head_file = saved / "threshold_head.safetensors"
    if head_file.exists():
        policy.threshold_head = ThresholdHead(denoiser.config.hidden_size).to(device)
        with as_value_error(f"cannot read {head_file}"):
            policy.threshold_head.load_state_dict(read_weights([head_file]))
    policy.step = None
    if (saved / "state.pt").is_file():
        policy.step = read_state(saved, mmap=True)["step"]
    return policy
