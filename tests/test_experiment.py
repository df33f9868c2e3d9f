"""experiment.sh: what it lists are runs that train.py would make, each in a folder of its own."""

import shutil
import subprocess
from pathlib import Path

import pytest

from settings import RECIPES, Settings, read_flags

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.skipif(not shutil.which("bash"), reason="experiment.sh needs bash")
def test_every_listed_run_is_one_that_train_py_would_make():
    parts = ["tune", "grid", "large", "caps", "two", "states"]
    command = ["bash", "experiment.sh", "list", *parts]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert len({folder for folder, *_ in rows}) == len(rows) > 150
    found = {}
    for folder, *flags in rows:
        given = read_flags(flags)
        settings = Settings(**RECIPES.get(given["task"], {}) | given)
        assert settings.eval_split == ("validation" if folder.startswith("runs/tune") else "test")
        found.setdefault(folder.rpartition("-")[0], []).append(settings)
    assert {len(found[f"runs/grid/{task}/exact"]) for task in ("countdown", "sudoku")} == {5}
    diffpo, plain = (found[f"runs/grid/sudoku/{name}"][0] for name in ("two-stage-w", "mean-field"))
    assert (diffpo.num_stages, diffpo.is_cap, diffpo.train) == (2, 1, "joint")
    assert (plain.num_stages, plain.is_cap, plain.train) == (1, 0, "joint")
