"""claims.py on a random model: what it draws is what training draws, its tables are those of loops,
its pictures and its refusals.
"""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import likelihood
import train
from diffpo_loss import weight_metrics
from experiments import claims, gradients
from training.files import read_log

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "bases" / "tiny"
FLAGS = "--steps 2 --prompts_per_step 4 --num_generations 4 --eval_problems 4 --frontier false"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "a"
    assert train.main([*FLAGS.split(), "--run_dir", str(folder)]) == 0
    return folder


def told(capsys, *arguments):
    """(exit code, stdout, stderr)."""
    code = claims.main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


# ---- states --------------------------------------------------------------------------------------


def test_a_base_is_drawn_from_as_the_first_step_of_training_would():
    state = claims.State("tiny", "sudoku")
    assert (state.prompts, state.length, state.name) == (16, 19, "sudoku, base")  # its recipe
    state = claims.State("tiny", "countdown", prompts=6)
    rollout, advantage, _ = state.batch(0)
    assert rollout.completion.shape == (6 * 8, 10)
    assert advantage.view(6, 8).mean(1).abs().max() < 1e-6 < advantage.abs().max()
    assert rollout.threshold.median().item() == pytest.approx(
        0.1, rel=0.4
    )  # initial_threshold, drawn
    assert rollout.threshold.std() > 0.02
    again, other = state.batch(0)[0], state.batch(1)[0]
    assert torch.equal(again.completion, rollout.completion)
    assert not torch.equal(other.completion, rollout.completion)


def test_a_run_is_its_adapter_merged_and_all_weights_have_gradients(run):
    state = claims.State(run, None)
    assert state.name == "countdown, after step 2"
    assert (state.prompts, state.settings.num_generations) == (4, 4)
    assert all(p.requires_grad for p in state.policy.denoiser.parameters())
    names = [name for name, _ in state.policy.denoiser.named_parameters()]
    assert not any("lora" in name for name in names)
    ids = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = state.policy.hidden(ids)
        adapted = claims.load_policy(run).hidden(ids)
    torch.testing.assert_close(hidden, adapted, rtol=1e-3, atol=1e-4)


# ---- tables --------------------------------------------------------------------------------------


def test_kl_and_effective_sample_by_step_are_those_of_loops():
    draw = torch.Generator().manual_seed(0)
    step, group = torch.randint(1, 4, (3000,), generator=draw), torch.arange(3000) // 10
    log_weight = -0.1 * step + 0.2 * torch.randn(3000, generator=draw, dtype=torch.double)
    rows = {row["step"]: row for row in claims.by_step(step, group, log_weight, 2)}
    assert sorted(rows) == [0, 1, 2, 3]
    for t, row in rows.items():
        own = [w for s, w in zip(step.tolist(), log_weight.tolist(), strict=True) if t in (0, s)]
        assert row["tokens"] == len(own)
        assert row["kl"] == pytest.approx(-sum(own) / len(own), rel=1e-6)
        used = [min(math.exp(w), 1) for w in own]
        ess = sum(used) ** 2 / sum(x * x for x in used) / len(used)
        assert row["ess, C = 1"] == pytest.approx(ess)
        low, high = row["kl_interval"]  # tokens are independent here: 1.96 standard errors
        wide = 2 * 1.96 * torch.tensor(own).std().item() / len(own) ** 0.5
        assert high - low == pytest.approx(wide, rel=0.15)
    assert rows[0]["slope"] == pytest.approx(0.1, abs=0.01)
    low, high = rows[0]["slope_interval"]
    assert low < 0.1 < high and high - low < 0.05
    assert sum(rows[0]["histogram"]) == pytest.approx(1)


def test_a_step_that_hardly_any_token_has_is_left_out():
    step = torch.tensor([1] * 999 + [2])
    rows = claims.by_step(step, torch.arange(1000), torch.zeros(1000).double(), 1)
    assert [row["step"] for row in rows] == [0, 1]


def test_the_surrogates_kl_is_the_one_that_training_logs():
    state = claims.State("tiny", "countdown", 4)
    found = claims.surrogate(state, 4, 0)
    whole = {row["stages"]: row["kl"] for row in found["rows"] if row["step"] == 0}
    total, count = 0, 0
    for b in range(4):
        rollout, _, _ = state.batch(b)
        none = torch.zeros(len(rollout.nfe), 0, dtype=torch.long)
        with torch.no_grad():
            logp = likelihood.surrogate_logp(state.policy, rollout, none)
        mask, n = rollout.token_mask, int(rollout.token_mask.sum())
        total += n * weight_metrics(logp, rollout.behaviour_logp, 1.0, mask, mask)["surrogate_kl"]
        count += n
    assert whole[1] == pytest.approx(total / count, rel=1e-4)
    assert whole[1] > whole[2] > whole[8] == pytest.approx(0, abs=0.05)


