"""Checkpoints: what is read and what is refused, adapters, export."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from checkpoints import (
    END,
    HIDDEN,
    LAYERS,
    MLP,
    edit_config,
    reference_logits,
    style_of,
    write_checkpoint,
)
from safetensors.torch import load_file, save_file
from toy import random_tiny
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
)

from config import Config
from diffusion_policy import DiffusionPolicy, end_token_ids
from experiments import benchmark
from models import loading
from models.export import export_model
from models.loading import check_attention, load_denoiser
from models.lora import add_lora, describe_lora, load_lora, lora_layers
from models.tiny import tiny_denoiser, tiny_tokenizer
from training import memory, recipe

FAMILIES = [
    "llada", "llada-gqa", "llada-tied", "llada-qkv", "llada-bias", "llada-moe", "dream",
    "dream-slow", "a2d-qwen3", "a2d-qwen2", "a2d-llama",
]  # fmt: skip


@pytest.fixture(scope="module")
def tiny():
    return random_tiny()


@pytest.fixture
def folder(tiny, tmp_path):
    for part in tiny:
        part.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_a_saved_model_is_loaded_with_equal_logits_and_tokens(tiny, folder):
    denoiser, tokenizer = load_denoiser(str(folder))
    ids = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    assert torch.equal(denoiser(input_ids=ids).logits, tiny[0](input_ids=ids).logits)
    text = "3 14 99 = 7 <answer>( 3 + 14 ) * 5</answer>[EOS][MASK][PAD]"
    assert tokenizer(text).input_ids == tiny[1](text).input_ids
    assert (tokenizer.mask_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "[MASK]",
        "[EOS]",
        "[PAD]",
    )


def test_the_first_position_sees_the_last_one_with_and_without_padding(tiny):
    check_attention(tiny[0])
    ids = torch.tensor([[5, 6, 7, 8]])
    gradient = []
    for mask in (None, torch.tensor([[0, 1, 1, 1]])):
        embedded = tiny[0].get_input_embeddings()(ids).detach().requires_grad_()
        tiny[0](inputs_embeds=embedded, attention_mask=mask).logits[0, 1].sum().backward()
        gradient.append(embedded.grad[0].abs().sum(-1))
    assert (gradient[0] > 0).all()
    assert gradient[1][0] == 0 and (gradient[1][1:] > 0).all()  # the padded one alone is not seen


class NoPaddingMask(LlamaForCausalLM):
    def forward(self, *args, attention_mask=None, **options):
        return super().forward(*args, **options)


class ColumnPositions(LlamaForCausalLM):
    """Adds an embedding of the column, whatever position ids it is given."""

    def forward(self, input_ids, **options):
        columns = torch.arange(input_ids.shape[1]).unsqueeze(-1)  # (S, 1)
        embedded = self.get_input_embeddings()(input_ids) + 0.1 * columns
        return super().forward(inputs_embeds=embedded, **options)


@pytest.mark.parametrize("kind", [NoPaddingMask, ColumnPositions])
def test_a_model_that_left_padding_changes_is_refused(tiny, kind):
    model = kind(tiny[0].config).eval()
    with pytest.raises(ValueError, match="padding") as error:
        check_attention(model)
    assert "\n" not in str(error.value)


def test_such_a_model_is_refused_when_it_is_loaded(folder, monkeypatch):
    monkeypatch.setitem(loading.PLAIN, "llama", NoPaddingMask)
    with pytest.raises(ValueError, match="padding"):
        load_denoiser(str(folder))


def drop_weight(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def add_weight(folder):
    weights = load_file(folder / "model.safetensors")
    save_file(
        weights | {"model.stranger": torch.zeros(3)},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: edit_config(f, is_causal=True), "causal"),
        (lambda f: edit_config(f, vocab_size=50), "mismatched|size"),
        (lambda f: edit_config(f, num_hidden_layers=10**7), "10000000 layers"),
        (drop_weight, "missing"),
        (add_weight, "unexpected"),
        (truncate, "cannot be loaded"),
        (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda f: (f / "config.json").unlink(), "config.json cannot be read"),
        (lambda f: edit_config(f, model_type="gpt2"), "gpt2 is not known"),
        (lambda f: (f / "model.safetensors").unlink(), "cannot be loaded.*model.safetensors"),
        (lambda f: (f / "tokenizer.json").write_text("[]"), "cannot be loaded"),
        (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer.json"),
    ],
)
def test_a_damaged_checkpoint_is_refused_in_one_line(folder, damage, says):
    damage(folder)
    with pytest.raises(ValueError, match=says) as error:
        load_denoiser(str(folder))
    assert "\n" not in str(error.value)


def test_a_tokenizer_without_a_mask_token_is_refused(folder):
    text = (folder / "tokenizer.json").read_text().replace("[MASK]", "[HOLE]")
    (folder / "tokenizer.json").write_text(text)
    settings = (folder / "tokenizer_config.json").read_text().replace("[MASK]", "[HOLE]")
    (folder / "tokenizer_config.json").write_text(settings)
    with pytest.raises(ValueError, match="mask"):
        load_denoiser(str(folder))


NO_HUB_NAMES = ["no-such-model", "/no/such/folder", "/gone", "./here", "../here", "runs/a/base"]


@pytest.mark.parametrize("name", NO_HUB_NAMES)
def test_a_path_that_is_no_folder_is_never_asked_of_the_hub(name, monkeypatch):
    fail = lambda *_, **__: pytest.fail("a stranger could own that name")  # noqa: E731
    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(ValueError, match="tiny") as error:
        load_denoiser(name)
    assert "\n" not in str(error.value)


def test_a_hub_that_cannot_be_reached_names_the_way_out(monkeypatch):
    def fail(*_, **__):
        raise OSError("no route\nto host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(ValueError, match=f"{loading.LLADA}.*--model FOLDER.*--model tiny") as error:
        load_denoiser(loading.LLADA)
    assert "\n" not in str(error.value)


def test_a_hub_name_is_downloaded_without_code_or_pickles_and_loaded(monkeypatch, tmp_path):
    write_checkpoint(tmp_path, "llada")
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda name, **options: asked.append((name, options)) or str(tmp_path),
    )
    denoiser, _ = load_denoiser("someone/LLaDA")
    assert denoiser.source == "someone/LLaDA" and asked[0][0] == "someone/LLaDA"
    assert not any(
        pattern.endswith(("bin", "pt", "*")) for pattern in asked[0][1]["allow_patterns"]
    )


# ---- checkpoints in the hub's layout ----


def ids_and_mask():
    """Three rows of 11 tokens; the second one has four of padding on its left."""
    ids = torch.randint(0, 250, (3, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, :4] = False
    return ids, mask


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_published_architecture_with_and_without_left_padding(
    tmp_path, family
):
    weights, config = write_checkpoint(tmp_path, family)
    denoiser, tokenizer = load_denoiser(str(tmp_path))
    ids, mask = ids_and_mask()
    expected = reference_logits(family, weights, config, ids)
    torch.testing.assert_close(denoiser(input_ids=ids).logits, expected, rtol=0, atol=1e-5)
    expected = reference_logits(family, weights, config, ids, mask)[
        1, 5:
    ]  # Dream's fifth is read from padding
    torch.testing.assert_close(
        denoiser(input_ids=ids, attention_mask=mask).logits[1, 5:], expected, rtol=0, atol=1e-5
    )
    policy = DiffusionPolicy(denoiser, tokenizer)  # reads hidden states: they are shifted too
    torch.testing.assert_close(
        denoiser.get_output_embeddings()(policy.hidden(ids)),
        reference_logits(family, weights, config, ids),
        rtol=0,
        atol=1e-5,
    )
    assert denoiser.dtype == torch.float32 and not denoiser.training


@pytest.mark.parametrize("family", FAMILIES)
def test_mask_end_and_padding_tokens_are_the_checkpoints_own(tmp_path, family):
    write_checkpoint(tmp_path, family)
    _, tokenizer = load_denoiser(str(tmp_path))
    style = style_of(family)
    mask, end = "<|mdm_mask|>" if style == "llada" else "<|mask|>", END[style]
    assert (tokenizer.mask_token, tokenizer.mask_token_id) == (mask, 260)
    assert (tokenizer.eos_token, tokenizer.pad_token) == (end, "<|endoftext|>")
    ends = {"llada": ["<|eot_id|>"], "dream": ["<|im_end|>"], "qwen": ["<|endoftext|>"]}
    assert tokenizer.convert_ids_to_tokens(end_token_ids(tokenizer)) == [end, *ends[style]]
    assert (
        tokenizer.decode(tokenizer("Grüße, 3 + 4?", add_special_tokens=False).input_ids)
        == "Grüße, 3 + 4?"
    )


def test_a_tokenizer_without_a_template_ends_at_eos_alone():
    assert end_token_ids(tiny_tokenizer()) == [tiny_tokenizer().eos_token_id]


def shards(folder):
    return sorted(folder.glob("*.safetensors"))


@pytest.mark.parametrize(
    "damage",
    [
        lambda f: shards(f)[1].unlink(),
        lambda f: shards(f)[1].write_bytes(shards(f)[1].read_bytes()[:-100]),
        lambda f: shards(f)[0].write_bytes(b""),
        lambda f: (f / "model.safetensors.index.json").write_text("{}"),
        lambda f: save_file(
            {k: v for k, v in load_file(shards(f)[0]).items() if "wte" not in k},
            shards(f)[0],
            metadata={"format": "pt"},
        ),
        lambda f: save_file(
            load_file(shards(f)[0]) | {"model.transformer.novelty": torch.ones(2)},
            shards(f)[0],
            metadata={"format": "pt"},
        ),
    ],
    ids=[
        "missing-shard",
        "truncated-shard",
        "empty-shard",
        "broken-index",
        "missing-weight",
        "unexpected-weight",
    ],
)
def test_damaged_shards_are_refused_in_one_line(tmp_path, damage):
    write_checkpoint(tmp_path, "llada")
    damage(tmp_path)
    if "novelty" in str([list(load_file(s)) for s in shards(tmp_path)[:1] if s.stat().st_size]):
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        index["weight_map"]["model.transformer.novelty"] = shards(tmp_path)[0].name
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=str(tmp_path.name)) as error:
        load_denoiser(str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("mask_id", "says"),
    [
        (5, "mask_token_id 5"),
        (9999, "mask_token_id 9999"),
        (-1, "mask_token_id -1"),
        (257, "endoftext"),
    ],
)
def test_a_wrong_mask_id_is_refused_and_the_right_one_named(tmp_path, mask_id, says):
    write_checkpoint(tmp_path, "llada", mask_token_id=mask_id)
    with pytest.raises(ValueError, match=f"{says}.*260") as error:
        load_denoiser(str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_mask_id_against_the_tokenizers_own_is_refused(folder):
    edit_config(folder, mask_token_id=2)
    with pytest.raises(ValueError, match="mask_token_id 2"):
        load_denoiser(str(folder))


def test_no_code_of_a_checkpoint_is_run(tmp_path):
    write_checkpoint(tmp_path, "llada")  # its modeling_llada.py raises
    load_denoiser(str(tmp_path))


# ---- adapters and export ----


def random_adapter(denoiser):
    """An adapter as training would leave it: its second factors start at zero, and show nothing."""
    model = add_lora(denoiser, rank=3, alpha=6, dropout=0.2, seed=0)
    generator = torch.Generator().manual_seed(0)
    for layer in lora_layers(model).values():
        weight = layer.lora_B["default"].weight
        weight.data.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_adapts_every_matrix_and_switched_off_is_the_base_exactly(tmp_path, family):
    write_checkpoint(tmp_path, family)
    denoiser, tokenizer = load_denoiser(str(tmp_path))
    ids, _ = ids_and_mask()
    base, state = denoiser(input_ids=ids).logits, torch.random.get_rng_state()
    model = random_adapter(denoiser)
    assert torch.equal(torch.random.get_rng_state(), state)
    kinds = 4 if family == "llada-moe" else 7
    assert len(lora_layers(model)) == kinds * LAYERS
    assert f"{kinds * LAYERS} matrices ({kinds} kinds x {LAYERS} layers), rank 3" in describe_lora(
        model
    )
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if "lora_" in n
    }
    policy = DiffusionPolicy(model, tokenizer)
    head = model.get_output_embeddings()
    assert not torch.allclose(head(policy.hidden(ids)), base, atol=1e-3)
    assert torch.equal(head(policy.without_adapter().hidden(ids)), base)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    again = load_lora(load_denoiser(str(tmp_path))[0], tmp_path / "adapter", trainable=True)
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    assert any(p.requires_grad for p in again.parameters())


THEIRS = {  # LLaDA's own names, and the matrices that they are: (out, in)
    "q_proj": (HIDDEN, HIDDEN), "k_proj": (HIDDEN, HIDDEN), "v_proj": (HIDDEN, HIDDEN),
    "attn_out": (HIDDEN, HIDDEN), "ff_proj": (MLP, HIDDEN), "up_proj": (MLP, HIDDEN),
    "ff_out": (HIDDEN, MLP),
}  # fmt: skip
D1 = ["q_proj", "k_proj", "v_proj", "up_proj"]  # d1 lists Llama's names, and these four match


def write_foreign_adapter(folder, kinds, **changes):
    """An adapter as others' training leaves it on LLaDA's own modules. -> its weights"""
    generator, weights = torch.Generator().manual_seed(3), {}
    for layer in range(LAYERS):
        for kind in kinds:
            key = f"base_model.model.model.transformer.blocks.{layer}.{kind}"
            for part, shape in (("A", (4, THEIRS[kind][1])), ("B", (THEIRS[kind][0], 4))):
                matrix = 0.2 * torch.randn(shape, generator=generator)
                weights[f"{key}.lora_{part}.weight"] = matrix
    config = {
        "base_model_name_or_path": "/home/someone/LLaDA-8B-Instruct", "bias": "none", "r": 4,
        "lora_alpha": 8, "lora_dropout": 0.05, "inference_mode": True, "peft_type": "LORA",
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
        "task_type": "CAUSAL_LM", "rank_pattern": {}, "modules_to_save": None, "loftq_config": {},
        "auto_mapping": {"base_model_class": "LLaDAModelLM", "parent_library": "modeling_llada"},
    }  # fmt: skip
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    return weights


@pytest.mark.parametrize("kinds", [D1, list(THEIRS)], ids=["d1's four", "all seven"])
def test_an_adapter_on_lladas_own_modules_is_what_they_would_compute_with_it(tmp_path, kinds):
    weights, config = write_checkpoint(tmp_path / "base", "llada")
    lora = write_foreign_adapter(tmp_path / "adapter", kinds)
    for key in [key for key in lora if "lora_A" in key]:  # W + alpha / r * B A
        name = key.removeprefix("base_model.model.").replace(".lora_A", "")
        weights[name] = weights[name] + 2 * lora[key.replace("lora_A", "lora_B")] @ lora[key]
    ids, mask = ids_and_mask()
    expected = reference_logits("llada", weights, config, ids, mask)
    denoiser, _ = load_denoiser(str(tmp_path / "base"))
    base = denoiser(input_ids=ids, attention_mask=mask).logits
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = load_lora(denoiser, tmp_path / "adapter")
    logits = model(input_ids=ids, attention_mask=mask).logits
    assert (logits - base).abs().max() > 1
    torch.testing.assert_close(logits[mask], expected[mask], rtol=0, atol=2e-5)
    assert describe_lora(model).startswith(f"LoRA: {len(kinds) * LAYERS} matrices ({len(kinds)} k")
    assert not any(p.requires_grad for p in model.parameters())
    model.save_pretrained(tmp_path / "ours", save_embedding_layers=False)  # under our names
    again = load_lora(load_denoiser(adapter_base(tmp_path / "ours"))[0], tmp_path / "ours")
    assert torch.equal(again(input_ids=ids, attention_mask=mask).logits, logits)


def change_weights(folder, change):
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)


FIRST = "base_model.model.model.transformer.blocks.0.q_proj.lora_A.weight"
MISFITS = [
    (lambda w: {k: v for k, v in w.items() if k != FIRST}, "1 weights without"),
    (lambda w: w | {"base_model.model.model.stranger.lora_A.weight": w[FIRST] + 1}, "stranger"),
    (lambda w: {k.replace("blocks", "layers"): v for k, v in w.items()}, "without a counterpart"),
    (
        lambda w: {k: v[:, :3].clone() if "lora_A" in k else v for k, v in w.items()},
        "size mismatch",
    ),
    (lambda w: {}, "target_modules"),
]


@pytest.mark.parametrize(("change", "says"), MISFITS)
def test_an_adapter_with_a_weight_too_many_or_too_few_is_refused(tmp_path, change, says):
    write_checkpoint(tmp_path / "base", "llada")
    write_foreign_adapter(tmp_path / "adapter", D1)
    change_weights(tmp_path / "adapter", change)
    with pytest.raises(ValueError, match=f"adapter cannot be loaded.*{says}") as error:
        load_lora(load_denoiser(str(tmp_path / "base"))[0], tmp_path / "adapter")
    assert "\n" not in str(error.value)


ODD_ADAPTERS = {
    "peft_type": "IA3", "modules_to_save": ["wte"], "alpha_pattern": {"blocks.0.q_proj": 4},
    "rank_pattern": {"q_proj": 8}, "layers_pattern": "blocks", "novelty": True,
}  # fmt: skip


@pytest.mark.parametrize("name", ODD_ADAPTERS)
def test_an_adapters_field_that_would_be_passed_over_is_refused_by_name(tmp_path, name):
    write_checkpoint(tmp_path / "base", "llada")
    write_foreign_adapter(tmp_path / "adapter", D1, **{name: ODD_ADAPTERS[name]})
    with pytest.raises(ValueError, match=f"{name} = ") as error:
        load_lora(load_denoiser(str(tmp_path / "base"))[0], tmp_path / "adapter")
    assert "\n" not in str(error.value)


def test_an_adapter_in_a_pickle_is_not_read(tmp_path):
    write_checkpoint(tmp_path / "base", "llada")
    weights = write_foreign_adapter(tmp_path / "adapter", D1)
    torch.save(weights, tmp_path / "adapter" / "adapter_model.bin")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="adapter_model.safetensors"):
        load_lora(load_denoiser(str(tmp_path / "base"))[0], tmp_path / "adapter")


def adapter_base(adapter):
    return json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]


def test_an_adapter_finds_its_base_from_any_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_checkpoint(Path("cache/base"), "llada")
    model = random_adapter(load_denoiser("cache/base")[0])
    model.save_pretrained("adapter", save_embedding_layers=False)
    ids, _ = ids_and_mask()
    expected = model(input_ids=ids).logits
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    base = adapter_base(tmp_path / "adapter")
    assert base == str((tmp_path / "cache/base").resolve())
    again = load_lora(load_denoiser(base)[0], tmp_path / "adapter")
    assert torch.equal(again(input_ids=ids).logits, expected)
    (tmp_path / "cache/base").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="cache/base' is no folder"):
        load_denoiser(base)


def test_an_adapter_on_a_hub_model_names_it(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "hub", "llada")
    download = lambda *_, **__: str(tmp_path / "hub")  # noqa: E731
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    model = add_lora(load_denoiser("someone/LLaDA")[0], 2, 4)
    assert model.peft_config["default"].lora_dropout == 0
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    assert adapter_base(tmp_path / "adapter") == "someone/LLaDA"


def test_a_missing_lora_target_is_named():
    denoiser = tiny_denoiser(tiny_tokenizer())
    del denoiser.model.layers[2].mlp.up_proj
    with pytest.raises(ValueError, match="up_proj in 5 of 6 layers"):
        add_lora(denoiser, 2, 4, 0.0)
    with pytest.raises(ValueError, match="LoRA target not found"):
        add_lora(
            GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2)), 2, 4, 0.0
        )


def test_an_adapter_on_a_bfloat16_base_is_float32_and_learns(tmp_path):
    write_checkpoint(tmp_path, "llada")
    denoiser, tokenizer = load_denoiser(str(tmp_path), dtype=torch.bfloat16)
    model = random_adapter(denoiser)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    ids, mask = ids_and_mask()
    hidden = DiffusionPolicy(model, tokenizer).hidden(ids, mask)
    assert hidden.dtype == torch.bfloat16
    hidden.float().square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_has_the_sources_layout_and_equal_logits(tmp_path, family, lora):
    weights, _ = write_checkpoint(tmp_path / "source", family)
    denoiser, tokenizer = load_denoiser(str(tmp_path / "source"))
    model = random_adapter(denoiser) if lora else denoiser
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.1)  # as if trained
    ids, _ = ids_and_mask()
    expected = model(input_ids=ids).logits
    export_model(model, tokenizer, tmp_path / "out")
    assert {key for shard in shards(tmp_path / "out") for key in load_file(shard)} == set(weights)
    for name in ("modeling_llada.py", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "source" / name).read_bytes()
    told, source = (
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("out", "source")
    )
    changed = {key for key in source if told[key] != source[key]}  # the weights are float32 now
    assert set(told) == set(source) and changed == {"torch_dtype", "dtype"} & set(source)
    assert told.get("torch_dtype", told.get("dtype", "float32")) == "float32"
    exported, other = load_denoiser(str(tmp_path / "out"))
    torch.testing.assert_close(exported(input_ids=ids).logits, expected, rtol=0, atol=2e-5)
    assert other("a <|mdm_mask|>").input_ids == tokenizer("a <|mdm_mask|>").input_ids
    if not lora:  # a full model's checkpoints are exports, each from what the last one wrote
        export_model(exported, other, tmp_path / "again")
        torch.testing.assert_close(
            load_denoiser(str(tmp_path / "again"))[0](input_ids=ids).logits,
            expected,
            rtol=0,
            atol=2e-5,
        )


def test_an_export_in_the_sources_dtype_has_its_config_to_the_letter(tmp_path):
    write_checkpoint(tmp_path / "source", "llada", torch_dtype="bfloat16")
    denoiser, tokenizer = load_denoiser(str(tmp_path / "source"), dtype=torch.bfloat16)
    export_model(denoiser, tokenizer, tmp_path / "out")
    configs = [(tmp_path / name / "config.json").read_text() for name in ("out", "source")]
    assert configs[0] == configs[1] and '"bfloat16"' in configs[0]


def test_an_export_under_names_that_no_tool_would_find_is_an_error(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "source", "llada")
    denoiser, tokenizer = load_denoiser(str(tmp_path / "source"))
    save = denoiser.save_pretrained
    monkeypatch.setattr(
        denoiser,
        "save_pretrained",
        lambda *args, **options: save(*args, **options, save_original_format=False),
    )
    with pytest.raises(ValueError, match="requirements.txt") as error:
        export_model(denoiser, tokenizer, tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out" / "modeling_llada.py").exists()


def test_weights_in_a_pickle_are_not_read(tmp_path):
    write_checkpoint(tmp_path, "llada")
    torch.save(
        {k: v for shard in shards(tmp_path) for k, v in load_file(shard).items()},
        tmp_path / "pytorch_model.bin",
    )
    for path in [*shards(tmp_path), tmp_path / "model.safetensors.index.json"]:
        path.unlink()
    with pytest.raises(ValueError, match="safetensors"):
        load_denoiser(str(tmp_path))


CARDS = {"NVIDIA GeForce RTX 4090": 23.6, "NVIDIA L40S": 44.5, "NVIDIA H100 80GB HBM3": 79.2}


def test_the_default_model_goes_by_the_gpus_memory(monkeypatch):
    cards = {"": 0, "Tesla T4": 14.6, "NVIDIA A10G": 22.1} | CARDS
    for name, gib in cards.items():
        monkeypatch.setattr(recipe, "gpu", lambda found=(name, gib): found if found[0] else None)
        model, why = recipe.default_model()
        assert model == ("tiny" if not name else recipe.SMALL if gib < 21 else loading.LLADA)
        assert (name or "no GPU") in why


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("shape", ["LLaDA-8B", "Qwen3-0.6B"])
def test_a_recipe_fits_its_card_and_says_what_to_expect(monkeypatch, tmp_path, card, shape):
    config = benchmark.config_of(shape)
    monkeypatch.setattr(recipe, "read_config", lambda *_: (config, ""))
    monkeypatch.setattr(recipe, "gpu", lambda: (card, CARDS[card]))
    changes, expect = recipe.recipe_of(str(tmp_path))
    settings = Config(**changes)
    assert memory.budget(config, settings, 400)["peak"] < 0.95 * CARDS[card]
    assert (settings.dtype == "4bit") == (shape == "LLaDA-8B" and CARDS[card] < 40)
    said = expect(settings)
    peak = memory.budget(config, settings, 200)["peak"]
    assert f"{peak:.1f} of {CARDS[card]:.1f} GiB expected" in said and "minutes" in said
    monkeypatch.setattr(recipe, "gpu", lambda: ("Some GPU", CARDS[card]))
    assert "minutes" not in recipe.recipe_of(str(tmp_path))[1](settings)  # of unknown speed
    monkeypatch.setattr(recipe, "gpu", lambda: None)
    changes, expect = recipe.recipe_of(str(tmp_path))
    assert "dtype" not in changes and "GiB" not in expect(settings)


def test_weights_that_are_split_later_wait_on_the_host_in_the_dtype_of_their_device(tmp_path):
    write_checkpoint(tmp_path, "llada")
    for path, dtype in ((tmp_path, torch.bfloat16), ("tiny", torch.float32)):
        denoiser, _ = loading.load_denoiser(str(path), "cuda", on_host=True)
        kinds = {(p.device.type, p.dtype) for p in denoiser.parameters()}
        assert kinds == {("cpu", dtype)}
