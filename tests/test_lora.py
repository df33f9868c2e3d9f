"""LoRA adapters: what they adapt, saving and loading them, and what is refused."""

import json
import stat
import warnings
from pathlib import Path

import pytest
import torch
from checkpoints import (
    FAMILIES,
    HIDDEN,
    LAYERS,
    MLP,
    MOE,
    ids_and_mask,
    random_adapter,
    reference_logits,
    write_checkpoint,
)
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from models.block_causal import make_policy
from models.checkpoints import adapter_base, load_policy
from models.loading import load_denoiser
from models.lora import add_lora, describe_lora, load_lora, lora_layers, save_adapter
from models.tiny import tiny_denoiser, tiny_tokenizer


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_adapts_every_matrix_and_switched_off_is_the_base_exactly(tmp_path, family):
    write_checkpoint(tmp_path, family)
    denoiser, tokenizer = load_denoiser(str(tmp_path))
    ids, _ = ids_and_mask()
    output_layer = denoiser.get_output_embeddings()
    base_logits = output_layer(make_policy(denoiser, tokenizer).hidden(ids))
    state = torch.random.get_rng_state()
    model = random_adapter(denoiser)
    assert torch.equal(torch.random.get_rng_state(), state)
    kinds = 4 if family in MOE else 7
    assert len(lora_layers(model)) == kinds * LAYERS
    summary = f"{kinds * LAYERS} matrices ({kinds} kinds x {LAYERS} layers), rank 3"
    assert summary in describe_lora(model)
    for name, p in model.named_parameters():
        assert p.requires_grad == ("lora_" in name)

    policy = make_policy(model, tokenizer)
    assert not torch.allclose(output_layer(policy.hidden(ids)), base_logits, atol=1e-3)
    assert torch.equal(output_layer(policy.without_adapter().hidden(ids)), base_logits)

    save_adapter(model, tmp_path / "adapter")
    base, _ = load_denoiser(str(tmp_path))
    loaded = load_lora(base, tmp_path / "adapter", trainable=True)
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    assert any(p.requires_grad for p in loaded.parameters())


def test_a_missing_lora_target_is_named():
    denoiser = tiny_denoiser(tiny_tokenizer())
    del denoiser.model.layers[2].mlp.up_proj
    with pytest.raises(ValueError, match="up_proj in 5 of 6 layers"):
        add_lora(denoiser, rank=2, alpha=4)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="LoRA target not found"):
        add_lora(gpt2, rank=2, alpha=4)


def test_an_adapter_on_a_bfloat16_base_is_float32_and_learns(tmp_path):
    write_checkpoint(tmp_path, "llada")
    denoiser, tokenizer = load_denoiser(str(tmp_path), dtype=torch.bfloat16)
    model = random_adapter(denoiser)
    trainable = [p for p in model.parameters() if p.requires_grad]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert {p.dtype for p in trainable} == {torch.float32}
    assert {p.dtype for p in frozen} == {torch.bfloat16}
    ids, mask = ids_and_mask()
    hidden = make_policy(model, tokenizer).hidden(ids, mask)
    assert hidden.dtype == torch.bfloat16
    hidden.float().square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in trainable)


# ---- saving --------------------------------------------------------------------------------------


def saved_adapter(folder, base):
    """A random adapter on the model `base`, saved to `folder`. Returns the model."""
    denoiser, _ = load_denoiser(base)
    model = random_adapter(denoiser)
    save_adapter(model, folder)
    return model


def test_an_adapter_finds_its_base_from_any_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_checkpoint(Path("cache/base"), "llada")
    model = saved_adapter("adapter", base="cache/base")
    ids, _ = ids_and_mask()
    expected = model(input_ids=ids).logits
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    base = adapter_base(tmp_path / "adapter")
    assert base == str((tmp_path / "cache/base").resolve())
    loaded = load_lora(load_denoiser(base)[0], tmp_path / "adapter")
    assert torch.equal(loaded(input_ids=ids).logits, expected)
    (tmp_path / "cache/base").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="cache/base' is not a folder"):
        load_denoiser(base)


