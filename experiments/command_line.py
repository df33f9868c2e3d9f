"""What the programs in this folder share: flags and exit statuses.

Only the standard library is imported here, so that flags are checked before torch is loaded, which
takes seconds.
"""

import argparse
import sys
from pathlib import Path

from config import MAX_SEED
from evaluation.outputs import verify_replaceable
from models.command_line import at_least
from models.hub import is_hub_name


def existing_folder(path):
    """An argparse type: the path of a folder that exists."""
    if not Path(path).is_dir():
        raise argparse.ArgumentTypeError(f"{path} does not exist")
    return path


def add_out_flag(parser, name, content, has_plot=True):
    """Adds --out, the folder for NAME.json and NAME.png, which is created if it does not exist.

    content   a text that every NAME.json of the program contains. Files of these names that the
              program did not write are not replaced; it refuses them before it starts to measure
    has_plot  False: the program writes no NAME.png
    """
    results = f"{name}.json and {name}.png go" if has_plot else f"{name}.json goes"

    def results_folder(path):
        folder = Path(path)
        pictures = [folder / f"{name}.png"] if has_plot else []
        if folder.exists() and not folder.is_dir():
            raise argparse.ArgumentTypeError(f"{path} is a file")
        try:
            verify_replaceable(folder / f"{name}.json", pictures, content)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return path

    parser.add_argument(
        "--out",
        type=results_folder,
        default=f"runs/{name}",
        metavar="DIR",
        help=f"where {results} [%(default)s]",
    )


def run_or_model(path):
    """An argparse type: an existing folder, tiny, or a possible hub name."""
    if path == "tiny" or is_hub_name(path):
        return path
    return existing_folder(path)


def add_task_file_flag(parser):
    """Adds --task, for runs whose task is in a file: it is executed only if it is named here."""
    parser.add_argument(
        "--task",
        default="",
        metavar="FILE.py:NAME",
        help="the runs' task, if it is your own: its file is executed only if you name it",
    )


def add_state_flags(parser, name):
    """Adds the flags that gradients.py and surrogate.py share: states, rollouts, where to write.

    name: the program's name, which its default folder and its files share
    """
    parser.add_argument(
        "paths",
        nargs="+",
        type=run_or_model,
        metavar="RUN",
        help="a run's folder (its last checkpoint), or a base: tiny, a folder, a hub name",
    )
    parser.add_argument(
        "--task",
        nargs="+",
        default=[],
        metavar="TASK",
        help="the tasks to measure a base on, one by one; a run has its own, which "
        "has to be given only if it is in a file",
    )
    parser.add_argument(
        "--batches",
        type=at_least(4),
        default=24,
        metavar="INT",
        help="batches of rollouts per state [24]",
    )
    parser.add_argument(
        "--prompts",
        type=at_least(1),
        metavar="INT",
        help="prompts per batch [as in training]",
    )
    parser.add_argument(
        "--block_length",
        type=at_least(0),
        metavar="INT",
        help="decode in blocks of this many tokens, 0 for one block [as in training]",
    )
    parser.add_argument(
        "--seed",
        type=at_least(0, maximum=MAX_SEED),
        default=0,
        metavar="INT",
        help="seed of problems and rollouts [0]",
    )
    add_out_flag(parser, name, content='"state"')


def exit_status(program, run):
    """Calls run(), and returns the program's exit status: 0, 2 for bad input, 130 for Ctrl-C."""
    try:
        run()
        return 0
    except (ValueError, OSError) as error:
        print(f"{program}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
