"""Configurations: what is read, what is refused, and that every published one is known."""

import json
from pathlib import Path

import pytest
import torch
from checkpoints import HIDDEN, drop_field, edit_config, write_checkpoint
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from models import families
from models.loading import load_denoiser
from models.tiny import tiny_tokenizer

REFUSED = [
    ("block_type", "sequential"), ("activation_type", "swiglu"), ("layer_norm_type", "default"),
    ("layer_norm_with_affine", False), ("rope", False), ("rope_full_precision", False),
    ("alibi", True), ("attention_layer_norm", True), ("input_emb_norm", True),
    ("scale_logits", True), ("bias_for_layer_norm", True), ("multi_query_attention", True),
    ("clip_qkv", 8.0), ("block_group_size", 2), ("attention_dropout", 0.1),
    ("embedding_dropout", 0.1), ("residual_dropout", 0.1), ("rope_scaling", {"factor": 2}),
    ("novelty", 1),
]  # fmt: skip
REFUSED_MOE = [
    ("hidden_act", "gelu"), ("qk_layernorm", False), ("moe_layer_freq", [1, 0]),
    ("rope_scaling", {"factor": 2}), ("n_group", 4), ("attention_dropout", 0.1),
    ("shared_expert_intermediate_size", 64), ("num_shared_experts", 1),
    ("partial_rotary_factor", 0.5), ("routed_scaling_factor", 2.5),
    ("moe_router_score_function", "sigmoid"), ("moe_router_enable_expert_bias", True),
    ("novelty", 1), ("clip_qkv", 8.0), ("router_num_group", 4), ("router_topk_group", 2),
]  # fmt: skip
REFUSED_DREAM = [
    ("hidden_act", "gelu"), ("attention_dropout", 0.1), ("rope_scaling", {"factor": 2}),
    ("use_sliding_window", True), ("use_mrope", True), ("novelty", 1),
]  # fmt: skip
REFUSED_A2D = [
    ("layer_types", ["full_attention", "sliding_attention"]), ("use_sliding_window", True),
    ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}),
    ("rope_scaling", {"rope_type": "llama3", "factor": 32.0}), ("hidden_act", "gelu"),
    ("num_experts", 4), ("novelty", 1),
]  # fmt: skip
ALL_REFUSED = (
    [("llada", *f) for f in REFUSED]
    + [("llada-moe", *f) for f in REFUSED_MOE]
    + [("dream", *f) for f in REFUSED_DREAM]
    + [("a2d-qwen3", *f) for f in REFUSED_A2D]
    + [("a2d-llama", "pretraining_tp", 2), ("a2d-llama", "sliding_window", 4096)]
)


@pytest.mark.parametrize(("family", "name", "value"), ALL_REFUSED)
def test_a_field_that_is_not_understood_is_refused_by_name(tmp_path, family, name, value):
    write_checkpoint(tmp_path, family, **{name: value})
    with pytest.raises(ValueError, match=f"{name} = ") as error:
        load_denoiser(str(tmp_path))
    assert "\n" not in str(error.value)


def test_every_value_that_is_known_is_the_only_one(tmp_path):
    """No field of the lists above was forgotten, and no family takes another value of any."""
    assert set(families.KNOWN) <= {name for _, name, _ in ALL_REFUSED}
    for family in ("llada", "llada-moe", "dream", "a2d-qwen3", "a2d-qwen2", "a2d-llama"):
        write_checkpoint(tmp_path / family, family)
        known = json.loads((tmp_path / family / "config.json").read_text())
        for name in families.KNOWN:
            also = {"use_sliding_window": None} if name == "sliding_window" else {}  # else unused
            edit_config(tmp_path / family, **known | also | {name: "other"})
            with pytest.raises(ValueError, match=f"{name} = 'other'"):
                families.read_config(tmp_path / family)
            edit_config(tmp_path / family, **known)
            if name not in known:
                drop_field(tmp_path / family, name)