def test_an_adapter_on_a_hub_model_names_it(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "hub", "llada")
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, **options: str(tmp_path / "hub")
    )
    denoiser, _ = load_denoiser("someone/LLaDA")
    model = add_lora(denoiser, rank=2, alpha=4)
    assert model.peft_config["default"].lora_dropout == 0
    save_adapter(model, tmp_path / "adapter")
    assert adapter_base(tmp_path / "adapter") == "someone/LLaDA"
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: peft\nbase_model: someone/LLaDA\n")
    assert 'load_denoiser("someone/LLaDA")' in card


def test_an_adapter_can_be_saved_from_weights_that_are_given_to_it(tmp_path):
    model = saved_adapter(tmp_path / "whole", base="tiny")
    weights = {name: w + 1 for name, w in model.state_dict().items() if "lora_" in name}
    save_adapter(model, tmp_path / "given", state_dict=weights)
    whole = load_file(tmp_path / "whole" / "adapter_model.safetensors")
    given = load_file(tmp_path / "given" / "adapter_model.safetensors")
    assert whole.keys() == given.keys()
    assert all(torch.equal(given[name], w + 1) for name, w in whole.items())


def test_whoever_may_read_new_files_may_read_an_adapter(tmp_path):
    saved_adapter(tmp_path / "adapter", base="tiny")
    files = {file.name: file for file in (tmp_path / "adapter").iterdir()}
    assert set(files) == {"adapter_model.safetensors", "adapter_config.json", "README.md"}
    modes = {stat.S_IMODE(file.stat().st_mode) for file in files.values()}
    (tmp_path / "new").touch()
    assert modes == {stat.S_IMODE((tmp_path / "new").stat().st_mode)}


def test_a_local_base_is_named_on_the_card_without_its_path(tmp_path):
    write_checkpoint(tmp_path / "some-base", "llada")
    saved_adapter(tmp_path / "adapter", base=str(tmp_path / "some-base"))
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "- Base model: some-base, a local model" in card
    assert str(tmp_path) not in card
    assert "base_model:" not in card  # the hub would look for it
    assert "- Rank 3, alpha 6, on down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj" in card
    assert len(card.splitlines()) < 50
    assert max(len(line) for line in card.splitlines()) <= 100


def test_both_examples_of_the_card_load_the_adapter(tmp_path):
    model = saved_adapter(tmp_path / "adapter", base="tiny")
    ids = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    expected = model(input_ids=ids).logits
    card = (tmp_path / "adapter" / "README.md").read_text()

    assert 'load_policy("FOLDER")' in card
    policy = load_policy(tmp_path / "adapter")
    assert torch.equal(policy.denoiser(input_ids=ids).logits, expected)

    assert 'denoiser, tokenizer = load_denoiser("tiny")' in card
    assert 'PeftModel.from_pretrained(denoiser, "FOLDER")' in card
    denoiser, _ = load_denoiser("tiny")
    loaded = PeftModel.from_pretrained(denoiser, str(tmp_path / "adapter"))
    assert torch.equal(loaded(input_ids=ids).logits, expected)


# ---- adapters that others trained on LLaDA's own modules -----------------------------------------

MATRIX_SHAPES = {  # LLaDA's own names, and the matrices that they are: (out, in)
    "q_proj": (HIDDEN, HIDDEN),
    "k_proj": (HIDDEN, HIDDEN),
    "v_proj": (HIDDEN, HIDDEN),
    "attn_out": (HIDDEN, HIDDEN),
    "ff_proj": (MLP, HIDDEN),
    "up_proj": (MLP, HIDDEN),
    "ff_out": (HIDDEN, MLP),
}
ALL_MATRICES = list(MATRIX_SHAPES)
D1_MATRICES = ["q_proj", "k_proj", "v_proj", "up_proj"]  # d1 lists Llama's names; these four match
FOREIGN_CONFIG = {
    "auto_mapping": {"base_model_class": "LLaDAModelLM", "parent_library": "modeling_llada"},
    "base_model_name_or_path": "/home/someone/LLaDA-8B-Instruct",
    "bias": "none",
    "inference_mode": True,
    "loftq_config": {},
    "lora_alpha": 8,
    "lora_dropout": 0.05,
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": 4,
    "rank_pattern": {},
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
    "task_type": "CAUSAL_LM",
}


