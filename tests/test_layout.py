"""What the layout promises: files that can be copied alone, imports that go one way, and no heavy
library before it is needed.
"""

import ast
import json
import shutil
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("evaluation", "experiments", "models", "tasks", "training")
HEAVY = {"PIL", "matplotlib", "peft"}


def python(*arguments, folder):
    """What it prints, in a process of its own."""
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- files that can be copied alone --------------------------------------------------------------

# Each script stands in a folder with copies of these files and of no others. It uses them for
# something small, whose answer is worked out by hand.
SCRIPTS = {
    ("sampler",): """
import torch

from sampler import Decoder

entropy = torch.tensor([[0.3, 0.1, 0.2, 0.0]])
masked = torch.tensor([[True, True, True, False]])
for gamma, positions in ((0.05, [1]), (0.1, [1, 2]), (0.31, [0, 1, 2])):
    selected = Decoder("eb", gamma).select(entropy, 1 - entropy, masked)
    assert selected[0].nonzero().flatten().tolist() == positions
""",
    ("denoiser",): """
import math

import torch

from denoiser import DenoiserCalls, LogitsModel

table = torch.tensor([[0.0, 0.0, 0.0], [9.0, 1.0, 2.0], [9.0, 0.0, 0.0]])
model = torch.nn.Embedding.from_pretrained(table)
model.forward = lambda ids, attention_mask: table[ids]
calls = DenoiserCalls(LogitsModel(model), mask_id=0)
hidden = calls.hidden(torch.tensor([[1, 2]]))[0]
p = torch.tensor([1 / (1 + math.e), math.e / (1 + math.e)])
logp = calls.token_logp(hidden, torch.tensor([1, 2]), temperature=1.0)
entropy, confidence = calls.entropy_and_confidence(hidden)
torch.testing.assert_close(logp, torch.tensor([math.log(p[0]), math.log(0.5)]))
torch.testing.assert_close(entropy, torch.tensor([-(p * p.log()).sum(), math.log(2)]))
torch.testing.assert_close(confidence, torch.tensor([p[1], 0.5]))
""",
    ("likelihood",): """
from dataclasses import make_dataclass
from types import SimpleNamespace

import torch

from likelihood import latent_at, surrogate_logp, surrogate_logp_by_definition

policy = SimpleNamespace(mask_id=0)  # a token's probability: the share of the canvas it sees
policy.hidden = lambda ids, mask: (ids > 0).float().mean(1).view(-1, 1, 1).expand(*ids.shape, 1)
policy.token_logp = lambda hidden, tokens, temperature, index=slice(None): hidden[index, 0].log()
steps = torch.tensor([[2, 1, 3]])
values = {
    "prompt_ids": torch.tensor([[5]]),
    "prompt_mask": torch.tensor([[True]]),
    "completion": torch.tensor([[7, 8, 9]]),
    "unmask_step": steps,
    "behaviour_logp": torch.zeros(1, 3),
    "token_mask": steps > 0,
    "nfe": steps.amax(1),
    "temperature": 1.0,
}
rollout = make_dataclass("Rollout", values)(**values)
assert latent_at(rollout.completion, steps, 2, 0).tolist() == [[7, 8, 0]]
for taus, seen in (([], [1, 1, 1]), ([1], [2, 1, 2]), ([2], [1, 1, 3]), ([1, 2], [2, 1, 3])):
    boundaries = torch.tensor([taus], dtype=torch.long)
    for score in (surrogate_logp, surrogate_logp_by_definition):
        p = score(policy, rollout, boundaries).exp()
        torch.testing.assert_close(p, torch.tensor([seen]) / 4)
""",
    ("diffpo_loss",): """
import torch

from diffpo_loss import diffpo_loss, group_advantages, importance_weights

advantage = group_advantages(torch.tensor([1.0, 0.0]), num_generations=2, scale_rewards=False)
assert advantage.tolist() == [0.5, -0.5]
old = torch.tensor([[0.5, 0.9], [0.4, 0.4]]).log()
true = torch.tensor([[0.5, 0.3], [0.4, 0.8]]).log()
weights = importance_weights(old, true, cap=2.0)
torch.testing.assert_close(weights, torch.tensor([[1.0, 2.0], [1.0, 0.5]]))
new = old + torch.tensor([[1.1, 1.5], [1.0, 1.0]]).log()
token_mask = torch.tensor([[True, True], [True, False]])
first, second = 0.5 * (1.1 + 2 * 1.2), -0.5  # the second ratio is clipped; one token is padding
for normalise_by, n in (("text", (2, 1)), ("canvas", (2, 2))):
    loss, _ = diffpo_loss(
        logp_new=new,
        logp_old=old,
        advantage=advantage,
        weights=weights,
        token_mask=token_mask,
        epsilon=0.2,
        normalise_by=normalise_by,
    )
    torch.testing.assert_close(loss, torch.tensor(-(first / n[0] + second / n[1]) / 2))
""",
    ("diffusion_policy", "denoiser", "sampler"): """
from types import SimpleNamespace

import torch
from torch.nn.functional import pad

from denoiser import LogitsModel
from diffusion_policy import DiffusionPolicy
from sampler import Decoder, ThresholdHead

# Of [MASK], [EOS], a and b: b follows a, [EOS] follows b, and anything follows anything else.
table = torch.zeros(4, 4)
table[2, 3] = table[3, 1] = 50.0
model = torch.nn.Embedding.from_pretrained(table)
model.forward = lambda ids, attention_mask: table[pad(ids[:, :-1], (1, 0))]
tokenizer = SimpleNamespace(mask_token_id=0, eos_token_id=1)
policy = DiffusionPolicy(LogitsModel(model), tokenizer, ThresholdHead(4, initial_threshold=0.2))
prompt_ids = torch.tensor([[2], [3], [2]])
decoder = Decoder("top_k", 1, stop_at_eos=True)
rollout = policy.rollout(prompt_ids, prompt_ids > 0, length=3, decoder=decoder)
assert rollout.completion.tolist() == [[3, 1, 1], [1, 1, 1], [3, 1, 1]]
assert rollout.unmask_step.tolist() == [[1, 2, 3], [1, 2, 2], [1, 2, 3]]
assert rollout.token_mask.sum(dim=1).tolist() == rollout.nfe.tolist() == [2, 1, 2]
assert rollout.behaviour_logp.abs().max() < 1e-6
assert policy.rows_run == 2 + 1  # equal rows are run once
learned = Decoder("eb", level=None, sample_threshold=False)
rollout = policy.rollout(prompt_ids, prompt_ids > 0, length=3, decoder=learned)
torch.testing.assert_close(rollout.threshold, torch.full((3,), 0.2))
assert set(rollout.unmask_step[:, 0].tolist()) == {1} and (rollout.completion > 0).all()
""",
}

