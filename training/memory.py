"""The command that estimates a run's GPU memory, and says what to lower if it does not fit.

    python -m training.memory --model LLaDA-8B --gpu_gib 24 --dtype 4bit    and any flag of train.py

No weights are read: the estimate is arithmetic (estimate.py), meant to be within 15%.
"""

import math

from config import TASK_RECIPES, Config
from models import terminal
from models.command_line import FlagParser, at_least, number
from training.estimate import describe_size, estimate_gib
from training.flags import add_settings, verify_settings
from training.recipe import (
    SHAPES,
    fit_to_memory,
    read_model_config,
    recipe_for,
    settings_of_memory,
)


def print_memory(model_config, config, prompt_tokens, processes, gpu_gib=None):
    """Prints the parts of a process's memory and, with gpu_gib, whether they fit."""
    parts = estimate_gib(model_config, config, prompt_tokens, processes)
    each = f", in each of {processes} processes" if processes > 1 else ""
    print(
        f"{config.model}, {describe_size(model_config)}: GiB with {prompt_tokens} prompt tokens "
        f"and {config.max_completion_length} completion tokens{each}"
    )
    for name, gib in parts.items():
        print(f"{name:24}{gib:8.2f}")
    if gpu_gib is None:
        return
    settings = settings_of_memory(config)
    if parts["peak"] <= gpu_gib:
        print(f"It fits into {gpu_gib:g} GiB, with {settings}")
    else:
        print(
            f"It does not fit into {gpu_gib:g} GiB, with {settings}: lower the batch sizes, "
            "--lora_rank or --max_completion_length, or use --gradient_checkpointing true, "
            "--dtype 4bit, --cache none or a smaller --model"
        )


def run_config(flags, gpu_gib):
    """(model_config, Config) of the run that train.py's flags describe. Raises ValueError."""
    model_config = read_model_config(flags["model"])
    if not getattr(model_config, "compact_prompts", False):
        return model_config, Config(**recipe_for(model_config, gpu_gib) | flags)
    from tasks.registry import load_task

    tasks = ",".join(sorted(flags.get("task", "").split(",")))
    config = Config(**TASK_RECIPES.get(tasks, {}) | flags)
    config.max_completion_length = (
        config.max_completion_length or load_task(config.task, compact=True).length
    )
    return model_config, config


def main(arguments=None):
    """The command. It takes its own flags and train.py's settings."""
    parser = FlagParser(
        prog="python -m training.memory",
        usage="%(prog)s --model NAME [--gpu_gib GIB] [train.py's flags]",
        description="How much GPU memory a training run needs, by arithmetic.\n"
        f"--model is {', '.join(SHAPES)}, tiny, a checkpoint's folder or a hub name.",
    )
    parser.add_argument(
        "--gpu_gib", metavar="GIB", type=number, help="a GPU's memory: also say what fits into it"
    )
    parser.add_argument(
        "--prompt_tokens",
        metavar="N",
        type=at_least(1),
        default=400,
        help="tokens per prompt [400]",
    )
    parser.add_argument(
        "--processes", metavar="N", type=at_least(1), default=1, help="processes of torchrun [1]"
    )
    add_settings(parser)
    flags = vars(parser.parse_args(arguments))
    gpu_gib = flags.pop("gpu_gib")
    prompt_tokens = flags.pop("prompt_tokens")
    processes = flags.pop("processes")
    if gpu_gib is not None and not 0 < gpu_gib < math.inf:
        parser.error("--gpu_gib has to be a number above 0")
    verify_settings(parser, flags)
    if not flags.get("model"):
        parser.error(f"--model is missing: {', '.join(SHAPES)}, a folder or a name on the hub")
    try:
        from training.checks import check_processes

        model_config, config = run_config(flags, gpu_gib)
        if not config.max_completion_length:
            raise ValueError("--max_completion_length 0: this model's completions need a length")
        check_processes(config, processes)
        config = fit_to_memory(model_config, config, flags, gpu_gib, prompt_tokens, processes)
        print_memory(model_config, config, prompt_tokens, processes, gpu_gib)
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: {' '.join(str(error).split())}\n")


if __name__ == "__main__":
    terminal.prepare()
    main()
