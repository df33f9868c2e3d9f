"""What a run starts from: settings, a folder that is free, a model; and what is refused."""

import json
from dataclasses import asdict

import pytest
import torch
from checkpoints import random_adapter
from small_run import SMALL_RUN

import train
from config import Config
from models.loading import load_denoiser
from models.lora import lora_layers, save_adapter
from training import run_folder


def start(folder, *flags):
    """The exit code of a small run in `folder`."""
    return train.main([*SMALL_RUN, *flags, "--run_dir", str(folder)])


def write_run(folder, steps, steps_done):
    """A folder as a run leaves it that has done some of its steps."""
    folder.mkdir()
    config = asdict(Config(model="tiny", steps=steps, run_dir=str(folder)))
    (folder / "config.json").write_text(json.dumps(config))
    rows = [{"step": step} for step in range(1, steps_done + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


# ---- folders -------------------------------------------------------------------------------------


def test_the_environment_of_a_run_on_the_cpu_names_no_gpu_beside_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    assert "\ndevice cpu " in run_folder.describe_environment(torch.device("cpu"))
    assert "\ndevice a card\n" in run_folder.describe_environment(torch.device("cuda"))


def test_a_finished_runs_folder_is_called_so(tmp_path, capsys):
    write_run(tmp_path / "a", steps=120, steps_done=120)
    assert start(tmp_path / "a") == 2
    assert capsys.readouterr().err == (
        f"train.py: {tmp_path}/a holds a finished run (120 of 120 steps): give a new --run_dir, or "
        f"continue with python train.py --resume --run_dir {tmp_path}/a --steps N\n"
    )


@pytest.mark.parametrize("steps_done", [0, 7])
def test_an_unfinished_runs_folder_says_how_far_it_is_and_both_ways_out(
    tmp_path, capsys, steps_done
):
    write_run(tmp_path / "a", steps=120, steps_done=steps_done)
    assert start(tmp_path / "a") == 2
    assert capsys.readouterr().err == (
        f"train.py: {tmp_path}/a holds a run with {steps_done} of 120 steps done: resume with "
        f"python train.py --resume --run_dir {tmp_path}/a, or give a new --run_dir\n"
    )


def test_a_folder_with_anything_else_in_it_is_not_used(tmp_path, capsys):
    (tmp_path / "diary.txt").write_text("mine")
    assert start(tmp_path, "--steps", "1") == 2
    error = capsys.readouterr().err
    assert "is not empty, it has diary.txt: give a new --run_dir" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", ["environment.txt", "inputs.json"])
def test_a_file_that_only_has_the_name_of_a_runs_is_not_replaced(tmp_path, capsys, name):
    """Earlier versions took both names for what a killed run had left."""
    (tmp_path / name).write_text("numpy==2.4.6")
    assert start(tmp_path, "--steps", "1") == 2
    assert f"is not empty, it has {name}: give a new --run_dir" in capsys.readouterr().err
    assert (tmp_path / name).read_text() == "numpy==2.4.6"


def test_a_run_that_is_refused_removes_neither_a_folder_nor_a_lock_that_was_there(tmp_path):
    """The lock may be another program's, and the folder made for something else."""
    (tmp_path / "empty").mkdir()
    assert start(tmp_path / "empty", "--task", "nonsense") == 2
    assert not any((tmp_path / "empty").iterdir())
    other = tmp_path / "other"
    other.mkdir()
    (other / ".lock").write_text("of another program")
    (other / "data").write_text("")
    assert start(other, "--steps", "1") == 2
    assert (other / ".lock").read_text() == "of another program"


def test_a_kill_before_the_first_step_leaves_a_folder_that_can_be_used(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "draw_pictures", lambda config, run_dir: [])
    for name in (".lock", "environment.txt", "inputs.json", ".diffpo-x"):
        (tmp_path / name).write_text("")
    assert start(tmp_path, "--steps", "1") == 0


def test_a_run_that_is_refused_leaves_no_folder(tmp_path):
    assert start(tmp_path / "a", "--task", "nonsense") == 2
    assert not list(tmp_path.iterdir())


def test_an_export_into_the_runs_own_folder_is_refused_before_anything_is_lost(tmp_path, capsys):
    assert start(tmp_path / "a", "--steps", "1", "--export", str(tmp_path / "a")) == 2
    assert "the folder is not empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("export", "says"),
    [
        ("", "needs the name of a new folder"),
        ("FILE", "is a file"),
        ("FILE/out", "cannot be made"),
        ("a/out", "inside the run's folder"),
        ("a/checkpoint/out", "inside the run's folder"),
        ("a", "the folder is not empty"),
    ],
)
def test_a_place_that_cannot_be_exported_to_is_told_before_the_first_step(
    tmp_path, capsys, monkeypatch, export, says
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("")
    monkeypatch.setattr(train, "measure_base", lambda *_, **__: pytest.fail("it was measured"))
    assert start(tmp_path / "a", "--steps", "1", "--export", export) == 2
    message = capsys.readouterr().err
    assert "--export" in message and says in message and message.count("\n") == 1
    assert not (tmp_path / "a").exists() and (tmp_path / "FILE").read_text() == ""


def test_a_file_in_the_place_of_the_runs_folder_is_said_to_be_one(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert start(tmp_path / "file", "--steps", "1") == 2
    assert capsys.readouterr().err == f"train.py: {tmp_path}/file is a file: a run needs a folder\n"


# ---- models and problems -------------------------------------------------------------------------


def test_a_run_rolls_out_as_many_rows_at_once_as_its_settings_say():
    config = Config(model="tiny", rollout_batch_size=6)
    assert run_folder.base_policy(config, "cpu").rollout_batch_size == 6


@pytest.mark.parametrize(
    ("base", "advice"),
    [
        (
            "tiny",
            "is an adapter of tiny: train it further with --model tiny --adapter .*models.merge",
        ),
        (None, "is a LoRA adapter.*Give its base as the model, and the adapter as --adapter"),
    ],
)
def test_an_adapter_given_as_the_model_is_told_to_be_one(tmp_path, base, advice):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    with pytest.raises(ValueError, match=advice) as error:
        run_folder.resolve_config({"task": "countdown", "model": str(tmp_path)})
    assert "\n" not in str(error.value)


def test_a_run_has_the_rank_and_alpha_of_the_adapter_that_it_starts_from(tmp_path):
    adapter = tmp_path / "adapter"
    save_adapter(random_adapter(load_denoiser("tiny")[0]), adapter)  # of rank 3, alpha 6
    flags = {"task": "countdown", "model": "tiny", "adapter": str(adapter)}
    config, *_ = run_folder.resolve_config(flags)
    assert (config.lora_rank, config.lora_alpha, config.adapter) == (3, 6, str(adapter))
    for flag, message in (
        ({"lora_rank": 8}, "--lora_rank 8: .*adapter has 3. Leave it out"),
        ({"lora_alpha": 7.0}, "--lora_alpha 7.0: .*has 6"),
        ({"beta": 0.1}, "merge --adapter first, by python -m models.merge"),
        ({"adapter": str(tmp_path)}, "cannot read .*adapter_config.json"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            run_folder.resolve_config(flags | flag)
        assert "\n" not in str(error.value)


def test_the_adapter_that_a_run_starts_from_has_the_runs_dropout(tmp_path):
    save_adapter(random_adapter(load_denoiser("tiny")[0]), tmp_path / "adapter")  # with 0.2
    for dropout in (0.0, 0.5):
        config = Config(model="tiny", adapter=str(tmp_path / "adapter"), lora_dropout=dropout)
        model = run_folder.starting_policy(config, "cpu").denoiser
        modules = [module.lora_dropout["default"].p for module in lora_layers(model).values()]
        assert set(modules) == {dropout} and model.peft_config["default"].lora_dropout == dropout


def test_a_training_prompt_that_does_not_fit_is_told_before_the_first_step(tmp_path, capsys):
    rows = [{"numbers": [n, n + 1, 5], "target": n + 6} for n in range(1, 15)]
    too_long = {"numbers": [1] * 600, "target": 3}
    file = tmp_path / "rows.jsonl"
    for attempt in range(20):  # until the long one is for training
        too_long["numbers"] = [1 + attempt % 9] * 600
        file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, too_long]))
        run_dir = tmp_path / f"run-{attempt}"
        code = start(run_dir, "--steps", "1", "--data", str(file))
        error = capsys.readouterr().err
        if "is for" not in error:
            break
    assert code == 2 and "more than the 512 that the model can read" in error
    assert not run_dir.exists()
