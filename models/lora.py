"""LoRA adapters: adding them to a denoiser, saving and loading them."""

import json
import sys
from dataclasses import fields
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

from models.errors import as_value_error
from models.families import adaptable_matrices
from models.hub import is_hub_name
from models.loading import model_folder
from models.permissions import apply_umask
from models.weights import read_weights, refuse_misfits, refuse_non_finite, to_model

# Fields of an adapter's configuration that name modules. If a family's modules are renamed, these
# names would match nothing.
FIELDS_WITH_NAMES = {
    "alpha_pattern",
    "exclude_modules",
    "layers_pattern",
    "modules_to_save",
    "rank_pattern",
}
PEFT_PREFIX = "base_model.model."  # in front of a module's name in an adapter's weights


def add_lora(denoiser, rank, alpha, dropout=0.0, seed=0):
    """Adds a new LoRA adapter to all matrices of the layers, and freezes the rest.

    Returns a PeftModel. The adapter is float32 even on a bfloat16 base, because bfloat16 would
    round its small steps away. Raises ValueError if a matrix is not found in every layer: peft
    would adapt whatever subset it finds, without a warning.
    """
    matrices = adaptable_matrices(denoiser.config)
    lora_config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=matrices,
    )
    with as_value_error("LoRA target not found"):
        model = attach_adapter(denoiser, lora_config, seed)
    layers = model.config.num_hidden_layers
    for matrix in matrices:
        count = sum(name.endswith(f".{matrix}") for name in lora_layers(model))
        if count != layers:
            raise ValueError(f"LoRA target not found: {matrix} in {count} of {layers} layers")
    return model


def load_lora(denoiser, name_or_path, trainable=False):
    """Adds the adapter of a folder or of the hub to its base model. Returns a PeftModel.

    An adapter that was trained with LLaDA's own modelling code has that code's module names, so
    they are renamed like the base's weights. Raises a one-line ValueError unless every weight finds
    its place: otherwise part of the model would silently run without the adapter.
    """
    folder = model_folder(name_or_path)
    file = folder / "adapter_model.safetensors"
    saved = read_weights([file])
    with as_value_error(f"the adapter in {name_or_path} cannot be loaded on {denoiser.source}"):
        _say_if_of_another_base(folder, denoiser.source)
        lora_config = read_lora_config(folder, has_renames=bool(denoiser.renames))
        if not saved:
            raise ValueError(f"{file.name} holds no weights")
        weights, sources = to_model(
            saved,
            denoiser.config,
            denoiser.renames,
            denoiser.fused,
            prefix=PEFT_PREFIX,
        )
        # model.layers.0.mlp.up_proj.lora_A.weight -> up_proj
        lora_config.target_modules = {name.split(".lora_")[0].split(".")[-1] for name in weights}
        lora_config.inference_mode = not trainable
        model = attach_adapter(denoiser, lora_config)
        refuse_misfits(
            weights,
            sources,
            expected=get_peft_model_state_dict(model, save_embedding_layers=False),
            advice="an adapter needs the base that it was trained on, and complete files",
            renames=denoiser.renames,
            fused=denoiser.fused,
            prefix=PEFT_PREFIX,
        )
        refuse_non_finite(weights, sources)
        set_peft_model_state_dict(model, weights)
    return model


def set_dropout(model, dropout):
    """Changes the dropout of a PeftModel's adapter."""
    model.peft_config["default"].lora_dropout = dropout
    for layer in lora_layers(model).values():
        # A new module is in training mode, in which it would also be active in rollouts.
        layer.lora_dropout["default"] = torch.nn.Dropout(dropout).train(layer.training)


def _say_if_of_another_base(folder, source):
    """Prints a message if an adapter names another base than `source`, to which it is added."""
    base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get(
        "base_model_name_or_path"
    )
    if base and Path(base).name != Path(source).name:
        print(f"{folder} was trained on {base}, but is applied to {source}", file=sys.stderr)


