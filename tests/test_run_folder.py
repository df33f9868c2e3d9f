"""Run folders: files are replaced whole, and what a kill leaves half-done is seen to."""

from types import SimpleNamespace

import pytest
import torch

from config import Config
from evaluation import summary
from training import run_folder


def test_samples_are_of_different_prompts_and_say_when_each_token_came():
    problems = [{"n": n} for n in (1, 1, 2, 2, 1, 3, 4, 5)]
    steps = torch.tensor([[2, 1, 3]]) + torch.arange(8).view(8, 1)
    rollout = SimpleNamespace(
        nfe=steps.amax(1), threshold=torch.full((8,), 0.123456), unmask_step=steps,
        token_mask=torch.tensor([[True, True, False]]).expand(8, 3),
    )  # fmt: skip
    kept = summary.sample_rows(problems, list("abcdefgh"), rollout, torch.full((8,), 0.1))
    assert [row["problem"]["n"] for row in kept] == [1, 2, 3, 4]
    assert [row["text"] for row in kept] == ["a", "c", "f", "g"]
    assert [row["unmask_steps"] for row in kept] == [[2, 1], [4, 3], [7, 6], [8, 7]]
    assert [row["nfe"] for row in kept] == [3, 5, 8, 9]
    assert all((row["reward"], row["threshold"]) == (0.1, 0.1235) for row in kept)


def test_a_run_rolls_out_as_many_rows_at_once_as_its_settings_say():
    settings = Config(model="tiny", rollout_batch_size=6)
    assert run_folder.base_policy(settings, "cpu").rows_at_once == 6


def test_an_adapter_is_no_model_to_train_another_on(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "tiny"}')
    with pytest.raises(ValueError, match="cannot carry another: .*--export DIR") as error:
        run_folder.resolve_config({"task": "countdown", "model": str(tmp_path)})
    assert "\n" not in str(error.value)