@pytest.mark.parametrize(
    "name",
    [
        "block_type",
        "rope",
        "d_model",
        "n_layers",
        "rope_theta",
        "weight_tying",
        "include_bias",
        "rms_norm_eps",
    ],
)
def test_a_field_without_which_the_model_is_not_known_must_be_there(tmp_path, name):
    write_checkpoint(tmp_path, "llada")
    drop_field(tmp_path, name)
    with pytest.raises(ValueError, match=f"{name} is missing"):
        load_denoiser(str(tmp_path))


def test_a_missing_mlp_size_follows_from_the_ratio(tmp_path):
    weights, config = write_checkpoint(tmp_path, "llada")
    wide = {}
    for name, value in weights.items():  # the tied ff_out outside the blocks is no MLP
        if "blocks" in name and any(kind in name for kind in ("ff_proj", "up_proj")):
            wide[name] = value.repeat(2, 1)[:64]
        elif "blocks" in name and "ff_out" in name:
            wide[name] = value.repeat(1, 2)[:, :64]
    for shard in tmp_path.glob("*.safetensors"):
        save_file(
            {name: wide.get(name, value).contiguous() for name, value in load_file(shard).items()},
            shard,
            metadata={"format": "pt"},
        )
    edit_config(tmp_path, mlp_hidden_size=None, mlp_ratio=2)
    assert load_denoiser(str(tmp_path))[0].config.intermediate_size == 2 * HIDDEN


UNUSED = [
    ("dream", {"sliding_window": 4096}), ("a2d-qwen3", {"sliding_window": 4096}),
    ("llada", {"tie_word_embeddings": False}), ("llada-tied", {"tie_word_embeddings": True}),
    ("dream", {"return_dict": True, "output_attentions": False, "attn_implementation": "eager"}),
    ("llada-moe", {"model_type": "lladamoe"}), ("dream", {"layer_types": ["full_attention"] * 2}),
    ("llada", {"flash_attn_varlen": True, "include_qkv_bias": None}),
]  # fmt: skip


@pytest.mark.parametrize(("family", "fields"), UNUSED)
def test_a_field_that_changes_nothing_is_no_reason_to_refuse(tmp_path, family, fields):
    write_checkpoint(tmp_path, family)
    plain = families.read_config(tmp_path)
    edit_config(tmp_path, **fields)
    config, kind = families.read_config(tmp_path)
    assert (config.to_dict(), kind) == (plain[0].to_dict(), plain[1])


def test_rope_theta_is_also_read_as_newer_transformers_write_it(tmp_path):
    write_checkpoint(tmp_path, "a2d-qwen3", rope_parameters={"rope_type": "default"})
    with pytest.raises(ValueError, match="rope_parameters = "):
        families.read_config(tmp_path)
    rope = {"rope_type": "default", "rope_theta": 5e5}
    edit_config(tmp_path, rope_parameters=rope)
    drop_field(tmp_path, "rope_theta")
    assert families.read_config(tmp_path)[0].rope_parameters == rope
    drop_field(tmp_path, "rope_parameters")
    with pytest.raises(ValueError, match="rope_theta is missing"):
        families.read_config(tmp_path)


def test_a_bias_of_every_matrix_needs_tied_embeddings(tmp_path):
    write_checkpoint(tmp_path, "llada", include_bias=True)  # Llama's output layer has none
    with pytest.raises(ValueError, match="include_bias = True.*tied"):
        families.read_config(tmp_path)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"model_type": "sdar"}, ""), ({"model_type": "Fast_dLLM_Qwen"}, ""),
        ({"model_type": "llada2_moe"}, ""), ({"architectures": ["LLaDA2MoeModelLM"]}, ""),
        ({}, "dllm-hub/Qwen3-0.6B-diffusion-bd3lm-v0.1"),
    ],
)  # fmt: skip
def test_a_block_causal_model_is_refused_and_the_reason_said(tmp_path, fields, name):
    write_checkpoint(tmp_path, "a2d-qwen3", **fields)
    with pytest.raises(ValueError, match="block-causal: its blocks see only") as error:
        families.read_config(tmp_path, name)
    assert "\n" not in str(error.value)


