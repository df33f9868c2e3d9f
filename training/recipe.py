"""Which model a bare command trains, and which recipe fits a checkpoint and a GPU."""

import torch

from config import RECIPES
from models.families import read_config
from models.loading import LLADA, model_folder
from training import memory

SMALL = "dllm-hub/Qwen3-0.6B-diffusion-mdlm-v0.1"


def gpu():
    """(its name, its GiB), or None where there is none."""
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    return found.name, found.total_memory / 2**30


def default_model():
    """(name, why): which model a bare command trains."""
    if not gpu():
        return "tiny", "no GPU was found, and this one needs neither GPU nor download"
    name, gib = gpu()
    why = f"a GPU of {gib:.0f} GiB was found, {name}; --model tiny trains the embedded model"
    return LLADA if gib > 21 else SMALL, why  # a card of 24 GB has 23.5 of them, or 22.1


def recipe_by_size(model_config):
    """The recipe of a checkpoint that is not tiny, before the GPU is looked at."""
    return RECIPES["LLaDA" if memory.parameters(model_config)[1] > 2e9 else "small"]


def recipe_of(name):
    """({setting: value}, words) for a checkpoint: by its size, and by the GPU's. Raises ValueError.

    The words say what memory and time to expect, by arithmetic: (settings) -> text.
    """
    model_config, _ = read_config(model_folder(name), name)
    size = memory.parameters(model_config)[1]
    recipe, here = recipe_by_size(model_config), gpu()
    if here and recipe is RECIPES["LLaDA"] and here[1] < 70:
        recipe = recipe | RECIPES["24 GB" if here[1] < 40 else "48 GB"]

    def expect(config):
        said = f"{size / 1e9:.1f} billion parameters"
        if not here:
            return said
        peak = memory.budget(model_config, config, 200)["peak"]
        said += f"; {peak:.1f} of {here[1]:.1f} GiB expected"
        speeds = [speed for key, speed in memory.SPEEDS.items() if key in here[0]]
        if speeds:
            seconds = memory.work(model_config, config, 200) * config.steps / (0.3e12 * speeds[0])
            said += f", {seconds / 60:,.0f} minutes if the GPU reaches 30% of its peak speed"
        return f"{said} (by arithmetic, not measured: benchmark.py --memory {name})"

    return recipe, expect
