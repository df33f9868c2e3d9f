"""The README against the code: its commands run, its tables are complete, its tags are where it says."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import train

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
MODULES = sorted(path for path in ROOT.glob("*.py"))
COMMANDS = [line.strip() for block in re.findall(r"```bash\n(.*?)```", README, re.S) for line in block.splitlines() if line.strip()]


def table_keys(heading):
    """The first column, in backquotes, of the table under a heading."""
    section = README.split(f"## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"^\| `([^`]+)`", section, re.M)


def test_every_metric_is_explained_once():
    assert table_keys("Metrics") == list(train.METRICS)


def test_the_metrics_are_explained_in_the_same_words():
    for key, meaning in train.METRICS.items():
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


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("python")])
def test_a_command_of_the_readme_runs_when_shortened(command, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "readme"  # shared: one base model for a task, and a run for evaluate.py to read
    words = shlex.split(command)
    if words[1:3] == ["-m", "pytest"]:
        return  # that is this very run
    words[0] = sys.executable
    if words[1] == "train.py":
        flags = dict(zip(words[2::2], words[3::2], strict=False))
        flags |= {
            "--steps": "2",
            "--warm_steps": "2",
            "--prompts_per_step": "2",
            "--group_size": "2",
            "--eval_problems": "8",
            "--model": "tiny",
        }
        name = flags.get("--run_dir", "runs/a").split("/")[-1]
        flags |= {"--cache_dir": str(folder / "cache"), "--run_dir": str(folder / name)}
        words = words[:2] + [word for pair in flags.items() for word in pair]
    else:
        words = [str(folder / Path(word).name) if word.startswith("runs/") else word for word in words] + ["--problems", "4"]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
