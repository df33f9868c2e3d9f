"""The README against the code: its commands and examples run, its tables say what is there."""

import hashlib
import importlib
import inspect
import json
import pkgutil
import re
import runpy
import shlex
import tomllib
from pathlib import Path

import pytest
from checkpoints import write_checkpoint
from packaging.version import Version

import evaluate
import train
from config import Config
from models.checkpoints import load_policy
from models.loading import LLADA
from models.tiny import BASE
from sampler import Decoder
from tasks.registry import TASKS
from training import recipe

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
LOG = (ROOT / "EXPERIMENTS.md").read_text(encoding="utf-8")
IDEAS = (ROOT / "docs" / "ideas.md").read_text(encoding="utf-8")
ANSWERS = (ROOT / "docs" / "answers.md").read_text(encoding="utf-8")
EXERCISES = (ROOT / "docs" / "exercises.md").read_text(encoding="utf-8")
OWN_TASK = (ROOT / "docs" / "own_task.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = ("models", "tasks", "training", "evaluation", "experiments")
MODULES = sorted([*ROOT.glob("*.py"), *(f for name in FOLDERS for f in (ROOT / name).glob("*.py"))])
# The README's blocks first, since its table goes on with their files; then d1's settings, the only
# command of the log that is kept up to date; then one's own task and the exercises.
TYPED = [
    *re.findall(r"```bash\n(.*?)```", README, re.S),
    *re.findall(r"^\|.*\| `((?:python|torchrun) [^`]*)` \|$", README, re.M),
    *re.findall(r"^python train\.py .* --run_dir runs/d1$", LOG, re.M),
    *re.findall(r"```bash\n(.*?)```", OWN_TASK, re.S),
    *re.findall(r"```bash\n(.*?)```", EXERCISES, re.S),
]
COMMANDS = re.findall(  # of several processes, one
    r"python (?:train\.py|evaluate\.py|-m (?:models|training|experiments)\.\w+)[^;&\n#]*",
    re.sub(r"torchrun --nproc_per_node \d+", "python", "\n".join(TYPED)),
)
COMPARED = ("runs/diffpo", "runs/mean-field")  # so their frontiers are measured
[MY_MODEL] = re.findall(r"```python\n(.*?)```", README, re.S)
[MY_TASK] = re.findall(r"```python\n(.*?)```", OWN_TASK, re.S)


def test_each_idea_names_a_place_a_test_and_how_sure_it_is():
    ideas = re.findall(
        r"^- `(\[[A-Z ]+\])` .*\n  In `([\w.]+)`, tested by\n  `(test_\w+)`\.$", IDEAS, re.M
    )
    assert len(ideas) == IDEAS.count("\n- ") >= 12
    tests = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests/test_*.py"))
    modules = set()
    for tag, place, test in ideas:
        module = inspect.getmodule(pkgutil.resolve_name(place))
        assert tag in inspect.getsource(module), place
        assert f"def {test}(" in tests, test
        modules.add(Path(module.__file__))
    tagged = {path for path in MODULES if "[PAPER]" in path.read_text(encoding="utf-8")}
    assert tagged <= modules


def test_no_numbered_equation_or_table_of_the_paper_is_quoted():
    numbered = r"\b(eq|equation|theorem|table|algorithm)s?\.? ?\(?\d"
    for path in [*MODULES, *PAGES, ROOT / "EXPERIMENTS.md"]:
        assert not re.search(numbered, path.read_text(encoding="utf-8"), re.I), path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_is_narrow(page):
    prose = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)  # not commands
    prose = re.sub(r"\$\$.*?\$\$", "", prose, flags=re.S)
    for line in prose.splitlines():
        assert len(line) <= 104 or line.startswith(("|", "<img")), line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_and_figure_that_a_page_names_is_there(page):
    names = re.findall(r"\]\(([\w./]+)\)|src=\"([\w./]+)\"", page.read_text(encoding="utf-8"))
    for name in {name for pair in names for name in pair if name}:
        assert (page.parent / name).exists(), name


