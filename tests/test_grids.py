"""grids.py: what it lists are runs that train.py would make, each in a folder of its own; a
finished one is skipped, a stopped one goes on.
"""

import json
import subprocess

import pytest

from config import TASK_RECIPES, Config
from experiments import grids
from training.flags import parse_flags


@pytest.mark.parametrize("part", grids.PARTS)
def test_every_listed_run_is_one_that_train_py_would_make(part, capsys):
    grids.main([part, "--list"])
    lines = capsys.readouterr().out.splitlines()
    folders = set()
    for line in lines:
        python, script, *flags = line.split()
        changes = parse_flags(flags)
        config = Config(**TASK_RECIPES.get(changes["task"], {}) | changes)
        assert (python, script) == ("python", "train.py")
        folder = config.run_dir.split("/")[1]
        assert config.frontier is (folder in ("grid", "states", "both", "gamma", "written"))
        assert config.eval_split == ("validation" if "tune" in config.run_dir else "test")
        folders.add(config.run_dir)
    assert len(folders) == len(lines) >= 4


def test_rows_differ_from_diffpo_in_what_their_names_say():
    flags_of = dict(grids.grid())
    assert len(flags_of) == len(grids.ROWS) * 2 * 5

    def config_of(row):
        flags = parse_flags(flags_of[f"runs/grid/sudoku/{row}-3"].split())
        return Config(**TASK_RECIPES["sudoku"] | flags)

    default = Config(**TASK_RECIPES["sudoku"])
    diffpo = config_of("two-stage-w")
    mean_field = config_of("mean-field")
    exact = config_of("exact")
    for name in (
        "num_stages",
        "importance_weight_cap",
        "train_target",
        "steps",
        "nfe_penalty",
        "prompts_per_step",
    ):
        assert getattr(diffpo, name) == getattr(default, name)
    assert mean_field.num_stages == 1
    assert mean_field.importance_weight_cap == 0
    assert mean_field.train_target == "joint"
    assert exact.num_stages > 19  # the length: no completion takes more calls
    assert config_of("no-price").learning_rate == diffpo.learning_rate != exact.learning_rate


def test_a_run_is_made_once_and_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    started = []

    def run(command, **_):
        started.append(command[2:])
        return subprocess.CompletedProcess(command, returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "environment.txt").write_text("killed before it had begun")
    flags = "--task countdown --seed 1"
    assert grids.make_run(folder, flags).endswith(": done")
    assert started.pop() == [*flags.split(), "--run_dir", str(folder)]
    assert folder.exists()  # another program may have locked it meanwhile
    (folder / "config.json").write_text("{}")
    (folder / "eval.json").write_text(json.dumps([{"name": "base"}]))
    grids.make_run(folder, flags)
    assert started.pop() == ["--resume", "--task", "countdown", "--run_dir", str(folder)]
    (folder / "eval.json").write_text(json.dumps([{"name": "base"}, {"name": "trained"}]))
    assert grids.make_run(folder, "").endswith("finished before") and not started


def test_a_failed_run_is_told_and_the_others_are_made(tmp_path, monkeypatch, capsys):
    runs = [(str(tmp_path / name), f"--{name}") for name in ("unknown", "wrong")]
    monkeypatch.setitem(grids.PARTS, "grid", lambda: runs)
    grids.main(["grid", "--jobs", "2"])
    assert capsys.readouterr().out.count("failed, ") == 2
    logs = tmp_path.with_name(f"{tmp_path.name}.logs")
    assert "unknown --wrong" in (logs / "wrong.txt").read_text()
