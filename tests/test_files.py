"""Files that survive: replaced whole, synced before that, checked when read; one run a folder."""

import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small_run import SMALL_RUN, make_small_run
from toy import metrics_of

import train
from models.checkpoints import read_json
from training import files

ROOT = Path(train.__file__).parent


# ---- writing -------------------------------------------------------------------------------------


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "checkpoint"
    for content in ("first", "second"):
        with files.atomic_write(path, keep=True) as temporary_path:
            temporary_path.mkdir()
            (temporary_path / "file").write_text(content)
    cannot_be_written = pytest.raises(ValueError, match="cannot be written .out of disk.")
    with cannot_be_written as error, files.atomic_write(path, keep=True) as temporary_path:
        temporary_path.mkdir()
        (temporary_path / "file").write_text("third, half-writ")
        raise RuntimeError("out\nof disk")
    assert "\n" not in str(error.value)
    assert (path / "file").read_text() == "second"
    assert (tmp_path / "checkpoint.old" / "file").read_text() == "first"
    (path / "file").unlink()
    path.rmdir()  # as after a kill between the two renames
    files.recover_interrupted_rename(path)
    assert (path / "file").read_text() == "first"
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint"]


def test_nothing_beside_a_path_is_touched_and_a_folder_in_use_is_not_replaced(tmp_path):
    """Earlier versions took merged.tmp and merged.old for their own, and removed them."""
    path = tmp_path / "merged"
    for name in ("merged.old", "merged.tmp", "metrics.jsonl.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("the user's")
    with files.atomic_write(path) as temporary_path:
        temporary_path.mkdir()
        (temporary_path / "file").write_text("exported")
    with files.atomic_write(tmp_path / "metrics.jsonl") as temporary_path:
        temporary_path.write_text("{}")
    with (
        pytest.raises(ValueError, match="cannot be written"),
        files.atomic_write(path) as temporary_path,
    ):
        temporary_path.mkdir()
    assert (path / "file").read_text() == "exported"
    for name in ("merged.old", "merged.tmp", "metrics.jsonl.old"):
        assert (tmp_path / name / "file").read_text() == "the user's"
    assert len(list(tmp_path.iterdir())) == 5


def test_a_file_is_on_the_disk_before_it_takes_the_old_ones_place(tmp_path, monkeypatch):
    events = []
    fsync = os.fsync
    replace = Path.replace

    def recorded_fsync(handle):
        events.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    def recorded_replace(path, target):
        events.append("rename")
        replace(path, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(Path, "replace", recorded_replace)
    with files.atomic_write(tmp_path / "checkpoint") as temporary_path:
        temporary_path.mkdir()
        (temporary_path / "state.pt").write_text("x")
    assert events == ["state.pt", "checkpoint", "rename", tmp_path.name]


def test_what_lies_where_the_old_one_goes_is_removed_and_a_link_is_not_followed(tmp_path):
    path = tmp_path / "checkpoint"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept").write_text("1")
    path.symlink_to(elsewhere)
    (tmp_path / "checkpoint.old").mkdir()
    (tmp_path / "checkpoint.old" / "half").write_text("")
    for _ in range(2):
        with files.atomic_write(path, keep=True) as temporary_path:
            temporary_path.mkdir()
    assert not path.is_symlink() and not any(path.iterdir()) and (elsewhere / "kept").exists()
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == ["checkpoint", "checkpoint.old", "elsewhere"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux's device that is always full")
def test_a_full_disk_is_called_so_whatever_torch_says_of_it(tmp_path, monkeypatch):
    """torch.save reports "[enforce fail at inline_container.cc] . unexpected pos 576 vs 534"."""
    with pytest.raises(RuntimeError, match="enforce fail"):
        torch.save({"a": torch.zeros(2**16)}, "/dev/full")
    full = os.statvfs_result([4096] * 2 + [0] * 8)
    monkeypatch.setattr(os, "statvfs", lambda path: full)
    path = tmp_path / "state.pt"
    full_disk = pytest.raises(ValueError, match=r"cannot be written \(No space left on device\)$")
    with full_disk as error, files.atomic_write(path) as temporary_path:
        temporary_path.write_text("")
        torch.save({"a": torch.zeros(2**16)}, "/dev/full")
    assert "\n" not in str(error.value) and not path.exists()


def test_torchs_other_failures_to_write_show_no_assertion_either(tmp_path):
    failed = pytest.raises(ValueError, match="cannot be written .torch.save failed: is there a quo")
    with failed as error, files.atomic_write(tmp_path / "state.pt"):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")
    assert "enforce" not in str(error.value)


# ---- reading -------------------------------------------------------------------------------------


def test_a_half_written_line_and_what_follows_are_not_read(tmp_path):
    file = tmp_path / "metrics.jsonl"
    assert files.read_log(file) == []
    file.write_text('{"step": 1}\n{"step": 2}\n')
    with open(file, "a") as handle:
        handle.write('{"step": 3, "rew')
    assert files.read_log(file) == [{"step": 1}, {"step": 2}]


NO_ROWS = ["garbage", "[1]", "{}", '{"step": "2"}', "\0\0\0", "null", "[" * 5000]


@pytest.mark.parametrize("line", NO_ROWS)
def test_a_line_that_is_no_row_is_left_out_and_told_and_the_rest_is_kept(tmp_path, capsys, line):
    file = tmp_path / "metrics.jsonl"
    file.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    assert [row["step"] for row in files.read_log(file)] == [1, 2]
    message = capsys.readouterr().err
    assert "line 2 is not a row" in message and message.count("\n") == 1
    file.write_bytes(b'{"step": 1}\n\xff\xfe\n{"step": 2}\n')
    assert [row["step"] for row in files.read_log(file)] == [1, 2]


def test_a_file_that_is_missing_or_no_json_is_named(tmp_path):
    (tmp_path / "broken.json").write_text("{")
    for name in ("missing.json", "broken.json"):
        with pytest.raises(ValueError, match=name):
            read_json(tmp_path / name)
    files.write_json(tmp_path / "good.json", {"seed": 1})
    assert read_json(tmp_path / "good.json") == {"seed": 1}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The metrics of a run of three steps that was left alone."""
    folder = tmp_path_factory.mktemp("runs") / "unbroken"
    make_small_run(folder, 3)
    return metrics_of(folder)


# ---- one run a folder ----------------------------------------------------------------------------

HOLD_THE_LOCK = """
import fcntl, sys, time
file = open(sys.argv[1], "a")
fcntl.flock(file, fcntl.LOCK_EX)  # as run_lock does it
print("held", flush=True)
time.sleep(60)
"""


def test_a_folder_that_another_process_holds_is_refused_and_a_kill_frees_it(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    command = [sys.executable, "-c", HOLD_THE_LOCK, str(folder / ".lock")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="in use by another run"), files.run_lock(folder):
            pass
        holder.kill()
    with (
        files.run_lock(folder),
        open(folder / ".lock") as file,
        pytest.raises(BlockingIOError),  # anybody else who tries
    ):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert [file.name for file in folder.iterdir()] == [".lock"]  # it was there before, as found


def test_a_lock_that_was_removed_meanwhile_is_taken_anew_so_that_two_never_hold_one(
    tmp_path, monkeypatch
):
    """The run before it removes the file after this one opened it, and before it locks it."""
    folder = tmp_path / "a"
    flock = fcntl.flock
    removed = []

    def flock_after_removal(handle, operation):
        if not removed:
            removed.append(folder / ".lock")
            (folder / ".lock").unlink()
        flock(handle, operation)

    monkeypatch.setattr(fcntl, "flock", flock_after_removal)
    with files.run_lock(folder):
        assert removed and (folder / ".lock").exists()
        with pytest.raises(ValueError, match="in use by another run"), files.run_lock(folder):
            pass


def test_a_lock_of_a_folder_that_was_removed_takes_no_other_runs_lock_along(tmp_path):
    folder = tmp_path / "a"
    with files.run_lock(folder):
        folder.rename(tmp_path / "moved")
        folder.mkdir()
        (folder / ".lock").write_text("another run's")
    assert (folder / ".lock").read_text() == "another run's"


@pytest.mark.parametrize("comes_in_its_place", [False, True])
def test_a_run_whose_folder_is_moved_stops_at_its_first_write_and_can_be_resumed(
    unbroken, tmp_path, capsys, monkeypatch, comes_in_its_place
):
    folder = tmp_path / "a"
    diffpo_step = train.diffpo_step

    def move_away(config, task, policy, reference, optimizers, step):
        if step == 1:
            folder.rename(tmp_path / "moved")
            if comes_in_its_place:
                folder.mkdir()
                (folder / ".lock").write_text("")
        return diffpo_step(config, task, policy, reference, optimizers, step)

    monkeypatch.setattr(train, "draw_pictures", lambda config, run_dir: [])
    with monkeypatch.context() as patch:
        patch.setattr(train, "diffpo_step", move_away)
        flags = ["--steps", "3", "--save_every", "1", "--run_dir", str(folder)]
        assert train.main([*SMALL_RUN, *flags]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert f"{folder} was moved or removed while the run was writing to it" in message
    assert not folder.exists() or [file.name for file in folder.iterdir()] == [".lock"]
    assert train.main(["--resume", "--run_dir", str(tmp_path / "moved")]) == 0
    assert metrics_of(tmp_path / "moved") == unbroken


# ---- signals -------------------------------------------------------------------------------------


@pytest.fixture
def heard_signals():
    """A suite that a script starts with & ignores SIGINT, and one under nohup SIGHUP."""
    before_int = signal.signal(signal.SIGINT, signal.default_int_handler)
    before_hup = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGINT, before_int)
    signal.signal(signal.SIGHUP, before_hup)


@pytest.mark.parametrize(
    ("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129)]
)  # SIGINT is tested in test_train.py
def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(
    unbroken, tmp_path, capsys, monkeypatch, heard_signals, name, code
):
    folder = tmp_path / "a"
    number = getattr(signal, name)
    handler = signal.getsignal(number)
    diffpo_step = train.diffpo_step

    def interrupted_step(config, task, policy, reference, optimizers, step):
        if step == 1:
            os.kill(os.getpid(), number)
            time.sleep(0.01)
        return diffpo_step(config, task, policy, reference, optimizers, step)

    monkeypatch.setattr(train, "draw_pictures", lambda config, run_dir: [])
    with monkeypatch.context() as patch:
        patch.setattr(train, "diffpo_step", interrupted_step)
        flags = ["--steps", "3", "--save_every", "3", "--run_dir", str(folder)]
        assert train.main([*SMALL_RUN, *flags]) == code
    out = capsys.readouterr().out
    assert "finishing this step" in out and f"--resume --run_dir {folder}" in out
    assert signal.getsignal(number) == handler
    assert len(metrics_of(folder)) == 2
    assert train.main(["--resume", "--run_dir", str(folder)]) == 0
    assert metrics_of(folder) == unbroken


def test_under_nohup_a_closed_terminal_changes_nothing():
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with files.GracefulInterrupt() as interrupt:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.01)
            assert interrupt.signal_number == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, previous)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_after_the_last_step_is_not_lost(name):
    number = getattr(signal, name)
    with pytest.raises(KeyboardInterrupt) as stop, files.GracefulInterrupt():
        os.kill(os.getpid(), number)
        time.sleep(0.01)
    assert stop.value.args == (number,)


@pytest.mark.usefixtures("heard_signals")
def test_a_second_signal_stops_at_once():
    with pytest.raises(KeyboardInterrupt) as stop, files.GracefulInterrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        assert interrupt.signal_number == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        pytest.fail("the second Ctrl-C was ignored")
    assert stop.value.args == ()  # Python's own
