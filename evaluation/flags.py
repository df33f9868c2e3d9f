"""The flags of evaluate.py.

Only the standard library is imported here, so that --help answers and values are checked before
torch is loaded, which takes seconds.
"""

import argparse
import math
from pathlib import Path

from config import MAX_SEED
from evaluation.outputs import has_content, read_only_place
from models.command_line import FlagParser, at_least, number
from models.hub import is_hub_name

DESCRIPTION = """\
Accuracy against NFE (denoiser calls per completion), for any checkpoint and
any decoder. A run is measured as it was trained, on problems held out from it.

  python evaluate.py runs/NAME                        the learned gamma, greedy
  python evaluate.py runs/NAME --level learned 0.1    and at a fixed gamma
  python evaluate.py runs/NAME --decoder top_k --level 1 2 4
  python evaluate.py runs/A runs/B --frontier         accuracy against calls
  python evaluate.py runs/NAME --trace 3              completions, call by call
  python evaluate.py runs/NAME --data FILE.jsonl      your own problems
  python evaluate.py FOLDER_OR_HUB_NAME --task gsm8k --level 0.1
  python evaluate.py MODEL --adapter FOLDER --task gsm8k
  python evaluate.py --completions FILE.jsonl         completions from elsewhere

In brackets: the default.
"""

# The value of a flag that is not given.
DEFAULTS = {
    "task": "",
    "data": "",
    "split": "",
    "problems": 1000,
    "samples": 1,
    "seed": 0,
    "prompt": "",
    "shots": 0,
    "decoder": "eb",
    "level": [None],  # None: the learned one
    "temperature": 0.0,
    "max_completion_length": [0],
    "block_length": None,  # None: the model's own, which only its denoiser knows
    "cache": "none",
    "prefill": "",
    "adapter": "",
    "dtype": "auto",
    "device": "auto",
    "batch_size": 64,
    "frontier": False,
    "trace": 0,
    "json": "",
    "completions": "",
}

# If one of these flags is not given, the run's own setting of the same name replaces the default.
FROM_RUN = ("task", "data", "block_length", "cache", "prefill", "dtype")
# The same, if only the run's checkpoint or adapter is measured.
DECODING_FROM_RUN = ("block_length", "cache", "prefill")

# Lowest and highest level of each rule. (sampler.Decoder has the same, but would import torch.)
LEVELS_ALLOWED = {"eb": (0, 1e9), "confidence": (0, 1), "top_k": (1, 1e9)}


def number_or_learned(text):
    """The type of --level: a float, or None for "learned"."""
    if text == "learned":
        return None
    try:
        return number(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"a number or learned, not {text[:40]!r}") from None


def parse_flags(arguments=None):
    """{name: value} of the flags that were given, and "paths", the runs to measure.

    Values are checked here, before torch is imported: a bad one ends the program with status 2.
    """
    parser = FlagParser(
        usage="python evaluate.py RUN ... [--FLAG VALUE] ...",
        description=DESCRIPTION,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "paths",
        nargs="*",
        metavar="RUN",
        help="a run's folder, a checkpoint's folder, or a hub name",
    )

    problems = parser.add_argument_group("problems")
    problems.add_argument(
        "--task",
        help="countdown, sudoku, chain, gsm8k, math, FILE.py:NAME; several as A,B [the run's]",
    )
    problems.add_argument(
        "--data",
        metavar="FILE",
        help="a file of problems: JSON lines or array, .csv, .parquet [the run's]",
    )
    problems.add_argument(
        "--split",
        choices=("train", "validation", "test", "all"),
        help="all: every problem of a file [test; for a file new to the run: all]",
    )
    problems.add_argument(
        "--problems",
        type=at_least(1),
        metavar="N",
        help="number of problems [1000]; with --split all the file's first N [all of them]",
    )
    problems.add_argument(
        "--samples",
        type=at_least(1),
        metavar="N",
        help="completions per problem, for pass@k; needs a temperature above 0 [1]",
    )
    problems.add_argument(
        "--seed",
        type=at_least(0, maximum=MAX_SEED),
        metavar="N",
        help="seed of the problems and, at a temperature above 0, of the draws [0]",
    )
    problems.add_argument(
        "--prompt",
        choices=("d1",),
        help="d1: prompts in d1's form [our own]",
    )
    problems.add_argument(
        "--shots",
        type=at_least(0),
        metavar="N",
        help="solved examples in d1's sudoku prompt; SPG has 3 [0]",
    )

    decoding = parser.add_argument_group("decoding")
    decoding.add_argument(
        "--decoder",
        choices=tuple(LEVELS_ALLOWED),
        help="the rule: entropy-bounded, confidence above a threshold, or top k [eb]",
    )
    decoding.add_argument(
        "--level",
        type=number_or_learned,
        nargs="+",
        metavar="X",
        help="learned, or the rule's gamma (nats), tau or k; one row each [learned]",
    )
    decoding.add_argument(
        "--temperature",
        type=number,
        metavar="X",
        help="0 is greedy [0]",
    )
    decoding.add_argument(
        "--max_completion_length",
        type=at_least(0),
        nargs="+",
        metavar="N",
        help="tokens per completion; rows for each [the run's, the task's or 256]",
    )
    decoding.add_argument(
        "--block_length",
        type=at_least(0),
        metavar="N",
        help="decode left to right in blocks of N tokens; 0: one block [the run's; for a LLaDA 32, "
        "for a block-causal model its own, for others 0]",
    )
    decoding.add_argument(
        "--cache",
        choices=("none", "prefix", "dual"),
        help="block cache of keys and values; approximate unless none, but always exact for "
        "block-causal models [the run's, or none]",
    )
    decoding.add_argument(
        "--prefill",
        metavar="TEXT",
        help="text with which every completion begins [the run's, or empty]",
    )

    model = parser.add_argument_group("model")
    model.add_argument(
        "--adapter",
        metavar="FOLDER",
        help="a LoRA adapter to add to the model: a folder or a hub name",
    )
    model.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "4bit"),
        help="type of the weights [the run's, or auto]",
    )
    model.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        help="auto: the GPU if there is one [auto]",
    )
    model.add_argument(
        "--batch_size",
        type=at_least(1),
        metavar="N",
        help="problems completed at once; a smaller batch needs less memory [64]",
    )

    output = parser.add_argument_group("output")
    output.add_argument(
        "--frontier",
        action="store_true",
        help="accuracy against calls for all rules; writes frontiers.png and .jsonl",
    )
    output.add_argument(
        "--trace",
        type=at_least(1),
        metavar="N",
        help="show N completions call by call; writes trace.html and pictures",
    )
    output.add_argument(
        "--json",
        metavar="FILE",
        help="also write the rows to this file, as JSON lines, each when it is measured; all "
        "completions go to a new FILE.completions.jsonl beside it, batch by batch",
    )
    output.add_argument(
        "--completions",
        metavar="FILE",
        help="score the completions in this file, without a model; if the task is your own, also "
        "name it (FILE.py:NAME)",
    )

    flags = vars(parser.parse_args(arguments))
    flags.setdefault("paths", [])
    problem = find_problem(flags)
    if problem:
        parser.error(problem)
    return flags


