"""Run folders: files are replaced whole, and what a kill leaves half-done is seen to."""

import pytest

import runs


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "checkpoint"
    for content in ("first", "second"):
        with runs.replacing(path) as aside:
            aside.mkdir()
            (aside / "file").write_text(content)
    with pytest.raises(RuntimeError), runs.replacing(path) as aside:
        aside.mkdir()
        (aside / "file").write_text("third, half-writ")
        raise RuntimeError("out of disk")
    assert (path / "file").read_text() == "second"
    path.rename(tmp_path / "checkpoint.old")  # a kill between the two renames
    runs.settle(path)
    assert (path / "file").read_text() == "second"
    (tmp_path / "checkpoint.old").mkdir()  # a kill after them, before the old one was gone
    (tmp_path / "checkpoint.old" / "file").write_text("first")
    with runs.replacing(path) as aside:
        aside.mkdir()
    assert [found.name for found in tmp_path.iterdir()] == ["checkpoint"]


def test_a_half_written_line_and_what_follows_are_not_read(tmp_path):
    file = tmp_path / "metrics.jsonl"
    assert runs.read_lines(file) == []
    file.write_text('{"step": 1}\n{"step": 2}\n')
    with open(file, "a") as f:
        f.write('{"step": 3, "rew')
    assert runs.read_lines(file) == [{"step": 1}, {"step": 2}]


def test_a_file_that_is_missing_or_no_json_is_named(tmp_path):
    (tmp_path / "broken.json").write_text("{")
    for name in ("missing.json", "broken.json"):
        with pytest.raises(ValueError, match=name):
            runs.read_json(tmp_path / name)
    runs.write_json(tmp_path / "good.json", {"seed": 1})
    assert runs.read_json(tmp_path / "good.json") == {"seed": 1}
