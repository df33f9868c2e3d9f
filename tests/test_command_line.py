"""The programs of experiments/: help without torch, one line for bad input, Ctrl-C."""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import gradients, surrogate
from experiments.command_line import exit_status
from models.command_line import FlagParser, at_least, number
from models.hub import is_hub_name

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = sorted(
    path.stem for path in (ROOT / "experiments").glob("*.py") if "def main(" in path.read_text()
)
OTHERS = ["train.py", "evaluate.py", "-m models.make_base", "-m models.merge", "-m training.memory"]


@pytest.fixture
def run_program(tmp_path):
    """run_program(name, *flags) -> the finished process, of a program that cannot import torch."""
    (tmp_path / "torch.py").write_text("raise ImportError")

    def run(name, *flags):
        return subprocess.run(
            [sys.executable, *name.split(), *flags],
            cwd=ROOT,
            env={"PYTHONPATH": str(tmp_path), "PATH": ""},
            capture_output=True,
            text=True,
            timeout=150,
        )

    return run


@pytest.mark.parametrize("flags", ["--out bases/tiny", "--out b --careless 2"])
def test_bad_flags_of_a_base_are_refused_without_torch(flags, run_program):
    done = run_program("-m models.make_base", *flags.split())
    assert done.returncode == 2 and not done.stdout


def test_the_programs_are_those_of_the_folder():
    assert PROGRAMS == [
        "benchmark",
        "compare",
        "dose",
        "gradients",
        "grids",
        "scaling",
        "surrogate",
        "thresholds",
    ]


@pytest.mark.parametrize("program", [*(f"-m experiments.{name}" for name in PROGRAMS), *OTHERS])
def test_help_answers_without_torch_in_80_columns(program, run_program):
    done = run_program(program, "--help")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) > 200
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert done.stdout.startswith(f"usage: python {program} ")


@pytest.mark.parametrize("name", PROGRAMS)
def test_an_unknown_flag_gets_one_line_without_torch(name, run_program):
    positional = {"benchmark": [], "scaling": [], "grids": ["grid"]}.get(name, ["bases/tiny"])
    done = run_program(f"-m experiments.{name}", *positional, "--nonsense", "1")
    assert done.returncode == 2 and not done.stdout
    assert "unknown --nonsense" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "the following arguments are required: RUN"),
        (["tiny", "--batches", "2"], "argument --batches: it has to be at least 4, not 2"),
        (["tiny", "--prompts", "0"], "argument --prompts: it has to be at least 1, not 0"),
        (
            ["tiny", "--prompts", "few"],
            "argument --prompts: it has to be a whole number, not 'few'",
        ),
        (["tiny", "--seed", "99999999999999999999"], "argument --seed: it has to be at most"),
        (["tiny", "--prompts", "9" * 5000], "argument --prompts: it has to be at most 1000000"),
        (["tiny", "--out", "config.py"], "argument --out: config.py is a file"),
    ],
)
def test_bad_flags_get_one_line_without_torch(flags, message, run_program):
    done = run_program("-m experiments.gradients", *flags)
    assert done.returncode == 2 and not done.stdout
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["compare", "dose", "gradients", "surrogate", "thresholds"])
def test_a_folder_that_does_not_exist_is_named_without_torch(name, run_program):
    done = run_program(f"-m experiments.{name}", "runs/nope")
    assert done.returncode == 2 and not done.stdout
    assert "RUN: runs/nope does not exist" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["compare", "dose", "gradients", "surrogate", "thresholds"])
def test_results_of_somebody_else_are_not_replaced(name, run_program, tmp_path):
    """Each program's files have its own name, and `--out .` is soon typed."""
    out = tmp_path / "out"
    out.mkdir()
    for suffix in ["json"] if name == "thresholds" else ["json", "png"]:
        file = out / f"{name}.{suffix}"
        file.write_text("somebody else's")
        done = run_program(f"-m experiments.{name}", "bases/tiny", "--out", str(out))
        assert done.returncode == 2 and not done.stdout
        assert f"{file} already exists and was not written by this program" in done.stderr
        assert done.stderr.count("\n") == 1
        assert file.read_text() == "somebody else's"
        file.unlink()


