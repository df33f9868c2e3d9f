"""The README against the code: its commands run, its tables are complete, its tags are where it says."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import write_checkpoint

import evaluate
import runs
import train
from models import LLADA

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
MODULES = sorted(path for path in ROOT.glob("*.py"))
BLOCKS = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.S))
COMMANDS = re.findall(
    r"python (?:train|evaluate)\.py[^;&\n]*", BLOCKS
)  # of `for seed in ...` lines, the body


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
    assert {module for _, module in tagged} >= {
        path.name for path in MODULES if "[PAPER]" in path.read_text(encoding="utf-8")
    }


def test_no_numbered_equation_or_table_of_the_paper_is_quoted():
    for path in [*MODULES, ROOT / "README.md"]:
        assert not re.search(
            r"\b(eq|equation|theorem|table|algorithm)s?\.? ?\(?\d",
            path.read_text(encoding="utf-8"),
            re.I,
        ), path


@pytest.mark.parametrize("number", range(len(COMMANDS)))
def test_a_command_of_the_readme_runs_when_shortened(number, tmp_path_factory, monkeypatch):
    folder = (
        tmp_path_factory.getbasetemp() / "readme"
    )  # shared, since later commands read the runs of earlier ones
    _, script, *words = shlex.split(
        COMMANDS[number]
        .replace("$seed", "0")
        .replace("$run", "countdown")
        .replace("$cache", "dual")
    )
    words = [str(folder / word) if word.startswith("runs/") else word for word in words]
    llada = LLADA in words
    if llada:  # a small random one in its place, and problems from a file
        words = [str(folder / "LLaDA") if word == LLADA else word for word in words]
        if not (folder / "LLaDA").exists():
            write_checkpoint(folder / "LLaDA", "llada")
        problems = [{"question": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(60)]
        (folder / "problems.jsonl").write_text(
            "".join(json.dumps(problem) + "\n" for problem in problems)
        )
        if "countdown" not in words:
            words += ["--data", str(folder / "problems.jsonl")]
        words += ["--length", "16", "--block_length", "8"]
    if script == "evaluate.py":
        words += ["--problems", "4"]
        words += (
            ["--length", "16", "--block_length", "8"]
            if str(folder / "runs" / "llada") in words
            else []
        )
    elif "--resume" not in words:
        words += [
            "--steps",
            "2",
            "--prompts_per_step",
            "2",
            "--group_size",
            "2",
            "--eval_problems",
            "4",
        ]
        tiny = ["--model", "tiny", "--warm_steps", "2", "--cache_dir", str(folder / "cache")]
        words += ["--lora_rank", "2", "--inner_updates", "2"] if llada else tiny
        words += [] if "--run_dir" in words else ["--run_dir", str(folder / f"run-{number}")]
    if number == 0:  # the one that everybody types, in a process of its own
        result = subprocess.run(
            [sys.executable, script, *words], cwd=ROOT, capture_output=True, text=True, timeout=120
        )
        assert result.returncode == 0, result.stderr
    else:
        monkeypatch.setattr(train, "plot_curves", lambda run_dir: None)
        assert not {"train.py": train.main, "evaluate.py": evaluate.main}[script](words)


def test_the_readme_starts_with_the_two_commands_that_do_everything():
    assert "pip install -r requirements.txt && python train.py --task countdown\n" in BLOCKS
    assert "pip install -r requirements.txt && python -m pytest\n" in BLOCKS
