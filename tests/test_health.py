"""Numbers gone wrong: a run stops before it spoils anything, and says what teaches nothing."""

import json
import shutil
from math import inf, nan

import pytest
import torch
from safetensors.torch import load_file
from small_run import SMALL_RUN, make_small_run
from toy import wide_policy

import train
from diffusion_policy import DiffusionPolicy
from sampler import Decoder
from training import distributed, health

pytestmark = pytest.mark.usefixtures("no_pictures")


# ---- what stops a run ----------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [nan, inf, -inf])
def test_what_is_not_finite_is_named_by_quantity_and_row(bad):
    health.assert_finite("the loss", torch.tensor(1.0))
    value = torch.zeros(4, 3)
    value[2, 1] = bad
    with pytest.raises(health.NotFinite, match="^the ratio of row 2 is not finite$"):
        health.assert_finite("the ratio", value)
    with pytest.raises(health.NotFinite, match="^the loss is not finite$"):
        health.assert_finite("the loss", torch.tensor(bad))


# Each spoils one quantity of a step, and returns what the run calls it.


def spoil_logp(patch):
    rollout = DiffusionPolicy.rollout

    def spoiled_rollout(*args, **kwargs):
        result = rollout(*args, **kwargs)
        result.behaviour_logp[5, 2] = nan
        return result

    patch.setattr(DiffusionPolicy, "rollout", spoiled_rollout)
    return "a drawn token's log-prob of row 5"


def spoil_loss(patch):
    objective = train.objective

    def spoiled_objective(*args, **kwargs):
        loss, metrics = objective(*args, **kwargs)
        return loss * inf, metrics

    patch.setattr(train, "objective", spoiled_objective)
    return "the loss"


def spoil_gradient(patch):
    patch.setattr(distributed, "clip_grad_norm", lambda model, max_norm: torch.tensor(nan))
    return "the gradient"


def spoil_threshold(patch):
    def spoiled_loss(**_):
        return torch.tensor(nan, requires_grad=True), {}

    patch.setattr(train, "threshold_loss", spoiled_loss)
    return "the threshold's loss"


def spoil_weights(patch):
    step = torch.optim.AdamW.step

    def spoiled_step(self, *args):
        step(self, *args)
        self.param_groups[0]["params"][3].data.view(-1)[0] = inf

    patch.setattr(torch.optim.AdamW, "step", spoiled_step)
    return "weight base_model.model"


def spoil_selection(patch):
    patch.setattr(Decoder, "select", lambda self, entropy, *_, **__: torch.zeros_like(entropy) > 0)
    return "the denoiser's output"


SPOILS = [spoil_selection, spoil_logp, spoil_loss, spoil_gradient, spoil_threshold, spoil_weights]


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """The folder of a run of two steps, saved after each."""
    folder = tmp_path_factory.mktemp("runs") / "a"
    make_small_run(folder, 2, "--save_every", "1")
    return folder


@pytest.mark.parametrize("spoil", SPOILS, ids=lambda function: function.__name__)
def test_a_run_stops_in_one_line_before_anything_bad_is_saved(
    spoil, two_steps, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "a"
    shutil.copytree(two_steps, folder)
    files = [folder / "checkpoint" / name for name in ("state.pt", "adapter_model.safetensors")]
    before = [file.read_bytes() for file in files]
    third_step = ["--resume", "--run_dir", str(folder), "--steps", "3"]
    capsys.readouterr()
    with monkeypatch.context() as patch:
        quantity = spoil(patch)
        assert train.main(third_step) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"step 3: {quantity}" in line and "is not finite" in line and "--learning_rate" in line
    assert [file.read_bytes() for file in files] == before
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2
    if spoil not in (spoil_weights, spoil_selection):  # of a rollout that failed nothing is left
        batch = load_file(folder / "broken-3.safetensors")
        assert batch["completion"].shape == (32, 10) and f"{folder}/broken-3" in line
    if spoil is spoil_logp:
        assert train.main(third_step) == 0  # it was mended


def test_a_denoiser_that_gives_nan_does_not_run_for_ever():
    policy = wide_policy()
    with torch.no_grad():
        policy.denoiser.model.norm.weight[0] = nan
    prompt_ids = torch.tensor([[4, 5]])
    for temperature in (1.0, 0.0):
        decoder = Decoder("eb", 0.1, temperature=temperature, stop_at_eos=False)
        with pytest.raises(ValueError, match="not finite"):
            policy.rollout(prompt_ids, prompt_ids > 0, 6, decoder)


# ---- what a run warns of -------------------------------------------------------------------------

GOOD = {
    "frac_reward_zero_std": 0.3,
    "completion_length_mean": 9.0,
    "capped_weight_fraction": 0.2,
    "ess_fraction": 0.9,
    "threshold_mean": 0.1,
    "surrogate_kl": 0.2,
}
WRONG = {
    "frac_reward_zero_std": (1.0, "--num_generations"),
    "completion_length_mean": (1.0, "--prefill"),
    "capped_weight_fraction": (1.0, "--num_stages"),
    "ess_fraction": (0.05, "--importance_weight_cap"),
    "threshold_mean": (0.001, "--nfe_penalty"),
}


def warnings_of(rows, already_warned=None):
    return list(health.new_warnings(rows, set() if already_warned is None else already_warned))


@pytest.mark.parametrize("name", WRONG)
def test_a_number_that_teaches_nothing_is_told_once_with_the_setting_to_change(name):
    value, setting = WRONG[name]
    already_warned = set()
    rows = [GOOD, GOOD | {name: value}]
    assert warnings_of(rows[:1], already_warned) == []
    [text] = warnings_of(rows, already_warned)
    assert setting in text and warnings_of(rows * 2, already_warned) == []
    [text] = warnings_of([GOOD | {"threshold_mean": 9.9}])
    assert "upper bound" in text


def test_a_surrogate_that_drifts_away_for_50_steps_is_told():
    rising = [GOOD | {"surrogate_kl": 0.1 + 0.01 * i + 0.02 * (i % 3)} for i in range(60)]
    [text] = warnings_of(rising)
    assert "doubled in 50 steps" in text
    assert warnings_of(rising[:49]) == []
    flat = [GOOD | {"surrogate_kl": 0.1 + 0.02 * (i % 2)} for i in range(60)]
    assert warnings_of(flat) == []
    slowly = [row | {"surrogate_kl": 1 + row["surrogate_kl"]} for row in rising]
    assert warnings_of(slowly) == []
    noise = [row | {"surrogate_kl": 1e-6 * row["surrogate_kl"]} for row in rising]
    assert warnings_of(noise) == []
    # A run of the sampler alone has no update of the denoiser.
    sampler_alone = [dict.fromkeys(GOOD) | {"threshold_mean": 0.1}] * 60
    assert warnings_of(sampler_alone) == []


def test_a_run_says_its_warnings_among_its_lines(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "group_advantages", lambda reward, G, scale: reward * 0)
    folder = tmp_path / "a"
    assert train.main([*SMALL_RUN, "--steps", "3", "--run_dir", str(folder)]) == 0
    captured = capsys.readouterr()
    text = "in every group all completions earn the same reward"
    assert (captured.out + captured.err).count(text) == 1
    rows = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["frac_reward_zero_std"] for row in rows] == [1.0] * 3