def test_a_kernel_that_a_folder_names_is_not_fetched(plain, monkeypatch):
    edit_config(plain[0], attn_implementation="evil/kernel", _attn_implementation="evil/kernel")
    config, _ = families.read_config(plain[0])
    assert "evil" not in str(config.to_dict()) and config._attn_implementation != "evil/kernel"
    load_denoiser(str(plain[0]))


KINDS = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}


@pytest.fixture(params=KINDS)
def plain(request, tmp_path):
    """A folder as transformers writes it, with a random model and our tokenizer."""
    config, model = KINDS[request.param]
    tokenizer = tiny_tokenizer()
    sizes = config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3, is_causal=False,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        **({"head_dim": 8} if request.param == "qwen3" else {}),
    )  # fmt: skip
    torch.manual_seed(0)
    for part in (model(sizes), tokenizer):
        part.save_pretrained(tmp_path)
    return tmp_path, model


def test_a_plain_folder_loads_as_it_was_saved_if_it_says_that_it_is_not_causal(plain):
    folder, model = plain
    ids = torch.randint(0, 100, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(9) >= torch.tensor([[0], [4], [0]])
    denoiser, loaded = load_denoiser(str(folder))
    expected = model.from_pretrained(folder).eval()(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(denoiser(input_ids=ids, attention_mask=mask).logits, expected)
    assert loaded.mask_token == "[MASK]" and not getattr(denoiser.config, "shift_logits", False)
    edit_config(folder, shift_logits=True)
    shifted = load_denoiser(str(folder))[0](input_ids=ids, attention_mask=mask).logits
    assert torch.equal(shifted[:, 1:], expected[:, :-1])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda f: edit_config(f, is_causal=True), '"is_causal": false.*"shift_logits": true'),
        (lambda f: drop_field(f, "is_causal"), '"is_causal": false.*"shift_logits": true'),
        (lambda f: edit_config(f, use_sliding_window=True), "only a window"),
        (lambda f: edit_config(f, residual_scale=3.0), "residual_scale = 3.0 is not known"),
        (lambda f: edit_config(f, quantization_config={}), "quantization_config = "),
        (lambda f: edit_config(f, auto_map={}, rope_scaling={"factor": 2}), "rope_scaling = "),
        (lambda f: edit_config(f, layer_types=["full_attention", "sliding_attention"]), "window"),
    ],
)
def test_any_other_plain_folder_is_refused_with_what_to_write_into_it(plain, change, says):
    change(plain[0])
    with pytest.raises(ValueError, match=says) as error:
        load_denoiser(str(plain[0]))
    assert "\n" not in str(error.value)


# ---- what others have published ------------------------------------------------------------------

PUBLISHED = json.loads((Path(__file__).parent / "published_configs.json").read_text())


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_configuration_is_read_as_its_family_or_refused_with_the_reason(name, tmp_path):
    found = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(found["config"]))
    if found["read_as"] == "block-causal":
        with pytest.raises(ValueError, match="block-causal"):
            families.read_config(tmp_path, name)
        return
    config, kind = families.read_config(tmp_path, name)
    ours = families.FIELDS[kind]
    sizes = [there for there in ours if there.startswith(("n_", "num_", "d_")) or "size" in there]
    assert kind == found["read_as"] and len(sizes) >= 6 and config.is_causal is False
    for there in sizes:
        assert getattr(config, ours[there]) == found["config"][there]
    assert config.rope_parameters["rope_theta"] == found["config"]["rope_theta"]
    assert getattr(config, "shift_logits", False) == (kind == "dream")
