"""LoRA adapters: put onto a denoiser, or read from a checkpoint."""

import json
import re
from dataclasses import fields

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file

from models.families import one_line
from models.loading import model_folder

# What an adapter's configuration says by the names of its modules, which are renamed here.
BY_NAME = ("rank_pattern", "alpha_pattern", "exclude_modules", "layers_pattern", "modules_to_save")
PEFT = "base_model.model."  # in front of the module's name in an adapter's weights
LORA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def add_lora(denoiser, rank, alpha, dropout=0.0, seed=0):
    """A LoRA adapter on all of the layers' matrices, as a PeftModel; the rest is frozen.

    It is float32 even on a bfloat16 base, or its small steps would be rounded away. Raises
    ValueError where a matrix is not found.
    """
    kinds = _lora_kinds(denoiser)
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=kinds)
    with one_line("LoRA target not found"):
        model = _adapted(denoiser, config, seed)
    found, layers = lora_layers(model), model.config.num_hidden_layers
    for kind in kinds:
        if (number := sum(name.endswith(f".{kind}") for name in found)) != layers:
            raise ValueError(f"LoRA target not found: {kind} in {number} of {layers} layers")
    return model


def load_lora(denoiser, name_or_path, trainable=False):
    """The adapter of a folder or the hub, on its base model. Raises ValueError, in one line.

    Others' adapters of a LLaDA name its own modules, so they are renamed as its weights are. Every
    weight has to find its place, or the bare base would be there instead, without a word.
    """
    folder, renamed = model_folder(name_or_path), {}
    with one_line(f"the adapter in {name_or_path} cannot be loaded"):
        config = _lora_config(folder, denoiser.renames)
        for key, weight in load_file(folder / "adapter_model.safetensors").items():
            name = key.removeprefix(PEFT)
            for there, here in denoiser.renames.items():
                name = re.sub(there, here, name)
            renamed[PEFT + name] = weight
        config.target_modules = {name.split(".lora_")[0].split(".")[-1] for name in renamed}
        config.inference_mode = not trainable
        model = _adapted(denoiser, config)
        ours = get_peft_model_state_dict(model, save_embedding_layers=False)
        if odd := sorted(ours.keys() ^ renamed.keys()):
            raise ValueError(f"{len(odd)} weights without a counterpart, the first {odd[0]}")
        set_peft_model_state_dict(model, renamed)
    return model


def _lora_config(folder, renames):
    """An adapter's configuration. What in it would be passed over is an error."""
    found = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    known = {field.name for field in fields(LoraConfig)} - set(BY_NAME if renames else ())
    for key, value in found.items():
        if value and key not in known or key == "peft_type" and value != "LORA":
            raise ValueError(f"{key} = {value!r} is not known")
    return LoraConfig(**{key: value for key, value in found.items() if key in known})


def _adapted(denoiser, config, seed=0):
    config.base_model_name_or_path = None  # or peft warns of another name
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        model = get_peft_model(denoiser, config)
    config.base_model_name_or_path = getattr(denoiser, "source", None)
    for module in lora_layers(model).values():
        module.cast_input_dtype_enabled = False  # autocast does it (DiffusionPolicy.hidden)
    return model.eval()


def _lora_kinds(model):  # of a mixture attention alone: its experts are no Linear modules
    return LORA[:4] if hasattr(model.config, "num_experts") else LORA


def lora_layers(model):
    """The adapted modules, {name: module}."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def describe_lora(model):
    """What is adapted, in one line, counted on the model itself."""
    found, layers = len(lora_layers(model)), model.config.num_hidden_layers
    n, total = (n / 1e6 for n in model.get_nb_trainable_parameters())
    kinds = f"{found // layers} kinds x {layers} layers), rank {model.peft_config['default'].r}"
    return f"LoRA: {found} matrices ({kinds}: {n:.1f}M of {total:,.1f}M parameters are trained"