# ---- the program ---------------------------------------------------------------------------------


def test_gradients_are_told_kept_and_drawn(run, tmp_path, capsys):
    code, out, _ = told(capsys, "gradient", run, "--batches", 4, "--out", tmp_path)
    assert code == 0
    (found,) = json.loads((tmp_path / "gradient.json").read_text())
    assert found["about"]["name"] == "countdown, after step 2"
    rows = {(row["stages"], row["weights"]): row for row in found["rows"]}
    assert len(rows) == len(gradients.STAGES) * len(gradients.CAPS) + 2
    assert rows["exact", "no weights"]["cosine"] == pytest.approx(1)
    assert rows[1, "no weights"]["cosine"] < 1
    assert rows[1, "C = 1"]["batches"] == 4
    assert (tmp_path / "gradient.png").stat().st_size > 20_000
    assert f"{rows[1, 'C = 1']['cosine']:.3f} (" in out
    assert out.count("m = 2, C = 1: ") >= 2 and "bias" in out
    for row in found["rows"]:  # as if its batches' means were nothing but noise
        row["noise"] = math.nan
    claims.tell_gradient(found)
    table = capsys.readouterr().out.splitlines()[3 : 3 + len(found["rows"])]
    assert all(re.search(r" -      -  +no signal", line) for line in table)


def test_the_surrogates_table_is_told_kept_and_drawn(tmp_path, capsys):
    how = ("--task", "countdown", "--batches", 4, "--prompts", 2, "--out", tmp_path)
    code, out, _ = told(capsys, "surrogate", TINY, *how)
    assert code == 0 and "countdown, base: 4 batches of 2 prompts x 8" in out
    found = json.loads((tmp_path / "surrogate.json").read_text())
    first = next(row for row in found[0]["rows"] if row["stages"] == 1 and row["step"] == 2)
    assert f"{first['kl']:.3f} ±" in out
    assert (tmp_path / "surrogate.png").stat().st_size > 20_000


def test_a_batch_without_a_gradient_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(claims.registry.TASKS["countdown"].compact, "reward", lambda *_: 0.0)
    how = ("--task", "countdown", "--batches", 4, "--prompts", 1, "--out", tmp_path)
    code, _, err = told(capsys, "gradient", "tiny", *how)
    assert code == 2 and "all rewards of a batch are equal" in err and err.count("\n") == 1


def test_bad_input_gets_one_line(run, tmp_path, capsys):
    old = tmp_path / "old"
    (old / "checkpoint").mkdir(parents=True)
    (old / "config.json").write_text('{"task": "countdown"}')
    for arguments, said in [
        (("gradient", TINY), "is no run, which would know its task: give a --task"),
        (("surrogate", TINY, "--task", "chess"), "unknown task 'chess'"),
        (("gradient", TINY, "--task", "gsm8k"), "no length"),
        (("gradient", old), "was written by another version of train.py"),
        (("gradient", tmp_path / "none", "--task", "countdown"), "none"),
    ]:
        code, out, err = told(capsys, *arguments, "--out", tmp_path / "out")
        assert code == 2 and said in err and err.count("\n") == 1, err
        assert err.startswith("claims.py: ") and not out


def test_help_answers_without_torch_and_bad_flags_get_one_line(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError")
    environment = {"PYTHONPATH": f"{tmp_path}", "PATH": ""}
    for arguments, code in [(["--help"], 0), (["gradient", "--help"], 0), (["gradient"], 2)]:
        command = [sys.executable, "-m", "experiments.claims", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=150)
        assert done.returncode == code
        assert len(done.stdout) > 200 if code == 0 else done.stderr.count("\n") == 1
    command = [sys.executable, "-m", "experiments.claims", "gradient", "x", "--batches", "2"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=150)
    assert "batches is at least 4" in done.stderr and done.stderr.count("\n") == 1


def test_metrics_of_a_run_count_the_rows_of_its_calls(run):
    rows = read_log(run / "metrics.jsonl")
    for row in rows:  # 16 rows of 4 prompts: a first call of 4, then rows that are not done
        rollout = 4 + 16 * (row["nfe_mean"] - 1)
        assert rollout + 4 <= row["denoiser_rows"] <= rollout + 4 + 16  # z_0 once a group, z_tau