def test_the_tree_of_files_is_whole():
    tree = re.findall(r"^(\w+\.py|\w+/) ", README, re.M)
    on_top = {path.name for path in ROOT.glob("*.py")}
    assert on_top | {f"{name}/" for name in (*FOLDERS, "tests", "docs")} == set(tree)


def test_the_symbols_have_the_flags_and_defaults_of_config():
    settings = Config.__dataclass_fields__
    rows = re.findall(r"\| (`\w+`(?:, `\w+`)*) \| ([^|]*) \| ([^|]*)\|$", README, re.M)
    assert len(rows) >= 12
    for flags, defaults, d1_values in rows:
        names = re.findall(r"`(\w+)`", flags)
        for flag, value in zip(names, defaults.split(", "), strict=True):
            default = settings[flag].default
            shown = "the task's" if flag == "max_completion_length" else f"{default}".lower()
            assert value in (shown, f"{default:g}" if isinstance(default, float) else shown), flag
        for flag, value in zip(names, d1_values.strip().split(", "), strict=True):
            d1 = settings[flag].metadata["d1"]
            if d1 is not None:
                assert value == f"{d1}".lower(), flag


def test_the_command_for_d1s_settings_has_the_values_of_config():
    """But for rollouts, LoRA's size and the learning rate, as the log says there."""
    (command,) = re.findall(r"^python train\.py (.*) --run_dir runs/d1$", LOG, re.M)
    typed = train.parse_flags(shlex.split(command))
    ours = {"num_generations", "prompts_per_step", "max_completion_length", "block_length", "dtype"}
    ours |= {"temperature", "lora_rank", "lora_alpha", "learning_rate"}
    for name, field in Config.__dataclass_fields__.items():
        if field.metadata["d1"] is not None and name not in ours:
            assert typed[name] == field.metadata["d1"], name


def test_the_gpus_memory_decides_the_model_as_the_table_says():
    shape = recipe.read_model_config("LLaDA-8B")
    for row, gib in (("below 24 GB", 15.6), ("24 to 40 GB", 22.1), ("40 GB and more", 44.0)):
        model, dtype = re.search(rf"^\| {row}.* \| `(.*)` \| (\w+)", README, re.M).groups()
        gpu = recipe.Gpu("a card", gib=gib, free_gib=gib - 0.4)  # CUDA's own
        assert recipe.default_model(gpu)[0] == model
        if model == LLADA:  # otherwise auto, which is bfloat16 on a GPU
            assert recipe.recipe_for(shape, gpu.free_gib).get("dtype", "bfloat16") == dtype


@pytest.mark.parametrize(
    ("task", "problem"),
    [
        ("gsm8k", {"question": "", "answer": "12"}),
        ("countdown", {"numbers": [3, 4, 5], "target": 35}),
    ],
)
def test_the_table_of_answers_is_true(task, problem):
    accepted, refused = re.search(rf"^\| {task} \| (.*) \| (.*) \|$", ANSWERS, re.M).groups()
    for answers, is_accepted in ((accepted, True), (refused, False)):
        examples = [text for text in re.findall("`([^`]+)`", answers) if "..." not in text]
        assert len(examples) >= 3
        for text in examples:
            assert TASKS[task].solved(problem, f"<answer>{text}</answer>") is is_accepted, text


