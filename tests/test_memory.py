"""The memory estimate, against real models' parameters and an exact budget of tensors."""

from dataclasses import replace

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Glm4MoeConfig,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from config import MEMORY_RECIPES, MODEL_RECIPES, Config
from models.families import LORA
from training import memory, recipe
from training.estimate import (
    CHUNK,
    count_parameters,
    describe_size,
    describe_time,
    estimate_gib,
    least_step_seconds,
)

SIZES = dict(
    vocab_size=100,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
)
MODELS = {
    "LLaDA-8B": recipe.read_model_config("LLaDA-8B"),
    "Qwen3-0.6B": recipe.read_model_config("Qwen3-0.6B"),
    "llama": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "llama-tied": LlamaConfig(**SIZES, tie_word_embeddings=True, head_dim=16),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=16, attention_bias=True),
    "mixture": Qwen3MoeConfig(**SIZES, num_experts=6, num_experts_per_tok=2),
    # Its first layer and its shared experts are Linear modules, which no adapter has.
    "mixture-shared": Glm4MoeConfig(**SIZES, n_routed_experts=6, num_experts_per_tok=2),
}
LLADA = Config(**MODEL_RECIPES["LLaDA"])


# ---- parameters ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_counted_as_the_model_has_them(name):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(MODELS[name])
    count = count_parameters(MODELS[name])
    linear = [m for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    outside = [model.model.embed_tokens, model.model.norm]
    if not MODELS[name].tie_word_embeddings:
        outside.append(model.lm_head)
    assert count["total"] == sum(p.numel() for p in model.parameters())
    assert count["matrices"] == sum(m.weight.numel() for m in linear)
    assert count["layers"] == count["total"] - sum(m.weight.numel() for m in outside)

    kinds = LORA[:4] if "mixture" in name else LORA  # its experts are no Linear modules
    adapted = get_peft_model(model, LoraConfig(r=5, target_modules=kinds))
    assert 5 * count["rank_1"] == adapted.get_nb_trainable_parameters()[0]


def test_the_built_in_shapes_are_those_of_the_published_models():
    assert count_parameters(MODELS["LLaDA-8B"])["total"] == 8_015_581_184
    assert count_parameters(MODELS["Qwen3-0.6B"])["total"] == 596_049_920


def test_a_small_models_size_is_not_told_as_0_billion():
    tiny = describe_size(recipe.read_model_config("tiny"))
    assert tiny.endswith(" million parameters") and 0.8 < float(tiny.split()[0]) < 1
    assert describe_size(MODELS["Qwen3-0.6B"]) == "0.6 billion parameters"
    assert describe_size(MODELS["LLaDA-8B"]) == "8.0 billion parameters"


def test_a_steps_least_time_counts_a_call_for_each_block_and_three_for_each_learned_canvas():
    config = Config(
        prompts_per_step=2,
        num_generations=3,
        max_completion_length=20,
        block_length=8,
        num_stages=2,
        num_iterations=4,
    )
    rollout = 6 * 3  # rows, and blocks of 8, 8 and 4
    canvases = 2 + 6  # the first stage's, shared by a group, and the second's
    assert least_step_seconds(config, 0.5) == 0.5 * (rollout + 3 * 4 * canvases)
    checkpointed = replace(config, gradient_checkpointing=True)
    assert least_step_seconds(checkpointed, 0.5) == 0.5 * (rollout + 4 * 4 * canvases)
    sampler = replace(config, train_target="sampler", block_length=0)
    assert least_step_seconds(sampler, 0.5) == 0.5 * 6


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0314, "0.031 s"),
        (9.4, "9.4 s"),
        (59.4, "59 s"),
        (90, "1.5 minutes"),
        (3 * 3600 + 720, "3.2 hours"),
        (36 * 3600, "1.5 days"),
    ],
)
def test_a_time_is_told_in_the_unit_that_fits(seconds, text):
    assert describe_time(seconds) == text


# ---- the estimate --------------------------------------------------------------------------------

