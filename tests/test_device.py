"""The device that models run on, and what is said of it."""

import re

import pytest
import torch

from config import CHANGEABLE_ON_RESUME, Config
from models.device import (
    describe_out_of_memory,
    device_name,
    peak_memory_gib,
    pick_device,
    settings_to_lower,
)


@pytest.mark.parametrize(
    ("name", "has_gpu", "expected"),
    [
        ("auto", False, "cpu"),
        ("auto", True, "cuda"),
        ("cpu", True, "cpu"),
        ("cpu", False, "cpu"),
        ("cuda", True, "cuda"),
    ],
)
def test_a_gpu_is_taken_where_there_is_one_unless_the_flag_says_otherwise(
    monkeypatch, name, has_gpu, expected
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    assert pick_device(name) == torch.device(expected)


def test_a_gpu_that_is_not_there_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="finds no GPU.*cpu") as error:
        pick_device("cuda")
    assert "\n" not in str(error.value)


def test_a_cpu_is_named_with_its_threads():
    assert device_name(torch.device("cpu")).endswith(f"{torch.get_num_threads()} thread")


def test_the_peak_memory_is_more_than_that_of_an_empty_process_and_less_than_a_big_machines():
    assert 0.05 < peak_memory_gib() < 500


def test_the_peak_memory_on_a_cpu_is_the_processs_also_beside_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 0)
    assert peak_memory_gib() > 0.05
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**30)
    assert peak_memory_gib() == 3


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("no room"),
        torch.OutOfMemoryError("CUDA out\nof memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory:\nyou tried 8 bytes"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
    ],
)
def test_out_of_memory_is_one_line_that_says_what_to_lower(error):
    message = describe_out_of_memory(error, "--batch_size (64)")
    assert message.startswith("out of memory")
    assert "lower --batch_size (64)" in message
    assert "\n" not in message


def test_any_other_error_is_raised_again():
    with pytest.raises(RuntimeError, match="shapes"):
        describe_out_of_memory(RuntimeError("shapes differ"), "--batch_size (64)")


def test_what_a_training_run_can_lower_has_its_values_once_they_are_known():
    flags = settings_to_lower(Config(micro_batch_size=7, num_generations=5))
    assert flags.startswith(
        "--micro_batch_size (7), --prompts_per_step (32), --num_generations (5)"
    )
    assert "or set --rollout_batch_size 1" in flags
    assert settings_to_lower(None).startswith("--micro_batch_size, --prompts_per_step, ")
    for config, hint in (
        (Config(lora_rank=0), "--lora_rank 128"),
        (Config(lora_rank=256), "--lora_rank 128"),
        (Config(cache="dual", block_length=2), "--cache none"),
    ):
        assert hint in settings_to_lower(config)
    flags = settings_to_lower(Config(cache="dual", block_length=2), has_checkpoint=True)
    for name in re.findall(r"--(\w+)", flags):  # what --resume would refuse helps nobody
        assert name in CHANGEABLE_ON_RESUME
    flags = settings_to_lower(Config(micro_batch_size=7, num_generations=5))
    for hint in ("--lora_rank", "--cache"):  # rank 16 and no cache: neither would take less
        assert hint not in flags
