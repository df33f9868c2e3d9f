"""Which model a bare command trains, and which recipe fits a checkpoint and a GPU."""

import json
from dataclasses import replace

import pytest

from config import MEMORY_RECIPES, MODEL_RECIPES, Config
from models import loading
from models.tiny import BASE
from training import recipe, run_folder
from training.estimate import estimate_gib

CARDS = {"NVIDIA GeForce RTX 4090": 23.6, "NVIDIA L40S": 44.5, "NVIDIA H100 80GB HBM3": 79.2}


def test_without_a_gpu_the_default_model_is_tiny(monkeypatch):
    monkeypatch.setattr(recipe, "find_gpu", lambda: None)
    name, reason = recipe.default_model()
    assert name == "tiny" and "no GPU" in reason


@pytest.mark.parametrize(
    ("card", "gib"), [("Tesla T4", 14.6), ("NVIDIA A10G", 22.1), *CARDS.items()]
)
def test_the_default_model_goes_by_the_gpus_memory(monkeypatch, card, gib):
    monkeypatch.setattr(recipe, "find_gpu", lambda: recipe.Gpu(card, gib))
    name, reason = recipe.default_model()
    assert name == (recipe.SMALL if gib < 21 else loading.LLADA)
    assert card in reason


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("shape", recipe.SHAPES)
def test_a_recipe_fits_its_card_and_says_what_to_expect(card, shape):
    gib = CARDS[card]
    model_config = recipe.read_model_config(shape)
    config = Config(**recipe.recipe_for(model_config, gib))
    assert estimate_gib(model_config, config, prompt_tokens=400)["peak"] < 0.95 * gib
    assert (config.dtype == "4bit") == (shape == "LLaDA-8B" and gib < 40)
    peak = estimate_gib(model_config, config)["peak"]
    line = recipe.describe_expected(model_config, config, gib)
    assert f"; {peak:.1f} of {gib:.1f} GiB expected (by arithmetic), with " in line
    assert f"--rollout_batch_size {config.rollout_batch_size} --micro_batch_size 12 " in line
    peak = estimate_gib(model_config, config, processes=4)["peak"]
    assert f"; {peak:.1f} of " in recipe.describe_expected(model_config, config, gib, processes=4)


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
    monkeypatch.setattr(recipe, "find_gpu", lambda: recipe.Gpu("RTX 4090", 23.6))
    monkeypatch.setattr(run_folder.loading, "model_folder", lambda name: name)
    monkeypatch.setattr(run_folder, "read_config", lambda folder, name: (model_config, "llada"))
    flags = {"task": "gsm8k", "model": "GSAI-ML/LLaDA-8B-Instruct", "rollout_batch_size": 12}
    config, *_ = run_folder.resolve_config(flags)
    assert config.dtype == "4bit" and config.rollout_batch_size == 12 and config.lora_rank == 128
    out = capsys.readouterr().out
    assert "model: GSAI-ML/LLaDA-8B-Instruct (from --model)\n8.0 billion parameters; " in out
    assert "of 23.6 GiB expected (by arithmetic), with --rollout_batch_size 12 " in out


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
