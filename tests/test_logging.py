"""What a run logs: every metric has a meaning, samples say what happened, trackers get the rest."""

import json
import re
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from small_run import SMALL_RUN

import train
from config import Config
from training import logging, run_folder
from training.files import read_log

FLAGS = [*SMALL_RUN, "--steps", "2"]
pytestmark = pytest.mark.usefixtures("no_pictures")


# ---- metrics -------------------------------------------------------------------------------------


def test_every_metric_has_a_meaning_and_every_row_has_all_metrics(tmp_path):
    meanings = list(logging.METRICS.values())
    assert all(meanings) and len(set(meanings)) == len(meanings)
    logging.log_step(tmp_path, 3, {"loss": 0.5}, [{"text": "a"}])
    [row] = read_log(tmp_path / "metrics.jsonl")
    assert list(row) == list(logging.METRICS)
    assert row == dict.fromkeys(logging.METRICS) | {"loss": 0.5, "step": 3}
    assert read_log(tmp_path / "samples.jsonl") == [{"text": "a", "step": 3}]


def test_what_a_run_logs_is_in_metrics_and_nothing_in_metrics_is_never_logged(tmp_path):
    """One run with all parts on: a block cache, a KL to the base, a learned threshold."""
    flags = ["--block_length", "5", "--cache", "dual", "--beta", "0.1", "--steps", "1"]
    assert train.main([*FLAGS, *flags, "--run_dir", str(tmp_path / "a")]) == 0
    [row] = read_log(tmp_path / "a" / "metrics.jsonl")
    assert list(row) == list(logging.METRICS)
    assert None not in row.values()


def test_the_share_of_prompts_without_a_lesson_is_counted_by_prompt():
    """Of three prompts with two completions each, two have no differing rewards."""
    advantage = torch.tensor([0.0, 0.0, 1.0, -1.0, 0.0, 0.0])
    rollout = SimpleNamespace(
        nfe=torch.tensor([1, 2, 3, 4, 5, 6]),
        token_mask=torch.tensor([[True, False]]).expand(6, 2),
        threshold=torch.tensor([0.1, 0.1, 0.1, 0.3, 0.3, 0.3]),
    )
    metrics = logging.rollout_metrics(rollout, advantage, num_generations=2)
    assert metrics == {
        "frac_reward_zero_std": pytest.approx(2 / 3),
        "nfe_mean": pytest.approx(3.5),
        "completion_length_mean": pytest.approx(1.0),
        "threshold_mean": pytest.approx(0.2),
        "threshold_std": pytest.approx(0.1),
    }


# ---- samples and progress ------------------------------------------------------------------------


def test_samples_are_of_different_prompts_and_say_when_each_token_came():
    problems = [{"n": n} for n in (1, 1, 2, 2, 1, 3, 4, 5)]
    steps = torch.tensor([[2, 1, 3]]) + torch.arange(8).view(8, 1)
    rollout = SimpleNamespace(
        nfe=steps.amax(1),
        threshold=torch.full((8,), 0.123456),
        unmask_step=steps,
        token_mask=torch.tensor([[True, True, False]]).expand(8, 3),
    )
    rows = logging.sample_rows(problems, list("abcdefgh"), rollout, torch.full((8,), 0.1))
    assert [row["problem"]["n"] for row in rows] == [1, 2, 3, 4]
    assert [row["text"] for row in rows] == ["a", "c", "f", "g"]
    assert [row["unmask_steps"] for row in rows] == [[2, 1], [4, 3], [7, 6], [8, 7]]
    assert [row["nfe"] for row in rows] == [3, 5, 8, 9]
    assert all(row["reward"] == 0.1 and row["threshold"] == 0.1235 for row in rows)