def find_problem(flags):
    """A line that says what is wrong with a combination of flags, or None."""
    if bool(flags["paths"]) == ("completions" in flags):
        return "name a RUN to measure, or give --completions FILE alone"
    if "completions" in flags:
        for name in sorted(flags.keys() - {"paths", "completions", "task", "json"}):
            return f"--completions needs no model: leave out --{name}"
    if "trace" in flags and len(flags.get("level", [])) > 1:
        return "--trace shows one --level at a time"
    if "trace" in flags and flags.get("samples", 1) > 1:
        return "--trace shows one completion of each problem: leave out --samples"
    for path in flags["paths"]:
        if not (Path(path).exists() or path == "tiny" or is_hub_name(path)):
            return f"{path} does not exist"
    for name in ("data", "completions"):
        if flags.get(name) and not Path(flags[name]).is_file():
            return f"--{name} {flags[name]}: there is no such file"
    if "json" in flags:
        file = Path(flags["json"])
        if not flags["json"] or (file.exists() and not file.is_file()):  # a folder, a device
            return f"--json {flags['json']!r}: give the name of a file"
        if not file.parent.is_dir():
            return f"--json {flags['json']}: there is no folder {file.parent}"
        place = read_only_place(file)
        if place:
            return f"--json {flags['json']}: it cannot be written: {place} is read-only"
        for name in ("data", "completions"):
            if flags.get(name) and file.exists() and file.samefile(flags[name]):
                return f"--json {flags['json']} would replace the file of --{name}"
        # Protects a run's metrics.jsonl, say, which could not be restored. (A run's eval.json never
        # has a whole row on one line.)
        if file.exists() and file.stat().st_size and not has_content(file, ', "solved_low": '):
            return (
                f"--json {flags['json']} already exists and was not written by this program: "
                "move it away, or give another --json"
            )
        completions = completions_file(flags["json"])
        if "completions" not in flags and completions.exists():
            return (
                f"--json {flags['json']}: its completions would go to {completions}, which "
                "already exists: move it away, or give another --json"
            )
        if "trace" in flags:
            return "--trace writes trace.html: leave out --json"
    adapter = flags.get("adapter")
    if adapter and not Path(adapter).exists() and "/" not in adapter:
        return f"--adapter {adapter} does not exist"

    temperature = flags.get("temperature", DEFAULTS["temperature"])
    if not 0 <= temperature < math.inf:
        return f"--temperature {temperature}: it has to be at least 0"
    if flags.get("samples", 1) > 1 and temperature == 0:
        return "greedy samples are all the same: --samples needs a --temperature above 0"
    for name in ("decoder", "level", "temperature", "trace"):
        if "frontier" in flags and name in flags:
            return f"--frontier is greedy and uses its own levels: leave out --{name}"

    rule = flags.get("decoder", DEFAULTS["decoder"])
    lowest, highest = LEVELS_ALLOWED[rule]
    for level in flags.get("level", DEFAULTS["level"]):
        if level is None and rule != "eb":
            return f"--decoder {rule} needs a --level: only eb can be learned"
        if level is not None and not lowest <= level <= highest:
            return f"--decoder {rule} takes a --level of {lowest} to {highest:g}, not {level:g}"
        if rule == "top_k" and level != int(level):
            return f"--decoder top_k takes a whole --level, not {level:g}"
    return None


def completions_file(json_file):
    """The file for the completions behind the rows of --json."""
    return Path(f"{json_file.removesuffix('.jsonl')}.completions.jsonl")
