"""A run knows its inputs by content: its data, its task's file, its base, and what it has done."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from small_run import SMALL_RUN, make_small_run
from toy import metrics_of, scores_of

import evaluate
import train
from models import inputs
from models.checkpoints import read_json
from models.tiny import BASE
from tasks.registry import TASKS

pytestmark = pytest.mark.usefixtures("no_pictures")

TASK_FILE = """
from pathlib import Path
from tasks.countdown import Countdown

Path(__file__).with_name("was_run").touch()

class Mine(Countdown):
    name = "mine"

    def __init__(self, is_compact=True):
        super().__init__(is_compact)
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a run of 3 steps on data, a base and a task of the user's own."""
    folder = tmp_path_factory.mktemp("made")
    shutil.copytree(BASE, folder / "base")
    (folder / "mine.py").write_text(TASK_FILE)
    task = TASKS["countdown"].compact
    problems = task.problems("train", 45, 0) + task.problems("test", 15, 0)
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        flags = ["--task", "mine.py:Mine", "--model", "base", "--data", "problems.jsonl"]
        make_small_run(Path("run"), 3, *flags, "--save_every", "1")
    return folder


@pytest.fixture
def work(made, tmp_path, monkeypatch):
    """A copy of that folder, moved to another place. Programs run in it."""
    shutil.copytree(made, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    Path("was_run").unlink(missing_ok=True)
    return tmp_path / "work"


HERE = ["--task", "mine.py:Mine", "--model", "base", "--data", "problems.jsonl"]


def resume(*flags):
    """The exit status."""
    return train.main(["--resume", "--run_dir", "run", *flags])


def measure(*flags):
    """(exit status, rows) of evaluate.py on the run."""
    Path("rows.completions.jsonl").unlink(missing_ok=True)  # of a call before this one
    status = evaluate.main(["run", "--level", "1", "--json", "rows.jsonl", *flags])
    rows = Path("rows.jsonl")
    return status, [
        json.loads(line) for line in rows.read_text().splitlines()
    ] if status == 0 else []


def one_line(capsys):
    """The message of a program that refused something: the last line of what it printed."""
    return capsys.readouterr().err.strip().splitlines()[-1]


# ---- data, task and base -------------------------------------------------------------------------


def test_the_paths_of_inputs_are_absolute_so_a_run_goes_on_from_any_folder(
    made, tmp_path, monkeypatch
):
    config = read_json(made / "run" / "config.json")
    assert config["data"] == str(made / "problems.jsonl")
    assert config["model"] == str(made / "base")
    assert config["task"] == f"{made}/mine.py:Mine"
    shutil.copytree(made / "run", tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    assert resume("--task", f"{made}/mine.py:Mine", "--steps", "4") == 0
    assert len(metrics_of(tmp_path / "run")) == 4


def test_inputs_that_were_moved_are_named_anew_and_known_by_their_content(work, made, monkeypatch):
    made.rename(made.with_name("gone"))
    try:
        assert resume("--steps", "4") == 2
        assert resume(*HERE, "--steps", "4") == 0
    finally:
        made.with_name("gone").rename(made)
    assert len(metrics_of(work / "run")) == 4
    assert read_json(work / "run" / "config.json")["data"] == str(work / "problems.jsonl")


@pytest.mark.parametrize(
    "spelling", ["problems.jsonl", "../work/problems.jsonl", "ABSOLUTE", "COPY"]
)
def test_the_runs_own_data_is_known_by_its_content_however_it_is_called(work, spelling):
    """Under another name it was a new file, and 70% of its problems are for training."""
    path = {"ABSOLUTE": str(work / "problems.jsonl"), "COPY": "copy.jsonl"}.get(spelling, spelling)
    shutil.copy("problems.jsonl", "copy.jsonl")
    status, [row] = measure("--task", "mine.py:Mine", "--data", path)
    assert status == 0 and row["split"] == "test" and row["problems"] < 20


def test_a_new_file_says_how_many_of_its_problems_the_runs_own_file_has_for_training(work, capsys):
    lines = Path("problems.jsonl").read_text().splitlines()
    Path("longer.jsonl").write_text("\n".join([*lines, '{"numbers": [1, 1, 1], "target": 3}']))
    status, [row] = measure("--task", "mine.py:Mine", "--data", "longer.jsonl")
    assert status == 0 and row["split"] == "all" and row["problems"] == 61
    message = capsys.readouterr().err
    assert "of 61 problems of longer.jsonl share their key" in message
    assert int(message.split(" of 61")[0].split()[-1]) > 30


def change_data(work):
    with open("problems.jsonl", "a") as file:
        file.write('{"numbers": [1, 1, 1], "target": 3}\n')
    return "other problems"


def change_base(work):
    made = json.loads((work / "base" / "config.json").read_text()) | {"rms_norm_eps": 1e-5}
    (work / "base" / "config.json").write_text(json.dumps(made))
    return "is not the base"


@pytest.mark.parametrize("change", [change_data, change_base])
def test_a_run_whose_data_or_base_has_changed_is_not_gone_on_with(work, capsys, change):
    says = change(work)
    log = (work / "run" / "metrics.jsonl").read_text()
    config = (work / "run" / "config.json").read_text()
    assert resume(*HERE, "--steps", "4") == 2
    assert says in one_line(capsys)
    assert (work / "run" / "metrics.jsonl").read_text() == log
    assert (work / "run" / "config.json").read_text() == config


def test_a_run_whose_settings_were_edited_is_not_gone_on_with(work, capsys):
    file = work / "run" / "config.json"
    config = read_json(file)
    for edit in ({"lora_rank": config["lora_rank"] + 1}, {"nfe_penalty": 0.1}):
        file.write_text(json.dumps(config | edit))
        assert resume(*HERE, "--steps", "4") == 2
        assert "config.json was edited after the run began" in one_line(capsys)
    file.write_text(json.dumps(config | {"save_every": 1}))  # which --save_every may change as well
    assert resume(*HERE, "--steps", "4") == 0


def test_a_run_whose_base_has_changed_is_not_measured(work, made, capsys):
    original = (made / "base" / "config.json").read_text()
    (made / "base" / "config.json").write_text(original + "\n")
    try:
        assert measure("--task", "mine.py:Mine")[0] == 2
    finally:
        (made / "base" / "config.json").write_text(original)
    assert f"{made}/base is not the base that run was trained from" in one_line(capsys)
    change_base(work)
    flags = ["--adapter", "run", "--task", "countdown", "--level", "1", "--problems", "2"]
    assert evaluate.main(["base", *flags]) == 2
    assert "base is not the base that run was trained from" in one_line(capsys)


def test_an_adapter_is_given_as_a_runs_folder_or_as_its_checkpoint(work):
    flags = ["--task", "countdown", "--level", "1", "--problems", "2"]
    for adapter in ("run", "run/checkpoint"):
        assert evaluate.main(["base", "--adapter", adapter, *flags]) == 0


def test_a_changed_task_file_is_said_to_have_changed(work, capsys):
    Path("mine.py").write_text(TASK_FILE + "\n# mended\n")
    assert resume(*HERE, "--steps", "4") == 0
    assert "mine.py has changed since run was started" in capsys.readouterr().err
    assert measure("--task", "mine.py:Mine", "--problems", "2")[0] == 0
    assert "mine.py has changed since run was started" in capsys.readouterr().err


def test_a_run_folder_does_not_decide_which_code_runs(work, made, capsys):
    """config.json of a folder from elsewhere may name any file."""
    (made / "was_run").unlink(missing_ok=True)
    for program in (measure, resume):
        program()
        message = one_line(capsys)
        assert f"its file runs only if you name it: add --task {made}/mine.py:Mine" in message
    assert not (made / "was_run").exists()
    assert measure("--task", "mine.py:Mine", "--problems", "2")[0] == 0
    assert Path("was_run").exists()
    assert measure("--task", "mine.py:Other")[0] == 2


def test_the_hint_after_a_stop_can_be_typed_as_it_is(made, work, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "diffpo_step", interrupt)
    assert resume(*HERE, "--steps", "4") == 130
    hint = f"python train.py --resume --run_dir run --task {work}/mine.py:Mine\n"
    assert capsys.readouterr().out.endswith(hint)


def test_other_threads_are_said_to_round_otherwise(work, capsys):
    assert resume(*HERE, "--steps", "4") == 0
    assert "threads" not in capsys.readouterr().err
    torch.set_num_threads(2)
    try:
        assert resume(*HERE, "--steps", "5") == 0
    finally:
        torch.set_num_threads(1)
    message = capsys.readouterr().err
    assert "2 threads" in message and "rounded differently" in message


def test_inputs_that_cannot_be_read_are_one_line(work, capsys):
    for content in ("{", "[]", "{}", '{"data": 1, "task": "", "model": ""}'):
        (work / "run" / inputs.INPUTS).write_text(content)
        assert resume(*HERE) == 2
        assert "inputs.json" in one_line(capsys)


# ---- nothing that is missing is made again under its name ----------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of 3 steps that learned something: a high rate on all weights."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    make_small_run(folder, 3, "--lora_rank", "0", "--eval_problems", "40")
    return folder


@pytest.fixture
def run_dir(finished, tmp_path, monkeypatch):
    """A copy of it, called run, in the current folder."""
    shutil.copytree(finished, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


@pytest.mark.parametrize("missing", ["eval.json", "frontier.json", "completions.json"])
def test_the_base_is_measured_again_as_the_base_and_not_as_what_was_trained(
    finished, run_dir, missing
):
    (run_dir / missing).unlink()
    assert resume() == 0
    assert scores_of(run_dir) == scores_of(finished)
    base, trained = scores_of(run_dir)[:2]
    assert base["solved_each"] != trained["solved_each"]  # or this test would show nothing


def test_a_lora_runs_base_is_measured_again_without_its_adapter(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--steps", "3", "--learning_rate", "0.05", "--warmup_steps", "0"]
    assert train.main([*SMALL_RUN, *flags, "--eval_problems", "40", "--run_dir", "run"]) == 0
    scores = scores_of(tmp_path / "run")
    (tmp_path / "run" / "eval.json").unlink()
    assert resume() == 0 and scores_of(tmp_path / "run") == scores
    assert scores[0]["solved_each"] != scores[1]["solved_each"]


def test_fewer_steps_than_are_done_are_refused(run_dir, capsys):
    assert resume("--steps", "2") == 2
    assert "--steps 2: run has already done 3 steps" in one_line(capsys)


def test_a_finished_run_without_its_checkpoint_is_not_trained_again(run_dir, tmp_path, capsys):
    shutil.rmtree(run_dir / "checkpoint")
    log = (run_dir / "metrics.jsonl").read_text()
    assert resume("--export", str(tmp_path / "out")) == 2
    assert "run has no checkpoint, although 3 steps are logged" in one_line(capsys)
    assert (run_dir / "metrics.jsonl").read_text() == log and not (tmp_path / "out").exists()
