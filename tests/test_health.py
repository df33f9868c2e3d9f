"""Numbers gone wrong: a run stops before it spoils anything, and says what teaches nothing."""

import json
import shutil
from math import inf, nan

import pytest
import torch
from safetensors.torch import load_file
from toy import wide_policy

import train
from diffusion_policy import DiffusionPolicy
from sampler import Decoder
from training import health

FLAGS = "--task countdown --model tiny --prompts_per_step 4 --eval_problems 4 --frontier false"


def run(folder, more=""):
    return train.main([*FLAGS.split(), *more.split(), "--run_dir", str(folder)])


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(train, "plot_curves", lambda run_dir: None)


@pytest.mark.parametrize("bad", [nan, inf, -inf])
def test_what_is_not_finite_is_named_by_quantity_and_row(bad):
    health.assert_finite("the loss", torch.tensor(1.0))
    value = torch.zeros(4, 3)
    value[2, 1] = bad
    with pytest.raises(health.NotFinite, match="^the ratio of row 2 is not finite$"):
        health.assert_finite("the ratio", value)
    with pytest.raises(health.NotFinite, match="^the loss is not finite$"):
        health.assert_finite("the loss", torch.tensor(bad))


def spoil_logp(patch):
    rollout = DiffusionPolicy.rollout

    def spoiled(*args, **more):
        made = rollout(*args, **more)
        made.behaviour_logp[5, 2] = nan
        return made

    patch.setattr(DiffusionPolicy, "rollout", spoiled)
    return "a drawn token's log-prob of row 5"


def spoil_loss(patch):
    objective = train.objective

    def spoiled(*args):
        loss, metrics = objective(*args)
        return loss * inf, metrics

    patch.setattr(train, "objective", spoiled)
    return "the loss"


def spoil_gradient(patch):
    patch.setattr(train.distributed, "clip_grad_norm", lambda *_: torch.tensor(nan))
    return "the gradient"


def spoil_threshold(patch):
    loss = lambda *_: (torch.tensor(nan, requires_grad=True), {})  # noqa: E731
    patch.setattr(train, "threshold_loss", loss)
    return "the threshold's loss"


def spoil_weights(patch):
    step = torch.optim.AdamW.step

    def spoiled(self, *args):
        step(self, *args)
        self.param_groups[0]["params"][3].data.view(-1)[0] = inf

    patch.setattr(torch.optim.AdamW, "step", spoiled)
    return "weight base_model.model"


SPOILS = [spoil_logp, spoil_loss, spoil_gradient, spoil_threshold, spoil_weights]


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "a"
    assert run(folder, "--steps 2 --save_every 1") == 0
    return folder


@pytest.mark.parametrize("spoil", SPOILS, ids=lambda f: f.__name__)
def test_a_run_stops_in_one_line_before_anything_bad_is_saved(
    spoil, two_steps, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "a"
    shutil.copytree(two_steps, folder)
    files = [folder / "checkpoint" / name for name in ("state.pt", "adapter_model.safetensors")]
    before, again = [file.read_bytes() for file in files], ["--resume", "--run_dir", str(folder)]
    capsys.readouterr()
    with monkeypatch.context() as patch:
        what = spoil(patch)
        assert train.main([*again, "--steps", "3"]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"step 3: {what}" in said and "is not finite" in said and "--learning_rate" in said
    assert [file.read_bytes() for file in files] == before
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2
    if spoil is not spoil_weights:
        batch = load_file(folder / "broken-3.safetensors")
        assert batch["completion"].shape == (32, 10) and f"{folder}/broken-3" in said
    if spoil is spoil_logp:
        assert train.main([*again, "--steps", "3"]) == 0  # mended


def test_a_denoiser_that_gives_nan_does_not_run_for_ever():
    policy = wide_policy()
    with torch.no_grad():
        policy.denoiser.model.norm.weight[0] = nan
    ids = torch.tensor([[4, 5]])
    for decoder in (Decoder("eb", 0.1), Decoder("eb", 0.1, temperature=0.0)):
        with pytest.raises(ValueError, match="not finite"):
            policy.rollout(ids, ids > 0, 6, decoder)


# ---- warnings ------------------------------------------------------------------------------------

GOOD = {
    "frac_reward_zero_std": 0.3, "completion_length_mean": 9.0,
    "capped_weight_fraction": 0.2, "ess_fraction": 0.9,
    "threshold_mean": 0.1, "surrogate_kl": 0.2,
}  # fmt: skip
WRONG = {
    "frac_reward_zero_std": (1.0, "--num_generations"),
    "completion_length_mean": (1.0, "--prefill"),
    "capped_weight_fraction": (1.0, "--num_stages"),
    "ess_fraction": (0.05, "--importance_weight_cap"),
    "threshold_mean": (0.001, "--nfe_penalty"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_number_that_teaches_nothing_is_told_once_with_the_setting_to_change(name):
    value, setting = WRONG[name]
    said, rows = set(), [GOOD, GOOD | {name: value}]
    assert list(health.new_warnings(rows[:1], said)) == []
    [text] = health.new_warnings(rows, said)
    assert setting in text and list(health.new_warnings(rows * 2, said)) == []
    [high] = health.new_warnings([GOOD | {"threshold_mean": 9.9}], set())
    assert "upper bound" in high


def test_a_surrogate_that_drifts_away_for_50_steps_is_told():
    rising = [GOOD | {"surrogate_kl": 0.1 + 0.01 * i + 0.02 * (i % 3)} for i in range(60)]
    flat = [GOOD | {"surrogate_kl": 0.1 + 0.02 * (i % 2)} for i in range(60)]
    assert "doubled in 50 steps" in next(health.new_warnings(rising, set()))
    slowly = [row | {"surrogate_kl": 1 + row["surrogate_kl"]} for row in rising]
    noise = [row | {"surrogate_kl": 1e-6 * row["surrogate_kl"]} for row in rising]
    assert not list(health.new_warnings(slowly, set())) and not list(
        health.new_warnings(noise, set())
    )
    assert not list(health.new_warnings(flat, set())) and not list(
        health.new_warnings(rising[:49], set())
    )
    sampler = [dict.fromkeys(GOOD) | {"threshold_mean": 0.1}] * 60  # no update of the denoiser
    assert not list(health.new_warnings(sampler, set()))


def test_a_run_says_its_warnings_among_its_lines(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "group_advantages", lambda reward, *_: reward * 0)
    assert run(tmp_path / "a", "--steps 3") == 0
    out = capsys.readouterr()
    assert (out.out + out.err).count("no completions of one prompt differ in reward") == 1
    rows = (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["frac_reward_zero_std"] for row in rows] == [1.0] * 3