def write_foreign_adapter(folder, matrices, **changes):
    """An adapter as others' training leaves it on LLaDA's own modules. Returns its weights."""
    generator = torch.Generator().manual_seed(3)
    weights = {}
    for layer in range(LAYERS):
        for matrix in matrices:
            rows, columns = MATRIX_SHAPES[matrix]
            module = f"base_model.model.model.transformer.blocks.{layer}.{matrix}"
            lora_a = 0.2 * torch.randn((4, columns), generator=generator)
            lora_b = 0.2 * torch.randn((rows, 4), generator=generator)
            weights[f"{module}.lora_A.weight"] = lora_a
            weights[f"{module}.lora_B.weight"] = lora_b
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(FOREIGN_CONFIG | changes))
    return weights


@pytest.mark.parametrize("matrices", [D1_MATRICES, ALL_MATRICES], ids=["d1's four", "all seven"])
def test_an_adapter_on_lladas_own_modules_is_what_they_would_compute_with_it(tmp_path, matrices):
    weights, config = write_checkpoint(tmp_path / "base", "llada")
    adapter = write_foreign_adapter(tmp_path / "adapter", matrices)
    for key in adapter:
        if "lora_A" in key:
            name = key.removeprefix("base_model.model.").replace(".lora_A", "")
            lora_b = adapter[key.replace("lora_A", "lora_B")]
            weights[name] = weights[name] + 2 * lora_b @ adapter[key]  # W + alpha / r * B A
    ids, mask = ids_and_mask()
    expected = reference_logits("llada", weights, config, ids, mask)

    denoiser, _ = load_denoiser(str(tmp_path / "base"))
    base_logits = denoiser(input_ids=ids, attention_mask=mask).logits
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = load_lora(denoiser, tmp_path / "adapter")
    logits = model(input_ids=ids, attention_mask=mask).logits
    assert (logits - base_logits).abs().max() > 1
    torch.testing.assert_close(logits[mask], expected[mask], rtol=0, atol=2e-5)
    summary = f"LoRA: {len(matrices) * LAYERS} matrices ({len(matrices)} kinds"
    assert describe_lora(model).startswith(summary)
    assert not any(p.requires_grad for p in model.parameters())

    save_adapter(model, tmp_path / "ours")  # under our names
    base, _ = load_denoiser(adapter_base(tmp_path / "ours"))
    loaded = load_lora(base, tmp_path / "ours")
    assert torch.equal(loaded(input_ids=ids, attention_mask=mask).logits, logits)


def test_an_adapter_on_llada2s_one_matrix_of_q_k_and_v_is_taken_apart(tmp_path):
    weights, config = write_checkpoint(tmp_path / "base", "llada2_moe")
    generator = torch.Generator().manual_seed(3)
    adapter = {}
    for layer in range(LAYERS):
        for matrix in ("attention.query_key_value", "attention.dense"):
            name = f"model.layers.{layer}.{matrix}"
            rows, columns = weights[f"{name}.weight"].shape
            lora_a = 0.2 * torch.randn((4, columns), generator=generator)
            lora_b = 0.2 * torch.randn((rows, 4), generator=generator)
            adapter[f"base_model.model.{name}.lora_A.weight"] = lora_a
            adapter[f"base_model.model.{name}.lora_B.weight"] = lora_b
            weights[f"{name}.weight"] = weights[f"{name}.weight"] + 2 * lora_b @ lora_a
    (tmp_path / "adapter").mkdir()
    save_file(adapter, tmp_path / "adapter" / "adapter_model.safetensors")
    adapter_config = FOREIGN_CONFIG | {"target_modules": ["query_key_value", "dense"]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(adapter_config))

    denoiser, tokenizer = load_denoiser(str(tmp_path / "base"))
    policy = make_policy(load_lora(denoiser, tmp_path / "adapter"), tokenizer)
    ids, _ = ids_and_mask()
    logits = denoiser.get_output_embeddings()(policy.hidden(ids))
    expected = reference_logits("llada2_moe", weights, config, ids)
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5)
    assert describe_lora(policy.denoiser).startswith(f"LoRA: {4 * LAYERS} matrices (4 kinds")


FIRST = "base_model.model.model.transformer.blocks.0.q_proj.lora_A.weight"