# What an exact budget of every tensor says, in GiB. It was within 4% of an H200's measured peaks;
# it stood in estimate.py's place until commit eba4c23. (Where a rollout's logits decide, less what
# drawing has since ceased to copy: 8 bytes of each of CHUNK logits, 1 GiB.)
BUDGET = [
    ("LLaDA-8B", {}, 1, 49.5),
    ("LLaDA-8B", MEMORY_RECIPES["48 GB"], 1, 35.4),
    ("LLaDA-8B", MEMORY_RECIPES["24 GB"], 1, 18.8),
    ("LLaDA-8B", {"cache": "none", "max_completion_length": 512}, 1, 30.7),
    (
        "LLaDA-8B",
        {"gradient_checkpointing": False, "micro_batch_size": 96, "rollout_batch_size": 24},
        1,
        318.6,
    ),
    ("LLaDA-8B", {"lora_rank": 0, "rollout_batch_size": 24}, 1, 151.5),
    ("LLaDA-8B", {"lora_rank": 0, "shard": True, "beta": 0.1}, 4, 68.6),
    ("LLaDA-8B", {"shard": True, "num_stages": 4}, 4, 17.1),
    ("LLaDA-8B", {}, 4, 28.4),
    ("Qwen3-0.6B", {}, 1, 5.0),
    (
        "Qwen3-0.6B",
        {"dtype": "4bit", "micro_batch_size": 96, "max_completion_length": 512},
        1,
        12.8,
    ),
    (
        "Qwen3-0.6B",
        {"lora_rank": 0, "micro_batch_size": 1, "max_completion_length": 128},
        1,
        12.7,
    ),
    (
        "Qwen3-0.6B",
        {"gradient_checkpointing": False, "micro_batch_size": 48, "rollout_batch_size": 96},
        1,
        51.9,
    ),
]


@pytest.mark.parametrize(("model", "changes", "processes", "exact"), BUDGET)
def test_the_peak_is_within_15_percent_of_an_exact_budget(model, changes, processes, exact):
    base = MODEL_RECIPES["LLaDA" if model == "LLaDA-8B" else "small"]
    parts = estimate_gib(MODELS[model], Config(**base | changes), 200, processes)
    assert parts["peak"] == pytest.approx(exact, rel=0.15)
    turns = max(parts["rollout"], parts["update"])
    resident = parts["weights"] + parts["adapter_and_optimizer"]
    assert parts["peak"] == pytest.approx(resident + turns + parts["allowance"])


def test_the_peak_is_within_15_percent_of_what_an_h200_allocated():
    """LLaDA-8B's recipe with 2 inner updates: 16 x 6 rows of 141 + 256 tokens (EXPERIMENTS.md)."""
    parts = estimate_gib(MODELS["LLaDA-8B"], replace(LLADA, num_iterations=2), prompt_tokens=141)
    assert parts["peak"] - parts["allowance"] == pytest.approx(40.2, rel=0.15)


def test_weights_and_optimizer_are_worked_out_by_hand():
    parts = estimate_gib(MODELS["LLaDA-8B"], LLADA)
    assert parts["weights"] == pytest.approx(8_015_581_184 * 2 / 2**30)
    # 4 matrices of 4096 x 4096 and 3 of 4096 x 12288, in 32 layers, at rank 128; in float32 the
    # adapter, its gradient and two moments.
    adapter = 32 * 128 * (4 * 8192 + 3 * 16384)
    assert parts["adapter_and_optimizer"] == 4 * 4 * adapter / 2**30
    full = estimate_gib(MODELS["Qwen3-0.6B"], replace(LLADA, lora_rank=0, beta=0.1))
    assert full["weights"] == pytest.approx(2 * 596_049_920 * 4 / 2**30)  # with the reference
    assert full["adapter_and_optimizer"] == pytest.approx(3 * 596_049_920 * 4 / 2**30)


def test_logits_are_made_as_many_at_once_as_the_denoiser_makes_them():
    import denoiser

    assert denoiser.CHUNK["cuda"] == CHUNK


# ---- python -m training.memory -------------------------------------------------------------------


def printed(capsys, *flags):
    memory.main(["--model", *flags])
    return capsys.readouterr().out


