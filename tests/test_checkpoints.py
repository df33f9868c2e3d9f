"""A run's checkpoint, read back: where it is, whether it is whole, and as a policy."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import random_adapter, write_checkpoint
from safetensors.torch import save_file

from models import checkpoints
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
from training.files import write_checksums

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


# ---- a run that is alive -------------------------------------------------------------------------


@pytest.fixture
def run_dir(adapter, tmp_path):
    """A run's folder with a checkpoint of step 1, and one of step 2 to put in its place."""
    _, folder = adapter
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    for name, step in (("checkpoint", 1), ("next", 2)):
        checkpoint = tmp_path / "run" / name
        shutil.copytree(folder, checkpoint)
        head = ThresholdHead(104, 0.1 * step)
        save_file(head.state_dict(), checkpoint / "threshold_head.safetensors")
        torch.save({"step": step, "optimizers": []}, checkpoint / "state.pt")
        write_checksums(checkpoint)
    return tmp_path / "run"


def replace_checkpoint(run_dir):
    """What a run does when it saves."""
    (run_dir / "checkpoint").rename(run_dir / "checkpoint.old")
    (run_dir / "next").rename(run_dir / "checkpoint")


def gamma_of(policy):
    return policy.threshold_head.linear.bias.exp().item()


def test_a_checkpoint_that_is_replaced_while_it_is_read_is_read_again(run_dir, monkeypatch):
    """Else the adapter of one step would have the threshold head of the next."""
    load_denoiser = checkpoints.load_denoiser

    def save_meanwhile(*arguments):
        if (run_dir / "next").exists():
            replace_checkpoint(run_dir)
        return load_denoiser(*arguments)

    monkeypatch.setattr(checkpoints, "load_denoiser", save_meanwhile)
    policy = load_policy(run_dir)
    assert policy.step == 2 and gamma_of(policy) == pytest.approx(0.2)


def test_a_checkpoint_that_vanishes_between_two_renames_is_read_again(run_dir, monkeypatch):
    verify = checkpoints.verify_checksums

    def save_meanwhile(folder):
        if (run_dir / "next").exists():
            (run_dir / "checkpoint").rename(run_dir / "checkpoint.old")
            try:
                read_json(folder / "sums.json")  # raises: it is not there
            finally:
                (run_dir / "next").rename(run_dir / "checkpoint")
        verify(folder)

    monkeypatch.setattr(checkpoints, "verify_checksums", save_meanwhile)
    assert load_policy(run_dir).step == 2


def test_a_checkpoint_that_is_always_replaced_is_said_to_be(run_dir, monkeypatch):
    states = iter(range(100))
    monkeypatch.setattr(checkpoints, "checkpoint_identity", lambda path: next(states))
    with pytest.raises(ValueError, match="replaced faster than it can be read"):
        load_policy(run_dir)


def test_reading_a_run_changes_nothing_in_its_folder(run_dir):
    """Between two renames a reader gave checkpoint.old its name back, and the run's save failed."""
    (run_dir / "checkpoint").rename(run_dir / "checkpoint.old")
    before = sorted(run_dir.rglob("*"))
    assert load_policy(run_dir).step == 1
    assert sorted(run_dir.rglob("*")) == before


# ---- files that a hand has edited ----------------------------------------------------------------


def rewrite_config(checkpoint, **fields):
    file = checkpoint / "adapter_config.json"
    file.write_text(json.dumps(read_json(file) | fields))


EDITS = {
    "no sums": lambda x: (x / "sums.json").unlink(),
    "empty sums": lambda x: (x / "sums.json").write_text("{}"),
    "sums are a list": lambda x: (x / "sums.json").write_text("[]"),
    "sums lead outside": lambda x: (x / "sums.json").write_text(
        json.dumps({"../config.json": checksum(x.parent / "config.json")})
    ),
    "config is a list": lambda x: (x / "adapter_config.json").write_text("[]"),
    "base is a number": lambda x: rewrite_config(x, base_model_name_or_path=3),
    "another file": lambda x: (x / "model.safetensors").write_text(""),
}
WITH_NEW_SUMS = {
    "head of another size": lambda x: save_file(
        ThresholdHead(7).state_dict(), x / "threshold_head.safetensors"
    ),
    "head is no tensors": lambda x: (x / "threshold_head.safetensors").write_text("{}"),
    "state is a list": lambda x: torch.save([1], x / "state.pt"),
    "state has no step": lambda x: torch.save({"optimizers": []}, x / "state.pt"),
    "step is a text": lambda x: torch.save({"step": "2", "optimizers": []}, x / "state.pt"),
    "state is no file of torch's": lambda x: (x / "state.pt").write_text("PK"),
    "rank is a text": lambda x: rewrite_config(x, r="16"),
    "rank is negative": lambda x: rewrite_config(x, r=-1),
    "alpha is a list": lambda x: rewrite_config(x, lora_alpha=[]),
}


@pytest.mark.parametrize("edit", [*EDITS, *WITH_NEW_SUMS])
def test_an_edited_checkpoint_is_one_line(run_dir, edit):
    (EDITS | WITH_NEW_SUMS)[edit](run_dir / "checkpoint")
    if edit in WITH_NEW_SUMS:
        write_checksums(run_dir / "checkpoint")
    with pytest.raises(ValueError, match="checkpoint") as error:
        load_policy(run_dir)
    assert "\n" not in str(error.value)


def test_an_edited_model_card_drops_no_checkpoint(run_dir):
    (run_dir / "checkpoint" / "README.md").write_text("my notes")
    assert load_policy(run_dir).step == 1


# ---- adapters beside the wrong model -------------------------------------------------------------


def test_an_adapter_beside_full_weights_is_refused(adapter):
    """transformers would load it with the model; or the adapter's base would be taken instead."""
    _, folder = adapter
    shutil.copy(BASE / "model.safetensors", folder)
    with pytest.raises(ValueError, match="holds full weights and an adapter of tiny"):
        load_policy(folder)
    for file in BASE.iterdir():
        shutil.copy(file, folder)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ValueError, match="an adapter needs its own folder"):
        load_policy(folder)


def test_an_adapter_of_another_base_says_so(adapter, tmp_path, capsys):
    _, folder = adapter
    shutil.copytree(BASE, tmp_path / "other")
    load_policy("tiny", adapter=folder)
    assert capsys.readouterr().err == ""
    load_policy(tmp_path / "other", adapter=folder)
    assert f"was trained on tiny, but is applied to {tmp_path}/other" in capsys.readouterr().err
    write_checkpoint(tmp_path / "llada", "llada")
    with pytest.raises(ValueError, match="cannot be loaded on .*llada") as error:
        load_policy(tmp_path / "llada", adapter=folder)
    assert "\n" not in str(error.value)
