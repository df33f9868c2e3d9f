"""Merges a LoRA adapter into its base model: the command. export.py says what is written.

    python -m models.merge GSAI-ML/LLaDA-8B-Instruct merged --adapter FOLDER_OR_HUB_NAME
    python -m models.merge runs/NAME merged
    python -m models.merge runs/NAME adapter --adapter_only

The merged model has the layout, the names and the dtype of its base, so the base's other tools read
it. Only light modules are imported here: torch, which takes seconds, has to wait for main().
"""

import sys
from pathlib import Path

from models import terminal
from models.command_line import FlagParser

DESCRIPTION = """\
Merges a LoRA adapter into its base model, and writes the whole model.

  python -m models.merge GSAI-ML/LLaDA-8B-Instruct merged --adapter FOLDER
  python -m models.merge runs/NAME merged     a run's own adapter and base
  python -m models.merge runs/NAME adapter --adapter_only
"""


def main(arguments=None):
    """The program. Bad flags end it with code 2, before torch is imported."""
    parser = FlagParser(
        prog="merge",
        usage="python -m models.merge MODEL OUT [--adapter ADAPTER] [--adapter_only]",
        description=DESCRIPTION,
    )
    parser.add_argument("model", help="a folder or a hub name; or a run, or an adapter with a base")
    parser.add_argument("out", type=Path, help="the new folder")
    parser.add_argument(
        "--adapter",
        metavar="ADAPTER",
        help="a folder or a hub name; without it, the adapter that MODEL is",
    )
    parser.add_argument(
        "--adapter_only",
        action="store_true",
        help="write the adapter instead, with the module names of the base's own code, such as "
        "LLaDA's: peft puts it onto a base that this code has loaded",
    )
    options = parser.parse_args(arguments)
    try:
        if options.out.exists():
            raise ValueError(f"{options.out} is there already")

        from models import export  # torch takes seconds to import

        if options.adapter_only:
            export.export_adapter(options.model, options.out, options.adapter)
        else:
            export.merge(options.model, options.out, options.adapter)
    except KeyboardInterrupt:
        parser.exit(130, "\nstopped\n")
    except (ValueError, OSError) as error:
        parser.exit(2, f"merge: {' '.join(str(error).split())}\n")
    print(f"{options.out} is made")


if __name__ == "__main__":
    terminal.prepare()
    sys.exit(main())
