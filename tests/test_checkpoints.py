"""A run's checkpoint, read back: where it is, whether it is whole, and as a policy."""

import json
from pathlib import Path

import pytest
import torch
from checkpoints import random_adapter, write_checkpoint
from safetensors.torch import save_file

from models.checkpoints import (
    adapter_base,
    checksum,
    find_checkpoint,
    load_policy,
    read_json,
    reads_compact_prompts,
    verify_checksums,
)
from models.loading import load_denoiser
from models.lora import save_adapter
from models.tiny import BASE
from sampler import ThresholdHead

# ---- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [None, "{", "\x00"])
def test_a_json_file_that_is_missing_or_broken_is_named_in_one_line(tmp_path, content):
    file = tmp_path / "settings.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError, match="cannot read .*settings.json") as error:
        read_json(file)
    assert "\n" not in str(error.value)


def test_a_checkpoint_that_is_not_as_it_was_written_is_named(tmp_path):
    file = tmp_path / "state.pt"
    file.write_bytes(b"weights")
    (tmp_path / "README.md").write_text("a card, which may be edited")
    (tmp_path / "sums.json").write_text(json.dumps({"state.pt": checksum(file)}))
    verify_checksums(tmp_path)
    file.write_bytes(b"weightz")
    with pytest.raises(ValueError, match="state.pt is not as it was written"):
        verify_checksums(tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match="state.pt is not as it was written"):
        verify_checksums(tmp_path)


# ---- checkpoints ---------------------------------------------------------------------------------


def test_a_runs_checkpoint_is_found_also_between_two_renames(tmp_path):
    (tmp_path / "checkpoint").mkdir()
    assert find_checkpoint(tmp_path) == tmp_path  # no run: it has no config.json
    (tmp_path / "config.json").write_text("{}")
    assert find_checkpoint(str(tmp_path)) == tmp_path / "checkpoint"
    (tmp_path / "checkpoint").rename(tmp_path / "checkpoint.old")
    assert find_checkpoint(tmp_path) == tmp_path / "checkpoint.old"
    (tmp_path / "checkpoint.old").rmdir()
    assert find_checkpoint(tmp_path) == tmp_path
    assert find_checkpoint("someone/LLaDA") == Path("someone/LLaDA")


@pytest.fixture
def adapter(tmp_path):
    """(model, folder) of a random adapter on tiny."""
    denoiser, _ = load_denoiser("tiny")
    model = random_adapter(denoiser)
    save_adapter(model, tmp_path / "adapter")
    return model, tmp_path / "adapter"


def test_tiny_and_what_was_trained_from_it_read_compact_prompts(tmp_path, adapter):
    _, folder = adapter
    assert adapter_base(folder) == "tiny"
    assert adapter_base(BASE) is None
    for path in ("tiny", BASE, folder):
        assert reads_compact_prompts(path)
    write_checkpoint(tmp_path / "llada", "llada")
    for path in (tmp_path / "llada", "someone/LLaDA"):
        assert not reads_compact_prompts(path)


IDS = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(0))


def test_an_adapters_own_folder_and_its_base_with_the_adapter_are_one_policy(adapter):
    model, folder = adapter
    head = ThresholdHead(model.config.hidden_size, 0.3)
    save_file(head.state_dict(), folder / "threshold_head.safetensors")
    policies = [
        load_policy(folder),
        load_policy("tiny", adapter=folder),
        load_policy(BASE, adapter=str(folder), trainable=True),
    ]
    expected = model(input_ids=IDS).logits
    for policy in policies:
        assert torch.equal(policy.denoiser(input_ids=IDS).logits, expected)
        saved = policy.threshold_head.state_dict()
        assert all(torch.equal(saved[name], value) for name, value in head.state_dict().items())
    learns = [any(p.requires_grad for p in policy.denoiser.parameters()) for policy in policies]
    assert learns == [False, False, True]
    assert load_policy("tiny").threshold_head is None


def test_an_adapter_whose_base_cannot_be_found_or_that_gets_another_says_what_to_give(adapter):
    _, folder = adapter
    with pytest.raises(ValueError, match=f"of tiny: give BASE_MODEL --adapter {folder}"):
        load_policy(folder, adapter=folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(read_json(file) | {"base_model_name_or_path": "/gone/LLaDA"}))
    with pytest.raises(ValueError, match=f"of /gone/LLaDA: give BASE_MODEL --adapter {folder}"):
        load_policy(folder)
