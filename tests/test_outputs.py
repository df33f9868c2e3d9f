"""What is written is asked for before anything is measured, and what was there is not lost."""

import errno
import os
from pathlib import Path

import pytest

from evaluation.frontiers import show_frontiers
from evaluation.outputs import verify_replaceable, write_rows


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_measured(tmp_path, monkeypatch):
    (tmp_path / "read").mkdir()
    (tmp_path / "read" / "x.json").write_text('"mine"')
    read_only = {tmp_path / "read"}  # root, who runs many a suite, may write anywhere
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) not in read_only)
    verify_replaceable(tmp_path / "new" / "x.json", [tmp_path / "new" / "x.png"], '"mine"')
    for folder in (tmp_path / "read", tmp_path / "read" / "new"):
        with pytest.raises(ValueError, match="read is read-only, so .*x.json cannot be written"):
            verify_replaceable(folder / "x.json", [folder / "x.png"], '"mine"')


def test_rows_that_were_measured_survive_a_full_disk(tmp_path, monkeypatch):
    file = tmp_path / "rows.jsonl"
    link = tmp_path / "link.jsonl"
    link.symlink_to(file)
    write_rows([{"solved": 0.5}], link)
    assert link.is_symlink() and file.read_text() == '{"solved": 0.5}\n'
    write_text = Path.write_text

    def full_disk(path, text, encoding):
        write_text(path, text[:5], encoding)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(ValueError, match="rows.jsonl cannot be written .*No space left"):
        write_rows([{"solved": 0.5}, {"solved": 0.75}], file)
    assert file.read_text() == '{"solved": 0.5}\n'
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.jsonl", "rows.jsonl"]


def test_the_rows_of_a_frontier_are_kept_if_its_picture_cannot_be_drawn(tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise OSError("No space left on device")

    monkeypatch.setattr("evaluation.plots.plot_frontier", fail)
    row = {
        "name": "a",
        "decoder": "eb",
        "level": 0.1,
        "task": "countdown",
        "nfe": 2.0,
        "tokens_per_call": 4.0,
    }
    rows = [row | {"solved": 0.5}, row | {"solved": 0.75, "nfe": 3.0}]
    with pytest.raises(OSError, match="No space"):
        show_frontiers(rows, tmp_path)
    assert '"area": ' in (tmp_path / "frontiers.jsonl").read_text()
