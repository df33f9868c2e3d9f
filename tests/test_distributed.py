"""Several processes against one: the same batch, metrics, gradients, weights and files."""

import multiprocessing
import os
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy import metrics_of, scores_of

import train
from training import distributed

# Each child is forked from a server that has imported everything once.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["train", "peft", "torch._dynamo"])
FLAGS = (  # noqa: SIM905
    "--task countdown --model tiny --num_generations 4 --micro_batch_size 4 "
    "--num_iterations 2 --p_mask_prompt 0.2 --beta 0.04 --warmup_steps 0 "
    "--eval_problems 5 --frontier false"
).split()


def child(rank, N, port, folder, call, *arguments):
    """One of N processes, as torchrun would start it. What it says goes to files."""
    where = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    where |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": N}
    os.environ.update({name: str(value) for name, value in where.items()})
    torch.set_num_threads(1)
    torch.cuda.is_available = lambda: False  # a GPU may be fewer than they are
    for stream in ("stdout", "stderr"):
        setattr(sys, stream, open(folder / f"{stream}-{rank}", "w"))  # noqa: SIM115
    code = call(*arguments)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code or 0)


def together(N, folder, call, *arguments):
    """Calls it in N processes that know of each other. -> their exit codes"""
    folder.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    how = [(rank, N, port, folder, call, *arguments) for rank in range(N)]
    children = [CONTEXT.Process(target=child, args=one) for one in how]
    for one in children:
        one.start()
    for one in children:
        one.join(150)
        if one.is_alive():  # a deadlock
            one.kill()
            one.join()
    return [one.exitcode for one in children]


class Descent(torch.optim.SGD):
    """In AdamW's place: its steps are the gradients, where AdamW's first are their signs."""

    def __init__(self, weights, lr, **_):
        super().__init__(weights, lr)


def descend(flags):
    torch.optim.AdamW = Descent
    train.plot_curves = lambda run_dir: None  # slow
    return train.main(flags)


@pytest.mark.parametrize(
    "turns, rank",  # of N processes, and whether weights are split
    [([(3, False), (2, True)], 16), ([(2, False), (4, True)], 0)],
    ids=["an adapter learns", "all learns"],
)
def test_one_step_by_some_processes_the_next_by_others_give_what_one_does(
    monkeypatch, tmp_path, turns, rank
):
    one, many, said = tmp_path / "one", tmp_path / "many", tmp_path / "said"
    flags = [*FLAGS, "--prompts_per_step", "4", "--lora_rank", str(rank)]  # of 3, one has two
    flags += ["--learning_rate", "0.1" if rank else "0.001"]
    monkeypatch.setattr(torch.optim, "AdamW", Descent)
    monkeypatch.setattr(train, "plot_curves", lambda run_dir: None)
    assert train.main([*flags, "--steps", "2", "--run_dir", str(one)]) == 0
    flags += ["--steps", "1", "--run_dir", str(many)]
    for N, shard in turns:
        how = [*flags, "--shard", str(shard)]
        assert together(N, said, descend, how) == [0] * N, (said / "stderr-0").read_text()
        flags = ["--resume", "--steps", "2", "--run_dir", str(many)]

    for row, other in zip(metrics_of(many), metrics_of(one), strict=True):
        assert row == {
            k: v if v is None else pytest.approx(v, rel=1e-4, abs=1e-5) for k, v in other.items()
        }
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=0, abs=1e-5)
        exact = ("solved_mean", "nfe_mean", "denoiser_rows", "threshold_mean")
        assert [row[name] for name in exact] == [other[name] for name in exact]
    for row, other in zip(scores_of(many), scores_of(one), strict=True):
        near = {k: pytest.approx(v, rel=1e-5) for k, v in other.items() if type(v) is float}
        assert row == other | near
    for name in ("adapter_model" if rank else "model", "threshold_head"):
        file = f"checkpoint/{name}.safetensors"
        weights, expected = (load_file(run / file) for run in (many, one))
        for key, weight in weights.items():
            torch.testing.assert_close(weight, expected[key], rtol=1e-5, atol=1e-6)

    # Files are written and words are said by the first alone.
    assert {f.name for f in many.iterdir()} - {"checkpoint.old"} == {f.name for f in one.iterdir()}
    assert f"processes {turns[0][0]}" in (many / "environment.txt").read_text()
    silent = range(1, max(N for N, _ in turns))
    assert not any((said / f"stdout-{rank}").read_text() for rank in silent)


