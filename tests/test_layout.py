"""What the layout promises: core files that can be copied alone and shown by running them, and
files and functions that stay small.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(file.name for file in ROOT.glob("*.py"))


def python(*arguments, folder):
    """What it prints, in a process of its own."""
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- the core ------------------------------------------------------------------------------------

# Each code imports one file and uses it for something small, whose answer is worked out by hand.
# It runs isolated (-I) and finds, besides what is installed, only the folder that it is in.
ALONE = {
    "sampler": """
from sampler import Decoder
entropy = torch.tensor([[0.3, 0.1, 0.2, 0.0]])
masked = torch.tensor([[True, True, True, False]])
for gamma, chosen in ((0.05, [1]), (0.1, [1, 2]), (0.31, [0, 1, 2])):
    selected = Decoder("eb", gamma).select(entropy, 1 - entropy, masked)
    assert selected[0].nonzero().flatten().tolist() == chosen
""",
    "denoiser": """
from denoiser import DenoiserCalls, LogitsModel
table = torch.tensor([[0.0, 0.0, 0.0], [9.0, 1.0, 2.0], [9.0, 0.0, 0.0]])
model = torch.nn.Embedding.from_pretrained(table)
model.forward = lambda ids, attention_mask: table[ids]
calls = DenoiserCalls(LogitsModel(model), mask_id=0)
hidden = calls.hidden(torch.tensor([[1, 2]]))[0]
p = [1 / (1 + math.e), math.e / (1 + math.e)]
logp = calls.token_logp(hidden, torch.tensor([1, 2]), 1.0).tolist()
entropy, confidence = (x.tolist() for x in calls.entropy_and_confidence(hidden))
assert near(logp, [math.log(p[0]), math.log(0.5)])
assert near(entropy, [-sum(x * math.log(x) for x in p), math.log(2)])
assert near(confidence, [p[1], 0.5])
""",
    "likelihood": """
from types import SimpleNamespace
from dataclasses import make_dataclass
from likelihood import latent_at, surrogate_logp
policy = SimpleNamespace(mask_id=0)  # a token's probability: the share of the canvas it sees
policy.hidden = lambda ids, mask: (ids > 0).float().mean(1).view(-1, 1, 1).expand(*ids.shape, 1)
policy.token_logp = lambda hidden, tokens, temperature: hidden[:, 0].log()
steps = torch.tensor([[2, 1, 3]])
values = dict(
    prompt_ids=torch.tensor([[5]]), prompt_mask=torch.tensor([[True]]), unmask_step=steps,
    completion=torch.tensor([[7, 8, 9]]), behaviour_logp=torch.zeros(1, 3), nfe=steps.amax(1),
    token_mask=steps > 0, temperature=1.0,
)
rollout = make_dataclass("Rollout", values)(**values)
assert latent_at(rollout.completion, steps, 2, 0).tolist() == [[7, 8, 0]]
for taus, p in (([], [1, 1, 1]), ([1], [2, 1, 2]), ([2], [1, 1, 3]), ([1, 2], [2, 1, 3])):
    logp = surrogate_logp(policy, rollout, torch.tensor([taus], dtype=torch.long))
    assert near(logp[0].tolist(), [math.log(x / 4) for x in p])
""",
    "diffpo_loss": """
from diffpo_loss import diffpo_loss, group_advantages, importance_weights
advantage = group_advantages(torch.tensor([1.0, 0.0]), 2)
assert advantage.tolist() == [0.5, -0.5]
old = torch.tensor([[0.5, 0.9], [0.4, 0.4]]).log()
true = torch.tensor([[0.5, 0.3], [0.4, 0.8]]).log()
weights = importance_weights(old, true, cap=2.0)
assert near(weights.flatten().tolist(), [1, 2, 1, 0.5])
new = old + torch.tensor([[1.1, 1.5], [1.0, 1.0]]).log()
mask = torch.tensor([[True, True], [True, False]])
first, second = 0.5 * (1.1 + 2 * 1.2), -0.5  # the second ratio is clipped; one token is padding
for by, n in (("text", (2, 1)), ("canvas", (2, 2))):
    loss, _ = diffpo_loss(new, old, advantage, weights, mask, 0.2, by)
    assert near([loss.item()], [-(first / n[0] + second / n[1]) / 2])
""",
}
START = """
import math, sys
import torch
sys.path.insert(0, ".")
near = lambda a, b: all(abs(x - y) < 1e-5 for x, y in zip(a, b, strict=True))
"""


@pytest.mark.parametrize("name", ALONE)
def test_a_file_copied_alone_into_an_empty_folder_works_there_and_prints_its_example(
    name, tmp_path
):
    shutil.copy(ROOT / f"{name}.py", tmp_path)
    end = f"\nfrom pathlib import Path\nprint(Path(sys.modules[{name!r}].__file__).resolve())"
    end += f"\nimport runpy\nrunpy.run_path('{name}.py', run_name='__main__')"
    where, *printed = python("-I", "-c", START + ALONE[name] + end, folder=tmp_path).splitlines()
    assert Path(where) == (tmp_path / f"{name}.py").resolve()
    is_an_example(printed)


def test_the_policy_needs_two_more_files_and_no_transformers(tmp_path):
    for name in ("diffusion_policy", "denoiser", "sampler"):
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    code = "import runpy\nrunpy.run_path('diffusion_policy.py', run_name='__main__')"
    code += "\nprint('transformers' in sys.modules)"
    *printed, loaded = python("-I", "-c", START + code, folder=tmp_path).splitlines()
    assert loaded == "False"
    is_an_example(printed)


def is_an_example(printed):
    assert 3 < len(printed) < 25 and max(map(len, printed)) <= 100
