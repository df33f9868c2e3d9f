"""evaluate.py's flags: --help at once and complete, bad values refused before torch is imported."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import evaluate
from evaluation import flags
from sampler import Decoder

ROOT = Path(evaluate.__file__).parent


def run_as_a_program(*arguments):
    """(the finished process, whether it had imported torch or matplotlib) of evaluate.py."""
    code = (
        f"import runpy, sys; sys.argv = {['evaluate.py', *arguments]}\n"
        "try:\n"
        "    runpy.run_path('evaluate.py', run_name='__main__')\n"
        "finally:\n"
        "    print('torch' in sys.modules or 'matplotlib' in sys.modules)"
    )
    process = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "80"},
    )
    return process, process.stdout.splitlines()[-1] == "True"


def test_a_bad_value_is_refused_before_torch_is_imported():
    process, is_slow = run_as_a_program("tiny", "--decoder", "confidence", "--level", "1.5")
    assert process.returncode == 2 and not is_slow
    assert "takes a --level of 0 to 1, not 1.5" in process.stderr


def test_the_help_says_every_default(capsys):
    with pytest.raises(SystemExit):
        flags.parse_flags(["--help"])
    help_of = {}  # {flag: its paragraph}
    for paragraph in " ".join(capsys.readouterr().out.split()).split(" --"):
        name, _, help_of[name] = paragraph.partition(" ")
    for name, default in flags.DEFAULTS.items():
        default = default[0] if isinstance(default, list) else default
        in_brackets = re.findall(r"\[([^]]+)\]", help_of[name])
        if name in flags.FROM_RUN:
            assert "the run's" in in_brackets[-1], name
        elif default != 0 and default != "" and name != "level":
            assert in_brackets[-1] == str(default), name
    assert help_of["level"].count("[learned]") == 1


@pytest.mark.parametrize("rule", ["eb", "confidence", "top_k"])
@pytest.mark.parametrize("level", [None, -1.0, 0.0, 0.5, 1.0, 1.5, 2.0, 1e9, 2e9, float("nan")])
def test_levels_are_refused_as_the_decoder_refuses_them(rule, level):
    problem = flags.find_problem({"paths": ["tiny"], "decoder": rule, "level": [level]})
    if problem:
        assert "level" in problem
        with pytest.raises(ValueError, match="level"):
            Decoder(rule, level)
    else:
        Decoder(rule, level)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("runs/nope", "runs/nope does not exist"),
        ("nope", "nope does not exist"),
        ("./nope/there", "./nope/there does not exist"),
        ("tiny /nowhere", "/nowhere does not exist"),
        ("", "name a RUN"),
        ("tiny --completions rows.jsonl", "give --completions FILE alone"),
        ("--completions rows.jsonl --trace 2", "needs no model: leave out --trace"),
        ("tiny --trace 1 --decoder top_k --level 1 2", "--trace shows one --level at a time"),
        ("tiny --trace 1 --samples 3", "one completion of each problem: leave out --samples"),
        ("--completions nowhere.jsonl", "nowhere.jsonl: there is no such file"),
        ("tiny --data nowhere.csv", "nowhere.csv: there is no such file"),
        ("tiny --json nowhere/rows.jsonl", "there is no folder nowhere"),
        ("tiny --decoder beam", "invalid choice: 'beam'"),
        ("tiny --cache both", "invalid choice: 'both'"),
        ("tiny --dtype float16", "invalid choice: 'float16'"),
        ("tiny --device tpu", "invalid choice: 'tpu'"),
        ("tiny --split half", "invalid choice: 'half'"),
        ("tiny --level many", "a number or learned, not 'many'"),
        ("tiny --problems ten", "a whole number, not 'ten'"),
        ("tiny --problems 0", "at least 1, not 0"),
        ("tiny --max_completion_length 10 -1", "max_completion_length: it has to be at least 0"),
        ("tiny --temperature -1", "--temperature -1.0: it has to be at least 0"),
        ("tiny --temperature nan", "--temperature nan: it has to be at least 0"),
        ("tiny --samples 4", "needs a --temperature above 0"),
        ("tiny --frontier --level 1", "leave out --level"),
        ("tiny --decoder top_k", "only eb can be learned"),
        ("tiny --decoder top_k --level 1.5", "takes a whole --level, not 1.5"),
        ("tiny --colour", "unknown --colour"),
        ("tiny --leve 1", "did you mean --level?"),
        ("tiny --json .", "--json '.': give the name of a file"),
        ("tiny --json /dev/null", "give the name of a file"),
        ("tiny --json=", "--json '': give the name of a file"),
        ("tiny --trace 1 --json rows.jsonl", "leave out --json"),
        ("tiny --adapter nope", "--adapter nope does not exist"),
        ("tiny --seed 99999999999999999999", "at most 9223372036854775807"),
        ("tiny --samples 1000000000 --temperature 1", "at most 1000000, not 1000000000"),
        ("tiny --block_length 99999999999999999999", "at most 1000000, not 9999999"),
    ],
)
def test_what_does_not_fit_is_said_in_a_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        flags.parse_flags(arguments.split())
    error = capsys.readouterr().err
    assert exit.value.code == 2 and message in error and error.count("\n") == 1


def test_flags_given_are_kept_and_others_left_to_run_and_defaults(tmp_path):
    assert flags.parse_flags(["GSAI-ML/LLaDA-8B-Instruct"]) == {
        "paths": ["GSAI-ML/LLaDA-8B-Instruct"]  # a hub's name need not be a folder
    }
    parsed = flags.parse_flags([str(tmp_path), "--level", "learned", "0.1", "--batch-size", "7"])
    assert parsed == {"paths": [str(tmp_path)], "level": [None, 0.1], "batch_size": 7}
    assert flags.parse_flags(["tiny", "--data", ""])["data"] == ""  # the task's own problems
