"""Writing a whole model, or an adapter, in the layout that its family's other tools read."""

import json
import re
import shutil
from pathlib import Path

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file

from models.beside import beside
from models.checkpoints import (
    CHECKSUMS,
    adapter_base,
    find_checkpoint,
    load_policy,
    reads_compact_prompts,
)
from models.errors import as_value_error
from models.families import FAMILIES, read_config
from models.loading import DTYPES, dtype_of, load_denoiser, model_folder
from models.lora import PEFT_PREFIX, attach_adapter, read_lora_config
from models.permissions import apply_umask
from models.weights import fuse, name_in_files, read_headers, read_weights, weight_files

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


def merge(name_or_path, folder, adapter=None):
    """Merges an adapter into its base, and writes the merged model to `folder`.

    name_or_path  the base; or, without `adapter`, a run or an adapter that names its base
    adapter       a folder or a hub name

    Raises a one-line ValueError if something cannot be loaded or there is no adapter.
    """
    if adapter is None:
        base = named_base(name_or_path)
    else:
        base = adapter_base(find_checkpoint(name_or_path))
    dtype = None
    if not reads_compact_prompts(name_or_path):
        dtype = DTYPES[stored_dtype(model_folder(base or name_or_path))]
    policy = load_policy(name_or_path, dtype=dtype, adapter=adapter)
    with beside(folder) as unfinished:
        export_model(policy.denoiser, policy.tokenizer, unfinished)


def export_adapter(name_or_path, folder, adapter=None):
    """Writes an adapter to `folder` with the module names that the base's own modelling code uses.

    peft can then put it onto a base that was loaded by that code. The arguments are those of
    `merge`; the base's weights are not read. Raises a one-line ValueError if the adapter cannot be
    read, or its names need no change or cannot be changed.
    """
    base = named_base(name_or_path) if adapter is None else name_or_path
    source = find_checkpoint(adapter or name_or_path)
    if not source.is_dir():
        source = model_folder(adapter)
    _, family = read_config(model_folder(base), base)
    renames = FAMILIES[family].weights if family in FAMILIES else {}
    if not renames:
        raise ValueError(f"{base} has the module names of transformers: its adapters fit as is")
    if FAMILIES[family].fused:
        raise ValueError(
            f"the q, k and v of {base} are one matrix, and in its adapters they are three: merge "
            "the whole model, without --adapter_only"
        )

    with as_value_error(f"the adapter in {source} cannot be read"):
        lora_config = read_lora_config(source, has_renames=True)
        weights = {}
        for key, weight in read_weights([source / "adapter_model.safetensors"]).items():
            name = name_in_files(key.removeprefix(PEFT_PREFIX), renames, fused={})
            weights[PEFT_PREFIX + name] = weight
    # Patterns of whole names, because LLaDA calls both a layer's last matrix and the output layer
    # ff_out.
    modules = {key.removeprefix(PEFT_PREFIX).split(".lora_")[0] for key in weights}
    patterns = {re.sub(r"\d+", r"\\d+", re.escape(module)) for module in modules}
    lora_config.target_modules = "|".join(sorted(patterns))
    lora_config.base_model_name_or_path = str(base)
    lora_config.auto_mapping = None  # it would name transformers' class
    with beside(folder) as unfinished:
        lora_config.save_pretrained(unfinished)
        save_file(weights, unfinished / "adapter_model.safetensors", metadata={"format": "pt"})
        apply_umask(unfinished)


def named_base(name_or_path):
    """The base that a run or an adapter names. Raises a one-line ValueError if there is none."""
    base = adapter_base(find_checkpoint(name_or_path))
    if base is not None:
        return base
    if name_or_path != "tiny" and not Path(name_or_path).exists():
        raise ValueError(
            f"there is no folder {name_or_path}; for a model on the hub give an --adapter"
        )
    raise ValueError(f"{name_or_path} is not an adapter that names its base: give an --adapter")


