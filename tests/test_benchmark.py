"""The benchmark on a shape that takes no time: the naive loop's tokens, and the table."""

import json
from dataclasses import replace

import pytest
import torch

from experiments import benchmark
from sampler import Decoder

TINY = benchmark.SHAPES["tiny"]
CONFIG = replace(TINY.config, prompts_per_step=2, num_generations=3, num_iterations=2)
SMALL = replace(TINY, config=CONFIG)


@pytest.fixture(scope="module")
def rows():
    return {method: benchmark.measure(SMALL, method) for method in benchmark.METHODS}


def test_the_naive_loop_and_ours_draw_the_same_tokens(rows):
    assert rows["naive"]["tokens"] == rows["ours"]["tokens"]
    drawn = {token for row in rows["ours"]["tokens"] for token in row}
    assert len(rows["ours"]["tokens"]) == 6 and len(drawn) > 10 and 1 not in drawn  # no mask left


def test_they_do_so_too_where_a_step_unmasks_several(rows):
    three = replace(
        SMALL,
        tokens_per_step=3,
        config=replace(CONFIG, max_completion_length=12, block_length=6),
    )
    naive = benchmark.measure(three, "naive")["tokens"]
    ours = benchmark.measure(three, "ours")["tokens"]
    assert naive == ours and {len(row) for row in ours} == {12}


def test_each_row_says_how_long_it_took_and_with_how_much_memory(rows):
    for method, row in rows.items():
        assert row["method"] == method and row["seconds"] > 0 and row["peak_gib"] > 0
        assert ("tokens_per_s" in row) == (method in ("naive", "ours", "prefix", "dual"))
    speed = rows["dual"]["tokens_per_s"] * rows["dual"]["seconds"]
    assert speed == pytest.approx(6 * 10)


def test_d1s_log_probs_and_their_gradient_are_ours_with_one_stage():
    results = []
    for method in ("d1_logp", "logp_1"):
        policy = benchmark.make_policy(SMALL)
        ids = torch.randint(3, 100, (6, 5), generator=torch.Generator().manual_seed(0))
        rollout = policy.rollout(
            ids, ids > 0, 10, Decoder("top_k", 1, stop_at_eos=False), torch.Generator()
        )
        rollout.token_mask[:] = True  # d1 scores behind the end token too
        work = benchmark.prepare_log_probs(CONFIG, policy, rollout, method, torch.Generator())
        logp = work()
        grads = [p.grad for p in policy.denoiser.parameters() if p.grad is not None]
        results.append((logp, *grads))
    for d1s, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, d1s, rtol=1e-3, atol=1e-5)
    assert len(results[0]) > 1


def test_a_rollout_is_compared_with_the_naive_one():
    naive = {"method": "naive", "tokens_per_s": 2.0, "tokens": [[3, 4], [5, 6]]}
    dual = {"method": "dual", "tokens_per_s": 5.0, "tokens": [[3, 4], [5, 9]]}
    others = [{"method": "ours", "failed": "out of memory"}, {"method": "learning", "seconds": 1}]
    table = benchmark.compare_with_naive([dict(naive), dict(dual), *others])
    assert table[1] == {"method": "dual", "tokens_per_s": 5.0, "x_naive": 2.5, "same_tokens": 0.75}
    assert table[2:] == others and "x_naive" not in table[0]
    failed = {"method": "naive", "failed": "out of memory"}
    assert "x_naive" not in benchmark.compare_with_naive([failed, dict(dual)])[1]


def test_the_table_has_a_line_for_every_row_and_says_why_one_failed(rows, monkeypatch, capsys):
    copies = {method: dict(row) for method, row in rows.items()}
    copies["prefix"] = {"method": "prefix", "failed": "out of memory"}
    monkeypatch.setattr(benchmark, "run_apart", lambda name, method: copies[method])
    benchmark.main(["--shape", "mid"])
    header, *lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["mid", m] for m in benchmark.METHODS]
    assert len(header) == len(lines[0]) and header.split()[2:] == list(benchmark.COLUMNS)
    assert lines[1].split()[5] == "1.000" and lines[2].endswith("out of memory")


def test_one_row_is_a_line_of_json_that_the_table_reads(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(benchmark.SHAPES, "tiny", SMALL)
    flags = ["--shape", "tiny", "--method", "ours"]
    benchmark.main(flags)
    line = capsys.readouterr().out.strip()
    assert json.loads(line)["method"] == "ours" and len(json.loads(line)["tokens"]) == 6
    program = tmp_path / "row.py"
    program.write_text(f"import sys\nassert sys.argv[1:] == {flags}\nprint({line!r})")
    monkeypatch.setattr(benchmark, "PROGRAM", [str(program)])
    assert benchmark.run_apart("tiny", "ours") == json.loads(line)


def test_a_row_that_fails_says_why_in_its_last_line(tmp_path, monkeypatch):
    program = tmp_path / "fails.py"
    program.write_text("raise MemoryError('no room')")
    monkeypatch.setattr(benchmark, "PROGRAM", [str(program)])
    row = benchmark.run_apart("tiny", "ours")
    assert row == {"method": "ours", "failed": "MemoryError: no room"}


def test_bad_flags_get_one_line(capsys):
    with pytest.raises(SystemExit) as exit:
        benchmark.main(["--method", "slow"])
    message = capsys.readouterr().err
    assert exit.value.code == 2 and "naive" in message and message.count("\n") == 1