@pytest.mark.parametrize("program", [gradients, surrogate])
def test_bad_input_gets_one_line(program, tmp_path, capsys):
    old = tmp_path / "old"
    (old / "checkpoint").mkdir(parents=True)
    (old / "config.json").write_text('{"task": "countdown"}')
    empty = tmp_path / "empty"
    empty.mkdir()
    tiny = ROOT / "bases" / "tiny"
    for arguments, message in [
        ((tiny,), "is not a run, so its task is unknown: give a --task"),
        ((tiny, "--task", "chess"), "unknown task 'chess'"),
        ((tiny, "--task", "gsm8k"), "no length"),
        ((old,), "written by another version of train.py"),
        ((empty, "--task", "countdown"), "empty is not a checkpoint"),
    ]:
        flags = [*arguments, "--out", tmp_path / "out"]
        assert program.main([str(flag) for flag in flags]) == 2
        out, err = capsys.readouterr()
        assert message in err and err.count("\n") == 1, err
        assert err.startswith(f"{program.__name__}: ") and not out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--sed 5 tiny", "unknown --sed: did you mean --seed?"),  # and 5 is no RUN
        ("-n 5 tiny", "unknown -n"),
        ("--count=5 --seed x tiny", "unknown --count"),
        ("tiny --seed x", "argument --seed: it has to be a whole number, not 'x'"),
        ("tiny --seed -1", "argument --seed: it has to be at least 0, not -1"),
        ("tiny --level -x", "unknown -x"),
        ("tiny --level low", "argument --level: it has to be a number, not 'low'"),
        ("--seed 1 -- --sed", "argument RUN: --sed does not exist"),
        ("tiny --seed 1 more", "unknown more"),
    ],
)
def test_a_wrong_flag_is_named_and_its_value_taken_for_nothing_else(arguments, message, capsys):
    def run(path):
        if path != "tiny":
            raise argparse.ArgumentTypeError(f"{path} does not exist")
        return path

    parser = FlagParser(prog="program")
    parser.add_argument("paths", nargs="+", type=run, metavar="RUN")
    parser.add_argument("--seed", type=at_least(0))
    parser.add_argument("--level", type=number)
    with pytest.raises(SystemExit) as end:
        parser.parse_args(arguments.split())
    assert end.value.code == 2
    assert capsys.readouterr().err == f"program: {message} (--help lists all flags)\n"


def test_negative_numbers_and_texts_that_begin_with_dashes_are_values():
    parser = FlagParser()
    parser.add_argument("--level", type=number)
    parser.add_argument("--prefill")
    options = parser.parse_args(["--level", "-.5", "--prefill=--think"])
    assert (options.level, options.prefill) == (-0.5, "--think")
    assert parser.parse_args(["--level", "-3"]).level == -3
    assert parser.parse_args(["--prefill", "-- so-called"]).prefill == "-- so-called"
    assert parser.parse_args(["--prefill", "--so-called x"]).prefill == "--so-called x"


def test_every_program_takes_its_flags_by_the_same_parser():
    for file in ROOT.glob("**/*.py"):
        is_program = not file.is_relative_to(ROOT / "tests") and "def main(" in file.read_text()
        if is_program and file.name not in ("train.py", "evaluate.py"):
            assert re.search(r"\bFlagParser\(", file.read_text()), file
    sources = [file.read_text() for file in ROOT.glob("*/*.py") if file.parent.name != "tests"]
    assert sum("argparse.ArgumentParser" in source for source in sources) == 1


@pytest.mark.parametrize("name", ["evaluate.py", "-m models.merge", "-m experiments.gradients"])
def test_a_program_that_torchrun_starts_several_times_is_refused(name, tmp_path):
    """Each process would do the same work, and write the same files."""
    (tmp_path / "torch.py").write_text("raise ImportError")
    done = subprocess.run(
        [sys.executable, *name.split(), "tiny"],
        cwd=ROOT,
        env={"PYTHONPATH": str(tmp_path), "TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "4"},
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 2 and not done.stdout
    assert "torchrun has started this program 4 times, and each" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("GSAI-ML/LLaDA-8B-Instruct", True),
        ("dllm-hub/Qwen3-0.6B-diffusion-mdlm-v0.1", True),
        ("runs/NAME", False),
        ("bases/nope", False),  # bases is a folder here
        ("./nope", False),
        ("../nope", False),
        ("~/nope", False),
        ("/nope", False),
        ("owner/", False),
        ("/name", False),
        ("owner/name/part", False),
        ("owner/my model", False),
        ("owner/..", False),
        ("name", False),
        ("", False),
    ],
)
def test_a_hub_name_is_owner_and_name_and_no_path(name, expected, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert is_hub_name(name) is expected


# peft imports bitsandbytes, which logs a warning where an optional kernel is missing.
TALKATIVE_PEFT = """
import logging
logging.getLogger("bitsandbytes").warning("a kernel is missing")
def __getattr__(name):
    return None
"""

IMPORT_EACH = """
import importlib, os, sys
import evaluation.trace_page, models.families, models.tiny  # what is slow to import, once
for name in sys.argv[1:]:
    child = os.fork()
    if not child:
        for module in (name, "models.export", "models.lora"):  # some import these late
            importlib.import_module(module)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, name
"""


def test_no_library_prints_anything_where_a_program_imports_it(tmp_path):
    (tmp_path / "peft.py").write_text(TALKATIVE_PEFT)
    names = [f"experiments.{name}" for name in PROGRAMS]
    names += ["train", "evaluate", "models.make_base", "models.merge", "training.memory"]
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_EACH, *names],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_every_program_prepares_what_it_prints_to():
    names = [f"experiments/{name}.py" for name in PROGRAMS]
    names += ["train.py", "evaluate.py", "training/memory.py"]
    names += ["models/make_base.py", "models/merge.py"]
    for name in names:
        assert "    terminal.prepare()\n" in (ROOT / name).read_text(), name


def test_ctrl_c_says_that_it_stopped(capsys):
    def interrupted():
        raise KeyboardInterrupt

    assert exit_status("experiments.x", interrupted) == 130
    assert capsys.readouterr().err == "\nstopped\n"
