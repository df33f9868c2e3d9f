"""Files that survive: replaced whole, synced before that, checked when read; one run a folder."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from toy import metrics_of

import train
from models.checkpoints import read_json, verify_checksums
from training import files

ROOT = Path(train.__file__).parent
FLAGS = "--task countdown --model tiny --prompts_per_step 4 --eval_problems 4 --frontier false"


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(train, "plot_curves", lambda run_dir: None)


def run(folder, more=""):
    return train.main([*FLAGS.split(), *more.split(), "--run_dir", str(folder)])


def again(folder, more=""):
    return train.main(["--resume", "--run_dir", str(folder), *more.split()])


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "checkpoint"
    for content in ("first", "second"):
        with files.atomic_write(path) as aside:
            aside.mkdir()
            (aside / "file").write_text(content)
    full = pytest.raises(ValueError, match="cannot be written .out of disk.")
    with full as error, files.atomic_write(path) as aside:
        aside.mkdir()
        (aside / "file").write_text("third, half-writ")
        raise RuntimeError("out\nof disk")
    assert "\n" not in str(error.value)
    assert (path / "file").read_text() == "second"
    path.rename(tmp_path / "checkpoint.old")  # a kill between the two renames
    files.recover_interrupted_rename(path)
    assert (path / "file").read_text() == "second"
    (tmp_path / "checkpoint.old").mkdir()  # a kill after them, before the old one was gone
    (tmp_path / "checkpoint.old" / "file").write_text("first")
    with files.atomic_write(path) as aside:
        aside.mkdir()
    assert [found.name for found in tmp_path.iterdir()] == ["checkpoint"]


def test_a_half_written_line_and_what_follows_are_not_read(tmp_path):
    file = tmp_path / "metrics.jsonl"
    assert files.read_log(file) == []
    file.write_text('{"step": 1}\n{"step": 2}\n')
    with open(file, "a") as f:
        f.write('{"step": 3, "rew')
    assert files.read_log(file) == [{"step": 1}, {"step": 2}]


def test_a_file_that_is_missing_or_no_json_is_named(tmp_path):
    (tmp_path / "broken.json").write_text("{")
    for name in ("missing.json", "broken.json"):
        with pytest.raises(ValueError, match=name):
            read_json(tmp_path / name)
    files.write_json(tmp_path / "good.json", {"seed": 1})
    assert read_json(tmp_path / "good.json") == {"seed": 1}


def test_a_file_is_on_the_disk_before_it_takes_the_old_ones_place(tmp_path, monkeypatch):
    events, fsync, replace = [], os.fsync, Path.replace
    named = lambda handle: Path(os.readlink(f"/proc/self/fd/{handle}")).name  # noqa: E731
    monkeypatch.setattr(os, "fsync", lambda f: (events.append(named(f)), fsync(f)))
    monkeypatch.setattr(Path, "replace", lambda a, b: (events.append("rename"), replace(a, b)))
    with files.atomic_write(tmp_path / "checkpoint") as aside:
        aside.mkdir()
        (aside / "state.pt").write_text("x")
    assert events == ["state.pt", "checkpoint.tmp", "rename", tmp_path.name]


def test_what_lies_where_the_old_one_goes_is_removed_and_a_link_is_not_followed(tmp_path):
    path, away = tmp_path / "checkpoint", tmp_path / "elsewhere"
    away.mkdir()
    (away / "kept").write_text("1")
    path.symlink_to(away)
    for name in ("checkpoint.old", "checkpoint.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("")
    for _ in range(2):
        with files.atomic_write(path, keep=True) as aside:
            aside.mkdir()
    assert not path.is_symlink() and not any(path.iterdir()) and (away / "kept").exists()
    assert sorted(x.name for x in tmp_path.iterdir()) == [
        "checkpoint",
        "checkpoint.old",
        "elsewhere",
    ]


BAD = ["garbage", "[1]", "{}", '{"step": "2"}', "\0\0\0", "null", "[" * 5000]


@pytest.mark.parametrize("line", BAD)
def test_a_line_that_is_no_row_is_left_out_and_told_and_the_rest_is_kept(tmp_path, capsys, line):
    file = tmp_path / "metrics.jsonl"
    file.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    assert [row["step"] for row in files.read_log(file)] == [1, 2]
    said = capsys.readouterr().err
    assert "line 2 is no row" in said and said.count("\n") == 1
    file.write_bytes(b'{"step": 1}\n\xff\xfe\n{"step": 2}\n')
    assert [row["step"] for row in files.read_log(file)] == [1, 2]


# ---- checkpoints ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of three steps, saved after each."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert run(folder, "--steps 3 --save_every 1") == 0
    return folder


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "flipped bit": lambda folder: flip(folder / "adapter_model.safetensors"),
    "optimizer cut": lambda folder: (folder / "state.pt").write_bytes(b"PK"),
    "no head": lambda folder: (folder / "threshold_head.safetensors").unlink(),
    "empty file": lambda folder: (folder / "adapter_config.json").write_text(""),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_checkpoint_falls_back_to_the_one_before_and_ends_the_same(
    whole, tmp_path, capsys, damage
):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    DAMAGES[damage](folder / "checkpoint")
    with pytest.raises(ValueError, match="is not as it was written"):
        verify_checksums(folder / "checkpoint")
    if damage != "flipped bit":
        files.restore_previous_checkpoint(folder / "checkpoint")
        assert "going on from the checkpoint before it" in capsys.readouterr().err
        return verify_checksums(folder / "checkpoint")
    assert again(folder) == 0
    assert "going on from the checkpoint before it" in capsys.readouterr().err
    assert metrics_of(folder) == metrics_of(whole)
    for both in ("checkpoint", "checkpoint.old"):
        flip(folder / both / "state.pt")
    assert again(folder, "--steps 4") == 2
    assert "is not as it was written" in capsys.readouterr().err.splitlines()[-1]


def test_a_full_disk_is_one_line_and_the_older_checkpoint_survives(
    whole, tmp_path, capsys, monkeypatch
):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)

    def full(*_, **__):
        raise RuntimeError(
            "PytorchStreamWriter failed writing file data/3: No space left on device"
        )

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        assert again(folder, "--steps 4") == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "checkpoint cannot be written" in said and "No space left" in said
    verify_checksums(folder / "checkpoint")
    assert again(folder, "--steps 4") == 0 and len(metrics_of(folder)) == 4


def test_a_kill_before_the_first_step_leaves_a_folder_that_can_be_used(tmp_path, capsys):
    for name in (".lock", "environment.txt", "config.json.tmp"):
        (tmp_path / "a").mkdir(exist_ok=True)
        (tmp_path / "a" / name).write_text("")
    assert run(tmp_path / "a", "--steps 1") == 0
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "diary.txt").write_text("mine")
    assert run(tmp_path / "b", "--steps 1") == 2
    assert "is in use" in capsys.readouterr().err


def test_a_run_that_is_refused_leaves_no_folder(tmp_path):
    assert run(tmp_path / "a", "--task nonsense") == 2
    assert not list(tmp_path.iterdir())


def test_an_export_into_the_runs_own_folder_is_refused_before_anything_is_lost(tmp_path, capsys):
    assert run(tmp_path / "a", f"--steps 1 --export {tmp_path / 'a'}") == 2
    assert "the folder is not empty" in capsys.readouterr().err


# ---- one run a folder, and signals ---------------------------------------------------------------


def test_a_folder_that_another_process_holds_is_refused_and_a_kill_frees_it(tmp_path):
    import fcntl

    (tmp_path / "a").mkdir()
    hold = "import fcntl, sys, time\nfile = open(sys.argv[1], 'a')\n"
    hold += "fcntl.flock(file, fcntl.LOCK_EX)\nprint('held', flush=True)\ntime.sleep(60)"
    command = [sys.executable, "-c", hold, str(tmp_path / "a" / ".lock")]  # as locked does it
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="in use by another run"):
            files.run_lock(tmp_path / "a").__enter__()
        holder.kill()
    with (
        files.run_lock(tmp_path / "a"),
        open(tmp_path / "a" / ".lock") as file,
        pytest.raises(BlockingIOError),  # whoever else tries
    ):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert not (tmp_path / "a").exists()  # nothing came of it


@pytest.mark.parametrize(
    ("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129)]
)  # SIGINT: test_train
def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(
    whole, tmp_path, capsys, monkeypatch, name, code
):
    step = train.diffpo_step

    def interrupted(*args):
        if args[-1] == 1:
            os.kill(os.getpid(), getattr(signal, name))
            time.sleep(0.01)
        return step(*args)

    before = signal.getsignal(getattr(signal, name))
    with monkeypatch.context() as patch:
        patch.setattr(train, "diffpo_step", interrupted)
        assert run(tmp_path / "a", "--steps 3 --save_every 3") == code
    out = capsys.readouterr().out
    assert "ending this step" in out and f"--resume --run_dir {tmp_path / 'a'}" in out
    assert signal.getsignal(getattr(signal, name)) == before
    assert len(metrics_of(tmp_path / "a")) == 2
    assert again(tmp_path / "a") == 0 and metrics_of(tmp_path / "a") == metrics_of(whole)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_after_the_last_step_is_not_lost(name):
    number = getattr(signal, name)
    with pytest.raises(KeyboardInterrupt) as stop, files.GracefulInterrupt():
        os.kill(os.getpid(), number)
        time.sleep(0.01)
    assert stop.value.args == (number,)


def test_a_training_prompt_that_does_not_fit_is_told_before_the_first_step(tmp_path, capsys):
    rows = [{"numbers": [n, n + 1, 5], "target": n + 6} for n in range(1, 15)]
    rows.append({"numbers": [1] * 600, "target": 3})
    path = tmp_path / "rows.jsonl"
    for keep in range(20):  # until the long one is for training
        rows[-1]["numbers"] = [1 + keep % 9] * 600
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        code = run(tmp_path / f"run-{keep}", f"--steps 1 --data {path}")
        said = capsys.readouterr().err
        if "is for" not in said:
            break
    assert code == 2 and "more than the 512 that the model can read" in said
    assert not (tmp_path / f"run-{keep}").exists()
