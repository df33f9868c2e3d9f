"""The command that makes a base: its flags, their defaults, its messages."""

from dataclasses import fields
from pathlib import Path

import pytest

from models import make_base, pretraining
from models.tiny import tiny_denoiser

ROOT = Path(__file__).parent.parent

ECHO = """
class Echo:
    length = 2

    def problems(self, split, n, seed):
        return [{"x": 3}] * n

    def prompt(self, problem):
        return "3"

    def reward(self, problem, text):
        return float(text == "3")

    def solved(self, problem, text):
        return text == "3"

    def demonstrations(self, n, seed, careless):
        return [({"x": 3}, "3")] * n
"""


@pytest.fixture
def small(monkeypatch):
    """The tiny model in miniature: 32 wide, 1 layer."""

    def small_denoiser(tokenizer, seed, layers):
        return tiny_denoiser(tokenizer, seed, hidden_size=32, layers=1)

    monkeypatch.setattr(pretraining, "tiny_denoiser", small_denoiser)


def test_a_base_for_ones_own_task_is_made_by_one_command(small, tmp_path, capsys):
    (tmp_path / "echo.py").write_text(ECHO)
    flags = f"--task {tmp_path}/echo.py:Echo --steps 2 --habit_steps 1 --batch 2"
    make_base.main(["--out", str(tmp_path / "base"), *flags.split()])
    assert f"--model {tmp_path}/base" in capsys.readouterr().out
    assert (tmp_path / "base" / "model.safetensors").exists()
    with pytest.raises(SystemExit) as exit:
        make_base.main(["--out", str(tmp_path / "base"), *flags.split()])
    assert exit.value.code == 2
    assert "already exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--task chess", "unknown task"),
        ("--task gsm8k", "no length and no demonstrations"),
        ("--turns 1,2,3", "turns"),
        ("--turns x,y", "turns"),
        ("--steps 0", "at least 1"),
        ("--batch 0", "at least 1"),
        ("--habit_steps -1", "at least 0"),
        ("--careless 2", "careless"),
        ("--careless nan", "careless"),
        ("--learning_rate nan", "learning_rate"),
        ("--step 3", "did you mean --steps"),
        ("--turns=", "turns '': it has to be a number"),
        ("--steps 2000000", "at most a million"),
        ("--batch 1000000000", "at most a million"),
        ("--seed -1", "seed = -1"),
        ("--learning_rate 1e9", "at most 1"),
    ],
)
def test_bad_flags_get_one_line(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        make_base.main(["--out", str(tmp_path / "base"), *flags.split()])
    error = capsys.readouterr().err
    assert exit.value.code == 2
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_task_without_demonstrations_is_not_advised_a_flag_that_is_not_here(tmp_path, capsys):
    with pytest.raises(SystemExit):
        make_base.main(["--out", str(tmp_path / "base"), "--task", "gsm8k"])
    assert "--model" not in capsys.readouterr().err
    assert "--model" not in make_base.flag_parser().format_help()


def test_help_says_each_default(capsys):
    with pytest.raises(SystemExit) as exit:
        make_base.main(["--help"])
    assert exit.value.code == 0
    text = capsys.readouterr().out
    text = " ".join(text.split())
    for f in fields(make_base.Recipe):
        assert f"--{f.name} " in text
        assert f"The default is {f.default}" in text
        shipped = getattr(make_base.SHIPPED, f.name)
        assert shipped == f.default or f"or {shipped} for bases/tiny." in text
