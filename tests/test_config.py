"""The flags: --help answers at once and in groups, and what is misspelt is refused."""

import re
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path

import pytest

import config

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def help_text():
    """What --help prints where torch cannot be imported, whatever the terminal's width."""
    code = "import runpy, sys; sys.modules['torch'] = None; sys.argv = ['train.py', '--help']"
    code += "; runpy.run_path('train.py', run_name='__main__')"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={"COLUMNS": "200"})
    assert done.returncode == 0 and not done.stderr
    return done.stdout


def test_help_needs_no_torch_and_fits_80_columns(help_text):
    assert max(map(len, help_text.splitlines())) <= 80
    assert "python train.py --task countdown" in help_text and "--resume" in help_text


def test_every_setting_is_named_in_its_group(help_text):
    where = {}
    for part in help_text.split("\n\n"):
        title, *lines = part.splitlines()
        for name in re.findall(r"^  --(\w+)", "\n".join(lines), re.M):
            where[name] = title.rstrip(":")
    group = None
    for f in fields(config.Config):
        group = config.GROUPS.get(f.name, group)
        assert where[f.name] == group, f.name
    assert len(set(where.values()) - {"options"}) == len(config.GROUPS)


def test_the_groups_are_those_that_the_source_shows():
    source = (ROOT / "config.py").read_text(encoding="utf-8")
    assert re.findall(r"    # (.+)\n    (\w+):", source) == [
        (v, k) for k, v in config.GROUPS.items()
    ]


def test_defaults_and_recipes_are_told(help_text):
    text = " ".join(help_text.split())
    assert (
        "P, prompts in a step [32; sudoku 16; chain 16; countdown,sudoku 24; LLaDA 16; small 16; "
        "d1 16]" in text
    )
    assert "what learns (policy, sampler, joint) [joint]" in text
    assert "[]" not in text


@pytest.mark.parametrize("flags", [["--step", "3"], ["--run", "a"], ["--resum"]])
def test_an_abbreviated_flag_is_refused(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        config.parse_flags(flags)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and flags[0] in message and message.count("\n") == 1


def test_the_config_of_a_run_is_read_back_and_one_with_other_fields_is_refused():
    saved = asdict(config.Config(seed=3))
    assert config.config_from_json(saved, "config.json") == config.Config(seed=3)
    for other in (saved | {"novelty": 1}, {k: v for k, v in saved.items() if k != "seed"}):
        with pytest.raises(ValueError, match="config.json was written by another version"):
            config.config_from_json(other, "config.json")


@pytest.mark.parametrize(
    "too_large",
    [
        {"learning_rate": 1e38},
        {"threshold_learning_rate": 1e38},
        {"epsilon": 1e300},
        {"threshold_epsilon": 1e300},
        {"threshold_sigma": 1e300},
        {"temperature": 1e300},
        {"block_length": 10**20},
        {"num_generations": 10**12},
        {"lora_rank": 10**6},
        {"num_stages": 10**6},
        {"prompts_per_step": 10**4, "num_generations": 10**4},
    ],
    ids=lambda changes: ",".join(changes),
)
def test_a_value_that_would_fill_the_memory_or_overflow_is_refused(too_large):
    with pytest.raises(ValueError, match="at most"):
        config.Config(**too_large)


def test_a_flags_old_name_gets_its_new_one_and_no_other(capsys):
    names = {f.name for f in fields(config.Config)}
    for old, new in config.OLD_FLAGS.items():
        with pytest.raises(SystemExit):
            config.parse_flags([f"--{old}", "1"])
        message = capsys.readouterr().err
        assert f"unknown --{old}" in message and message.count("\n") == 1
        if new in names:
            assert f"it is called --{new} now" in message
        else:
            assert "did you mean" not in message  # --unmask is no --task
    log = (ROOT / "EXPERIMENTS.md").read_text(encoding="utf-8")
    renamed = dict(re.findall(r"^\| `(\w+)` \| `(\w+)` \|", log, re.M))
    assert len(renamed) == 15 and renamed.items() <= config.OLD_FLAGS.items()


def test_a_cap_that_rounds_to_zero_is_refused():
    with pytest.raises(ValueError, match="importance_weight_cap = 1e-300: 0, or at least 1e-6"):
        config.Config(importance_weight_cap=1e-300)
