"""The command that merges a LoRA adapter into its base model. export.py says what is written.

    python -m models.merge GSAI-ML/LLaDA-8B-Instruct merged --adapter FOLDER_OR_HUB_NAME
    python -m models.merge runs/NAME merged
    python -m models.merge runs/NAME adapter --adapter_only

The merged model has the layout, names and dtype of its base, so other tools for the base can read
it. Only light modules are imported here; torch, which takes seconds, is imported in main().
"""

import sys
from pathlib import Path

from models import terminal
from models.command_line import FlagParser

DESCRIPTION = """\
Merges a LoRA adapter into its base model, and writes the whole model.

  python -m models.merge GSAI-ML/LLaDA-8B-Instruct merged --adapter FOLDER
  python -m models.merge runs/NAME merged     the run's own adapter and base
  python -m models.merge runs/NAME adapter --adapter_only
"""


def main(arguments=None):
    """The program. Bad flags end it with code 2, before torch is imported."""
    parser = FlagParser(
        prog="merge",
        usage="python -m models.merge MODEL OUT [--adapter ADAPTER] [--adapter_only]",
        description=DESCRIPTION,
    )
    parser.add_argument("model", help="a folder or hub name, or a run or adapter with a base")
    parser.add_argument("out", type=Path, help="the new folder")
    parser.add_argument(
        "--adapter",
        metavar="ADAPTER",
        help="a folder or hub name; not needed if MODEL is a run or an adapter",
    )
    parser.add_argument(
        "--adapter_only",
        action="store_true",
        help="write only the adapter, with the module names of the base's own code, such as "
        "LLaDA's: peft can add it to a base that was loaded by that code",
    )
    options = parser.parse_args(arguments)
    try:
        if options.out.exists():
            raise ValueError(f"{options.out} already exists")

        from models import export  # torch takes seconds to import

        if options.adapter_only:
            export.export_adapter(options.model, options.out, options.adapter)
        else:
            export.merge(options.model, options.out, options.adapter)
    except KeyboardInterrupt:
        parser.exit(130, "\nstopped\n")
    except (ValueError, OSError) as error:
        parser.exit(2, f"merge: {' '.join(str(error).split())}\n")
    print(f"made {options.out}")


if __name__ == "__main__":
    terminal.prepare()
    sys.exit(main())
