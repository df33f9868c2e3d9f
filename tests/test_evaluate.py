"""Evaluation: the numbers against others got by hand, every decoder, data files, manners."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from toy import random_tiny

import evaluate
from diffusion_policy import DiffusionPolicy
from evaluation import metrics
from models import loading, lora
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
    create_run(folder)
    write_json(folder / "config.json", {"task": "countdown"})
    save_checkpoint(folder, policy, [], 1)
    return folder


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


def test_a_row_of_several_tasks_has_each_ones_own_row_as_its_part(policy, monkeypatch):
    lucky = lambda self, problem, text: len(text) % 3 == 0  # noqa: E731 (it solves nothing else)
    for name in ("countdown", "sudoku"):
        monkeypatch.setattr(type(TASKS[name]), "solved", lucky)
    task, decoder = (
        registry.load_task("countdown,sudoku", True),
        Decoder("eb", 2.0, temperature=0.0),
    )
    problems = task.problems("test", 9, 0)
    row, each = evaluate.evaluate(policy, task, problems, decoder, 19, 3), [""] * 9
    for name, part in row["tasks"].items():
        places = [i for i, problem in enumerate(problems) if problem["task"] == name]
        own, length = [problems[i] for i in places], TASKS[name].length
        alone = evaluate.evaluate(policy, TASKS[name].compact, own, decoder, length, 3)
        assert part.items() <= alone.items() and {"solved", "solved_low", "nfe"} <= part.keys()
        for place, mark in zip(places, alone["solved_each"], strict=True):
            each[place] = mark
    assert row["solved_each"] == "".join(each) and {*each} == {"0", "1"}
    parts = row["tasks"].values()
    assert [part["problems"] for part in parts] == [5, 4] and row["solved"] == each.count("1") / 9
    for key, by in (("nfe", "problems"), ("solved", "problems"), ("clusters", None)):
        total = sum(part[key] * (part[by] if by else 1) for part in parts)
        assert row[key] == pytest.approx(total / (9 if by else 1))
    assert "length up to 19" in evaluate.plots.conditions([row])
    alone = evaluate.evaluate(policy, TASKS["sudoku"].compact, own, decoder, 19)
    assert "tasks" not in alone and "length 19" in evaluate.plots.conditions([alone])


@pytest.fixture
def measured(capsys):
    """measured(folder, "--flag value ...") -> the rows that evaluate.py prints as JSON."""

    def run(folder, flags):
        capsys.readouterr()
        evaluate.main([str(folder), *flags.split()])
        lines = capsys.readouterr().out.splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    return run


def test_top_k_takes_as_many_calls_as_the_length_over_k(run_dir, measured):
    flags = "--task sudoku --decoder top_k --level 1 4 --problems 3"
    rows = measured(run_dir / "checkpoint", flags)
    assert [row["level"] for row in rows] == [1.0, 4.0]
    assert rows[0]["nfe"] <= 19 and rows[1]["nfe"] <= 5  # fewer where a row stops at [EOS]


def test_every_setting_stands_beside_the_score_and_the_table_says_once_what_is_shared(
    run_dir, capsys, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    flags = "--problems 3 --temperature 0.5 --block_length 5 --seed 4 --level learned 0.2"
    evaluate.main([str(run_dir), *flags.split()])
    *said, header, learned, fixed = capsys.readouterr().out.splitlines()
    json_lines, shared = said[:2], said[2:]
    row = json.loads(json_lines[0])
    expected = dict(name="a", decoder="eb", level="learned", block_length=5, length=10)
    expected |= dict(
        temperature=0.5, seed=4, problems=3, split="test", cache="none", task="countdown"
    )
    expected |= dict(checkpoint=str(run_dir), revision=1, dtype="float32")
    assert expected.items() <= row.items() and row["threshold_mean"] == pytest.approx(0.1)
    assert row["device"] == evaluate.device_name(torch.device("cpu")) != "cpu"
    assert row["device"].endswith(", 1 thread")
    said = "temperature 0.5, length 10, blocks of 5, no cache, 3 problems in"
    assert " ".join(shared) == f"a: countdown, eb, {said} {row['clusters']} clusters"
    columns = ["level", "gamma", "solved", "95% interval", "reward", "NFE", "tokens/call", "AUP"]
    assert re.split("  +", header.strip()) == columns
    cells = [re.split("  +", line.strip()) for line in (learned, fixed)]
    assert [line[:2] for line in cells] == [["learned", "0.100 ± 0.000"], ["0.2", "0.200 ± 0.000"]]
    assert cells[0][-3] == f"{row['nfe']:.2f}"
    assert all(len(line) <= 80 for line in (*shared, header, learned, fixed))


def test_a_run_is_measured_as_it_was_trained_unless_flags_say_otherwise(policy, tmp_path, measured):
    trained = {
        "max_completion_length": 12,
        "block_length": 4,
        "prefill": "<answer>",
        "cache": "dual",
    }
    create_run(tmp_path / "b")
    write_json(tmp_path / "b" / "config.json", trained | {"task": "countdown"})
    save_checkpoint(tmp_path / "b", policy, [], 1)
    for flags, expected in (
        ("", (12, 4, "<answer>", "dual", "countdown")),
        (
            "--max_completion_length 9 --block_length 0 --cache none",
            (9, 9, "<answer>", "none", "countdown"),
        ),
        ("--task countdown --max_completion_length 11", (11, 4, "<answer>", "dual", "countdown")),
    ):
        row = measured(tmp_path / "b", f"--problems 2 {flags}")[0]
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
    assert measured(tmp_path / "c", f"--level 1 --data {other}")[0]["split"] == "all"


def test_out_of_memory_says_which_setting_to_lower(run_dir, capsys, monkeypatch):
    def fail(*_, **__):
        said = "CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has 79 GiB"
        raise torch.OutOfMemoryError(said)

    monkeypatch.setattr(DiffusionPolicy, "rollout", fail)
    with pytest.raises(SystemExit) as exit:
        evaluate.main([str(run_dir), "--problems", "2", "--batch_size", "7"])
    message = capsys.readouterr().err
    assert exit.value.code == 1 and message.count("\n") == 1
    assert "--batch_size (7)" in message and "2.00 GiB" in message


def test_a_data_file_of_either_format_is_read(run_dir, tmp_path, measured):
    path = tmp_path / "data.jsonl"  # of unequal length for tiny
    rows = ({"input": "3,4,5", "output": "35"}, {"numbers": [30, 100, 93], "target": 23})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    row = measured(run_dir, f"--data {path}")[0]
    assert (row["problems"], row["data"], row["split"]) == (2, str(path), "all")


def test_several_lengths_are_rows_of_one_table_with_an_aup_each(run_dir, capsys):
    evaluate.main(
        [
            str(run_dir),
            *["--problems", "6", "--max_completion_length", "8", "10", "--level", "0.2", "2"],
        ]
    )
    out = capsys.readouterr().out.splitlines()
    rows = [json.loads(line) for line in out if line.startswith("{")]
    made = [(row["length"], row["level"]) for row in rows]
    assert made == [(8, 0.2), (8, 2.0), (10, 0.2), (10, 2.0)]
    header, *table = [re.split("  +", line.strip()) for line in out[-5:]]
    assert header[0] == "length" and header[-1] == "AUP"
    for i, length in ((0, "8"), (2, "10")):
        score = metrics.aup(rows[i : i + 2], max(row["solved"] for row in rows[i : i + 2]))
        assert [(line[0], line[-1]) for line in table[i : i + 2]] == [(length, f"{score:.1f}")] * 2


def test_samples_of_a_problem_give_pass_at_k(run_dir, capsys, monkeypatch):
    hit = lambda self, problem, text: len(text) % 3 == 0  # noqa: E731
    monkeypatch.setattr(type(TASKS["countdown"]), "solved", hit)
    flags = "--problems 9 --samples 4 --temperature 2 --level 1"
    evaluate.main([str(run_dir), *flags.split()])
    out = capsys.readouterr().out.splitlines()
    row = json.loads(out[0])
    assert (row["problems"], row["samples"]) == (9, 4) and "4 samples" not in out[0]
    each = {int(k): share for k, share in row["pass_at_k"].items()}
    assert each[1] == pytest.approx(row["solved"]) and list(each) == [1, 2, 3, 4]
    assert sorted(each.values()) == list(each.values()) and each[4] > each[1] > 0
    header, line = (re.split("  +", line.strip()) for line in out[-2:])
    assert line[header.index("pass@4")] == f"{each[4]:.1%}"


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
    said = capsys.readouterr().err
    assert f"5 of 8 problems of {path} share their numbers with" in said
    evaluate.main([str(run_dir), "--level", "1", "--problems", "3"])
    assert "share" not in capsys.readouterr().err


def test_an_adapter_is_put_onto_the_model_and_named_in_the_row(tmp_path, measured, monkeypatch):
    look = lambda self, problem, text: len(text) % 97 / 97  # noqa: E731
    monkeypatch.setattr(type(TASKS["countdown"]), "reward", look)
    denoiser, tokenizer = random_tiny()
    for part in (denoiser, tokenizer):
        part.save_pretrained(tmp_path / "base")
    denoiser, _ = loading.load_denoiser(str(tmp_path / "base"))
    model, gain = lora.add_lora(denoiser, 2, 4), torch.Generator().manual_seed(0)
    for layer in lora.lora_layers(model).values():
        weight = layer.lora_B["default"].weight
        weight.data.copy_(torch.randn(weight.shape, generator=gain))
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    how = "--task countdown --problems 4 --level 1"
    bare = measured(tmp_path / "base", how)[0]
    row = measured(tmp_path / "base", f"{how} --adapter {tmp_path / 'adapter'}")[0]
    same = measured(tmp_path / "adapter", how)[0]  # it names its base itself
    assert row["adapter"] == str(tmp_path / "adapter") and bare["adapter"] == ""
    assert row["reward"] == same["reward"] != bare["reward"]


def test_an_adapter_whose_base_is_elsewhere_says_how_to_give_it(tmp_path, capsys):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "/data/LLaDA"}')
    with pytest.raises(SystemExit):
        evaluate.main([str(folder), "--task", "countdown", "--level", "1"])
    said = capsys.readouterr().err
    assert f"an adapter of /data/LLaDA: give BASE_MODEL --adapter {folder}" in said
    assert said.count("\n") == 1


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
        ("--max_completion_length 10 -1", "length is at least 0"),
        ("--max_completion_length 10 12 --frontier", "one --max_completion_length at a time"),
        ("--prompt d1", "leave out --prompt"),
        ("--shots 3", "up to 3, of sudoku, with --prompt d1"),
        ("--dtype float16", "invalid choice: 'float16'"),
        ("--adapter /nowhere", "'/nowhere' is no folder here"),
        ("--completions rows.jsonl", "give --completions FILE alone"),
        ("--data EMPTY", "no problems"),
        ("--data FIELDS", "line 1"),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(run_dir, tmp_path, capsys, flags, says):
    (tmp_path / "EMPTY").write_text("")
    (tmp_path / "FIELDS").write_text('{"numbers": [1, 2]}\n')
    flags = [str(tmp_path / flag) if flag.isupper() else flag for flag in flags.split()]
    with pytest.raises(SystemExit) as exit:
        evaluate.main([str(run_dir), *flags])
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
    for flags, says in ((["--task", "countdown"], "no checkpoint"), ([], "give a --task")):
        with pytest.raises(SystemExit):
            evaluate.main([str(tmp_path), *flags])
        assert says in capsys.readouterr().err
    with pytest.raises(SystemExit):
        evaluate.main([str(tmp_path / "base"), "--task", "chess"])
    assert "choose one of countdown" in capsys.readouterr().err


def test_traces_are_printed_and_drawn_into_the_runs_folder(run_dir, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    task, files = TASKS["countdown"].compact, ("trace.html", "trace.gif", "two_stages.png")
    first, second = map(task.prompt, task.problems("test", 2, 7))
    evaluate.main([str(run_dir), "--trace", "2", "--seed", "7", "--level", "20"])
    said = capsys.readouterr().out
    assert said.count("\nprompt  ") == 2 and said.index(first) < said.index(second)
    assert "\x1b" not in said and said.strip().endswith(str(run_dir / "two_stages.png"))
    page = (run_dir / "trace.html").read_text(encoding="utf-8")
    assert page.index(first) < page.index(second) and page.count("<section>") == 2
    assert all((run_dir / name).exists() for name in files) and not list(tmp_path.iterdir())
    how = ["--task", "countdown", "--decoder", "top_k", "--level", "10", "--trace", "1"]
    evaluate.main([str(run_dir / "checkpoint"), *how])  # no run: into the current folder
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(files)
    assert "10 tokens in 1 call, " in capsys.readouterr().out


def test_a_run_of_two_tasks_is_measured_and_traced_each_in_its_own_length(
    policy, tmp_path, measured, capsys
):
    create_run(tmp_path / "both")
    config = {"task": "countdown,sudoku", "max_completion_length": 19, "data": ""}
    write_json(tmp_path / "both" / "config.json", config)
    save_checkpoint(tmp_path / "both", policy, [], 1)
    row = measured(tmp_path / "both", "--decoder top_k --level 1 --problems 3")[0]
    assert [part["length"] for part in row["tasks"].values()] == [10, 19]
    assert row["tasks"]["countdown"]["nfe"] <= 10 and row["task"] == "countdown,sudoku"
    evaluate.main([str(tmp_path / "both"), "--decoder", "top_k", "--level", "25", "--trace", "2"])
    said = capsys.readouterr().out
    assert said.index("10 tokens in 1 call,") < said.index("19 tokens in 1 call,")


def test_frontiers_of_runs_are_one_picture_and_each_row_has_its_lines_area(
    policy, run_dir, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(evaluate, "LEVELS", {"eb": (0.1, 3), "top_k": (1, 5, 10)})
    right = lambda self, problem, text: len(text) % 2 == 0  # noqa: E731 (it solves nothing else)
    monkeypatch.setattr(type(TASKS["countdown"]), "solved", right)
    for name, task in (("other", "countdown"), ("third", "sudoku")):
        create_run(tmp_path / name)
        write_json(tmp_path / name / "config.json", {"task": task})
        save_checkpoint(tmp_path / name, policy, [], 1)
    evaluate.main([str(run_dir), str(tmp_path / "other"), "--frontier", "--problems", "6"])
    said = capsys.readouterr().out.splitlines()
    rows = [json.loads(line) for line in (run_dir / "frontiers.jsonl").read_text().splitlines()]
    found = [(row["name"], row["decoder"], row["level"]) for row in rows]
    levels = [("eb", 0.1), ("eb", 3), ("top_k", 1), ("top_k", 5), ("eb", "learned")]
    assert found == [(name, *level) for name in ("a", "other") for level in levels]
    measured = [row for line in said if line.startswith("{") and (row := json.loads(line))]
    assert [row["nfe"] for row in measured] == [row["nfe"] for row in rows]
    largest = max(row["nfe"] for row in rows)
    for row in rows:
        line = [x for x in rows if x["name"] == row["name"] and x["decoder"] == row["decoder"]]
        line = [x for x in line if (x["level"] == "learned") == (row["level"] == "learned")]
        assert row["area"] == metrics.area(line, largest)
        assert row["aup"] == metrics.aup(line, max(x["solved"] for x in rows))
    table = said[len(measured) :]
    assert len(table) == 1 + 1 + 2 * 3 + 2 and all(len(line) <= 80 for line in table[:-1])
    (line,) = [x.split() for x in table if x.split()[:2] == ["other", "top_k"]]
    assert float(line[3]) == pytest.approx(rows[8]["area"], abs=1e-3)
    assert table[-1].split()[1:] == [str(run_dir / f"frontiers.{x}") for x in ("png", "jsonl")]
    with pytest.raises(SystemExit) as exit:
        evaluate.main([str(run_dir), str(tmp_path / "third"), "--frontier"])
    assert exit.value.code == 2 and "not of countdown and sudoku" in capsys.readouterr().err


def test_help_answers_before_torch_is_imported_and_fits_80_columns():
    code = "import runpy, sys; sys.argv = ['evaluate.py', '--help']\ntry:\n"
    code += "    runpy.run_path('evaluate.py', run_name='__main__')\n"
    code += "finally:\n    print('torch' in sys.modules, 'matplotlib' in sys.modules)"
    root = Path(evaluate.__file__).parent
    how = dict(capture_output=True, text=True, cwd=root, env={**os.environ, "COLUMNS": "80"})
    done = subprocess.run([sys.executable, "-c", code], **how)
    *lines, last = done.stdout.splitlines()
    assert done.returncode == 0 and last == "False False" and not done.stderr
    assert max(map(len, lines)) <= 80 and "python evaluate.py runs/NAME --trace 3" in done.stdout
    assert all(f"--{name}" in done.stdout for name in evaluate.DEFAULTS)
