"""Evaluation: the numbers against others got by hand, every decoder, data files, manners."""

import json
import random

import pytest
import torch
from toy import random_tiny

import evaluate
from diffusion_policy import DiffusionPolicy
from runs import create_run, save_checkpoint, write_json
from sampler import Decoder, ThresholdHead
from splits import FromFile
from tasks import TASKS


@pytest.fixture(scope="module")
def policy():
    return DiffusionPolicy(*random_tiny(), ThresholdHead(104))


@pytest.fixture(scope="module")
def run_dir(policy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "a"
    create_run(folder)
    write_json(folder / "config.json", {})
    save_checkpoint(folder, policy, [], 1)
    return folder


def test_the_interval_of_problems_that_have_nothing_in_common_is_about_wilsons():
    # Newcombe (1998), table I: 81 of 263; a bootstrap has no continuity, so to a point
    low, high, k = evaluate.share_interval([True] * 81 + [False] * 182, list(map(str, range(263))))
    assert (low, high, k) == (pytest.approx(0.2553, abs=0.01), pytest.approx(0.3662, abs=0.01), 263)


def test_problems_of_a_cluster_count_together():
    solved, clusters = [i % 3 == 0 for i in range(60)], [str(i) for i in range(60)]
    apart = evaluate.share_interval(solved, clusters)
    together = evaluate.share_interval(solved * 16, clusters * 16)
    assert together == apart  # sixteen copies tell nothing new
    naive = evaluate.share_interval(solved * 16, list(map(str, range(960))))
    assert naive[1] - naive[0] < 0.3 * (apart[1] - apart[0])


def test_the_interval_covers_the_true_share_as_often_as_it_says():
    chance, hits = random.Random(0), 0
    for _ in range(200):
        solved, clusters = [], []
        for cluster in range(60):  # of unequal sizes, each solved or missed as a whole
            right, size = chance.random() < 0.3, chance.choice([1, 5, 20])
            solved += [right] * size
            clusters += [str(cluster)] * size
        low, high, _ = evaluate.share_interval(solved, clusters, draws=400)
        hits += low <= 0.3 <= high
    assert 0.88 <= hits / 200 <= 0.99


@pytest.mark.parametrize(("solved", "low", "high"), [(False, 0, 0.1611), (True, 0.8389, 1)])
def test_where_none_or_all_are_solved_the_interval_is_wilsons(solved, low, high):  # 0 of 20
    interval = evaluate.share_interval([solved] * 40, [str(i % 20) for i in range(40)])
    assert interval == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4), 20)


@pytest.mark.parametrize("name", ["countdown", "sudoku"])
def test_scores_are_those_of_the_rollouts_whatever_the_batch_size(policy, name, monkeypatch):
    task, pay = TASKS[name].compact, lambda self, problem, text: len(text) % 5 / 4
    monkeypatch.setattr(type(task), "reward", pay)  # a random model solves nothing
    problems, decoder = task.problems("test", 7, 0), Decoder("eb", 5.0, temperature=0.0)
    prompts = policy.encode([task.prompt(problem) for problem in problems])
    rollout = policy.rollout(*prompts, task.length, decoder)
    texts = policy.decode(rollout)
    rewards = [task.reward(*pair) for pair in zip(problems, texts, strict=True)]
    for batch_size in (3, 100):
        row = evaluate.evaluate(policy, task, problems, decoder, task.length, batch_size)
        assert row["reward"] == pytest.approx(sum(rewards) / 7)
        assert row["solved"] == pytest.approx(rewards.count(1.0) / 7)
        assert row["nfe"] == pytest.approx(rollout.nfe.sum().item() / 7)
        per_call = rollout.token_mask.sum().item() / rollout.nfe.sum().item()
        assert row["tokens_per_call"] == pytest.approx(per_call)
        assert row["solved_low"] <= row["solved"] <= row["solved_high"] and row["problems"] == 7
        assert row["clusters"] == len({task.key(problem) for problem in problems})


@pytest.fixture
def measured(capsys):
    """measured(folder, "--flag value ...") -> the rows that evaluate.py prints as JSON."""

    def run(folder, flags, task="countdown"):
        capsys.readouterr()
        evaluate.main([str(folder), *(["--task", task] if task else []), *flags.split()])
        lines = capsys.readouterr().out.splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    return run


def test_top_k_takes_as_many_calls_as_the_length_over_k(run_dir, measured):
    rows = measured(run_dir, "--decoder top_k --level 1 4 --problems 3", task="sudoku")
    assert [row["level"] for row in rows] == [1.0, 4.0]
    assert rows[0]["nfe"] <= 19 and rows[1]["nfe"] <= 5  # fewer where a row stops at [EOS]


def test_every_sampler_setting_stands_beside_the_score(run_dir, capsys):
    flags = "--task countdown --problems 3 --temperature 0.5 --block_length 5 --seed 4"
    evaluate.main([str(run_dir), *flags.split()])
    *json_lines, header, table = capsys.readouterr().out.splitlines()
    row = json.loads(json_lines[0])
    expected = dict(decoder="eb", level="learned", block_length=5, length=10, temperature=0.5)
    expected |= dict(seed=4, problems=3, split="test", cache="none")
    assert expected.items() <= row.items() and row["threshold_mean"] == pytest.approx(0.1)
    assert (row["device"], row["dtype"]) == ("cpu", "float32")
    columns = {"solved", "95%, by cluster", "NFE", "tokens/call", "seconds", "block", "temp"}
    assert columns <= {cell.strip() for cell in header.split("  ")}
    assert "learned" in table


