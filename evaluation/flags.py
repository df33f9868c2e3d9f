"""The flags of evaluate.py.

Only the standard library is imported here: --help answers, and values are checked, before torch is
loaded, which takes seconds.
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
  python evaluate.py runs/NAME --level learned 0.1    beside a fixed one
  python evaluate.py runs/NAME --decoder top_k --level 1 2 4
  python evaluate.py runs/A runs/B --frontier         accuracy against calls
  python evaluate.py runs/NAME --trace 3              completions, call by call
  python evaluate.py runs/NAME --data FILE.jsonl      your own problems
  python evaluate.py FOLDER_OR_HUB_NAME --task gsm8k --level 0.1
  python evaluate.py MODEL --adapter FOLDER --task gsm8k
  python evaluate.py --completions FILE.jsonl         written elsewhere

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

# If such a flag is not given, a run's own setting of the same name comes before DEFAULTS.
FROM_RUN = ("task", "data", "block_length", "cache", "prefill", "dtype")
# And of these before DEFAULTS, if not the run but its checkpoint or adapter is measured.
DECODING_FROM_RUN = ("block_length", "cache", "prefill")

# Lowest and highest level of each rule, as in sampler.Decoder, which cannot be imported here.
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

    Values are checked here, before torch is imported: a bad one ends the program with code 2.
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
        help="countdown, sudoku, chain, gsm8k, math, FILE.py:NAME; several: A,B [the run's]",
    )
    problems.add_argument(
        "--data",
        metavar="FILE",
        help="a file of problems: JSON lines or array, .csv, .parquet [the run's]",
    )
    problems.add_argument(
        "--split",
        choices=("train", "validation", "test", "all"),
        help="all: of a file [test; of a file that the run did not have: all]",
    )
    problems.add_argument(
        "--problems",
        type=at_least(1),
        metavar="N",
        help="how many; of split all its first N, or the whole file [1000]",
    )
    problems.add_argument(
        "--samples",
        type=at_least(1),
        metavar="N",
        help="completions of each problem, for pass@k; needs a temperature [1]",
    )
    problems.add_argument(
        "--seed",
        type=at_least(0, maximum=MAX_SEED),
        metavar="N",
        help="of the problems, and of the draws if the temperature is above 0 [0]",
    )
    problems.add_argument(
        "--prompt",
        choices=("d1",),
        help="d1: the prompts have d1's form [our form]",
    )
    problems.add_argument(
        "--shots",
        type=at_least(0),
        metavar="N",
        help="solved examples in d1's prompt of sudoku; SPG has 3 [0]",
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
        help="learned, or the rule's gamma (nats), tau or k; a row for each [learned]",
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
        help="tokens of a completion; rows for each [the run's, the task's or 256]",
    )
    decoding.add_argument(
        "--block_length",
        type=at_least(0),
        metavar="N",
        help="decode left to right in blocks of N tokens; 0: one block [the run's; a LLaDA's 32, "
        "a block-causal model's own, another model's 0]",
    )
    decoding.add_argument(
        "--cache",
        choices=("none", "prefix", "dual"),
        help="block cache of keys and values; only none is exact, except that all are for "
        "block-causal models [the run's, or none]",
    )
    decoding.add_argument(
        "--prefill",
        metavar="TEXT",
        help="how every completion is made to begin [the run's, or empty]",
    )

    model = parser.add_argument_group("model")
    model.add_argument(
        "--adapter",
        metavar="FOLDER",
        help="a LoRA adapter to put onto the model: a folder or a hub name",
    )
    model.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "4bit"),
        help="of the weights [the run's, or auto]",
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
        help="problems completed at once; fewer need less memory [64]",
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
        help="also write the rows to this file, as JSON lines, each once it is measured; and "
        "beside it, in a new FILE.completions.jsonl, every completion once its batch is done",
    )
    output.add_argument(
        "--completions",
        metavar="FILE",
        help="score the completions of this file, without a model; name the task if it is your "
        "own (FILE.py:NAME)",
    )

    flags = vars(parser.parse_args(arguments))
    flags.setdefault("paths", [])
    problem = find_problem(flags)
    if problem:
        parser.error(problem)
    return flags


def find_problem(flags):
    """What is wrong with flags that are right one by one, in a line. None: nothing."""
    if bool(flags["paths"]) == ("completions" in flags):
        return "name a RUN to measure, or give --completions FILE alone"
    if "completions" in flags:
        for name in sorted(flags.keys() - {"paths", "completions", "task", "json"}):
            return f"--completions is scored without a model: leave out --{name}"
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
        if not flags["json"] or file.is_dir():
            return f"--json {flags['json']!r}: give the name of a file"
        if not file.parent.is_dir():
            return f"--json {flags['json']}: there is no folder {file.parent}"
        place = read_only_place(file)
        if place:
            return f"--json {flags['json']}: it cannot be written: {place} is read-only"
        for name in ("data", "completions"):
            if flags.get(name) and file.exists() and file.samefile(flags[name]):
                return f"--json {flags['json']} would replace the file of --{name}"
        # A run's metrics.jsonl, say, which nothing could make again. (Its eval.json has no row
        # that is one line.)
        if file.exists() and file.stat().st_size and not has_content(file, ', "solved_low": '):
            return (
                f"--json {flags['json']} is there already, and was not written by this program: "
                "move it away, or give another --json"
            )
        completions = completions_file(flags["json"])
        if "completions" not in flags and completions.exists():
            return (
                f"--json {flags['json']}: its completions would go to {completions}, which is "
                "there already: move it away, or give another --json"
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
            return f"--frontier is greedy, with levels of its own: leave out --{name}"

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
    """Where the completions behind the rows of --json go."""
    return Path(f"{json_file.removesuffix('.jsonl')}.completions.jsonl")