# All scripts share one process, since torch takes seconds to import. It runs isolated (-I): besides
# what is installed it finds the folder of one script at a time. Then each first file shows its
# example.
RUN_SCRIPTS = """
import contextlib, io, json, os, runpy, sys, traceback
import torch

installed = list(sys.path)
results = {}
for folder in sys.argv[1:]:
    name = os.path.basename(folder)
    os.chdir(folder)
    sys.path[:] = [folder, *installed]
    printed = io.StringIO()
    failure = file = None
    try:
        runpy.run_path("use_it.py")
        file = sys.modules[name].__file__
        with contextlib.redirect_stdout(printed):
            runpy.run_path(name + ".py", run_name="__main__")
    except BaseException:
        failure = traceback.format_exc()
    results[name] = {
        "failure": failure,
        "file": file,
        "example": printed.getvalue().splitlines(),
        "transformers": "transformers" in sys.modules,
    }
    for key, module in list(sys.modules.items()):
        if os.path.dirname(getattr(module, "__file__", None) or "") == folder:
            del sys.modules[key]
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """(folder, {name of a script's first file: what came of it})."""
    root = tmp_path_factory.mktemp("copied").resolve()
    folders = []
    for names, script in SCRIPTS.items():
        folder = root / names[0]
        folder.mkdir()
        for name in names:
            shutil.copy(ROOT / f"{name}.py", folder)
        (folder / "use_it.py").write_text(script)
        folders.append(str(folder))
    printed = python("-I", "-c", RUN_SCRIPTS, *folders, folder=root)
    return root, json.loads(printed)


@pytest.mark.parametrize("name", [names[0] for names in SCRIPTS])
def test_a_file_copied_into_an_empty_folder_works_there_and_prints_its_example(name, copied):
    root, results = copied
    result = results[name]
    assert result["failure"] is None, result["failure"]
    assert Path(result["file"]) == root / name / f"{name}.py"
    assert not result["transformers"]
    assert 3 < len(result["example"]) < 25 and max(map(len, result["example"])) <= 100


# ---- imports go one way --------------------------------------------------------------------------

ALONE = {"denoiser", "diffpo_loss", "likelihood", "sampler"}
MATHEMATICS = {*ALONE, "diffusion_policy"}
TOP = {*MATHEMATICS, "config", "train", "evaluate"}
# What --help needs, before any library is loaded: the standard library, and one another.
STANDARD_LIBRARY = {
    "config",
    "evaluation.flags",
    "evaluation.outputs",
    "models.beside",
    "models.command_line",
    "models.errors",
    "models.hub",
    "models.terminal",
    "training.flags",
}
# What a file on top, or the files of a folder, may import of this project. (config is there for all
# but the mathematics, which can be copied without it.)
MAY_IMPORT = dict.fromkeys(ALONE, set()) | {
    "diffusion_policy": {"denoiser", "sampler"},
    "config": set(),
    "tasks": {"tasks", "config"},
    "models": {"models", "config", *MATHEMATICS},
    "models.make_base": {"models", "config", "tasks", *MATHEMATICS},
    "evaluation": {"evaluation", "models", "config", *MATHEMATICS},
    "training": {"training", "models", "tasks", "config", *MATHEMATICS},
    "evaluate": {"evaluation", "models", "tasks", "config", *MATHEMATICS},
    # A run measures its model by evaluate, which imports nothing of training: no circle.
    "training.measure": {"evaluate", "evaluation", "training", "config", *MATHEMATICS},
    "train": {"evaluation", "models", "tasks", "training", "config", *MATHEMATICS},
    "experiments": {*TOP, *FOLDERS},
}
FILES = [*ROOT.glob("*.py"), *(file for folder in FOLDERS for file in (ROOT / folder).glob("*.py"))]
MODULES = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in FILES}
TREES = {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in MODULES.items()}


def imports(tree):
    """The modules that a file imports: of `from a import b`, b too if a.b is one of ours."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            ours = [name for name in inside if name in MODULES]
            yield from ours or [node.module]
        else:
            yield from imports(node)


def test_the_eight_files_that_are_read_stand_on_top_and_the_others_in_five_folders():
    assert {file.stem for file in ROOT.glob("*.py")} == TOP and len(TOP) == 8
    assert {file.parent.name for file in ROOT.glob("*/*.py")} == {*FOLDERS, "tests"}


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_has_one_level_and_an_init_that_is_one_docstring(folder):
    assert {path.name for path in (ROOT / folder).iterdir() if path.is_dir()} <= {"__pycache__"}
    tree = TREES[f"{folder}.__init__"]
    assert len(tree.body) == 1 and ast.get_docstring(tree)


def test_a_file_imports_only_what_its_place_allows():
    for name, tree in TREES.items():
        packages = {imported.partition(".")[0] for imported in imports(tree)}
        ours = packages & {*TOP, *FOLDERS}
        allowed = MAY_IMPORT[name if name in MAY_IMPORT else name.partition(".")[0]]
        assert ours <= allowed, f"{name} imports {ours - allowed}"
        installed = packages - ours - sys.stdlib_module_names
        if name in MATHEMATICS:
            assert installed == {"torch"}, name
        if name in STANDARD_LIBRARY:
            assert not installed, name
            assert {*imports(tree)} & MODULES.keys() <= STANDARD_LIBRARY, name


def test_no_two_modules_import_each_other_in_a_circle():
    graph = {name: {*imports(tree)} & MODULES.keys() for name, tree in TREES.items()}
    assert sum(map(len, graph.values())) > 50
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


# ---- heavy libraries are imported where they are needed ------------------------------------------


def test_importing_train_loads_no_heavy_library():
    code = f"import sys, train; print(sorted({HEAVY} & sys.modules.keys()))"
    loaded = ast.literal_eval(python("-c", code, folder=ROOT))
    assert set(loaded) <= {"PIL"}  # which transformers itself loads
