"""Writing a whole model for the other tools of its family."""

import json
import re
import shutil
from pathlib import Path

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open

from models.loading import dtype_of, load_denoiser
from models.lora import attach_adapter
from models.permissions import apply_umask

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


def export_model(denoiser, tokenizer, folder, weights=None):
    """Writes the whole model to `folder`, in the layout of the checkpoint that it was loaded from.

    An adapter is merged first, in place: there may be no memory for a second model of 8 billion
    parameters.

    weights: the whole state dict, if the denoiser's own is split over processes.
    Raises ValueError if this version of transformers cannot write the source's weight names.
    """
    folder = Path(folder)
    source = getattr(denoiser, "hub_folder", None)
    if dtype_of(denoiser) == "4bit":
        denoiser = _move_adapter_to_unrounded_base(denoiser)
    if hasattr(denoiser, "disable_adapter"):
        denoiser = denoiser.merge_and_unload()
    denoiser.save_pretrained(folder, max_shard_size="5GB", state_dict=weights)
    tokenizer.save_pretrained(folder)
    apply_umask(folder)
    if source is not None:
        _restore_layout(folder, source, dtype_of(denoiser))


def _move_adapter_to_unrounded_base(model):
    """A 4-bit model's adapter on its base in bfloat16: an export is not rounded to 4 bits."""
    adapter = get_peft_model_state_dict(model, save_embedding_layers=False)
    base, _ = load_denoiser(model.source, dtype=torch.bfloat16)
    model = attach_adapter(base, model.peft_config["default"])
    set_peft_model_state_dict(model, adapter)
    return model


def _restore_layout(folder, source, dtype):
    """Copies all of a source checkpoint but its weights to `folder`, and notes the dtype.

    Its config.json, tokenizer and modelling code are what its other tools read. Raises ValueError
    if the weights in `folder` have other names than the source's, which no tool would find.
    """
    if _weight_names(folder) != _weight_names(source):
        raise ValueError(f"this transformers renames {source}'s weights: see requirements.txt")
    for file in source.iterdir():
        is_weight = file.suffix in WEIGHT_SUFFIXES or file.name.endswith(".index.json")
        if file.is_file() and not is_weight:
            shutil.copyfile(file, folder / file.name)
    config_file = folder / "config.json"
    config = re.sub(
        r'("(?:torch_)?dtype"\s*:\s*)"\w+"',
        rf'\1"{dtype}"',
        config_file.read_text(encoding="utf-8"),
    )
    says_is_causal = "is_causal" in json.loads(config)
    if str(json.loads(config).get("model_type")).startswith("a2d") and not says_is_causal:
        config = config.replace("{", '{\n  "is_causal": false,', 1)  # see families.read_config
    config_file.write_text(config, encoding="utf-8")


def _weight_names(folder):
    names = set()
    for file in folder.glob("model*.safetensors"):
        with safe_open(file, "pt") as weights:
            names.update(weights.keys())
    return names
