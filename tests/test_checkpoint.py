"""Checkpoints: a damaged one falls back to the one before it, a full disk loses none."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from small_run import make_small_run
from toy import metrics_of

import train
from models.checkpoints import verify_checksums
from training import files

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The folder of a run of three steps, saved after each."""
    folder = tmp_path_factory.mktemp("runs") / "unbroken"
    make_small_run(folder, 3, "--save_every", "1")
    return folder


@pytest.fixture
def folder(unbroken, tmp_path):
    """A copy of that run's folder."""
    shutil.copytree(unbroken, tmp_path / "run")
    return tmp_path / "run"


def resume(folder, *flags):
    """The exit code."""
    return train.main(["--resume", "--run_dir", str(folder), *flags])


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "flipped bit": lambda checkpoint: flip_a_bit(checkpoint / "adapter_model.safetensors"),
    "optimizer cut": lambda checkpoint: (checkpoint / "state.pt").write_bytes(b"PK"),
    "no head": lambda checkpoint: (checkpoint / "threshold_head.safetensors").unlink(),
    "empty file": lambda checkpoint: (checkpoint / "adapter_config.json").write_text(""),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_it_takes_its_place(
    folder, capsys, damage
):
    DAMAGES[damage](folder / "checkpoint")
    with pytest.raises(ValueError, match="is not as it was written"):
        verify_checksums(folder / "checkpoint")
    files.restore_previous_checkpoint(folder / "checkpoint")
    assert "continuing from the previous checkpoint" in capsys.readouterr().err
    verify_checksums(folder / "checkpoint")


def test_a_run_with_a_damaged_checkpoint_goes_on_from_the_one_before_and_ends_the_same(
    unbroken, folder, capsys
):
    flip_a_bit(folder / "checkpoint" / "adapter_model.safetensors")
    assert resume(folder) == 0
    assert "continuing from the previous checkpoint" in capsys.readouterr().err
    assert metrics_of(folder) == metrics_of(unbroken)
    for name in ("checkpoint", "checkpoint.old"):
        flip_a_bit(folder / name / "state.pt")
    assert resume(folder, "--steps", "4") == 2
    assert "is not as it was written" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "message",
    [
        "PytorchStreamWriter failed writing file data/3: No space left on device",
        "[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534",
    ],
)
def test_a_full_disk_is_one_line_and_the_older_checkpoint_survives(
    folder, capsys, monkeypatch, message
):
    def full_disk(*_, **__):
        raise RuntimeError(message)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full_disk)
        if "No space" not in message:  # torch does not say it, so the disk is asked
            usage = shutil.disk_usage(folder)._replace(free=0)
            patch.setattr(shutil, "disk_usage", lambda path: usage)
        assert resume(folder, "--steps", "4") == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "checkpoint cannot be written" in line and "No space left" in line
    assert "enforce" not in line
    verify_checksums(folder / "checkpoint")
    assert resume(folder, "--steps", "4") == 0 and len(metrics_of(folder)) == 4


def test_a_checkpoint_has_an_adapter_the_head_the_state_and_a_card(unbroken):
    checkpoint = unbroken / "checkpoint"
    assert {file.name for file in checkpoint.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "state.pt",
        "sums.json",
        "threshold_head.safetensors",
    }
    assert all("lora_" in name for name in load_file(checkpoint / "adapter_model.safetensors"))
    state = torch.load(checkpoint / "state.pt", weights_only=True)
    assert state.keys() == {"step", "optimizers"} and state["step"] == 3
    assert len(state["optimizers"]) == 2
    card = (checkpoint / "README.md").read_text()
    assert "DiFFPO" in card and str(unbroken) not in card
