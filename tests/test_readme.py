"""The README against the code: its commands run, its tables are complete, its tags are where it says."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import runs

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
MODULES = sorted(path for path in ROOT.glob("*.py"))
BLOCKS = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.S))
COMMANDS = re.findall(r"python (?:train|evaluate)\.py[^;&\n]*", BLOCKS)  # of `for seed in ...` lines, the body


def table_keys(heading):
    """The first column, in backquotes, of the table under a heading."""
    section = README.split(f"## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"^\| `([^`]+)`", section, re.M)


def test_every_metric_is_explained_once():
    assert table_keys("Metrics") == list(runs.METRICS)


def test_the_metrics_are_explained_in_the_same_words():
    for key, meaning in runs.METRICS.items():
        assert f"| `{key}` | {meaning} |" in README


def test_provenance_tags_stand_in_the_code_where_the_readme_says():
    tagged = re.findall(r"^\| .*? \| (`\[[A-Z ]+\]`) \| `(\w+\.py)` \|$", README, re.M)
    assert len(tagged) >= 8
    for tag, module in tagged:
        assert tag.strip("`") in (ROOT / module).read_text(encoding="utf-8"), (tag, module)
    assert {module for _, module in tagged} >= {path.name for path in MODULES if "[PAPER]" in path.read_text(encoding="utf-8")}


def test_no_numbered_equation_or_table_of_the_paper_is_quoted():
    for path in [*MODULES, ROOT / "README.md"]:
        assert not re.search(r"\b(eq|equation|theorem|table|algorithm)s?\.? ?\(?\d", path.read_text(encoding="utf-8"), re.I), path


@pytest.mark.parametrize("number", range(len(COMMANDS)))
def test_a_command_of_the_readme_runs_when_shortened(number, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "readme"  # shared, since later commands read the runs of earlier ones
    _, script, *words = shlex.split(COMMANDS[number].replace("$seed", "0").replace("$run", "countdown"))
    words = [str(folder / word) if word.startswith("runs/") else word for word in words]
    if script == "evaluate.py":
        words += ["--problems", "4"]
    elif "--resume" not in words:
        words += ["--model", "tiny", "--steps", "2", "--warm_steps", "2", "--prompts_per_step", "2", "--group_size", "2"]
        words += ["--eval_problems", "8", "--cache_dir", str(folder / "cache")]
        words += [] if "--run_dir" in words else ["--run_dir", str(folder / f"run-{number}")]
    result = subprocess.run([sys.executable, script, *words], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


def test_the_readme_starts_with_the_two_commands_that_do_everything():
    assert "pip install -r requirements.txt && python train.py --task countdown\n" in BLOCKS
    assert "pip install -r requirements.txt && python -m pytest\n" in BLOCKS