def save_adapter(model, folder, state_dict=None):
    """Writes a PeftModel's adapter to `folder`, which is made if it does not exist.

    The files are adapter_model.safetensors, adapter_config.json and README.md, a short model card.

    state_dict: the adapter's weights, if the model's own are split over processes.
    """
    folder = Path(folder)
    model.save_pretrained(folder, save_embedding_layers=False, state_dict=state_dict)
    card = _model_card(model.peft_config["default"])  # replaces peft's empty form
    (folder / "README.md").write_text(card, encoding="utf-8")
    apply_umask(folder)


CARD = """\
---
library_name: peft
{front_matter}tags:
- lora
- diffpo
---

# A LoRA adapter trained with DiFFPO

This adapter was trained by DiFFPO, reinforcement learning of masked-diffusion language models.

- Base model: {description}
- Rank {rank}, alpha {alpha:g}, on {matrices}
- `adapter_model.safetensors` holds its weights. `threshold_head.safetensors`, if present, holds the
  learned decoding threshold, which only the code that trained it reads.

With the code that trained it, from its root folder:

```python
from models.checkpoints import load_policy

policy = load_policy("FOLDER")  # the base model with this adapter and the threshold head
```

With peft, on the base model as that code loads it:

```python
from models.loading import load_denoiser
from peft import PeftModel

denoiser, tokenizer = load_denoiser("{base}")
model = PeftModel.from_pretrained(denoiser, "FOLDER")
```

FOLDER is the folder of this file. The weights have the module names of transformers' own classes.
With modelling code that comes with a checkpoint, such as LLaDA's, peft finds no modules of these
names: it warns, and the model stays the bare base. For such tools, write the merged model, which
has the base's own names and layout: `python -m models.merge {base} DIR --adapter FOLDER`. With
`--adapter_only` this command writes only the adapter, with the base's own module names, for use
with peft (but not for LLaDA2, whose q, k and v are one matrix).
"""


def _model_card(lora_config):
    """The README.md of an adapter. It names no local path; adapter_config.json does."""
    base = lora_config.base_model_name_or_path or "unknown"
    front_matter = ""
    if base == "tiny":
        description = "tiny, the model embedded in the code that trained it"
    elif is_hub_name(base):
        description = base
        front_matter = f"base_model: {base}\n"  # which links the two on the hub
    else:
        base = Path(base).name
        description = f"{base}, a local model"
    return CARD.format(
        front_matter=front_matter,
        base=base,
        description=description,
        rank=lora_config.r,
        alpha=lora_config.lora_alpha,
        matrices=", ".join(sorted(lora_config.target_modules)),
    )


def read_lora_config(folder, has_renames):
    """An adapter's configuration. Raises ValueError for any field that would be ignored."""
    saved = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    known = {field.name for field in fields(LoraConfig)}
    understood = known - FIELDS_WITH_NAMES if has_renames else known
    for key, value in saved.items():
        is_unknown = value and key not in understood
        is_no_lora = key == "peft_type" and value != "LORA"
        if is_unknown or is_no_lora:
            raise ValueError(f"{key} = {value!r} is not supported")
    return LoraConfig(**{key: value for key, value in saved.items() if key in understood})


def attach_adapter(denoiser, lora_config, seed=0):
    """Adds an adapter with random weights to a denoiser, as a peft configuration describes it.

    Returns a PeftModel in eval mode, whose configuration names the denoiser's source.
    """
    lora_config.base_model_name_or_path = None  # peft warns if this is not the class's own name
    device = denoiser.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        model = get_peft_model(denoiser, lora_config)
    lora_config.base_model_name_or_path = getattr(denoiser, "source", None)
    for module in lora_layers(model).values():
        module.cast_input_dtype_enabled = False  # autocast does this (DenoiserCalls.run_decoder)
    return model.eval()


def lora_layers(model):
    """The adapted modules, {name: module}."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def describe_lora(model):
    """One line that says what is adapted, counted on the model itself."""
    matrices = len(lora_layers(model))
    layers = model.config.num_hidden_layers
    rank = model.peft_config["default"].r
    adapter_size = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    _, total_size = model.get_nb_trainable_parameters()  # counts packed 4-bit weights right
    base_size = total_size - adapter_size
    return (
        f"LoRA: {matrices} matrices ({matrices // layers} kinds x {layers} layers), rank {rank}: "
        f"{adapter_size / 1e6:.1f}M parameters on a base of {base_size / 1e6:,.1f}M"
    )