def stored_dtype(folder):
    """ "bfloat16" if all matrices in a checkpoint's folder are stored in it, else "float32"."""
    weights = read_headers(weight_files(folder)).values()
    # Only matrices count: a router's bias may be float32 in any model.
    dtypes = {weight.dtype for weight in weights if weight.dim() > 1}
    return "bfloat16" if dtypes == {torch.bfloat16} else "float32"


def export_model(denoiser, tokenizer, folder, weights=None):
    """Writes the whole model to `folder`, in the layout of the checkpoint it was loaded from.

    An adapter is merged first, in place: there may be no memory for a second model of 8 billion
    parameters. If the base is stored in bfloat16, so is the result, except for tiny.

    weights: the whole state dict, if the denoiser's own is split over processes.
    Raises ValueError if this version of transformers cannot write the source's weight names.
    """
    folder = Path(folder)
    source = getattr(denoiser, "hub_folder", None)
    if dtype_of(denoiser) == "4bit":
        denoiser = _move_adapter_to_unrounded_base(denoiser)
    if hasattr(denoiser, "disable_adapter"):
        base_folder = model_folder(denoiser.source)
        denoiser = denoiser.merge_and_unload()
        is_tiny = getattr(denoiser.config, "compact_prompts", False)  # always run in float32
        if stored_dtype(base_folder) == "bfloat16" and not is_tiny:
            for parameter in denoiser.parameters():  # on a CPU they were loaded as float32
                parameter.data = parameter.data.to(torch.bfloat16)
    fused = getattr(denoiser, "fused", None)
    if fused:
        weights = fuse(weights or denoiser.state_dict(), fused)
    denoiser.save_pretrained(folder, max_shard_size="5GB", state_dict=weights)
    tokenizer.save_pretrained(folder)
    apply_umask(folder)
    if source is not None:
        block_size = getattr(denoiser.config, "block_size", None)
        _restore_layout(folder, source, dtype_of(denoiser), block_size)


def _move_adapter_to_unrounded_base(model):
    """Puts a 4-bit model's adapter onto its base in bfloat16, so that an export is not rounded."""
    adapter = get_peft_model_state_dict(model, save_embedding_layers=False)
    base, _ = load_denoiser(model.source, dtype=torch.bfloat16)
    model = attach_adapter(base, model.peft_config["default"])
    set_peft_model_state_dict(model, adapter)
    return model


def _restore_layout(folder, source, dtype, block_size):
    """Copies all of a source checkpoint except its weights to `folder`, and records the dtype.

    The source's config.json, tokenizer and modelling code are what the family's other tools read.
    Properties that were inferred from the source's name (families.py) are recorded as well, since
    `folder` has another name. Raises ValueError if the weights in `folder` are named differently
    from the source's, so that no tool would find them.
    """
    names = read_headers(weight_files(folder)).keys()
    if names != read_headers(weight_files(source)).keys():
        raise ValueError(f"this transformers renames {source}'s weights: see requirements.txt")
    for file in source.iterdir():
        is_weight = file.suffix in WEIGHT_SUFFIXES or file.name.endswith(".index.json")
        # A run's checksums are those of its own weights, not of these.
        if file.is_file() and not is_weight and file.name != CHECKSUMS:
            shutil.copyfile(file, folder / file.name)
    config_file = folder / "config.json"
    published = json.loads(config_file.read_text(encoding="utf-8"))
    config = dict(published)
    for name in ("dtype", "torch_dtype"):
        if name in config:
            config[name] = dtype
    if block_size:
        if "bd_size" not in config:  # Fast-dLLM's name for it
            config["block_size"] = block_size
    elif str(config.get("model_type")).startswith("a2d"):
        config.setdefault("is_causal", False)
    if config != published:  # otherwise the file stays exactly as published
        config_file.write_text(json.dumps(config, indent=2), encoding="utf-8")
