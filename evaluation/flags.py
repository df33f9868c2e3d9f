"""What evaluate.py and claims.py can be asked, and examples.

Standard library alone: --help answers before torch is imported, which takes seconds.
"""

import argparse

from config import FlagParser

EXAMPLES = """
  python evaluate.py runs/NAME                        the learned gamma, greedy
  python evaluate.py runs/NAME --level learned 0.1    beside a fixed one
  python evaluate.py runs/NAME --decoder top_k --level 1 2 4
  python evaluate.py FOLDER_OR_HUB_NAME --task gsm8k --level 0.1
  python evaluate.py runs/NAME --data FILE.jsonl      your own problems
  python evaluate.py MODEL --adapter DIR --task gsm8k
  python evaluate.py runs/NAME --trace 3              completions, call by call
  python evaluate.py --completions FILE.jsonl         what was written elsewhere
  python evaluate.py runs/A runs/B --frontier         accuracy against calls

A run is measured as it was trained, on problems held out from it.
"""
FLAGS = {  # name: (default, help); the run's own come before these defaults
    "task": ("", "countdown, sudoku, gsm8k, math, FILE.py:NAME; several: A,B [the run's]"),
    "decoder": ("eb", "eb, confidence or top_k"),
    "block_length": (0, "tokens a block; 0: the whole canvas [the run's, or 0]"),
    "cache": ("none", "block cache: none, prefix or dual [the run's, or none]"),
    "max_completion_length": (
        [0],
        "tokens a completion; several in turn [the run's, the task's own, or 256]",
    ),
    "adapter": ("", "a LoRA adapter to put onto the model: a folder or a hub name"),
    "dtype": ("auto", "of the model: auto, float32, bfloat16 or 4bit [the run's, or auto]"),
    "prompt": ("", "d1: ask as d1 does [our prompts]"),
    "shots": (0, "solved examples in the prompt, 3 as SPG; of d1's sudoku"),
    "prefill": ("", "how completions are made to begin [the run's, or empty]"),
    "device": ("auto", "auto: the GPU if there is one; or cpu, cuda"),
    "batch_size": (64, "problems at once; fewer need less memory"),
    "temperature": (0.0, "0 is greedy"),
    "problems": (1000, "how many"),
    "samples": (1, "N completions a problem, for pass@k; needs a temperature"),
    "split": ("", "train, validation, test, or all of a file [test; a new file all]"),
    "data": ("", "a file of problems, JSON lines or .csv [the run's, if it had one]"),
    "seed": (0, "of the problems, and of the draws where temperature is above 0"),
    "level": ([None], "learned, or gamma, tau or k; several give several rows [learned]"),
    "trace": (0, "show N completions call by call; writes trace.html, trace.gif"),
    "completions": ("", "a file of completions to score, without a model"),
    "json": ("", "also write the rows to this file, as JSON lines"),
    "frontier": (False, "accuracy against calls for all rules; writes frontiers.png"),
}
DEFAULTS = {name: default for name, (default, _) in FLAGS.items()}
FROM_RUN = ("task", "block_length", "cache", "prefill", "data", "dtype")  # their default: the run's


def number_or_learned(text):
    return None if text == "learned" else float(text)


def parse_flags(arguments=None):
    """{name: value} of the flags given, and `paths`. Bad ones end the program, with code 2."""
    about = "Accuracy against NFE (denoiser calls a completion), of any checkpoint."
    how = {"usage": "%(prog)s RUN [flags]"}
    how |= {"epilog": "examples:" + EXAMPLES, "argument_default": argparse.SUPPRESS}
    parser = FlagParser(description=about, **how)
    parser.add_argument(
        "paths", nargs="*", metavar="RUN", help="a run's folder, a checkpoint's, or a hub name"
    )
    for name, (default, text) in FLAGS.items():
        text += f" [{default}]" if default and "[" not in text else ""
        kind = {"type": type(default), "metavar": type(default).__name__.upper(), "help": text}
        if name == "level":
            kind |= {"type": number_or_learned, "nargs": "+", "metavar": "X"}
        if name == "device":
            kind |= {"choices": ("auto", "cpu", "cuda")}
        if name == "dtype":
            kind |= {"choices": ("auto", "float32", "bfloat16", "4bit")}
        if name == "max_completion_length":
            kind |= {"type": int, "nargs": "+", "metavar": "INT"}
        if name == "frontier":
            kind = {"action": "store_true", "help": text}
        parser.add_argument(f"--{name}", **kind)
    given = vars(parser.parse_args(arguments))
    low = {
        "problems": 1,
        "batch_size": 1,
        "max_completion_length": 0,
        "block_length": 0,
        "trace": 1,
    }
    for name, least in (low | {"samples": 1, "shots": 0}).items():
        asked = given.get(name, least)
        if (min(asked) if isinstance(asked, list) else asked) < least:
            parser.error(f"{name} is at least {least}")
    if bool(given.setdefault("paths", [])) == ("completions" in given):
        parser.error("name a RUN to measure, or give --completions FILE alone")
    if given.get("samples", 1) > 1 and given.get("temperature", 0) <= 0:
        parser.error("greedy samples are all the same: --samples needs a --temperature above 0")
    clash = {"decoder", "level", "temperature", "trace"} & given.keys()
    if "frontier" in given and clash:
        parser.error(f"--frontier is greedy, with levels of its own: leave out --{min(clash)}")
    return given


CLAIMS = """
  python -m experiments.claims gradient tiny --task countdown sudoku    at the base
  python -m experiments.claims gradient runs/A --batches 48             at a run's last checkpoint
  python -m experiments.claims surrogate tiny runs/A --task countdown   two states beside each other
  python -m experiments.claims compare runs/A-0 runs/A-1 runs/B-0  the first run's settings first
  python -m experiments.claims threshold runs/A
"""
PARTS = {
    "gradient": "its cosine with the exact likelihood's, by stages and weights",
    "surrogate": "KL(true || surrogate) and importance weights, by unmasking step",
    "compare": "runs grouped by settings: curves, frontiers, paired differences",
    "threshold": "the learned gamma by task and difficulty, against one fixed gamma",
}


def parse_claims_flags(arguments=None):
    """The flags of claims.py as a dict, with `what` and `paths`. Bad ones end the program."""
    how = {"epilog": "examples:" + CLAIMS}
    parser = FlagParser(usage="%(prog)s WHAT RUN ... [flags]", **how)
    parts = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    for name, said in PARTS.items():
        part = parts.add_parser(name, help=said, description=said)
        part.add_argument("paths", nargs="+", metavar="RUN", help="a run's folder, or a base's")
        part.add_argument("--out", default=f"runs/claims-{name}", help="a folder [%(default)s]")
        if name in ("gradient", "surrogate"):
            part.add_argument("--task", nargs="+", default=[], help="of what is no run")
            part.add_argument("--batches", type=int, default=24, help="of rollouts [24]")
            part.add_argument("--prompts", type=int, help="a batch [as in training]")
            part.add_argument("--seed", type=int, default=0, help="of the rollouts [0]")
    given = vars(parser.parse_args(arguments))
    for name, least in {"batches": 4, "prompts": 1}.items():
        if (given.get(name) or least) < least:
            parser.error(f"{name} is at least {least}")
    return given
