"""The flags of train.py: one for each setting of config.py, and --resume and --export.

Only the standard library is imported here, so that --help answers and values are checked before
torch is loaded, which takes seconds.
"""

import argparse
from dataclasses import fields

from config import MEMORY_RECIPES, MODEL_RECIPES, TASK_RECIPES, Config
from models.command_line import FLAG_TYPES, FlagParser

DESCRIPTION = """\
DiFFPO: reinforcement learning of a masked-diffusion language model and of the
threshold by which it decodes.

  python train.py --task countdown --model tiny   no GPU and no download needed
  python train.py --task countdown,sudoku         both tasks, one model
  python train.py --task my_task.py:MyTask        your own task
  python train.py --resume --run_dir runs/NAME    resume after Ctrl-C or a kill
  python train.py --task gsm8k --model GSAI-ML/LLaDA-8B-Instruct    24 GB GPU

In brackets: the default; values of recipes that replace it (for a task with the
tiny model, for LLaDA or small models, for a GPU of 24 or 48 GB); d1's value.
"""

# The groups of --help: the first field of each, and its title.
GROUPS = {
    "task": "run",
    "prompts_per_step": "rollout",
    "num_stages": "objective",
    "learning_rate": "optimiser",
    "rollout_batch_size": "memory",
    "eval_problems": "measuring and saving",
}


def help_text(f):
    """A setting's help: meaning, choices, default, the recipes' values and d1's value."""
    text = f.metadata["help"]
    if f.metadata["choices"]:
        text += f" ({', '.join(f.metadata['choices'])})"
    values = [str(f.default)] if f.default != "" else []
    recipes = TASK_RECIPES | MODEL_RECIPES | MEMORY_RECIPES
    values += [f"{name} {recipe[f.name]}" for name, recipe in recipes.items() if f.name in recipe]
    if f.metadata["d1"] is not None:
        values.append(f"d1 {f.metadata['d1']}")
    return text + (f" [{'; '.join(values)}]" if values else "")


def parse_flags(arguments=None):
    """{name: value} of the flags on the command line, including `resume` and `export`.

    Values are checked here, before torch is imported: a bad one ends the program with status 2.
    """
    parser = FlagParser(
        several_processes=True,
        usage="python train.py [--FLAG VALUE] ...",
        description=DESCRIPTION,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--resume", action="store_true", help="resume the run in --run_dir")
    parser.add_argument("--export", metavar="DIR", help="at the end, write the whole model to DIR")
    add_settings(parser)
    flags = vars(parser.parse_args(arguments))
    settings = {name: flags[name] for name in flags if name not in ("resume", "export")}
    verify_settings(parser, settings)
    return flags


def add_settings(parser):
    """Adds a flag for each setting of config.py, in groups. Omitted flags get no value."""
    for f in fields(Config):
        if f.name in GROUPS:
            group = parser.add_argument_group(GROUPS[f.name])
        group.add_argument(
            f"--{f.name}",
            type=FLAG_TYPES[f.type],
            default=argparse.SUPPRESS,
            metavar=f.type.__name__.upper(),
            help=help_text(f),
        )


def verify_settings(parser, settings):
    """Ends the program with status 2 if Config refuses one of these settings, {name: value}."""
    try:
        Config(**settings)
    except ValueError as error:
        parser.error(str(error))
