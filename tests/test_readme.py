"""The README against the code: its commands and examples run, its tables say what is there."""

import hashlib
import json
import re
import runpy
import shlex
from pathlib import Path

import pytest
from checkpoints import write_checkpoint

import evaluate
import train
from evaluation import summary
from experiments import benchmark, claims
from models import make_base, tiny
from models.checkpoints import load_policy
from models.loading import LLADA
from sampler import Decoder
from tasks.registry import TASKS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
LOG = (ROOT / "EXPERIMENTS.md").read_text(encoding="utf-8")
MODULES = sorted([*ROOT.glob("*.py"), *ROOT.glob("[!t]*/*.py"), *ROOT.glob("t[!e]*/*.py")])
BLOCKS = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.S))
COMMANDS = re.findall(  # of loops, the body; of several processes, one
    r"python (?:train\.py|evaluate\.py|-m models\.tiny|-m experiments\.\w+)[^;&\n]*",
    re.sub(r"torchrun --nproc_per_node \d+", "python", BLOCKS),
)
COMPARED = tuple(re.findall(r"compare (.*)", BLOCKS)[0].split())  # runs with a frontier
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.S)
IDEAS = re.findall(r"^\| .*? \| `(\w+)\.(\w+)` \| ?`?(\w*).*? \| `(\[[A-Z ]+\])` \|$", README, re.M)


def test_every_metric_is_explained_once():
    section = LOG.split("## Metrics\n")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `([^`]+)` \| \S", section, re.M)) == set(summary.METRICS)


def test_each_idea_names_a_place_a_test_and_how_sure_it_is():
    assert len(IDEAS) >= 12
    source = {path.stem: path.read_text(encoding="utf-8") for path in MODULES}
    tests = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests/test_*.py"))
    for module, name, test, tag in IDEAS:
        assert re.search(rf"(def|class) {name}\b", source[module]), (module, name)
        assert tag in source[module], (module, tag)
        assert f"def {test}(" in tests, test
    tagged = {module for module, text in source.items() if "[PAPER]" in text}
    assert tagged <= {module for module, *_ in IDEAS}


def test_no_numbered_equation_or_table_of_the_paper_is_quoted():
    numbered = r"\b(eq|equation|theorem|table|algorithm)s?\.? ?\(?\d"
    for path in [*MODULES, ROOT / "README.md", ROOT / "EXPERIMENTS.md"]:
        assert not re.search(numbered, path.read_text(encoding="utf-8"), re.I), path


def test_the_readme_is_short_and_narrow():
    lines = re.sub(r"```.*?```", "", README, flags=re.S).splitlines()  # commands may be long
    assert all(len(line) <= 100 or line.startswith("|") for line in lines)


def test_the_readme_starts_with_the_two_commands_that_do_everything():
    assert "pip install -r requirements.txt && python train.py --task countdown\n" in BLOCKS
    assert "pip install -r requirements.txt && python -m pytest\n" in BLOCKS


@pytest.mark.parametrize("task", ["countdown", "sudoku"])
def test_the_shipped_base_is_the_one_that_the_results_began_with(task):
    weights = (tiny.BASE / "model.safetensors").read_bytes()
    assert f"`{hashlib.sha256(weights).hexdigest()[:12]}`" in README
    row = re.search(rf"\| {task}, base \|.* ([\d.]+) \(([\d.]+)\) \|$", LOG, re.M)  # at γ = 1
    task = TASKS[task].compact
    decoder = Decoder("eb", 1.0, temperature=0.0, stop_at_eos=True)
    problems = task.problems("test", 1000, 0)
    found = evaluate.evaluate(load_policy("tiny"), task, problems, decoder, task.length)
    assert abs(100 * found["solved"] - float(row[1])) < 1  # machines differ in the last digits
    assert abs(found["nfe"] - float(row[2])) < 0.05


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the README's commands run: shared, since later ones read the runs of earlier ones."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "my_task.py").write_text(EXAMPLES[0], encoding="utf-8")
    write_checkpoint(folder / "LLaDA", "llada", max_sequence_length=2048)
    problems = [{"question": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(60)]
    lines = "".join(json.dumps(problem) + "\n" for problem in problems)
    (folder / "problems.jsonl").write_text(lines, encoding="utf-8")
    return folder


@pytest.mark.parametrize("number", range(len(COMMANDS)))
def test_a_command_of_the_readme_runs_when_shortened(number, folder, monkeypatch):
    command = COMMANDS[number].replace("$seed", "0").replace("$task", "sudoku")
    _, script, *words = shlex.split(command.replace("-m ", ""))
    ours = ("runs/", "bases/", "my_task")
    words = [str(folder / word) if word.startswith(ours) else word for word in words]
    llada = LLADA in words  # a small random one in its place, and problems from a file
    of_llada = llada or str(folder / "runs/llada") in words
    words = [str(folder / "LLaDA") if word == LLADA else word for word in words]
    if of_llada and "--resume" not in words:
        words += ["--max_completion_length", "16", "--block_length", "8"]
        if llada and "countdown" not in words:
            words += ["--data", str(folder / "problems.jsonl")]
    if script == "models.tiny":
        words += ["--steps", "2", "--habit_steps", "1", "--batch", "2"]
    elif script == "evaluate.py":
        words += ["--problems", "4"]
        words = ["8" if word in ("128", "256") else word for word in words]
    elif script == "experiments.benchmark":
        pass
    elif script == "experiments.claims":
        words += ["--out", str(folder / words[0])]
        if words[0] != "compare":
            words.remove("sudoku")  # one of the two will do
            words += ["--batches", "4", "--prompts", "3"]
    elif "--resume" not in words:
        for name in ("steps", "prompts_per_step", "num_generations", "num_iterations"):
            words += [f"--{name}", "2"]
        words += ["--eval_problems", "4"]
        compared = number == 0 or COMMANDS[number].endswith(COMPARED)
        words += [] if compared else ["--frontier", "false"]
        base = [] if "--model" in words else ["--model", "tiny"]
        words += ["--lora_rank", "2"] if llada else base
        words += [] if "--run_dir" in words else ["--run_dir", str(folder / f"run-{number}")]
    if number:  # the first draws its curves
        monkeypatch.setattr(train, "plot_curves", lambda run_dir: None)
    mains = {"train.py": train.main, "evaluate.py": evaluate.main, "models.tiny": make_base.main}
    mains |= {"experiments.claims": claims.main, "experiments.benchmark": benchmark.main}
    assert not mains[script](words)


def test_your_own_model_learns_in_15_lines(tmp_path):
    (tmp_path / "mine.py").write_text(EXAMPLES[1], encoding="utf-8")
    mine = runpy.run_path(str(tmp_path / "mine.py"))
    assert mine["model"].model.weight.grad.abs().max() > 0 and abs(mine["loss"].item()) < 1