@pytest.mark.parametrize(
    ("steps", "expected_lines"), [(300, 10), (25, 10), (20, 10), (10, 10), (3, 3), (1, 1)]
)
def test_ten_lines_of_progress_each_of_its_tenth(tmp_path, steps, expected_lines):
    lines = []
    bar = SimpleNamespace(total=steps, write=lines.append)
    for step in range(1, steps + 1):
        metrics = {
            "reward_mean": step / 10,
            "solved_mean": 0.5,
            "nfe_mean": 3.0,
            "threshold_mean": 0.1,
            "seconds_rollout": 1.0,
            "seconds_update": 2.0,
        }
        logging.log_step(tmp_path, step, metrics, [])
        logging.print_progress(tmp_path, bar, step, metrics)
    assert len(lines) == expected_lines and max(map(len, lines)) <= 80
    last_tenth = [step / 10 for step in range(1, steps + 1)][-max(1, steps // 10) :]
    assert f"reward {sum(last_tenth) / len(last_tenth):.3f}  " in lines[-1]
    if steps != 20:
        return
    assert lines[0] == "step  2/20  reward 0.150  solved 50.0%  NFE 3.00  γ 0.100  6 s"
    assert lines[-1] == "step 20/20  reward 1.950  solved 50.0%  NFE 3.00  γ 0.100  60 s"


def test_slow_steps_leave_a_line_every_ten_minutes(tmp_path):
    lines = []
    bar = SimpleNamespace(total=300, write=lines.append)
    for step in range(1, 31):
        metrics = dict.fromkeys(("reward_mean", "solved_mean", "nfe_mean", "threshold_mean"), 0.5)
        metrics |= {"seconds_rollout": 100.0, "seconds_update": 55.0}
        logging.log_step(tmp_path, step, metrics, [])
        logging.print_progress(tmp_path, bar, step, metrics)
    assert [int(line.split("/")[0].split()[1]) for line in lines] == [4, 8, 12, 16, 20, 24, 28, 30]


def test_a_log_that_cannot_be_written_is_named_in_one_line(tmp_path):
    with pytest.raises(ValueError, match="metrics.jsonl cannot be written") as error:
        logging.log_step(tmp_path / "missing", 1, {}, [])
    assert "\n" not in str(error.value)


# ---- trackers ------------------------------------------------------------------------------------


class FakeTracker(ModuleType):
    """wandb's and trackio's interface, as far as a run uses it."""

    def __init__(self, name):
        super().__init__(name)
        self.runs = []
        self.logged = []

    def init(self, **options):
        self.runs.append(options)

    def log(self, metrics, step):
        self.logged.append((step, metrics))


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_gets_the_settings_and_each_steps_metrics(monkeypatch, tmp_path, name):
    tracker = FakeTracker(name)
    monkeypatch.setitem(sys.modules, name, tracker)
    flags = [*FLAGS, "--report_to", name, "--run_dir", str(tmp_path / "a")]
    assert train.main(flags) == 0
    [options] = tracker.runs
    assert options["project"] == "diffpo" and options["name"].startswith("a-")
    assert options["config"] == json.loads((tmp_path / "a" / "config.json").read_text()) | {
        "run_dir": options["config"]["run_dir"]
    }
    rows = read_log(tmp_path / "a" / "metrics.jsonl")
    assert [step for step, _ in tracker.logged] == [row["step"] for row in rows] == [1, 2]
    for row, (_, metrics) in zip(rows, tracker.logged, strict=True):
        assert metrics == {name: row[name] for name in metrics}
        assert all(row[name] is None for name in row.keys() - metrics.keys() - {"step"})


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_resumed_run_goes_on_with_its_curves_also_from_another_folder(
    monkeypatch, tmp_path, name
):
    """They opened a second run; and by its folder's name alone trackio would take another's."""
    tracker = FakeTracker(name)
    monkeypatch.setitem(sys.modules, name, tracker)
    for folder in ("a", "beside/a"):
        flags = [*FLAGS, "--report_to", name, "--run_dir", str(tmp_path / folder)]
        assert train.main(flags) == 0
    (tmp_path / "a").rename(tmp_path / "b")
    assert train.main(["--resume", "--steps", "3", "--run_dir", str(tmp_path / "b")]) == 0
    first, other, resumed = tracker.runs
    assert all(options["resume"] == "allow" for options in tracker.runs)
    assert resumed["name"] == first["name"] != other["name"]
    assert resumed.get("id") == first.get("id")
    if name == "wandb":  # of several runs with one name it finds the right one by the id alone
        assert resumed["id"] and first["id"] != other["id"]
    assert [step for step, _ in tracker.logged] == [1, 2, 1, 2, 3]


def test_a_runs_name_has_no_character_that_a_tracker_refuses(tmp_path):
    folder = tmp_path / "γ = 0.1 % of a/b?".replace("/", ":")
    folder.mkdir()
    assert re.fullmatch(r"[\w.-]{10,80}", logging.tracker_name(folder), re.ASCII)
    assert logging.tracker_name(folder) == logging.tracker_name(folder)


def test_a_tracker_that_refuses_a_run_is_one_line(monkeypatch, tmp_path, capsys):
    class NotLoggedIn(FakeTracker):
        def init(self, **options):
            raise RuntimeError("no API key configured.\nUse `wandb login`")

    monkeypatch.setitem(sys.modules, "wandb", NotLoggedIn("wandb"))
    flags = [*FLAGS, "--report_to", "wandb", "--run_dir", str(tmp_path / "a")]
    assert train.main(flags) == 2
    error = capsys.readouterr().err
    assert error.endswith(
        "train.py: --report_to wandb: it refuses the run (no API key configured. Use `wandb login`)"
        "\n"
    )


def test_a_tracker_that_fails_at_night_stops_no_run(monkeypatch, tmp_path, capsys):
    class Lost(FakeTracker):
        def log(self, metrics, step):
            if step in (1, 2):
                raise ConnectionResetError("the service\nis gone")
            super().log(metrics, step)

    tracker = Lost("wandb")
    monkeypatch.setitem(sys.modules, "wandb", tracker)
    flags = [*FLAGS, "--steps", "3", "--report_to", "wandb", "--run_dir", str(tmp_path / "a")]
    assert train.main(flags) == 0
    assert capsys.readouterr().err.count("step 1: wandb has failed (the service is gone)") == 1
    assert [step for step, _ in tracker.logged] == [3]  # it has recovered
    assert [row["step"] for row in read_log(tmp_path / "a" / "metrics.jsonl")] == [1, 2, 3]


def test_tensorboard_gets_each_steps_metrics_and_of_a_step_made_again_the_last(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = Config(model="tiny")
    report = logging.open_tracker("tensorboard", tmp_path, config, first_step=0)
    report({"loss": 0.5, "nfe_mean": 3.0, "peak_memory_gib": None}, 1)
    report({"loss": 0.25, "nfe_mean": 2.0, "peak_memory_gib": None}, 2)
    report = logging.open_tracker("tensorboard", tmp_path, config, first_step=1)
    report({"loss": 0.75, "nfe_mean": 2.0, "peak_memory_gib": None}, 2)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["loss", "nfe_mean"]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 0.5), (2, 0.75)]


@pytest.mark.parametrize("name", ["tensorboard", "trackio", "wandb"])
def test_a_missing_tracker_is_one_line_before_anything_is_measured(
    monkeypatch, tmp_path, capsys, name
):
    for module in (name, "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)  # importing it raises ImportError
    monkeypatch.setattr(run_folder, "load_policy", None)
    assert train.main([*FLAGS, "--report_to", name, "--run_dir", str(tmp_path / "a")]) == 2
    error = capsys.readouterr().err
    assert error == f"train.py: --report_to {name} needs a package: pip install {name}\n"
    assert not (tmp_path / "a").exists()


def test_without_a_tracker_nothing_is_imported(monkeypatch, tmp_path):
    monkeypatch.setattr(logging.importlib, "import_module", None)
    logging.open_tracker("none", tmp_path, Config(), first_step=0)({"loss": 1.0}, 1)
