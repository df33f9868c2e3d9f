"""experiment.py: what it lists are runs that train.py would make, each in a folder of its own; a
finished one is skipped, a stopped one goes on.
"""

import json
import subprocess

import pytest

from config import RECIPES, Config, parse_flags
from experiments import grids


@pytest.mark.parametrize("part", grids.PARTS)
def test_every_listed_run_is_one_that_train_py_would_make(part, capsys):
    grids.main([part, "--list"])
    lines = capsys.readouterr().out.splitlines()
    folders = set()
    for line in lines:
        python, script, *flags = line.split()
        given = parse_flags(flags)
        settings = Config(**RECIPES.get(given["task"], {}) | given)
        assert (python, script) == ("python", "train.py")
        assert settings.frontier is ("written-tune" not in settings.run_dir)
        assert settings.eval_split == ("validation" if "tune" in settings.run_dir else "test")
        folders.add(settings.run_dir)
    assert len(folders) == len(lines) >= 4


def test_rows_differ_from_diffpo_in_what_their_names_say():
    of = {folder: flags for folder, flags in grids.grid()}
    assert len(of) == len(grids.ROWS) * 2 * 5

    def settings(name):
        given = parse_flags(of[f"runs/grid/sudoku/{name}-3"])
        return Config(**RECIPES["sudoku"] | given)

    default = Config(**RECIPES["sudoku"])
    diffpo, plain, exact = (settings(name) for name in ("two-stage-w", "mean-field", "exact"))
    for name in (
        "num_stages",
        "importance_weight_cap",
        "train_target",
        "steps",
        "nfe_penalty",
        "prompts_per_step",
    ):
        assert getattr(diffpo, name) == getattr(default, name)
    assert (plain.num_stages, plain.importance_weight_cap, plain.train_target) == (1, 0, "joint")
    assert exact.num_stages > 19  # the length: no completion takes more calls
    assert settings("no-price").learning_rate == diffpo.learning_rate != exact.learning_rate


def test_a_run_is_made_once_and_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    asked = []

    def run(command, **_):
        asked.append(command[2:])
        return subprocess.CompletedProcess(command, returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "environment.txt").write_text("killed before it had begun")
    assert grids.make(folder, ["--seed", "1"]).endswith(": done")
    assert asked.pop() == ["--seed", "1", "--run_dir", str(folder)] and not folder.exists()
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "eval.json").write_text(json.dumps([{"name": "base"}]))
    grids.make(folder, ["--seed", "1"])
    assert asked.pop() == ["--resume", "--run_dir", str(folder)]
    (folder / "eval.json").write_text(json.dumps([{"name": "base"}, {"name": "trained"}]))
    assert grids.make(folder, []).endswith("finished before") and not asked


def test_a_failed_run_is_told_and_the_others_are_made(tmp_path, monkeypatch, capsys):
    pairs = [(str(tmp_path / name), [f"--{name}"]) for name in ("unknown", "wrong")]
    monkeypatch.setitem(grids.PARTS, "grid", lambda: pairs)
    grids.main(["grid", "--jobs", "2"])
    assert capsys.readouterr().out.count("failed, ") == 2
    logs = tmp_path.with_name(f"{tmp_path.name}.logs")
    assert "unknown --wrong" in (logs / "wrong.txt").read_text()