def test_a_run_is_measured_as_it_was_trained_unless_flags_say_otherwise(policy, tmp_path, measured):
    trained = {"length": 12, "block_length": 4, "prefill": "<answer>", "cache": "dual"}
    create_run(tmp_path / "b")
    write_json(tmp_path / "b" / "config.json", trained | {"task": "countdown"})
    save_checkpoint(tmp_path / "b", policy, [], 1)
    for flags, expected in (
        ("", (12, 4, "<answer>", "dual", "countdown")),
        ("--length 9 --block_length 0 --cache none", (9, 9, "<answer>", "none", "countdown")),
        ("--task sudoku --length 19", (19, 4, "<answer>", "dual", "sudoku")),
    ):
        row = measured(tmp_path / "b", f"--problems 2 {flags}", task=None)[0]
        found = (row["length"], row["block_length"], row["prefill"], row["cache"], row["task"])
        assert found == expected


def test_a_runs_own_data_file_is_measured_by_what_was_held_out(policy, tmp_path, measured):
    task = TASKS["countdown"].compact
    path = tmp_path / "data.jsonl"
    numbers = [[a, b, c] for a in range(1, 5) for b in (6, 7) for c in (8, 9)]
    rows = [{"numbers": x, "target": y} for x in numbers for y in (3, 5, 9)]
    rows += [row | {"numbers": row["numbers"][::-1]} for row in rows]  # near-duplicates
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    create_run(tmp_path / "c")
    write_json(tmp_path / "c" / "config.json", {"task": "countdown", "data": str(path)})
    save_checkpoint(tmp_path / "c", policy, [], 1)
    own, all_, train = (
        measured(tmp_path / "c", f"--level 1 --problems 100 {flags}", task=None)[0]
        for flags in ("", "--split all", "--split train")
    )
    pools = FromFile(task, path).pools
    assert own["split"] == "test" and own["problems"] == len(pools["test"])
    assert all_["problems"] == len(rows)
    keys = {split: {task.key(problem) for problem in pools[split]} for split in pools}
    assert not keys["test"] & keys["train"] and own["clusters"] == len(keys["test"])
    assert train["clusters"] == len(keys["train"])
    other = tmp_path / "other.jsonl"
    other.write_text(path.read_text())
    assert measured(tmp_path / "c", f"--level 1 --data {other}")[0]["split"] == "all"


def test_out_of_memory_says_which_setting_to_lower(run_dir, capsys, monkeypatch):
    def fail(*_, **__):
        said = "CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has 79 GiB"
        raise torch.OutOfMemoryError(said)

    monkeypatch.setattr(DiffusionPolicy, "rollout", fail)
    with pytest.raises(SystemExit) as exit:
        evaluate.main([str(run_dir), "--task", "countdown", "--problems", "2", "--batch_size", "7"])
    message = capsys.readouterr().err
    assert exit.value.code == 1 and message.count("\n") == 1
    assert "--batch_size (7)" in message and "2.00 GiB" in message


def test_a_data_file_of_either_format_is_read(run_dir, tmp_path, measured):
    path = tmp_path / "data.jsonl"  # of unequal length for tiny
    rows = ({"input": "3,4,5", "output": "35"}, {"numbers": [30, 100, 93], "target": 23})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    row = measured(run_dir, f"--data {path}")[0]
    assert (row["problems"], row["data"], row["split"]) == (2, str(path), "all")


def test_a_decoder_at_temperature_draws_by_its_seed(policy):
    task, seen, original = TASKS["countdown"].compact, [], policy.rollout
    problems = task.problems("test", 8, 0)
    policy.rollout = lambda *args, **kwargs: seen.append(original(*args, **kwargs)) or seen[-1]
    for seed in (0, 0, 1):
        evaluate.evaluate(policy, task, problems, Decoder("top_k", 2), 10, seed=seed)
    del policy.rollout
    first, same, other = (rollout.completion for rollout in seen)
    assert torch.equal(first, same) and not torch.equal(first, other)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--task chess", "countdown"),
        ("--decoder beam", "eb"),
        ("--level many", "learned"),
        ("--level -1", "not -1"),
        ("--decoder confidence --level 1.5", "1"),
        ("--decoder top_k --level 0.5", "1"),
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
    for part in random_tiny():
        part.save_pretrained(tmp_path / "base")
    with pytest.raises(SystemExit):
        evaluate.main([str(tmp_path / "base"), "--task", "countdown"])
    assert "--level" in capsys.readouterr().err
    flags = "--task countdown --level 0.1 --problems 2"
    evaluate.main([str(tmp_path / "base"), *flags.split()])
    assert '"level": 0.1' in capsys.readouterr().out
    with pytest.raises(SystemExit):
        evaluate.main([str(tmp_path), "--task", "countdown"])
    assert "no checkpoint" in capsys.readouterr().err