def without_the_first(weights):
    return {name: w for name, w in weights.items() if name != FIRST}


def with_a_stranger(weights):
    return weights | {"base_model.model.model.stranger.lora_A.weight": weights[FIRST] + 1}


def under_other_names(weights):
    return {name.replace("blocks", "layers"): w for name, w in weights.items()}


def under_both_names(weights):
    ours = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    return weights | {ours: weights[FIRST] + 1}


def too_narrow(weights):
    return {name: w[:, :3].clone() if "lora_A" in name else w for name, w in weights.items()}


def of_another_rank(weights):
    return weights | {FIRST: weights[FIRST][:2].clone()}


def with_nan(weights):
    return weights | {FIRST: torch.full_like(weights[FIRST], torch.nan)}


def nothing(weights):
    return {}


MISFITS = [
    (without_the_first, rf"{FIRST} is \(4, 32\) in the model and missing in the files"),
    (with_a_stranger, r"stranger.lora_A.weight is unknown in the model and \(4, 32\) in the files"),
    (under_other_names, "missing in the files, and 31 more do not fit: an adapter needs the base"),
    (under_both_names, "are the same weight of the model"),
    (too_narrow, r"up_proj.lora_A.weight is \(4, 32\) in the model and \(4, 3\) in the files"),
    (of_another_rank, rf"{FIRST} is \(4, 32\) in the model and \(2, 32\) in the files"),
    (with_nan, f"{FIRST} holds NaN or infinity"),
    (nothing, "adapter_model.safetensors holds no weights"),
]


@pytest.mark.parametrize(("change", "message"), MISFITS)
def test_an_adapter_with_a_weight_too_many_or_too_few_is_refused(tmp_path, change, message):
    write_checkpoint(tmp_path / "base", "llada")
    weights = write_foreign_adapter(tmp_path / "adapter", D1_MATRICES)
    save_file(change(weights), tmp_path / "adapter" / "adapter_model.safetensors")
    denoiser, _ = load_denoiser(str(tmp_path / "base"))
    with pytest.raises(ValueError, match=f"adapter cannot be loaded.*{message}") as error:
        load_lora(denoiser, tmp_path / "adapter")
    assert "\n" not in str(error.value)


def test_an_adapter_of_integers_or_that_is_not_whole_names_its_file(tmp_path):
    write_checkpoint(tmp_path / "base", "llada")
    weights = write_foreign_adapter(tmp_path / "adapter", D1_MATRICES)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    denoiser, _ = load_denoiser(str(tmp_path / "base"))
    save_file(weights | {FIRST: weights[FIRST].long()}, file)
    with pytest.raises(ValueError, match=f"{file}: {FIRST} is stored as I64"):
        load_lora(denoiser, tmp_path / "adapter")
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match=f"{file} is missing, broken or incomplete"):
        load_lora(denoiser, tmp_path / "adapter")


REFUSED_FIELDS = {
    "alpha_pattern": {"blocks.0.q_proj": 4},
    "layers_pattern": "blocks",
    "modules_to_save": ["wte"],
    "novelty": True,
    "peft_type": "IA3",
    "rank_pattern": {"q_proj": 8},
}


@pytest.mark.parametrize("name", REFUSED_FIELDS)
def test_an_adapters_field_that_would_be_passed_over_is_refused_by_name(tmp_path, name):
    write_checkpoint(tmp_path / "base", "llada")
    write_foreign_adapter(tmp_path / "adapter", D1_MATRICES, **{name: REFUSED_FIELDS[name]})
    denoiser, _ = load_denoiser(str(tmp_path / "base"))
    with pytest.raises(ValueError, match=f"{name} = ") as error:
        load_lora(denoiser, tmp_path / "adapter")
    assert "\n" not in str(error.value)


def test_an_adapter_in_a_pickle_is_not_read(tmp_path):
    write_checkpoint(tmp_path / "base", "llada")
    weights = write_foreign_adapter(tmp_path / "adapter", D1_MATRICES)
    torch.save(weights, tmp_path / "adapter" / "adapter_model.bin")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    denoiser, _ = load_denoiser(str(tmp_path / "base"))
    with pytest.raises(ValueError, match="adapter_model.safetensors"):
        load_lora(denoiser, tmp_path / "adapter")