def test_every_part_is_printed_and_what_fits(capsys):
    text = printed(capsys, "LLaDA-8B", "--gpu_gib", "24", "--max_completion_length", "128")
    config = Config(
        **MODEL_RECIPES["LLaDA"] | MEMORY_RECIPES["24 GB"] | {"max_completion_length": 128}
    )
    config = recipe.fit_to_memory(MODELS["LLaDA-8B"], config, {}, 24, prompt_tokens=400)
    for name, gib in estimate_gib(MODELS["LLaDA-8B"], config, prompt_tokens=400).items():
        assert f"{name:24}{gib:8.2f}\n" in text
    assert text.startswith(
        "LLaDA-8B, 8.0 billion parameters: GiB with 400 prompt tokens and 128 completion tokens\n"
    )
    assert text.splitlines()[-1] == f"It fits into 24 GiB, with {recipe.settings_of_memory(config)}"


def test_what_does_not_fit_says_what_to_lower(capsys):
    text = printed(capsys, "LLaDA-8B", "--gpu-gib", "24", "--dtype", "bfloat16")
    assert "It does not fit into 24 GiB, with --rollout_batch_size " in text
    assert "--dtype 4bit" in text


def test_several_processes_are_told_of_one_of_them(capsys):
    text = printed(capsys, "LLaDA-8B", "--processes", "4", "--shard", "true")
    parts = estimate_gib(MODELS["LLaDA-8B"], replace(LLADA, shard=True), processes=4)
    assert f"{'weights':24}{parts['weights']:8.2f}\n" in text
    assert "in each of 4 processes" in text


def test_a_folder_is_read_without_its_weights(capsys, tmp_path, monkeypatch):
    Qwen2Config(**SIZES, is_causal=False).save_pretrained(tmp_path)
    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", None)
    assert "weights" in printed(capsys, str(tmp_path), "--prompt_tokens", "20")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gpu_gib", "24"], "--model is missing"),
        (["--model", "nonsense"], "'nonsense' is neither one of LLaDA-8B, Qwen3-0.6B nor a folder"),
        (["--model", "../nothing"], "'../nothing' is neither one of"),
        (["--model", "a/b/c"], "'a/b/c' is neither one of"),
        (["--model", "LLaDA-8B", "--lenght", "3"], "--lenght"),
        (["--model", "LLaDA-8B", "--max_completion_length", "-3"], "length = -3"),
        (["--model", "LLaDA-8B", "--prompt_tokens", "0"], "at least 1"),
        (["--model", "LLaDA-8B", "--processes", "0"], "at least 1"),
        (["--model", "LLaDA-8B", "--gpu_gib", "0"], "--gpu_gib has to be a number above 0"),
        (["--model", "LLaDA-8B", "--gpu_gib", "nan"], "--gpu_gib has to be a number above 0"),
        (["--model", "LLaDA-8B", "--processes", "17"], "at least 1 for each of the 17"),
        (["--model", "LLaDA-8B", "--shard", "true"], "start several by torchrun"),
        (
            ["--model", "LLaDA-8B", "--gpu_gib", "much"],
            "--gpu_gib: it has to be a number, not 'much'",
        ),
        (["--model", "LLaDA-8B", "--gpu_gb", "24"], "unknown --gpu_gb: did you mean --gpu_gib?"),
        (["--model", "LLaDA-8B", "--step", "24"], "unknown --step: did you mean --steps or"),
        (["--model", "LLaDA-8B", "--resume"], "unknown --resume"),
        (["--model", "LLaDA-8B", "--dtype", "4bit", "--lora_rank", "0"], "a --lora_rank above 0"),
        (["--model", "LLaDA-8B", "--max_completion_length", "0"], "completions need a length"),
        (["--model", "LLaDA-8B", "--group_size", "8"], "unknown --group_size (--help lists"),
    ],
)
def test_bad_flags_get_one_line_and_the_hub_is_not_asked(capsys, monkeypatch, flags, message):
    monkeypatch.setattr("huggingface_hub.hf_hub_download", None)
    with pytest.raises(SystemExit) as end:
        memory.main(flags)
    error = capsys.readouterr().err
    assert end.value.code == 2 and message in error and error.count("\n") == 1
    assert error.startswith("python -m training.memory: ")


def test_tiny_has_a_memory_too(capsys):
    assert "10 completion tokens" in printed(capsys, "tiny")
    assert "19 completion tokens" in printed(capsys, "tiny", "--task", "sudoku")
