"""train.py's flags: --help answers at once and in groups, and what is misspelt is refused."""

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from config import Config
from training import flags

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


def test_every_setting_is_named_in_its_group(help_text):
    where = {}
    for part in help_text.split("\n\n"):
        title, *lines = part.splitlines()
        for name in re.findall(r"^  --(\w+)", "\n".join(lines), re.M):
            where[name] = title.rstrip(":")
    group = None
    for f in fields(Config):
        group = flags.GROUPS.get(f.name, group)
        assert where[f.name] == group, f.name
    assert len(set(where.values()) - {"options"}) == len(flags.GROUPS)


def test_the_groups_are_those_that_the_source_shows():
    source = (ROOT / "config.py").read_text(encoding="utf-8")
    assert re.findall(r"    # (.+)\n    (\w+):", source) == [
        (v, k) for k, v in flags.GROUPS.items()
    ]


def test_defaults_and_recipes_are_told(help_text):
    text = " ".join(help_text.split())
    assert (
        "P, prompts per step [32; sudoku 16; chain 16; countdown,sudoku 24; LLaDA 16; small 16; "
        "d1 16]" in text
    )
    assert "what learns (policy, sampler, joint) [joint]" in text
    assert "[]" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--step", "3"], "unknown --step: did you mean --steps or"),
        (["--run", "a"], "unknown --run: did you mean --run_dir?"),
        (["--resum"], "unknown --resum: did you mean --resume?"),
        (["--learning-rat", "1"], "--learning_rate"),
        (["--group_size", "4"], "unknown --group_size (--help lists all flags)"),
    ],
)
def test_an_unknown_flag_is_refused_in_a_line_with_those_that_are_like_it(
    arguments, message, capsys
):
    with pytest.raises(SystemExit) as stop:
        flags.parse_flags(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1
