"""Evaluation: the numbers against others got by hand, every decoder, data files, manners."""

import json
import re
from dataclasses import asdict

import pytest
import torch
from checkpoints import write_checkpoint
from small_run import make_run_folder
from toy import random_tiny

import evaluate
from config import Config
from diffusion_policy import DiffusionPolicy
from evaluation import metrics, progress, tables
from evaluation.options import resolve_options
from evaluation.trace_page import verify_folder
from models import loading, lora
from models.prompting import decode_completions, encode_prompts
from sampler import Decoder, ThresholdHead
from tasks import registry
from tasks.registry import TASKS
from tasks.splits import ProblemsFromFile
from training.checkpoint import save_checkpoint
from training.files import write_json
from training.run_folder import create_run


@pytest.fixture(scope="module")
def policy():
    return DiffusionPolicy(*random_tiny(), ThresholdHead(104))


@pytest.fixture(scope="module")
def run_dir(policy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "a"
    make_run_folder(folder, Config())
    save_checkpoint(folder, policy, [], 1)
    return folder


@pytest.mark.parametrize("name", ["countdown", "sudoku"])
def test_scores_are_those_of_the_rollouts_whatever_the_batch_size(policy, name, monkeypatch):
    task = TASKS[name].compact
    reward = lambda self, problem, text: len(text) % 5 / 4  # noqa: E731
    monkeypatch.setattr(type(task), "reward", reward)  # a random model solves nothing
    problems = task.problems("test", 7, 0)
    decoder = Decoder("eb", 5.0, temperature=0.0)
    prompts = [task.prompt(problem) for problem in problems]
    prompt_ids, prompt_mask = encode_prompts(policy, prompts)
    rollout = policy.rollout(prompt_ids, prompt_mask, task.length, decoder)
    texts = decode_completions(policy, rollout)
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


def test_a_rollout_function_completes_the_batches_if_one_is_given(policy):
    task = TASKS["countdown"].compact
    problems = task.problems("test", 5, 0)
    batches = []

    def rollout(policy, prompt_ids, prompt_mask, length, decoder, generator):
        batches.append(len(prompt_ids))
        return policy.rollout(prompt_ids, prompt_mask, length, decoder, generator)

    decoder = Decoder("eb", 5.0, temperature=0.0)
    row = evaluate.evaluate(policy, task, problems, decoder, 10, batch_size=2, rollout=rollout)
    own = evaluate.evaluate(policy, task, problems, decoder, 10, batch_size=2)
    assert batches == [2, 2, 1]
    assert row | {"seconds": 0} == own | {"seconds": 0}


def test_a_row_of_several_tasks_has_each_ones_own_row_as_its_part(policy, monkeypatch):
    lucky = lambda self, problem, text: len(text) % 3 == 0  # noqa: E731 (it solves nothing else)
    for name in ("countdown", "sudoku"):
        monkeypatch.setattr(type(TASKS[name]), "solved", lucky)
    task = registry.load_task("countdown,sudoku", True)
    decoder = Decoder("eb", 2.0, temperature=0.0)
    problems = task.problems("test", 9, 0)
    row = evaluate.evaluate(policy, task, problems, decoder, 19, 3)
    solved_each = [""] * 9
    for name, part in row["tasks"].items():
        places = [i for i, problem in enumerate(problems) if problem["task"] == name]
        own = [problems[i] for i in places]
        length = TASKS[name].length
        alone = evaluate.evaluate(policy, TASKS[name].compact, own, decoder, length, 3)
        assert part.items() <= alone.items() and {"solved", "solved_low", "nfe"} <= part.keys()
        for place, mark in zip(places, alone["solved_each"], strict=True):
            solved_each[place] = mark
    assert row["solved_each"] == "".join(solved_each) and {*solved_each} == {"0", "1"}
    keys = [task.key(problem) for problem in problems]
    number_of_cluster = dict(zip(row["cluster_each"].split(), keys, strict=True))
    assert [number_of_cluster[number] for number in row["cluster_each"].split()] == keys
    assert len(number_of_cluster) == row["clusters"]
    assert sum(map(int, row["nfe_each"].split())) / 9 == row["nfe"]
    parts = row["tasks"].values()
    assert [part["problems"] for part in parts] == [5, 4]
    assert row["solved"] == solved_each.count("1") / 9
    for key, by in (("nfe", "problems"), ("solved", "problems"), ("clusters", None)):
        total = sum(part[key] * (part[by] if by else 1) for part in parts)
        assert row[key] == pytest.approx(total / (9 if by else 1))
    assert "length up to 19" in tables.conditions([row])
    alone = evaluate.evaluate(policy, TASKS["sudoku"].compact, own, decoder, 19)
    assert "tasks" not in alone and "length 19" in tables.conditions([alone])


@pytest.fixture
def measured(tmp_path):
    """measured(folder, "--flag value ...") -> the rows that evaluate.py writes as JSON."""

    def run(folder, flags):
        path = tmp_path / "rows.jsonl"
        (tmp_path / "rows.completions.jsonl").unlink(missing_ok=True)  # of a call before this one
        assert evaluate.main([str(folder), *flags.split(), "--json", str(path)]) == 0
        return read_rows(path)

    return run


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_top_k_takes_as_many_calls_as_the_length_over_k(run_dir, measured):
    flags = "--task sudoku --decoder top_k --level 1 4 --problems 3"
    rows = measured(run_dir / "checkpoint", flags)
    assert [row["level"] for row in rows] == [1.0, 4.0]
    assert rows[0]["nfe"] <= 19 and rows[1]["nfe"] <= 5  # fewer where a row stops at [EOS]


def test_every_setting_stands_beside_the_score_and_the_table_says_once_what_is_shared(
    run_dir, measured, capsys, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    flags = "--problems 3 --temperature 0.5 --block_length 5 --seed 4 --level learned 0.2"
    row, _ = measured(run_dir, flags)
    expected = {
        "name": "a",
        "task": "countdown",
        "split": "test",
        "problems": 3,
        "checkpoint": str(run_dir),
        "revision": 1,
        "dtype": "float32",
        "decoder": "eb",
        "level": "learned",
        "temperature": 0.5,
        "block_length": 5,
        "length": 10,
        "cache": "none",
        "seed": 4,
    }
    assert expected.items() <= row.items() and row["threshold_mean"] == pytest.approx(0.1)
    assert row["device"] == evaluate.device_name(torch.device("cpu")) != "cpu"
    assert row["device"].endswith(", 1 thread")

    out = capsys.readouterr().out
    assert "{" not in out  # a table, no JSON
    lines = out.splitlines()
    assert all(len(line) <= 80 for line in lines)
    i = next(i for i, line in enumerate(lines) if line.strip().startswith("level"))
    conditions = "temperature 0.5, length 10, blocks of 5, no cache, 3 problems in"
    shared = " ".join(lines[:i])
    assert shared == f"a: countdown, eb, {conditions} {row['clusters']} clusters"
    columns = ["level", "gamma", "solved", "95% interval", "reward", "NFE", "tokens/call", "AUP"]
    assert re.split("  +", lines[i].strip()) == columns
    cells = [re.split("  +", line.strip()) for line in lines[i + 1 : i + 3]]
    assert [line[:2] for line in cells] == [["learned", "0.100 σ 0.000"], ["0.2", "0.200 σ 0.000"]]
    assert cells[0][-3] == f"{row['nfe']:.2f}"
    assert lines[i + 3].startswith("AUP: accuracy under parallelism")
    assert re.split("  +", lines[i + 6]) == ["minus learned", "solved, points", "NFE"]
    assert lines[i + 7].split()[0] == "0.2"
    assert lines[i + 8] == "In brackets: 95% intervals, paired by problem, over clusters."


@pytest.mark.parametrize(
    ("flags", "changed"),
    [
        ("", {}),
        (
            "--max_completion_length 9 --block_length 0 --cache none",
            {"length": 9, "block_length": 9, "cache": "none"},
        ),
        ("--task countdown --max_completion_length 11", {"length": 11}),
    ],
)
def test_a_run_is_measured_as_it_was_trained_unless_flags_say_otherwise(
    policy, tmp_path, measured, flags, changed
):
    trained = {
        "max_completion_length": 12,
        "block_length": 4,
        "prefill": "<answer>",
        "cache": "dual",
        "task": "countdown",
    }
    make_run_folder(tmp_path / "b", Config(**trained))
    save_checkpoint(tmp_path / "b", policy, [], 1)
    row = measured(tmp_path / "b", f"--problems 2 {flags}")[0]
    expected = {
        "length": 12,
        "block_length": 4,
        "prefill": "<answer>",
        "cache": "dual",
        "task": "countdown",
    }
    assert (expected | changed).items() <= row.items()


def test_a_run_that_trained_the_policy_alone_has_a_fixed_threshold_and_no_learned_one(
    policy, tmp_path, measured, capsys, monkeypatch
):
    monkeypatch.setattr(evaluate, "LEVELS", {"eb": (0.1, 3), "top_k": (1,)})
    config = {"task": "countdown", "train_target": "policy", "initial_threshold": 0.3}
    make_run_folder(tmp_path / "fixed", Config(**config))
    save_checkpoint(tmp_path / "fixed", policy, [], 1)  # it has a head, as it was made
    [row] = measured(tmp_path / "fixed", "--problems 2")
    assert row["level"] == 0.3 and row["threshold_mean"] == pytest.approx(0.3)
    [row] = measured(tmp_path / "fixed", "--problems 2 --decoder top_k --level 2")
    assert row["level"] == 2
    rows = measured(tmp_path / "fixed", "--problems 2 --frontier")
    assert [row["level"] for row in rows] == [0.1, 3, 1]
    assert evaluate.main([str(tmp_path / "fixed"), "--level", "learned"]) == 2
    assert "has no learned threshold: give --level a number" in capsys.readouterr().err


def test_a_runs_own_data_file_is_measured_by_what_was_held_out(policy, tmp_path, measured):
    task = TASKS["countdown"].compact
    path = tmp_path / "data.jsonl"
    numbers = [[a, b, c] for a in range(1, 5) for b in (6, 7) for c in (8, 9)]
    rows = [{"numbers": x, "target": y} for x in numbers for y in (3, 5, 9)]
    rows += [row | {"numbers": row["numbers"][::-1]} for row in rows]  # near-duplicates
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    make_run_folder(tmp_path / "c", Config(data=str(path)))
    save_checkpoint(tmp_path / "c", policy, [], 1)
    own, all_, train = (
        measured(tmp_path / "c", f"--level 1 --problems 100 {flags}")[0]
        for flags in ("", "--split all", "--split train")
    )
    pools = ProblemsFromFile(task, path).pools
    assert own["split"] == "test" and own["problems"] == len(pools["test"])
    assert all_["problems"] == len(rows)
    keys = {split: {task.key(problem) for problem in pools[split]} for split in pools}
    assert not keys["test"] & keys["train"] and own["clusters"] == len(keys["test"])
    assert train["clusters"] == len(keys["train"])
    other = tmp_path / "other.jsonl"
    other.write_text(path.read_text())
    assert measured(tmp_path / "c", f"--level 1 --data {other}")[0]["split"] == "test"
    other.write_text(path.read_text() + json.dumps(rows[0]) + "\n")
    assert measured(tmp_path / "c", f"--level 1 --data {other}")[0]["split"] == "all"


def test_problems_of_a_whole_file_are_its_first_or_all(run_dir, tmp_path, measured):
    rows = [{"numbers": [a, b, 3], "target": a + b + 3} for a in range(1, 9) for b in (5, 6)]
    path = tmp_path / "sixteen.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = f"--level 1 --data {path}"
    assert measured(run_dir, f"{flags} --problems 4")[0]["problems"] == 4
    assert measured(run_dir, f"{flags} --split all --problems 4")[0]["problems"] == 4
    assert measured(run_dir, flags)[0]["problems"] == 16
    options = resolve_options(run_dir, {"data": str(path), "problems": 4})
    _, _, problems, _ = evaluate.load(options)
    assert problems == rows[:4]


TRAINED = {
    "task": "countdown",
    "max_completion_length": 12,
    "block_length": 4,
    "cache": "dual",
    "prefill": "<answer>",
    "train_target": "policy",
    "initial_threshold": 0.3,
}


def test_a_runs_adapter_on_its_base_is_decoded_as_the_run_was(tmp_path, measured):
    denoiser, tokenizer = loading.load_denoiser("tiny")
    model = DiffusionPolicy(lora.add_lora(denoiser, 2, 4), tokenizer, ThresholdHead(104))
    make_run_folder(tmp_path / "run", Config(**TRAINED, model="tiny"))
    save_checkpoint(tmp_path / "run", model, [], 1)
    settings = ("length", "block_length", "cache", "prefill", "level")
    flags = "--problems 2 --task countdown"
    own = measured(tmp_path / "run", "--problems 2")[0]
    expected = [own[name] for name in settings]
    assert expected == [12, 4, "dual", "<answer>", 0.3]
    for path, adapter in (
        ("tiny", tmp_path / "run" / "checkpoint"),
        ("tiny", tmp_path / "run"),
        (tmp_path / "run" / "checkpoint", None),
    ):
        row = measured(path, f"{flags} --adapter {adapter}" if adapter else flags)[0]
        assert [row[name] for name in settings] == expected
        assert row["solved_each"] == own["solved_each"] and row["nfe"] == own["nfe"]
    adapter = f"--adapter {tmp_path / 'run'}"
    given = measured("tiny", f"{flags} {adapter} --block_length 0 --cache none --level 1")[0]
    assert (given["block_length"], given["cache"], given["level"]) == (12, "none", 1)
    # Of another task the tiny model has another length; the rest is the run's.
    sudoku = measured("tiny", f"--problems 2 --task sudoku {adapter}")[0]
    assert [sudoku[name] for name in settings] == [19, 4, "dual", "<answer>", 0.3]


@pytest.mark.parametrize(
    ("family", "block_length"),
    [("llada", 32), ("llada-moe", 32), ("dream", 40), ("a2d-qwen3", 40)],
)
def test_a_bare_llada_is_decoded_in_blocks_of_32_as_its_own_example_does(
    tmp_path, measured, family, block_length
):
    write_checkpoint(tmp_path / "model", family)
    flags = "--task countdown --decoder top_k --level 40 --problems 1 --max_completion_length 40"
    assert measured(tmp_path / "model", flags)[0]["block_length"] == block_length
    assert measured(tmp_path / "model", f"{flags} --block_length 0")[0]["block_length"] == 40
    arguments = [str(tmp_path / "model"), *flags.split(), "--cache", "prefix"]
    assert evaluate.main(arguments) == (0 if block_length == 32 else 2)  # a cache needs blocks


def test_a_long_evaluation_says_how_far_it_is(run_dir, capsys, monkeypatch):
    flags = [str(run_dir), "--problems", "5", "--batch_size", "2", "--level", "1", "2"]
    assert evaluate.main(flags) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0)
    assert evaluate.main(flags) == 0
    lines = capsys.readouterr().err.splitlines()
    counts = [re.match(r"a: (\d+) of 10 completions in .* minutes, about", line) for line in lines]
    assert [int(count[1]) for count in counts] == [2, 4, 5, 7, 9]


def test_what_was_measured_before_an_interruption_is_kept(run_dir, tmp_path, capsys, monkeypatch):
    """Two levels of five problems in batches of two; Ctrl-C in the second batch of the second."""
    batches = []

    def interrupted(policy, rollout):
        batches.append(rollout)
        if len(batches) == 5:
            raise KeyboardInterrupt
        return decode_completions(policy, rollout)

    monkeypatch.setattr(evaluate, "decode_completions", interrupted)
    rows_file = tmp_path / "rows.jsonl"
    flags = "--problems 5 --batch_size 2 --level 1 20 --json"
    assert evaluate.main([str(run_dir), *flags.split(), str(rows_file)]) == 130
    out, err = capsys.readouterr()
    [row] = read_rows(rows_file)
    assert (row["level"], row["problems"]) == (1, 5) and "5 problems" in out
    written = tmp_path / "rows.completions.jsonl"
    assert str(written) in err
    completions = read_rows(written)
    names = [completion["name"] for completion in completions]
    assert names == ["a, eb 1.0, length 10"] * 5 + ["a, eb 20.0, length 10"] * 2
    problems = TASKS["countdown"].compact.problems("test", 5, 0)
    assert [completion["problem"] for completion in completions] == problems + problems[:2]
    nfe = [completion["nfe"] for completion in completions]
    assert sum(nfe[:5]) / 5 == row["nfe"]


def test_completions_that_are_there_already_are_neither_removed_nor_added_to(
    run_dir, tmp_path, capsys
):
    written = tmp_path / "rows.completions.jsonl"
    written.write_text("of another evaluation")
    flags = ["--problems", "2", "--json", str(tmp_path / "rows.jsonl")]
    with pytest.raises(SystemExit) as exit:
        evaluate.main([str(run_dir), *flags])
    error = capsys.readouterr().err
    assert exit.value.code == 2
    assert f"would go to {written}, which already exists: move it away" in error
    assert error.count("\n") == 1
    assert written.read_text() == "of another evaluation"
    assert not (tmp_path / "rows.jsonl").exists()


def test_rows_replace_rows_alone(run_dir, tmp_path, capsys):
    file = tmp_path / "metrics.jsonl"
    flags = [str(run_dir), "--problems", "2", "--json", str(file)]
    log = json.dumps({"step": 1, "solved_mean": 0.5})
    measured = json.dumps([{"step": 1, "solved_low": 0.5}], indent=1)  # a run's eval.json
    for text in (log, measured):
        file.write_text(text)
        with pytest.raises(SystemExit) as exit:
            evaluate.main(flags)
        assert exit.value.code == 2 and file.read_text() == text
        assert "was not written by this program: move it away" in capsys.readouterr().err
    file.write_text("")
    assert evaluate.main(flags) == 0
    (tmp_path / "metrics.completions.jsonl").unlink()
    assert evaluate.main(flags) == 0  # its own rows


@pytest.mark.parametrize("name", ["data", "completions"])
def test_rows_do_not_replace_the_file_that_is_read(run_dir, tmp_path, capsys, name):
    file = tmp_path / "rows.jsonl"
    row = {"task": "countdown", "problem": {"numbers": [3, 4, 5], "target": 35}, "text": ""}
    file.write_text(json.dumps(row))
    (tmp_path / "link.jsonl").symlink_to(file)
    run = [str(run_dir)] if name == "data" else []
    with pytest.raises(SystemExit):
        evaluate.main([*run, f"--{name}", str(file), "--json", str(tmp_path / "link.jsonl")])
    assert f"would replace the file of --{name}" in capsys.readouterr().err
    assert json.loads(file.read_text()) == row


@pytest.mark.parametrize(
    ("flags", "name"), [("--trace 1", "trace.gif"), ("--frontier", "frontiers.png")]
)
def test_pictures_of_somebody_else_in_the_current_folder_are_not_replaced(
    tmp_path, monkeypatch, capsys, flags, name
):
    """What is written of a base goes there; of a run it goes into the run's own folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text("somebody else's")
    command = f"tiny --task countdown --problems 2 {flags}"
    assert evaluate.main(command.split()) == 2
    assert f"{name} already exists and was not written by this program" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "somebody else's"


@pytest.mark.parametrize("task", ["countdown", "countdown,sudoku"])
def test_saved_completions_are_scored_as_they_were_measured(
    policy, tmp_path, measured, capsys, monkeypatch, task
):
    for name in task.split(","):
        monkeypatch.setattr(type(TASKS[name]), "solved", lambda self, _, text: len(text) % 3 == 0)
        monkeypatch.setattr(type(TASKS[name]), "reward", lambda self, _, text: len(text) % 7 / 7)
    make_run_folder(tmp_path / "c", Config(task=task))
    save_checkpoint(tmp_path / "c", policy, [], 1)
    rows = measured(tmp_path / "c", "--problems 6 --level 0.5 20")
    measured_out = capsys.readouterr().out
    written = tmp_path / "rows.completions.jsonl"
    rescored = tmp_path / "rescored.jsonl"
    assert evaluate.main(["--completions", str(written), "--json", str(rescored)]) == 0
    out = capsys.readouterr().out
    assert "c, eb 0.5, length" in out and out.count("minus c, eb 0.5") == len(task.split(","))
    if "," not in task:  # the difference and its interval are those of the models' own table
        points = [
            re.search(r"[+-][\d.]+ \(.*?\)|\+0\.0\b", x.split("minus")[1])[0]
            for x in (measured_out, out)
        ]
        assert points[0] == points[1]
    scores = read_rows(rescored)
    assert len(scores) == 2 * len(task.split(","))
    for row in rows:
        own = [score for score in scores if f"eb {row['level']}," in score["name"]]
        for name in ("solved", "reward"):
            total = sum(score[name] * score["completions"] for score in own)
            assert total / 6 == pytest.approx(row[name])


def test_completions_of_a_task_of_ones_own_are_scored_if_it_is_named(tmp_path, capsys):
    (tmp_path / "own.py").write_text(
        "class Echo:\n"
        "    def problems(self, split, n, seed): return [{'word': 'x'}] * n\n"
        "    def prompt(self, problem): return problem['word']\n"
        "    def reward(self, problem, text): return float(text == problem['word'])\n"
        "    def solved(self, problem, text): return text == problem['word']\n"
    )
    rows = [{"task": "Echo", "problem": {"word": word}, "text": "x"} for word in ("x", "y")]
    file = tmp_path / "written.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert evaluate.main(["--completions", str(file)]) == 2
    assert "unknown task 'Echo'" in capsys.readouterr().err
    task = f"{tmp_path / 'own.py'}:Echo"
    assert evaluate.main(["--completions", str(file), "--task", task]) == 0
    assert "50.0%" in capsys.readouterr().out


def test_out_of_memory_says_which_setting_to_lower(run_dir, capsys, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has 79 GiB"
        )

    monkeypatch.setattr(evaluate, "decode_completions", fail)
    assert evaluate.main([str(run_dir), "--problems", "2", "--batch_size", "7"]) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "--batch_size (7)" in message and "2.00 GiB" in message


def test_ctrl_c_ends_with_its_own_status(run_dir, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "decode_completions", interrupt)
    assert evaluate.main([str(run_dir), "--problems", "2"]) == 130
    assert capsys.readouterr().err.strip() == "stopped"


def test_a_data_file_of_either_format_is_read(run_dir, tmp_path, measured):
    path = tmp_path / "data.jsonl"  # of unequal length for tiny
    rows = ({"input": "3,4,5", "output": "35"}, {"numbers": [30, 100, 93], "target": 23})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    row = measured(run_dir, f"--data {path}")[0]
    assert (row["problems"], row["data"], row["split"]) == (2, str(path), "all")


def test_several_lengths_are_rows_of_one_table_with_an_aup_each(run_dir, measured, capsys):
    rows = measured(run_dir, "--problems 6 --max_completion_length 8 10 --level 0.2 2")
    lengths_and_levels = [(row["length"], row["level"]) for row in rows]
    assert lengths_and_levels == [(8, 0.2), (8, 2.0), (10, 0.2), (10, 2.0)]
    lines = [re.split("  +", line.strip()) for line in capsys.readouterr().out.splitlines()]
    i = next(i for i, line in enumerate(lines) if line[0] == "length")
    assert lines[i][-1] == "AUP"
    table = lines[i + 1 : i + 5]
    for first, length in ((0, "8"), (2, "10")):
        two_rows = rows[first : first + 2]
        score = metrics.aup(two_rows, best=max(row["solved"] for row in two_rows))
        cells = [(line[0], line[-1]) for line in table[first : first + 2]]
        assert cells == [(length, f"{score:.1f}")] * 2


def test_samples_of_a_problem_give_pass_at_k(run_dir, measured, capsys, monkeypatch):
    hit = lambda self, problem, text: len(text) % 3 == 0  # noqa: E731
    monkeypatch.setattr(type(TASKS["countdown"]), "solved", hit)
    [row] = measured(run_dir, "--problems 9 --samples 4 --temperature 2 --level 1")
    assert (row["problems"], row["samples"]) == (9, 4)
    rates = {int(k): rate for k, rate in row["pass_at_k"].items()}
    assert rates[1] == pytest.approx(row["solved"]) and list(rates) == [1, 2, 3, 4]
    assert sorted(rates.values()) == list(rates.values()) and rates[4] > rates[1] > 0
    out = capsys.readouterr().out
    assert "4 samples" not in out
    header, line = (re.split("  +", line.strip()) for line in out.splitlines()[-2:])
    assert line[header.index("pass@4")] == f"{rates[4]:.1%}"


def test_a_sudoku_row_has_the_share_of_right_cells_too(run_dir, measured, monkeypatch):
    monkeypatch.setattr(type(TASKS["sudoku"]), "cells", lambda *_: 0.25)
    row = measured(run_dir / "checkpoint", "--task sudoku --problems 8 --level 1")[0]
    assert row["cells"] == 0.25 and "cells" not in measured(run_dir, "--problems 2 --level 1")[0]


def test_a_file_says_how_much_of_it_the_run_may_have_trained_on(run_dir, tmp_path, capsys):
    task = TASKS["countdown"].compact
    problems = task.problems("train", 5, 1) + task.problems("test", 3, 1)
    path = tmp_path / "mixed.jsonl"
    path.write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    evaluate.main([str(run_dir), "--level", "1", "--data", str(path)])
    warning = capsys.readouterr().err
    assert f"5 of 8 problems of {path} share their numbers with" in warning
    evaluate.main([str(run_dir), "--level", "1", "--problems", "3"])
    assert "share" not in capsys.readouterr().err


def test_an_adapter_is_put_onto_the_model_and_named_in_the_row(tmp_path, measured, monkeypatch):
    look = lambda self, problem, text: len(text) % 97 / 97  # noqa: E731
    monkeypatch.setattr(type(TASKS["countdown"]), "reward", look)
    denoiser, tokenizer = random_tiny()
    for part in (denoiser, tokenizer):
        part.save_pretrained(tmp_path / "base")
    denoiser, _ = loading.load_denoiser(str(tmp_path / "base"))
    model = lora.add_lora(denoiser, 2, 4)
    generator = torch.Generator().manual_seed(0)
    for layer in lora.lora_layers(model).values():
        weight = layer.lora_B["default"].weight
        weight.data.copy_(torch.randn(weight.shape, generator=generator))
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    flags = "--task countdown --problems 4 --level 1"
    bare = measured(tmp_path / "base", flags)[0]
    row = measured(tmp_path / "base", f"{flags} --adapter {tmp_path / 'adapter'}")[0]
    same = measured(tmp_path / "adapter", flags)[0]  # it names its base itself
    assert row["adapter"] == str(tmp_path / "adapter") and bare["adapter"] == ""
    assert row["reward"] == same["reward"] != bare["reward"]


def test_an_adapter_whose_base_is_elsewhere_says_how_to_give_it(tmp_path, capsys):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "/data/LLaDA"}')
    assert evaluate.main([str(folder), "--task", "countdown", "--level", "1"]) == 2
    message = capsys.readouterr().err
    assert f"an adapter of /data/LLaDA: give BASE_MODEL --adapter {folder}" in message
    assert message.count("\n") == 1


def test_a_decoder_at_temperature_draws_by_its_seed(policy):
    task = TASKS["countdown"].compact
    problems = task.problems("test", 8, 0)
    completions = []

    def rollout(policy, prompt_ids, prompt_mask, length, decoder, generator):
        completed = policy.rollout(prompt_ids, prompt_mask, length, decoder, generator)
        completions.append(completed.completion)
        return completed

    for seed in (0, 0, 1):
        evaluate.evaluate(
            policy, task, problems, Decoder("top_k", 2), 10, seed=seed, rollout=rollout
        )
    first, same, other = completions
    assert torch.equal(first, same) and not torch.equal(first, other)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--task sudoku", "was trained on countdown: leave out --task"),
        ("--decoder beam", "eb"),
        ("--level many", "learned"),
        ("--level -1", "not -1"),
        ("--decoder confidence --level 1.5", "1"),
        ("--decoder top_k --level 0.5", "1"),
        ("--decoder top_k", "only eb"),
        ("--problems 0", "at least 1"),
        ("--split all", "test"),
        ("--trace 0", "at least 1"),
        ("--level 1 --frontier", "leave out --level"),
        ("--frontier --trace 2", "leave out --trace"),
        ("--data nowhere.jsonl", "nowhere.jsonl"),
        ("--data nowhere.csv", "nowhere.csv"),
        ("--samples 4", "--temperature above 0"),
        ("--max_completion_length 10 -1", "length: it has to be at least 0"),
        ("--max_completion_length 10 12 --frontier", "one --max_completion_length at a time"),
        ("--prompt d1", "leave out --prompt"),
        ("--shots 3", "up to 3, with --prompt d1"),
        ("--dtype float16", "invalid choice: 'float16'"),
        ("--adapter /nowhere", "'/nowhere' is not a folder here"),
        ("--completions rows.jsonl", "give --completions FILE alone"),
        ("--data EMPTY", "no problems"),
        ("--data FIELDS", "line 1"),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(run_dir, tmp_path, capsys, flags, says):
    (tmp_path / "EMPTY").write_text("")
    (tmp_path / "FIELDS").write_text('{"numbers": [1, 2]}\n')
    flags = [str(tmp_path / flag) if flag.isupper() else flag for flag in flags.split()]
    assert status_of([str(run_dir), *flags]) == 2
    message = capsys.readouterr().err
    assert says in message and message.count("\n") == 1


def status_of(arguments):
    """The exit status of the program: that of main or, for flags that do not parse, argparse's."""
    try:
        return evaluate.main(arguments)
    except SystemExit as exit:
        return exit.code


def test_what_does_not_exist_is_said_not_to_exist(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for path in ("runs/nope", "nope", "./nope", str(tmp_path / "nope")):
        assert status_of([path, "--task", "countdown"]) == 2
        assert f"{path} does not exist" in capsys.readouterr().err


def test_a_folder_without_a_threshold_head_asks_for_a_number(tmp_path, measured, capsys):
    for part in random_tiny():
        part.save_pretrained(tmp_path / "base")
    assert evaluate.main([str(tmp_path / "base"), "--task", "countdown"]) == 2
    assert "--level" in capsys.readouterr().err
    [row] = measured(tmp_path / "base", "--task countdown --level 0.1 --problems 2")
    assert row["level"] == 0.1
    for flags, says in ((["--task", "countdown"], "not a checkpoint"), ([], "give a --task")):
        assert evaluate.main([str(tmp_path), *flags]) == 2
        assert says in capsys.readouterr().err
    assert evaluate.main([str(tmp_path / "base"), "--task", "chess"]) == 2
    assert "choose one of countdown" in capsys.readouterr().err


def test_traces_are_printed_and_drawn_into_the_runs_folder(run_dir, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    task = TASKS["countdown"].compact
    files = ["trace.gif", "trace.html", "two_stages.png"]
    first, second = map(task.prompt, task.problems("test", 2, 7))
    assert evaluate.main([str(run_dir), "--trace", "2", "--seed", "7", "--level", "20"]) == 0
    out = capsys.readouterr().out
    assert out.count("\nprompt  ") == 2 and out.index(first) < out.index(second)
    assert "\x1b" not in out and out.strip().endswith(str(run_dir / "two_stages.png"))
    page = (run_dir / "trace.html").read_text(encoding="utf-8")
    assert page.index(first) < page.index(second) and page.count("<section>") == 2
    assert all((run_dir / name).exists() for name in files) and not list(tmp_path.iterdir())
    flags = "--task countdown --decoder top_k --level 10 --trace 1"
    # No run: into the current folder.
    assert evaluate.main([str(run_dir / "checkpoint"), *flags.split()]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == files
    verify_folder(tmp_path)  # its own pictures may be replaced
    assert "10 tokens in 1 call, " in capsys.readouterr().out


def test_a_run_of_two_tasks_is_measured_and_traced_each_in_its_own_length(
    policy, tmp_path, measured, capsys
):
    config = {"task": "countdown,sudoku", "max_completion_length": 19, "data": ""}
    make_run_folder(tmp_path / "both", Config(**config))
    save_checkpoint(tmp_path / "both", policy, [], 1)
    row = measured(tmp_path / "both", "--decoder top_k --level 1 --problems 3")[0]
    assert [part["length"] for part in row["tasks"].values()] == [10, 19]
    assert row["tasks"]["countdown"]["nfe"] <= 10 and row["task"] == "countdown,sudoku"
    flags = "--decoder top_k --level 25 --trace 2"
    assert evaluate.main([str(tmp_path / "both"), *flags.split()]) == 0
    out = capsys.readouterr().out
    assert out.index("10 tokens in 1 call,") < out.index("19 tokens in 1 call,")


def test_frontiers_of_runs_are_one_picture_and_each_row_has_its_lines_area(
    policy, run_dir, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(evaluate, "LEVELS", {"eb": (0.1, 3), "top_k": (1, 5, 10)})
    right = lambda self, problem, text: len(text) % 2 == 0  # noqa: E731 (it solves nothing else)
    monkeypatch.setattr(type(TASKS["countdown"]), "solved", right)
    for name, task in (("other", "countdown"), ("third", "sudoku")):
        create_run(tmp_path / name, torch.device("cpu"))
        write_json(tmp_path / name / "config.json", asdict(Config(task=task)))
        save_checkpoint(tmp_path / name, policy, [], 1)
    flags = ["--frontier", "--problems", "6"]
    assert evaluate.main([str(run_dir), str(tmp_path / "other"), *flags]) == 0
    assert '"tokens_per_call"' in (run_dir / "frontiers.jsonl").read_text()  # known as its own
    rows = read_rows(run_dir / "frontiers.jsonl")
    levels = [("eb", 0.1), ("eb", 3), ("top_k", 1), ("top_k", 5), ("eb", "learned")]
    measured = [(row["name"], row["decoder"], row["level"]) for row in rows]
    assert measured == [(name, *level) for name in ("a", "other") for level in levels]

    largest = max(row["nfe"] for row in rows)
    for row in rows:
        line = [x for x in rows if x["name"] == row["name"] and x["decoder"] == row["decoder"]]
        line = [x for x in line if (x["level"] == "learned") == (row["level"] == "learned")]
        assert row["area"] == metrics.area(line, largest)
        assert row["aup"] == metrics.aup(line, max(x["solved"] for x in rows))

    lines = capsys.readouterr().out.splitlines()
    for line, row in zip(lines, rows, strict=False):  # one for each measurement
        assert line.startswith(f"{row['name']}: {row['decoder']} {row['level']}:")
        assert line.endswith(f"NFE {row['nfe']:.2f}")
    table = lines[len(rows) :]
    # Conditions, header, 2 runs of 3 lines, an explanation of 3 lines; an empty line, a header, 3
    # differences from the first frontier of several points, an explanation; and the files.
    assert len(table) == 1 + 1 + 2 * 3 + 3 + (1 + 1 + 3 + 1) + 1
    assert all(len(line) <= 80 for line in table[:-1])
    [line] = [x.split() for x in table[:11] if x.split()[:2] == ["other", "top_k"]]
    assert float(line[3]) == pytest.approx(rows[8]["area"], abs=1e-3)
    compared = [line.split()[:3] for line in table[12:16]]
    assert [line[:2] for line in compared] == [
        ["minus", "a"],
        ["a", "top_k"],
        ["other", "eb"],
        ["other", "top_k"],
    ]
    assert float(compared[3][2]) == pytest.approx(rows[8]["area"] - rows[0]["area"], abs=2e-3)
    assert table[-1].split()[1:] == [str(run_dir / f"frontiers.{x}") for x in ("png", "jsonl")]

    assert evaluate.main([str(run_dir), str(tmp_path / "third"), "--frontier"]) == 2
    assert "not of countdown and sudoku" in capsys.readouterr().err


def test_a_run_written_by_another_version_is_refused_and_not_measured_with_defaults(
    policy, tmp_path, capsys
):
    create_run(tmp_path / "old", torch.device("cpu"))
    old = asdict(Config()) | {"length": 14}
    del old["max_completion_length"]
    write_json(tmp_path / "old" / "config.json", old)
    save_checkpoint(tmp_path / "old", policy, [], 1)
    with pytest.raises(ValueError, match="written by another version of train.py"):
        resolve_options(tmp_path / "old", {})
    assert evaluate.main([str(tmp_path / "old"), "--problems", "2"]) != 0
    assert "another version" in capsys.readouterr().err


def test_a_run_without_a_checkpoint_is_said_to_have_none(tmp_path, capsys):
    make_run_folder(tmp_path / "young", Config())
    for flags in ([], ["--level", "0.1"]):
        assert evaluate.main([str(tmp_path / "young"), "--task", "countdown", *flags]) == 2
        message = capsys.readouterr().err
        assert "young has no checkpoint yet" in message and message.count("\n") == 1
