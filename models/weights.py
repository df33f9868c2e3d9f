"""How a checkpoint's weights in its files correspond to those in the model.

Besides names, two things differ. LLaDA2's q, k and v are one matrix in the files, stacked along the
rows. A family's row in families.py names them:

    fused  {name in the files: names of q, k and v in the model}

And the experts of a mixture are one tensor in transformers' classes but separate matrices in most
files. Both sides are split into single matrices before they are compared. Only names and shapes are
compared, on the meta device, before any weight is read.
"""

import json
import re
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from models.errors import as_value_error

DTYPES = {  # by their names in the header of a safetensors file
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}


# ---- files ---------------------------------------------------------------------------------------


def weight_files(folder):
    """The paths of the files that hold a checkpoint's weights, chosen as transformers chooses them.

    Raises ValueError if there are none, or if an index names something that is not a file beside
    it: a path could lead out of the folder.
    """
    file = folder / "model.safetensors"
    if file.is_file():
        return [file]
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        raise ValueError(
            f"{folder} cannot be loaded: it has neither model.safetensors nor an index of several "
            "(weights in another format have to be converted)"
        )
    with as_value_error(f"{index} cannot be read"):
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    for name in names:
        is_name = isinstance(name, str) and Path(name).name == name
        if not is_name or not (folder / name).is_file():
            raise ValueError(
                f"{index} names {name!r}, which is not a file beside it: download the checkpoint "
                "again"
            )
    return [folder / name for name in sorted(names)]


def read_headers(files):
    """The weights in safetensors files as {name: tensor on the meta device}, without reading them.

    Raises ValueError, naming the file, if a file is broken, or a weight is in two files or does not
    hold floating-point numbers.
    """
    headers = {}
    for file in files:
        with as_value_error(f"{file} is missing, broken or incomplete: download it again"):
            weights = safe_open(file, "pt")
        names = weights.keys()
        for name in names:
            header = weights.get_slice(name)
            if name in headers:
                raise ValueError(f"{file}: {name} is in another file of the checkpoint too")
            if header.get_dtype() not in DTYPES:
                raise ValueError(
                    f"{file}: {name} is stored as {header.get_dtype()}, but only floating-point "
                    f"numbers are supported: {', '.join(DTYPES)}"
                )
            dtype = DTYPES[header.get_dtype()]
            headers[name] = torch.empty(header.get_shape(), dtype=dtype, device="meta")
    return headers


def read_weights(files):
    """The weights themselves, {name: tensor}. Raises ValueError where read_headers does."""
    read_headers(files)
    weights = {}
    for file in files:
        weights |= load_file(file)
    return weights


# ---- from the files to the model -----------------------------------------------------------------


def take_apart(name, weight, config, fused):
    """{name: weight}; if the weight fuses q, k and v, their three names and matrices instead.

    name, weight  from the files of a model, or of a LoRA adapter for it
    config        the model's configuration
    fused         see the head of this file
    """
    for whole, parts in fused.items():
        if f".{whole}." in name and weight.dim() > 0:
            q_rows = config.num_attention_heads * config.head_dim
            kv_rows = config.num_key_value_heads * config.head_dim
            matrices = weight.tensor_split([q_rows, q_rows + kv_rows])
            if ".lora_A." in name:  # LoRA's first factor reads the input, which all three share
                matrices = [weight, weight, weight]
            names = [name.replace(whole, part) for part in parts]
            return dict(zip(names, matrices, strict=True))
    return {name: weight}


def split_experts(weights):
    """{name: weight} with one entry per expert's matrix, as in the files of mixtures.

    In transformers' classes a mixture's gate_up_proj is (experts, gate and up, in), and its
    down_proj is (experts, out, in).
    """
    result = {}
    for name, weight in weights.items():
        prefix, _, matrix = name.rpartition(".experts.")
        if matrix not in ("gate_up_proj", "down_proj") or weight.dim() != 3:
            result[name] = weight
            continue
        for i, expert in enumerate(weight):
            if matrix == "down_proj":
                result[f"{prefix}.experts.{i}.down_proj.weight"] = expert
            else:
                gate, up = expert.tensor_split(2)
                result[f"{prefix}.experts.{i}.gate_proj.weight"] = gate
                result[f"{prefix}.experts.{i}.up_proj.weight"] = up
    return result


