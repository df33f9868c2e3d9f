"""The command lines of all programs: a parser for flags, and the types of their values.

Only the standard library is imported here, so that --help answers and flags are checked before
torch is loaded, which takes seconds.
"""

import argparse
import difflib
import functools
import os
import re
import sys


class FlagParser(argparse.ArgumentParser):
    """argparse with one-line errors that suggest the flag meant; --a-b is accepted for --a_b.

    several_processes: whether the program divides its work among the processes that torchrun
    starts. If it does not, torchrun is refused: each process would do all the work and write the
    same files.
    """

    def __init__(self, several_processes=False, **options):
        self.several_processes = several_processes
        super().__init__(
            allow_abbrev=False,
            formatter_class=functools.partial(
                argparse.RawDescriptionHelpFormatter, width=80, max_help_position=26
            ),
            **options,
        )

    def parse_args(self, args=None, namespace=None):
        processes = os.environ.get("WORLD_SIZE", "1")
        is_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
        if is_torchrun and processes != "1" and not self.several_processes:
            self.exit(
                2,
                f"{self.prog}: torchrun has started this program {processes} times, and each "
                "process would do all the work: start it with plain python\n",
            )
        args = sys.argv[1:] if args is None else args
        namespace, unknown = self.parse_known_args(self._known_flags(args), namespace)
        if unknown:
            self.error(f"unknown {unknown[0]}")
        return namespace

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (--help lists all flags)\n")

    def _known_flags(self, arguments):
        """The arguments, with underscores in the names of flags.

        An unknown flag ends the program here: argparse would mistake its value for a RUN, say, and
        complain about that instead.
        """
        arguments = list(arguments)
        for i, argument in enumerate(arguments):
            if argument == "--":  # no flags follow
                break
            flag, equals, value = argument.partition("=")
            if not re.fullmatch(r"--?[^\W\d][\w-]*", flag):  # -1 and "-- a text" are values
                continue
            flag = flag[:2] + flag[2:].replace("-", "_")
            if flag not in self._option_string_actions:
                self.error(f"unknown {flag}{self._suggestion(flag)}")
            arguments[i] = flag + equals + value
        return arguments

    def _suggestion(self, flag):
        """The flags that were probably meant: those that contain this name, else similar ones."""
        if not flag.startswith("--"):
            return ""
        name = flag[2:]
        names = [flag[2:] for flag in self._option_string_actions if flag.startswith("--")]
        candidates = [known for known in names if len(name) > 3 and name in known]
        candidates = candidates or difflib.get_close_matches(name, names)
        return f": did you mean --{' or --'.join(candidates)}?" if candidates else ""


def at_least(minimum, maximum=1_000_000):
    """The type of a flag that takes a whole number from `minimum` to `maximum`.

    A mistyped number is refused at once, instead of filling the memory.
    """

    def bounded_number(text):
        value = whole_number(text)
        if value > maximum:
            raise argparse.ArgumentTypeError(f"it has to be at most {maximum}, not {text[:40]}")
        if value < minimum:
            raise argparse.ArgumentTypeError(f"it has to be at least {minimum}, not {text[:40]}")
        return value

    return bounded_number


def whole_number(text):
    """The type of a flag that takes a whole number, whose size is checked elsewhere."""
    if not re.fullmatch(r"-?\d+", text):
        raise argparse.ArgumentTypeError(f"it has to be a whole number, not {text[:40]!r}")
    return int(text[:100])  # int() refuses thousands of digits; a hundred are too many anyway


def number(text):
    """The type of a flag that takes a float."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"it has to be a number, not {text[:40]!r}") from None


def true_or_false(text):
    """The type of a boolean flag."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"it has to be true or false, not {text[:40]!r}")
    return text.lower() == "true"


# How a flag's text is read, by the type of the dataclass field that it sets.
FLAG_TYPES = {str: str, int: whole_number, float: number, bool: true_or_false}
