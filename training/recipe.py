"""Which model is trained without --model, and which recipe and batch sizes fit a model and a GPU.

The recipes are in config.py, the memory estimate is in estimate.py. torch and transformers are
imported inside functions, so that `python -m training.memory --help` answers at once.
"""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path

from config import MEMORY_RECIPES, MODEL_RECIPES
from models.hub import is_hub_name
from training.estimate import count_parameters, describe_size, estimate_gib

SMALL = "dllm-hub/Qwen3-0.6B-diffusion-mdlm-v0.1"


@dataclass
class Gpu:
    name: str
    gib: float  # its memory
    free_gib: float  # what no process uses; run_folder.py takes the least of all cards
    used_gib: float = field(init=False)  # the rest, on this card

    def __post_init__(self):
        self.used_gib = self.gib - self.free_gib

    def memory_in_use(self):
        """A phrase on the memory that other processes use; "" if that is negligible."""
        if self.used_gib < 1:  # this process's own CUDA context takes about half a GiB
            return ""
        return f"; {self.used_gib:.1f} of the card's {self.gib:.1f} GiB are in use already"


def find_gpu():
    """The Gpu that this process runs on, or None if there is none."""
    import torch

    if not torch.cuda.is_available():
        return None
    # In bytes, for the current device, which distributed.init has set. This creates a context
    # there.
    free, total = torch.cuda.mem_get_info()
    return Gpu(torch.cuda.get_device_name(), total / 2**30, free / 2**30)


def default_model(gpu):
    """(name, reason): which model is trained without --model on a Gpu, or on a CPU if None."""
    from models.loading import LLADA

    if gpu is None:
        return "tiny", "no GPU is used, and tiny needs neither GPU nor download"
    why = (
        f"a GPU of {gpu.gib:.0f} GiB was found, {gpu.name}{gpu.memory_in_use()}; --model tiny "
        "trains the embedded one"
    )
    # A card sold as 24 GB has 23.5 or 22.1 GiB.
    return LLADA if gpu.free_gib > 21 else SMALL, why


def recipe_for(model_config, gpu_gib=None):
    """The recipe for a model other than tiny, {setting: value}.

    It depends on the model's size and on gpu_gib, the GPU's free memory.
    """
    if count_parameters(model_config)["total"] < 2e9:
        recipe = MODEL_RECIPES["small"]
    else:
        recipe = MODEL_RECIPES["LLaDA"]
        if gpu_gib and gpu_gib < 70:
            recipe = recipe | MEMORY_RECIPES["24 GB" if gpu_gib < 40 else "48 GB"]
    if getattr(model_config, "block_size", None):  # a block-causal model has its own block size
        recipe = recipe | {"block_length": model_config.block_size}
    return recipe


def fit_to_memory(model_config, config, flags, gpu_gib=None, prompt_tokens=400, processes=1):
    """Adapts a config to a GPU's memory, by arithmetic; the results of a run do not depend on it.

    flags    the settings given by the user, which are not changed
    gpu_gib  the GPU's free memory; None: nothing is changed

    Gradient checkpointing repeats every call of an update, so it is turned off if the update fits
    without it, if need be in micro-batches of one group. Then as many rows as fit are rolled out at
    once. A tenth of the memory is left free.
    """
    if gpu_gib is None:
        return config

    def fits(candidate):
        peak = estimate_gib(model_config, candidate, prompt_tokens, processes)["peak"]
        return peak <= 0.9 * gpu_gib

    if "gradient_checkpointing" not in flags:
        sizes = [config.micro_batch_size]
        if "micro_batch_size" not in flags:
            sizes.append(min(config.micro_batch_size, config.num_generations))
        for size in sizes:
            without = replace(config, gradient_checkpointing=False, micro_batch_size=size)
            if fits(replace(without, rollout_batch_size=1)):
                config = without
                break
    if "rollout_batch_size" not in flags:
        batch = config.prompts_per_step // processes * config.num_generations
        for parts in range(1, batch + 1):
            candidate = replace(config, rollout_batch_size=math.ceil(batch / parts))
            if fits(candidate):
                return candidate
    return config


def describe_expected(model_config, config, gpu=None, processes=1):
    """The line at the start of a run: the model's size and, with a Gpu, the memory to expect and
    the settings on which it depends.
    """
    size = describe_size(model_config)
    if gpu is None:
        return size
    peak = estimate_gib(model_config, config, processes=processes)["peak"]
    return (
        f"{size}; {peak:.1f} of {gpu.free_gib:.1f} GiB expected (by arithmetic"
        f"{gpu.memory_in_use()}), with {settings_of_memory(config)}"
    )


def settings_of_memory(config):
    """The settings that decide a run's memory, as flags."""
    return (
        f"--rollout_batch_size {config.rollout_batch_size} "
        f"--micro_batch_size {config.micro_batch_size} "
        f"--gradient_checkpointing {str(config.gradient_checkpointing).lower()}"
    )


SHAPES = ("LLaDA-8B", "Qwen3-0.6B")


def read_model_config(name):
    """The configuration of one of SHAPES, of tiny, of a checkpoint's folder, or of a hub's model.

    Raises ValueError for any other name. Only names like OWNER/NAME are looked up on the hub.
    """
    unknown = f"{name!r} is neither one of {', '.join(SHAPES)} nor a folder"
    if name == "tiny":
        from models.tiny import BASE

        name = str(BASE)
    is_folder = Path(name).is_dir()
    if not (name in SHAPES or is_folder or is_hub_name(name)):
        raise ValueError(f"{unknown}; a model on the hub is OWNER/NAME")

    from huggingface_hub import hf_hub_download
    from transformers import LlamaConfig, Qwen3Config

    from models.errors import as_value_error
    from models.families import read_config

    if name == "LLaDA-8B":
        return LlamaConfig(
            vocab_size=126464,
            hidden_size=4096,
            intermediate_size=12288,
            num_hidden_layers=32,
            num_attention_heads=32,
        )
    if name == "Qwen3-0.6B":
        return Qwen3Config(
            vocab_size=151936,
            hidden_size=1024,
            intermediate_size=3072,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=8,
            tie_word_embeddings=True,
        )
    folder = Path(name)
    if not is_folder:
        with as_value_error(f"{unknown}, and cannot be downloaded from the hub"):
            folder = Path(hf_hub_download(name, "config.json")).parent
    return read_config(folder, name)[0]
