"""A state's rollouts are those of training; a run is its adapter merged; what is refused."""

from pathlib import Path

import pytest
import torch

import train
from experiments.states import State, load_states
from likelihood import latent_at
from models.checkpoints import load_policy
from training.files import read_log

FLAGS = "--steps 2 --prompts_per_step 4 --num_generations 4 --eval_problems 4 --frontier false"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "a"
    assert train.main([*FLAGS.split(), "--run_dir", str(folder)]) == 0
    return folder


def test_a_base_is_drawn_from_as_the_first_step_of_training_would():
    state = State("tiny", "sudoku")
    assert state.prompts == 16  # its recipe
    assert state.length == 19
    assert state.name == "sudoku, base"
    state = State("tiny", "countdown", prompts=6)
    batch = state.sample_batch(seed=0)
    assert batch.rollout.completion.shape == (6 * 8, 10)
    groups = batch.advantage.view(6, 8)
    assert groups.mean(dim=1).abs().max() < 1e-6 < groups.abs().max()
    initial_threshold = 0.1
    assert batch.rollout.threshold.median().item() == pytest.approx(initial_threshold, rel=0.4)
    assert batch.rollout.threshold.std() > 0.02  # drawn
    again = state.sample_batch(seed=0)
    other = state.sample_batch(seed=1)
    assert torch.equal(again.rollout.completion, batch.rollout.completion)
    assert not torch.equal(other.rollout.completion, batch.rollout.completion)


def test_a_state_decodes_in_the_blocks_that_are_asked_for():
    path = Path(train.__file__).parent / "bases" / "chain"
    state = State(path, "chain", prompts=2, block_length=1)
    assert state.name == "chain in blocks of 1, base"
    assert state.sample_batch(seed=0).rollout.nfe.tolist() == [7] * 16  # a token in each call
    state = State(path, "chain", prompts=2)
    assert state.config.block_length == 2  # as training does
    assert state.sample_batch(seed=0).rollout.nfe.float().mean() < 7


def test_a_run_is_its_adapter_merged_and_all_weights_have_gradients(run):
    [state] = load_states([run], task_names=[], prompts=None, block_length=None)
    assert state.name == "countdown, after step 2"
    assert state.prompts == 4
    assert state.config.num_generations == 4
    assert all(p.requires_grad for p in state.policy.denoiser.parameters())
    names = [name for name, _ in state.policy.denoiser.named_parameters()]
    assert not any("lora" in name for name in names)
    ids = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    policy = load_policy(run)
    state.policy.denoiser.double()  # six layers make much of float32's rounding
    policy.denoiser.double()
    with torch.no_grad():
        hidden = state.policy.hidden(ids)
        adapted = policy.hidden(ids)
    torch.testing.assert_close(hidden, adapted, rtol=1e-3, atol=1e-4)


def test_a_state_draws_with_the_settings_of_its_run(tmp_path):
    folder = tmp_path / "a"
    flags = ["--prefill", "1", "--threshold_sigma", "0.3", "--run_dir", str(folder)]
    assert train.main([*FLAGS.split(), *flags]) == 0
    policy = State(folder).policy
    assert policy.prefill == "1"
    assert policy.threshold_head.sigma == 0.3


def test_a_base_is_loaded_once_for_each_task(run):
    states = load_states(
        ["tiny", run], task_names=["countdown", "sudoku"], prompts=2, block_length=None
    )
    assert [state.name for state in states] == [
        "countdown, base",
        "sudoku, base",
        "countdown, after step 2",
    ]


def test_several_tasks_at_once_are_refused():
    with pytest.raises(ValueError, match="countdown,sudoku are several tasks"):
        State("tiny", "countdown,sudoku")


def test_a_rollout_runs_the_different_canvases_of_each_step_and_the_log_counts_them(run):
    [state] = load_states([run], task_names=[], prompts=None, block_length=None)
    state.policy.rows_run = 0
    rollout = state.sample_batch(seed=0).rollout
    prompts = rollout.prompt_ids.tolist()
    expected = 0
    for t in range(int(rollout.nfe.max())):
        state_t = latent_at(rollout.completion, rollout.unmask_step, t, state.policy.mask_id)
        running = (rollout.nfe > t).nonzero().flatten().tolist()
        expected += len({(*prompts[row], *state_t[row].tolist()) for row in running})
    assert state.policy.rows_run == expected
    for row in read_log(run / "metrics.jsonl"):  # 16 rows of 4 prompts
        at_most = 4 + 16 * (row["nfe_mean"] - 1)
        scored_at_most = 4 + 16  # z_0 once a group, z_tau
        assert 4 + 4 < row["denoiser_rows"] <= at_most + scored_at_most