def one_ends():
    distributed.init()
    if distributed.rank() == 1:
        return 9  # as if killed
    began = time.perf_counter()
    with (
        pytest.raises(ValueError, match="another process has ended"),
        distributed.reraise_lost_peer(),
    ):
        for _ in range(2):
            distributed.barrier()
    assert time.perf_counter() - began < 30


def test_the_others_hear_of_a_process_that_has_ended(tmp_path):
    assert together(2, tmp_path, one_ends) == [0, 9]


def some_have_no_gradient():
    """Weights a, b, c: both processes use a, the second alone b, none c."""
    distributed.init()
    model = torch.nn.ParameterDict({name: torch.ones(2) for name in "abc"})
    rank = distributed.rank()
    (model.a * (rank + 1) + (model.b * 5 if rank else 0)).sum().backward()
    distributed.all_reduce_gradients(model)
    assert model.a.grad.tolist() == [3, 3] and model.b.grad.tolist() == [5, 5]
    assert model.c.grad is None  # so that AdamW leaves it alone, as in one process
    assert (
        distributed.all_reduce_sum(rank + 1) == 3 and distributed.all_reduce_max(rank + 0.5) == 1.5
    )
    rows = distributed.local_rows(3)
    part = torch.tensor([[True], [False], [True]])[rows]
    assert distributed.all_gather_rows(part, rows, 3).tolist() == [[True], [False], [True]]
    lone = torch.tensor([float("nan"), 2.0])[distributed.local_rows(2)]
    assert distributed.all_gather_rows(lone, distributed.local_rows(2), 2).isnan().tolist() == [
        True,
        False,
    ]


def test_gradients_are_summed_also_where_a_process_has_none(tmp_path):
    codes = together(2, tmp_path, some_have_no_gradient)
    assert codes == [0, 0], (tmp_path / "stderr-0").read_text()


@pytest.mark.parametrize("N", [1, 2, 3, 5])
@pytest.mark.parametrize("groups", [1, 2, 5, 7])
def test_shares_are_whole_groups_and_together_all_rows(monkeypatch, N, groups):
    monkeypatch.setattr(distributed, "world_size", lambda: N)
    shares = []
    for rank in range(N):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares.append(list(range(groups * 4))[distributed.local_rows(groups * 4, 4)])
    if groups < N:  # nobody may be without
        assert shares == [list(range(groups * 4))] * N
        return
    assert sum(shares, []) == list(range(groups * 4))
    assert all(share and len(share) % 4 == 0 and share[0] % 4 == 0 for share in shares)
    assert max(map(len, shares)) - min(map(len, shares)) <= 4


@pytest.mark.parametrize(
    "flags, said",
    [
        ([], "several processes need one --run_dir"),
        (["--run_dir", "x", "--prompts_per_step", "2"], "at least 1 for each of the 3 processes"),
    ],
)
def test_what_several_processes_need_is_asked_for(monkeypatch, capsys, tmp_path, flags, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    assert train.main(["--task", "countdown", "--model", "tiny", *flags]) == 2
    assert said in capsys.readouterr().err and not Path("x").exists()


def test_a_process_without_a_gpu_of_its_own_gets_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(distributed, "is_distributed", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert train.main(["--task", "countdown"]) == 2
    said = capsys.readouterr().err
    assert "process 2 finds 1 GPU(s)" in said and said.count("\n") == 1
