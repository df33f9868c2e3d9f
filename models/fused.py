"""Matrices that are one in a checkpoint's files and several in its model: LLaDA2's q, k and v.

In the files their rows stand one below the other. A family's row in families.py names them:

    fused  {name in the files: names of q, k and v in the model}
"""

import json

import torch
from safetensors.torch import load_file


def read_weights(folder):
    """All weights of a checkpoint's folder, {name: tensor}. They stay on the disk until read."""
    files = [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        files = [folder / name for name in sorted(set(names))]
    weights = {}
    for file in files:
        weights |= load_file(file)
    return weights


def take_apart(weights, config, fused):
    """Weights under the names of the files, {name: tensor}, with q, k and v taken apart.

    weights  of a model, or of a LoRA adapter on it
    config   the model's configuration

    Raises ValueError, naming the weight, for a wrong size and if a part is there by itself as well.
    """
    q_rows = config.num_attention_heads * config.head_dim
    kv_rows = config.num_key_value_heads * config.head_dim
    result = {}
    for name, weight in weights.items():
        for whole, parts in fused.items():
            if f".{whole}." in name:
                if ".lora_A." in name:  # LoRA's first factor reads the input, which is the same
                    matrices = [weight, weight, weight]
                elif len(weight) == q_rows + 2 * kv_rows:
                    matrices = weight.split([q_rows, kv_rows, kv_rows])
                else:
                    raise ValueError(
                        f"{name} has {len(weight)} rows, and q, k and v of its configuration "
                        f"{q_rows + 2 * kv_rows}"
                    )
                for part, matrix in zip(parts, matrices, strict=True):
                    part_name = name.replace(whole, part)
                    if part_name in weights:
                        raise ValueError(f"there are both {name} and {part_name}, which is in it")
                    result[part_name] = matrix.clone()
                break
        else:
            result[name] = weight
    return result


def fuse(weights, fused):
    """The inverse of `take_apart`, for the weights of a model."""
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