@pytest.mark.parametrize("task", ["countdown", "sudoku"])
def test_the_shipped_base_is_the_one_that_the_results_began_with(task):
    weights = (BASE / "model.safetensors").read_bytes()
    assert f"`{hashlib.sha256(weights).hexdigest()[:12]}`" in README
    row = re.search(rf"\| {task}, base \|.* ([\d.]+) \(([\d.]+)\) \|$", LOG, re.M)  # at γ = 1
    task = TASKS[task].compact
    decoder = Decoder("eb", 1.0, temperature=0.0, stop_at_eos=True)
    problems = task.problems("test", 1000, 0)
    scores = evaluate.evaluate(load_policy("tiny"), task, problems, decoder, task.length)
    assert abs(100 * scores["solved"] - float(row[1])) < 1  # machines differ in the last digits
    assert abs(scores["nfe"] - float(row[2])) < 0.05


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the README's commands run: shared, since later ones read the runs of earlier ones."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "my_chain.py").write_text(MY_TASK, encoding="utf-8")
    write_checkpoint(folder / "LLaDA", "llada", max_sequence_length=2048)
    problems = [{"question": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(60)]
    lines = "".join(json.dumps(problem) + "\n" for problem in problems)
    (folder / "problems.jsonl").write_text(lines, encoding="utf-8")
    return folder


@pytest.mark.parametrize("number", range(len(COMMANDS)))
def test_a_command_of_the_readme_runs_when_shortened(number, folder, monkeypatch):
    program, *words = shlex.split(COMMANDS[number].removeprefix("python ").removeprefix("-m "))
    ours = ("runs/", "bases/", "my_chain")
    words = [str(folder / word) if word.startswith(ours) else word for word in words]
    uses_llada = LLADA in words  # a small random one in its place, and problems from a file
    is_of_llada = uses_llada or str(folder / "runs/llada") in words
    words = [str(folder / "LLaDA") if word == LLADA else word for word in words]
    if is_of_llada and program.endswith(".py") and "--resume" not in words:
        words += ["--max_completion_length", "16", "--block_length", "8"]
        if uses_llada and "countdown" not in words:
            words += ["--data", str(folder / "problems.jsonl")]
    if program == "models.make_base":
        words += ["--steps", "2", "--habit_steps", "1", "--batch", "2"]
    elif program == "evaluate.py":
        words += ["--problems", "4"]
        words = ["8" if word in ("128", "256") else word for word in words]
    elif program in ("experiments.gradients", "experiments.surrogate"):
        words.remove("sudoku")  # one of the two will do
        words += ["--batches", "4", "--prompts", "3"]
    elif program == "train.py" and "--resume" not in words:
        for name in ("steps", "prompts_per_step", "num_generations", "num_iterations"):
            words += [f"--{name}", "2"]
        words += ["--eval_problems", "4"]
        if number > 0 and not COMMANDS[number].strip().endswith(COMPARED):
            words += ["--frontier", "false"]
        words += ["--lora_rank", "2"] if uses_llada else []
        words += [] if "--run_dir" in words else ["--run_dir", str(folder / f"run-{number}")]
    if program.startswith("experiments."):
        words += ["--out", str(folder / program)]
    if number:  # the first draws its pictures
        monkeypatch.setattr(train, "draw_pictures", lambda config, run_dir: [])
    main = importlib.import_module(program.removesuffix(".py")).main
    assert not main(words)


def test_your_own_model_learns_in_a_few_lines(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(MY_MODEL, encoding="utf-8")
    mine = runpy.run_path(str(tmp_path / "mine.py"))
    assert mine["model"].model.weight.grad.abs().max() > 0 and abs(mine["loss"].item()) < 1
    assert "ratio_mean" in capsys.readouterr().out


def test_the_versions_that_are_stated_are_those_that_are_tried():
    """pyproject's ranges: the pins lie in them, their ends are CI's, and the README names them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]["4bit"]
    stated = " ".join(project["dependencies"] + optional)
    ranges = re.findall(r"([a-z]+)>=([\d.]+),<=([\d.]+)", stated)
    assert [name for name, *_ in ranges] == ["transformers", "peft", "bitsandbytes"]
    ci = (ROOT / ".ci" / "run").read_text()
    lowest, newest = (re.search(f"{word}\\).*", ci)[0] for word in ("lowest", "newest"))
    pins = (ROOT / "requirements.txt").read_text() + README  # bitsandbytes is in the README alone
    for name, low, high in ranges:
        for line, end in ((lowest, low), (newest, high)):
            tried = re.search(rf"{name}==([\d.]+)", line)[1]
            assert tried in (end, f"{end}.0")
        pin = Version(re.search(rf"{name}==([\d.]+)", pins)[1].rstrip("."))
        assert Version(low) <= pin <= Version(high)
        if name != "bitsandbytes":
            assert f"{name} {low} to {high}" in README
    required = re.findall(r"^([a-z_-]+)==", pins, re.M)
    assert {re.split("[>=]", name)[0] for name in project["dependencies"]} <= {*required}
