"""The command lines of all programs: a parser of flags, and types of their values.

Only the standard library is imported here: --help answers, and flags are checked, before torch is
loaded, which takes seconds.
"""

import argparse
import difflib
import functools
import sys


class FlagParser(argparse.ArgumentParser):
    """argparse, with one line for a mistake, a suggestion for a near miss, and --a-b for --a_b."""

    def __init__(self, **options):
        super().__init__(
            allow_abbrev=False,
            formatter_class=functools.partial(
                argparse.RawDescriptionHelpFormatter, width=80, max_help_position=26
            ),
            **options,
        )

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        return super().parse_known_args([self._with_underscores(a) for a in args], namespace)

    def parse_args(self, args=None, namespace=None):
        namespace, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(f"unknown {unknown[0]}{self._suggestion(unknown[0])}")
        return namespace

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (--help lists all flags)\n")

    @staticmethod
    def _with_underscores(argument):
        if not argument.startswith("--"):
            return argument
        name, equals, value = argument.partition("=")
        return "--" + name[2:].replace("-", "_") + equals + value

    def _suggestion(self, argument):
        """The flags that were probably meant: those that contain the name, else similar ones."""
        if not argument.startswith("--"):
            return ""
        name = argument[2:].partition("=")[0]
        names = [flag[2:] for flag in self._option_string_actions if flag.startswith("--")]
        candidates = [known for known in names if len(name) > 3 and name in known]
        candidates = candidates or difflib.get_close_matches(name, names)
        return f": did you mean --{' or --'.join(candidates)}?" if candidates else ""


def at_least(minimum, maximum=1_000_000):
    """The type of a flag that takes a whole number from `minimum` to `maximum`.

    A mistyped one is refused at once, instead of filling the memory.
    """

    def whole_number(text):
        if not text.removeprefix("-").isdecimal():
            raise argparse.ArgumentTypeError(f"a whole number, not {text[:40]!r}")
        if len(text) > 20 or int(text) > maximum:
            raise argparse.ArgumentTypeError(f"it has to be at most {maximum}, not {text[:40]}")
        if int(text) < minimum:
            raise argparse.ArgumentTypeError(f"it has to be at least {minimum}, not {text}")
        return int(text)

    return whole_number


def true_or_false(text):
    """The value of a boolean flag."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"true or false, not {text!r}")
    return text.lower() == "true"
