"""Which model a bare command trains, and which recipe fits a checkpoint and a GPU."""

import json
from dataclasses import replace

import pytest
import torch

from config import MEMORY_RECIPES, MODEL_RECIPES, Config
from models import loading
from models.tiny import BASE
from training import recipe, run_folder
from training.estimate import estimate_gib

CARDS = {"NVIDIA GeForce RTX 4090": 23.6, "NVIDIA L40S": 44.5, "NVIDIA H100 80GB HBM3": 79.2}


def test_without_a_gpu_the_default_model_is_tiny():
    name, reason = recipe.default_model(gpu=None)
    assert name == "tiny" and "no GPU" in reason


@pytest.mark.parametrize(
    ("card", "gib"), [("Tesla T4", 14.6), ("NVIDIA A10G", 22.1), *CARDS.items()]
)
def test_the_default_model_goes_by_the_gpus_memory(card, gib):
    name, reason = recipe.default_model(recipe.Gpu(card, gib=gib, free_gib=gib))
    assert name == (recipe.SMALL if gib < 21 else loading.LLADA)
    assert card in reason and "in use" not in reason


def test_the_default_model_fits_what_others_leave_free():
    gpu = recipe.Gpu("NVIDIA L40S", gib=44.5, free_gib=14.5)
    name, reason = recipe.default_model(gpu)
    assert name == recipe.SMALL
    assert "44 GiB was found, NVIDIA L40S; 30.0 of the card's 44.5 GiB are in use" in reason


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("shape", recipe.SHAPES)
def test_a_recipe_fits_its_card_and_says_what_to_expect(card, shape):
    gib = CARDS[card]
    model_config = recipe.read_model_config(shape)
    config = Config(**recipe.recipe_for(model_config, gib))
    assert estimate_gib(model_config, config, prompt_tokens=400)["peak"] < 0.95 * gib
    assert (config.dtype == "4bit") == (shape == "LLaDA-8B" and gib < 40)
    peak = estimate_gib(model_config, config)["peak"]
    gpu = recipe.Gpu(card, gib=gib, free_gib=gib)
    line = recipe.describe_expected(model_config, config, gpu)
    assert f"; {peak:.1f} of {gib:.1f} GiB expected (by arithmetic), with " in line
    assert f"--rollout_batch_size {config.rollout_batch_size} --micro_batch_size 12 " in line
    peak = estimate_gib(model_config, config, processes=4)["peak"]
    assert f"; {peak:.1f} of " in recipe.describe_expected(model_config, config, gpu, processes=4)


@pytest.mark.parametrize(
    ("shape", "gib", "checkpointing", "micro_batch", "rollout_batch"),
    [
        ("LLaDA-8B", 23.6, True, 12, 24),
        ("LLaDA-8B", 44.5, True, 12, 32),
        ("LLaDA-8B", 79.2, False, 6, 96),
        ("LLaDA-8B", 139.0, False, 12, 96),
        ("Qwen3-0.6B", 23.6, False, 12, 96),
    ],
)
def test_what_fits_into_the_memory_is_not_made_twice_nor_in_parts(
    shape, gib, checkpointing, micro_batch, rollout_batch
):
    model_config = recipe.read_model_config(shape)
    config = Config(**recipe.recipe_for(model_config, gib))
    fitted = recipe.fit_to_memory(model_config, config, {}, gib)
    assert fitted == replace(
        config,
        gradient_checkpointing=checkpointing,
        micro_batch_size=micro_batch,
        rollout_batch_size=rollout_batch,
    )
    assert estimate_gib(model_config, fitted, prompt_tokens=400)["peak"] < 0.9 * gib


def test_memory_changes_no_flag_and_nothing_without_a_gpu():
    model_config = recipe.read_model_config("LLaDA-8B")
    flags = {"gradient_checkpointing": True, "rollout_batch_size": 7, "micro_batch_size": 5}
    config = Config(**recipe.recipe_for(model_config) | flags)
    assert recipe.fit_to_memory(model_config, config, flags, 139.0) == config
    assert recipe.fit_to_memory(model_config, config, {}, None) == config
    flags = {"micro_batch_size": 12}  # too large for 80 GB without checkpointing
    config = Config(**recipe.recipe_for(model_config) | flags)
    fitted = recipe.fit_to_memory(model_config, config, flags, 79.2)
    assert fitted.gradient_checkpointing and fitted.micro_batch_size == 12