def to_model(weights, config, renames, fused, prefix=""):
    """Weights of the files, {name: tensor} -> (weights under the model's names, sources).

    Fused matrices and experts are split.

    config, fused  see take_apart
    renames        {pattern of a name in the files: the name in the model}
    prefix         a prefix of all names, in the files and in the model
    sources        {name in the model: the weight in the files, and which part of it, for messages}

    Raises ValueError if two weights have the same name in the model: the last would win.
    """
    in_model = {}
    sources = {}
    for name, weight in weights.items():
        parts = take_apart(name.removeprefix(prefix), weight, config, fused)
        for part, matrix in split_experts(parts).items():
            for pattern, replacement in renames.items():
                part = re.sub(pattern, replacement, part)
            source = name if matrix.shape == weight.shape else f"{part} in {name}"
            part = prefix + part
            if part in in_model:
                raise ValueError(f"{sources[part]} and {source} are the same weight of the model")
            in_model[part] = matrix
            sources[part] = source
    return in_model, sources


def name_in_files(name, renames, fused):
    """A weight's name in the files of a checkpoint, from its name in the model."""
    for whole, parts in fused.items():
        for part in parts:
            name = name.replace(f".{part}.", f".{whole}.")
    for pattern, ours in renames.items():
        theirs = pattern.removeprefix("^").replace(r"\.", ".").replace(r"(\d+)", r"\1")
        name = re.sub("^" + re.escape(ours).replace(r"\\1", r"(\d+)"), theirs, name)
    return name


def refuse_misfits(weights, sources, expected, advice, renames, fused, prefix=""):
    """Raises ValueError unless the weights have the names and the shapes of the expected ones.

    weights, sources        as `to_model` returns them
    expected                {name in the model: tensor}
    advice                  what to do about weights that do not fit
    renames, fused, prefix  those of `to_model`
    """
    misfits = []
    for name in sorted(weights.keys() | expected.keys()):
        if name.endswith("rotary_emb.inv_freq"):  # only in old files; it is computed now
            continue
        in_model = tuple(expected[name].shape) if name in expected else "unknown"
        in_files = tuple(weights[name].shape) if name in weights else "missing"
        if in_files != in_model:
            source = prefix + name_in_files(name.removeprefix(prefix), renames, fused)
            source = sources.get(name, source)
            misfits.append(f"{source} is {in_model} in the model and {in_files} in the files")
    if misfits:
        others = f", and {len(misfits) - 1} more do not fit" if len(misfits) > 1 else ""
        raise ValueError(f"{misfits[0]}{others}: {advice}")


def refuse_non_finite(weights, sources):
    """Raises ValueError, naming the weight, if one holds NaN or infinity.

    Summing takes one pass at memory speed. The terms are checked only if the sum is not finite,
    since a sum of finite 16-bit numbers may overflow.
    """
    for name, weight in weights.items():
        is_sane = not weight.is_floating_point() or weight.sum().isfinite()
        if not is_sane and not weight.isfinite().all():
            raise ValueError(
                f"{sources.get(name, name)} holds NaN or infinity: its file is broken, or the "
                "training that wrote it diverged"
            )


# ---- and back ------------------------------------------------------------------------------------


def fuse(weights, fused):
    """The inverse of `take_apart`, for all weights of a model, {name: tensor}."""
    result = {}
    for name, weight in weights.items():
        for whole, parts in fused.items():
            if f".{parts[0]}." in name:
                matrices = [weights[name.replace(parts[0], part)] for part in parts]
                result[name.replace(parts[0], whole)] = torch.cat(matrices)
            if any(f".{part}." in name for part in parts):
                break
        else:
            result[name] = weight
    return result
