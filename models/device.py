"""The device that models run on: its choice, name and memory, and the out-of-memory message."""

import platform
import re
import resource
import sys
from pathlib import Path

import torch


def pick_device(name="auto"):
    """The torch.device for "auto" (a GPU if there is one), "cpu" or "cuda".

    Raises ValueError for "cuda" without a GPU.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ValueError("device cuda: torch finds no GPU here; leave out --device, or use cpu")
    return torch.device("cuda" if available and name != "cpu" else "cpu")


def device_name(device):
    """The model of the GPU, or of the CPU with the number of threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration, IndexError):
        model = platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return f"{model}, {threads} thread{'s' * (threads > 1)}"


def peak_memory_gib():
    """The peak memory so far in GiB, of the GPU, else of this process."""
    if torch.cuda.is_available():
        allocated = torch.cuda.max_memory_allocated()
        if allocated:  # 0 with --device cpu on a machine that has a GPU
            return allocated / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def settings_to_lower(config, has_checkpoint=False):
    """Which settings of a training run to lower, in words, for describe_out_of_memory.

    config          the run's Config, or None if it ended before it had one
    has_checkpoint  True: the run can be resumed, so only settings that --resume may change are
                    named
    """
    settings = ["micro_batch_size"]
    if not has_checkpoint:
        settings += ["prompts_per_step", "num_generations", "max_completion_length"]
    settings = [
        f"--{name} ({getattr(config, name)})" if config else f"--{name}" for name in settings
    ]
    others = ["--rollout_batch_size 1", "--gradient_checkpointing true"]
    if not has_checkpoint and (config is None or not 0 < config.lora_rank <= 128):
        others.append("--lora_rank 128")
    if config is None or config.cache != "none":
        others.append("--cache none")
    return f"{', '.join(settings)}, or set {', '.join(others)}"


def describe_out_of_memory(error, lower):
    """A one-line message for an out-of-memory error. Re-raises any other error.

    lower: the settings to lower, in words
    """
    message = " ".join(str(error).split())
    # The CPU's allocator, CUDA's driver and NCCL, and cuBLAS word it differently.
    is_out_of_memory = re.search("allocate|out of memory|ALLOC_FAILED", message)
    if not isinstance(error, torch.OutOfMemoryError | MemoryError) and not is_out_of_memory:
        raise error
    peak = peak_memory_gib()
    return f"out of memory, {peak:.1f} GiB used at most: lower {lower} [{message[:160]}]"