@pytest.mark.parametrize("shape", recipe.SHAPES)
def test_without_a_gpu_a_recipe_changes_no_dtype_and_expects_no_memory(shape):
    model_config = recipe.read_model_config(shape)
    changes = recipe.recipe_for(model_config)
    assert "dtype" not in changes
    line = recipe.describe_expected(model_config, Config(**changes))
    assert line == {"LLaDA-8B": "8.0", "Qwen3-0.6B": "0.6"}[shape] + " billion parameters"


def test_a_run_takes_the_recipe_of_its_model_and_gpu_and_then_its_flags(monkeypatch, capsys):
    model_config = recipe.read_model_config("LLaDA-8B")
    monkeypatch.setattr(recipe, "find_gpu", lambda: recipe.Gpu("RTX 4090", gib=23.6, free_gib=23.2))
    monkeypatch.setattr(run_folder.loading, "model_folder", lambda name: name)
    monkeypatch.setattr(run_folder, "read_config", lambda folder, name: (model_config, "llada"))
    flags = {"task": "gsm8k", "model": "GSAI-ML/LLaDA-8B-Instruct", "rollout_batch_size": 12}
    config, *_ = run_folder.resolve_config(flags)
    assert config.dtype == "4bit" and config.rollout_batch_size == 12 and config.lora_rank == 128
    out = capsys.readouterr().out
    assert "model: GSAI-ML/LLaDA-8B-Instruct (from --model)\n8.0 billion parameters; " in out
    assert "of 23.2 GiB expected (by arithmetic), with --rollout_batch_size 12 " in out


def use_card(monkeypatch, total_gib, free_gib):
    """As if torch had found a card, of which it can say the memory and the name alone."""
    memory = (int(free_gib * 2**30), int(total_gib * 2**30))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: memory)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")


def test_a_shared_cards_settings_fit_into_what_is_free(monkeypatch, capsys):
    """Of 79 GiB another process uses 30: what fits an empty card would run out of memory."""
    model_config = recipe.read_model_config("LLaDA-8B")
    monkeypatch.setattr(run_folder.loading, "model_folder", lambda name: name)
    monkeypatch.setattr(run_folder, "read_config", lambda folder, name: (model_config, "llada"))
    flags = {"task": "gsm8k", "model": "GSAI-ML/LLaDA-8B-Instruct"}
    use_card(monkeypatch, total_gib=79.2, free_gib=78.7)
    on_empty_card, *_ = run_folder.resolve_config(flags)
    assert "of 78.7 GiB expected (by arithmetic), with" in capsys.readouterr().out
    use_card(monkeypatch, total_gib=79.2, free_gib=49.2)
    config, *_ = run_folder.resolve_config(flags)
    assert estimate_gib(model_config, on_empty_card, prompt_tokens=400)["peak"] > 49.2
    assert estimate_gib(model_config, config, prompt_tokens=400)["peak"] < 0.9 * 49.2
    peak = estimate_gib(model_config, config)["peak"]
    line = f"{peak:.1f} of 49.2 GiB expected (by arithmetic; 30.0 of the card's 79.2 GiB are in use"
    assert line in capsys.readouterr().out


def test_on_a_cpu_a_gpu_beside_it_decides_nothing(monkeypatch, capsys):
    use_card(monkeypatch, total_gib=79.2, free_gib=78.7)
    config, *_ = run_folder.resolve_config({"task": "countdown", "device": "cpu"})
    assert config.model == "tiny"
    assert "no GPU is used" in capsys.readouterr().out


def test_a_block_causal_model_that_reads_short_prompts_is_trained_in_its_own_blocks(tmp_path):
    saved = json.loads((BASE / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(saved | {"block_size": 4}))
    flags = {"task": "chain", "model": str(tmp_path)}
    config, *_ = run_folder.resolve_config(flags)
    assert config.block_length == 4  # not chain's 2
    config, *_ = run_folder.resolve_config(flags | {"block_length": 2})
    assert config.block_length == 2
    with pytest.raises(ValueError, match="is block-causal, in blocks of 4"):
        run_folder.resolve_config(flags | {"block_length": 3})


def test_a_gpus_memory_changes_the_large_models_recipe_and_not_the_small_ones():
    for shape, is_large in (("LLaDA-8B", True), ("Qwen3-0.6B", False)):
        model_config = recipe.read_model_config(shape)
        plain = recipe.recipe_for(model_config)
        assert plain == MODEL_RECIPES["LLaDA" if is_large else "small"]
        for gib, name in ((23.6, "24 GB"), (44.5, "48 GB")):
            changes = MEMORY_RECIPES[name] if is_large else {}
            assert recipe.recipe_for(model_config, gib) == plain | changes
