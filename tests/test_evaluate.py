"""Evaluation: the numbers against others got by hand, every decoder, data files, and its manners."""

import json

import pytest
import torch

import evaluate
from diffusion_policy import DiffusionPolicy
from models import load_denoiser
from runs import create_run, save_checkpoint, write_json
from sampler import Decoder, ThresholdHead
from tasks import TASKS


@pytest.fixture(scope="module")
def policy():
    return DiffusionPolicy(*load_denoiser("tiny"), ThresholdHead(128))


@pytest.fixture(scope="module")
def run_dir(policy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "a"
    create_run(folder)
    write_json(folder / "config.json", {})
    save_checkpoint(folder, policy, [], 1)
    return folder


def test_the_interval_is_wilsons():
    # Newcombe (1998), table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29
    for successes, n, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611), (1, 29, 0.0061, 0.1718)):
        assert evaluate.wilson_interval(successes, n) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize("name", ["countdown", "sudoku"])
def test_scores_are_those_of_the_rollouts_whatever_the_batch_size(policy, name, monkeypatch):
    task = TASKS[name].compact
    monkeypatch.setattr(type(task), "reward", lambda self, problem, text: len(text) % 5 / 4)  # a random model solves nothing
    problems, decoder = task.problems("test", 7, 0), Decoder("eb", 5.0)
    rollout = policy.rollout(*policy.encode([task.prompt(p) for p in problems]), task.length, decoder, None, 0.0)
    rewards = [task.reward(p, text) for p, text in zip(problems, policy.decode(rollout), strict=True)]
    for batch_size in (3, 100):
        row = evaluate.evaluate(policy, task, problems, decoder, batch_size=batch_size)
        assert row["reward"] == pytest.approx(sum(rewards) / 7) and row["solved"] == pytest.approx(rewards.count(1.0) / 7)
        assert row["nfe"] == pytest.approx(rollout.nfe.sum().item() / 7)
        assert row["tokens_per_call"] == pytest.approx(rollout.token_mask.sum().item() / rollout.nfe.sum().item(), rel=0.2)
        assert row["solved_low"] <= row["solved"] <= row["solved_high"] and row["problems"] == 7


def test_top_k_takes_as_many_calls_as_the_length_over_k(run_dir, capsys):
    evaluate.main([str(run_dir), "--task", "sudoku", "--decoder", "top_k", "--setting", "1", "4", "--problems", "3"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [row["setting"] for row in rows] == [1.0, 4.0]
    assert rows[0]["nfe"] <= 19 and rows[1]["nfe"] <= 5  # fewer where a row stops at [EOS]


def test_every_sampler_setting_stands_beside_the_score(run_dir, capsys):
    evaluate.main([str(run_dir), "--task", "countdown", "--problems", "3", "--temperature", "0.5", "--block_length", "5", "--seed", "4"])
    *json_lines, header, table = capsys.readouterr().out.splitlines()
    row = json.loads(json_lines[0])
    expected = dict(decoder="eb", setting="learned", block_length=5, length=10, temperature=0.5, seed=4, problems=3, data="test")
    assert expected.items() <= row.items() and row["threshold_mean"] == pytest.approx(0.1)
    assert (row["device"], row["dtype"]) == ("cpu", "float32")
    assert {"solved", "95% interval", "NFE", "tokens/call", "seconds", "block", "T"} <= {cell.strip() for cell in header.split("  ")}
    assert "learned" in table


def test_a_run_is_measured_as_it_was_trained_unless_flags_say_otherwise(policy, tmp_path, capsys):
    create_run(tmp_path / "b")
    write_json(tmp_path / "b" / "config.json", {"length": 12, "block_length": 4, "prefill": "<answer>", "cache": "dual"})
    save_checkpoint(tmp_path / "b", policy, [], 1)
    for flags, expected in (("", (12, 4, "<answer>", "none")), ("--length 9 --block_length 0 --cache none", (9, 9, "<answer>", "none"))):
        evaluate.main([str(tmp_path / "b"), "--task", "countdown", "--problems", "2", *flags.split()])
        row = json.loads(capsys.readouterr().out.splitlines()[0])
        assert (row["length"], row["block_length"], row["prefill"], row["cache"]) == expected


def test_out_of_memory_says_which_setting_to_lower(run_dir, capsys, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has 79 GiB")

    monkeypatch.setattr(DiffusionPolicy, "rollout", fail)
    with pytest.raises(SystemExit) as exit:
        evaluate.main([str(run_dir), "--task", "countdown", "--problems", "2", "--batch_size", "7"])
    message = capsys.readouterr().err
    assert exit.value.code == 1 and "--batch_size (7)" in message and "2.00 GiB" in message and message.count("\n") == 1


def test_a_data_file_of_either_format_is_read(run_dir, tmp_path, capsys):
    path = tmp_path / "data.jsonl"
    path.write_text('{"input": "3,4,5", "output": "35"}\n{"numbers": [30, 100, 93], "target": 23}\n')  # of unequal length for tiny
    evaluate.main([str(run_dir), "--task", "countdown", "--data", str(path)])
    row = json.loads(capsys.readouterr().out.splitlines()[0])
    assert row["problems"] == 2 and row["data"] == str(path)


def test_a_decoder_at_temperature_draws_by_its_seed(policy):
    task = TASKS["countdown"].compact
    problems = task.problems("test", 8, 0)
    seen = []
    original = policy.rollout
    policy.rollout = lambda *args, **kwargs: seen.append(original(*args, **kwargs)) or seen[-1]
    for seed in (0, 0, 1):
        evaluate.evaluate(policy, task, problems, Decoder("top_k", 2), temperature=1.0, seed=seed)
    del policy.rollout
    first, same, other = (rollout.completion for rollout in seen)
    assert torch.equal(first, same) and not torch.equal(first, other)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--task chess", "countdown"),
        ("--decoder beam", "eb"),
        ("--setting many", "learned"),
        ("--setting -1", "not -1"),
        ("--decoder confidence --setting 1.5", "1"),
        ("--decoder top_k --setting 0.5", "1"),
        ("--decoder top_k", "only eb"),
        ("--problems 0", "at least 1"),
        ("--split all", "test"),
        ("--data nowhere.jsonl", "nowhere.jsonl"),
        ("--data EMPTY", "no problems"),
        ("--data FIELDS", "line 1"),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(run_dir, tmp_path, capsys, flags, says):
    (tmp_path / "EMPTY").write_text("")
    (tmp_path / "FIELDS").write_text('{"numbers": [1, 2]}\n')
    flags = [str(tmp_path / flag) if flag.isupper() else flag for flag in flags.split()]
    task = [] if "--task" in flags else ["--task", "countdown"]
    with pytest.raises(SystemExit) as exit:
        evaluate.main([str(run_dir), *task, *flags])
    message = capsys.readouterr().err
    assert exit.value.code == 2 and says in message and message.count("\n") == 1


def test_a_folder_without_a_threshold_head_asks_for_a_number(run_dir, tmp_path, capsys):
    for part in load_denoiser("tiny"):
        part.save_pretrained(tmp_path / "base")
    with pytest.raises(SystemExit):
        evaluate.main([str(tmp_path / "base"), "--task", "countdown"])
    assert "--setting" in capsys.readouterr().err
    evaluate.main([str(tmp_path / "base"), "--task", "countdown", "--setting", "0.1", "--problems", "2"])
    assert '"setting": 0.1' in capsys.readouterr().out
    with pytest.raises(SystemExit):
        evaluate.main([str(tmp_path), "--task", "countdown"])
    assert "no checkpoint" in capsys.readouterr().err
