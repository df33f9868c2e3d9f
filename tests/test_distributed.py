"""Several processes against one: the same batch, metrics, gradients, weights and files."""

import multiprocessing
import os
import socket
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_run import make_run_folder
from toy import metrics_of, scores_of

import train
from config import Config
from training import distributed, recipe, run_folder

# Each child is forked from a server that has imported everything once.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["train", "peft", "torch._dynamo"])
SMALL_RUN = [
    *("--task", "countdown"),
    *("--model", "tiny"),
    *("--num_generations", "4"),
    *("--micro_batch_size", "4"),
    *("--num_iterations", "2"),
    *("--p_mask_prompt", "0.2"),
    *("--beta", "0.04"),
    *("--warmup_steps", "0"),
    *("--eval_problems", "5"),
    *("--frontier", "false"),
]


def child(rank, N, port, folder, function, *arguments):
    """One of N processes, as torchrun would start it. What it prints goes to files."""
    os.environ["MASTER_ADDR"] = "localhost"
    os.environ["MASTER_PORT"] = str(port)
    os.environ["TORCHELASTIC_RUN_ID"] = "test"
    os.environ["RANK"] = str(rank)
    os.environ["LOCAL_RANK"] = str(rank)
    os.environ["WORLD_SIZE"] = str(N)
    torch.set_num_threads(1)
    torch.cuda.is_available = lambda: False  # there may be fewer GPUs than processes
    sys.stdout = open(folder / f"stdout-{rank}", "w")  # noqa: SIM115
    sys.stderr = open(folder / f"stderr-{rank}", "w")  # noqa: SIM115
    code = function(*arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


def run_together(N, folder, function, *arguments):
    """Calls it in N processes that know of each other. Returns their exit codes."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as free_socket:
        free_socket.bind(("localhost", 0))
        port = free_socket.getsockname()[1]
    children = [
        CONTEXT.Process(target=child, args=(rank, N, port, folder, function, *arguments))
        for rank in range(N)
    ]
    for process in children:
        process.start()
    for process in children:
        process.join(150)
        if process.is_alive():  # a deadlock
            process.kill()
            process.join()
    return [process.exitcode for process in children]


class Descent(torch.optim.SGD):
    """SGD in AdamW's place: its steps are the gradients, where AdamW's first are their signs."""

    def __init__(self, weights, lr, **_):
        super().__init__(weights, lr)


def descend(flags):
    torch.optim.AdamW = Descent
    train.draw_pictures = lambda config, run_dir: []  # slow
    return train.main(flags)


@pytest.mark.parametrize(
    ("turns", "lora_rank"),  # turns: (processes, whether weights are split) of each step
    [([(3, False), (2, True)], 16), ([(2, False), (4, True)], 0)],
    ids=["an adapter learns", "all learns"],
)
def test_one_step_by_some_processes_the_next_by_others_give_what_one_does(
    monkeypatch, tmp_path, turns, lora_rank
):
    one = tmp_path / "one"
    many = tmp_path / "many"
    output = tmp_path / "output"
    flags = [
        *SMALL_RUN,
        *("--prompts_per_step", "4"),  # of 3 processes, one has two prompts
        *("--lora_rank", str(lora_rank)),
        *("--learning_rate", "0.1" if lora_rank else "0.0005"),
    ]
    monkeypatch.setattr(torch.optim, "AdamW", Descent)
    monkeypatch.setattr(train, "draw_pictures", lambda config, run_dir: [])
    assert train.main([*flags, "--steps", "2", "--run_dir", str(one)]) == 0
    flags += ["--steps", "1", "--run_dir", str(many)]
    for N, shard in turns:
        codes = run_together(N, output, descend, [*flags, "--shard", str(shard)])
        assert codes == [0] * N, (output / "stderr-0").read_text()
        flags = ["--resume", "--steps", "2", "--run_dir", str(many)]

    exact = ("solved_mean", "nfe_mean", "denoiser_rows", "threshold_mean")
    for row, expected in zip(metrics_of(many), metrics_of(one), strict=True):
        assert row == {
            name: None if value is None else pytest.approx(value, rel=1e-4, abs=1e-5)
            for name, value in expected.items()
        }
        assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=0, abs=1e-5)
        assert [row[name] for name in exact] == [expected[name] for name in exact]
    for row, expected in zip(scores_of(many), scores_of(one), strict=True):
        assert row == {
            name: pytest.approx(value, rel=1e-5) if type(value) is float else value
            for name, value in expected.items()
        }
    for name in ("adapter_model" if lora_rank else "model", "threshold_head"):
        file = f"checkpoint/{name}.safetensors"
        weights = load_file(many / file)
        expected = load_file(one / file)
        for key, weight in weights.items():
            torch.testing.assert_close(weight, expected[key], rtol=1e-5, atol=1e-6)

    # Only the main process writes files and prints.
    names = {file.name for file in many.iterdir()}
    assert names - {"checkpoint.old"} == {file.name for file in one.iterdir()}
    assert f"processes {turns[0][0]}" in (many / "environment.txt").read_text()
    silent_ranks = range(1, max(N for N, _ in turns))
    assert not any((output / f"stdout-{rank}").read_text() for rank in silent_ranks)


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
    assert run_together(2, tmp_path, one_ends) == [0, 9]


def main_process_writes_long(folder):
    distributed.init()
    if distributed.is_main_process():
        time.sleep(0.5)
        (folder / "written").touch()
    distributed.finish()
    assert (folder / "written").exists()
    assert not torch.distributed.is_initialized()


def test_no_process_ends_before_the_main_one_has_written_its_files(tmp_path):
    """torchrun took one that left early for a failed one, and ended the main one while it drew."""
    assert run_together(2, tmp_path, main_process_writes_long, tmp_path) == [0, 0]


def tensor_of_the_last_sum_is_alive():
    distributed.init()
    tensor = torch.zeros(1)
    reference = weakref.ref(tensor)
    distributed.all_reduce(tensor)
    del tensor
    time.sleep(0.2)  # gloo's thread lets go of the sum
    assert reference() is not None


def test_gloos_thread_is_not_the_one_that_frees_the_last_sum(tmp_path):
    """It aborted the process if the interpreter was shutting down by then."""
    codes = run_together(2, tmp_path, tensor_of_the_last_sum_is_alive)
    assert codes == [0, 0], (tmp_path / "stderr-0").read_text()


def some_have_no_gradient():
    """Weights a, b, c: both processes use a, the second alone b, none c."""
    distributed.init()
    model = torch.nn.ParameterDict({name: torch.ones(2) for name in "abc"})
    rank = distributed.rank()
    (model.a * (rank + 1) + (model.b * 5 if rank else 0)).sum().backward()
    distributed.all_reduce_gradients(model)
    assert model.a.grad.tolist() == [3, 3] and model.b.grad.tolist() == [5, 5]
    assert model.c.grad is None  # so that AdamW leaves it alone, as in one process
    assert distributed.all_reduce_sum(rank + 1) == 3
    assert distributed.all_reduce_max(rank + 0.5) == 1.5
    rows = distributed.local_rows(3)
    flags = torch.tensor([[True], [False], [True]])
    assert distributed.all_gather_rows(flags[rows], rows, 3).tolist() == flags.tolist()
    rows = distributed.local_rows(2)
    values = torch.tensor([float("nan"), 2.0])
    gathered = distributed.all_gather_rows(values[rows], rows, 2)
    assert gathered.isnan().tolist() == [True, False]


def test_gradients_are_summed_also_where_a_process_has_none(tmp_path):
    codes = run_together(2, tmp_path, some_have_no_gradient)
    assert codes == [0, 0], (tmp_path / "stderr-0").read_text()


def cards_differ():
    """Another program uses 30 GiB of the second process's card."""
    distributed.init()
    free_gib = [78.7, 48.7][distributed.rank()]
    recipe.find_gpu = lambda: recipe.Gpu("a card", gib=79.2, free_gib=free_gib)
    assert run_folder.gpu_with_least_free_memory(device="auto").free_gib == pytest.approx(48.7)


def test_all_processes_choose_settings_that_fit_the_fullest_card(tmp_path):
    """Micro-batches of another size on one of them would wait for the others for ever."""
    codes = run_together(2, tmp_path, cards_differ)
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
    ("flags", "message"),
    [
        ([], "several processes need one --run_dir"),
        (["--run_dir", "x", "--prompts_per_step", "2"], "at least 1 for each of the 3 processes"),
    ],
)
def test_what_several_processes_need_is_asked_for(monkeypatch, capsys, tmp_path, flags, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    assert train.main(["--task", "countdown", "--model", "tiny", *flags]) == 2
    assert message in capsys.readouterr().err and not Path("x").exists()


def test_a_process_without_a_gpu_of_its_own_gets_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(distributed, "is_distributed", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert train.main(["--task", "countdown"]) == 2
    error = capsys.readouterr().err
    assert "process 2 finds 1 GPU(s)" in error and error.count("\n") == 1


def test_processes_on_the_cpu_need_no_gpu_each(monkeypatch, tmp_path):
    """Two of them beside one GPU were refused."""
    backends = []

    def init_process_group(backend, timeout):
        backends.append(backend)
        raise ValueError("enough")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.distributed, "init_process_group", init_process_group)
    monkeypatch.setattr(distributed, "is_distributed", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    flags = ["--task", "countdown", "--device", "cpu", "--run_dir", str(tmp_path / "run")]
    assert train.main(flags) == 2
    # The command to go on with does not name the device: it is in the run's config.json.
    (tmp_path / "saved").mkdir()
    make_run_folder(
        tmp_path / "saved", Config(model="tiny", device="cpu", max_completion_length=10)
    )
    assert train.main(["--resume", "--run_dir", str(tmp_path / "saved")]) == 2
    assert backends == ["gloo", "gloo"]


def test_the_command_to_go_on_with_starts_as_many_processes(monkeypatch, capsys, tmp_path):
    def interrupted(config, run_dir, resume, export):
        raise KeyboardInterrupt

    (tmp_path / "run").mkdir()
    make_run_folder(tmp_path / "run", Config(model="tiny", max_completion_length=10))
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(train, "run", interrupted)
    assert train.main(["--resume", "--run_dir", str(tmp_path / "run")]) == 130
    command = f"torchrun --nproc_per_node 2 train.py --resume --run_dir {tmp_path / 'run'}"
    assert f"stopped; resume with: {command}\n" in capsys.readouterr().out
