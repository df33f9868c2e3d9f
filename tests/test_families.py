"""Configurations: what is read, what is refused, and that every published one is known."""

import json
from pathlib import Path

import pytest
import torch
from checkpoints import HIDDEN, drop_field, edit_config, write_checkpoint
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from models import families
from models.block_causal import make_policy
from models.loading import load_denoiser
from models.tiny import tiny_tokenizer

# (family, field, value): every field of which only some values are understood, with another one.
REFUSED = [
    ("llada", "activation_type", "swiglu"),
    ("llada", "alibi", True),
    ("llada", "attention_dropout", 0.1),
    ("llada", "attention_layer_norm", True),
    ("llada", "bias_for_layer_norm", True),
    ("llada", "block_group_size", 2),
    ("llada", "block_type", "sequential"),
    ("llada", "clip_qkv", 8.0),
    ("llada", "embedding_dropout", 0.1),
    ("llada", "include_bias", True),
    ("llada", "include_qkv_bias", True),
    ("llada", "input_emb_norm", True),
    ("llada", "layer_norm_type", "default"),
    ("llada", "layer_norm_with_affine", False),
    ("llada", "multi_query_attention", True),
    ("llada", "novelty", 1),
    ("llada", "residual_dropout", 0.1),
    ("llada", "rope", False),
    ("llada", "rope_full_precision", False),
    ("llada", "rope_scaling", {"factor": 2}),
    ("llada", "scale_logits", True),
    ("llada-moe", "attention_dropout", 0.1),
    ("llada-moe", "clip_qkv", 8.0),
    ("llada-moe", "hidden_act", "gelu"),
    ("llada-moe", "moe_layer_freq", [1, 0]),
    ("llada-moe", "moe_router_enable_expert_bias", True),
    ("llada-moe", "moe_router_score_function", "sigmoid"),
    ("llada-moe", "n_group", 4),
    ("llada-moe", "novelty", 1),
    ("llada-moe", "num_shared_experts", 1),
    ("llada-moe", "partial_rotary_factor", 0.5),
    ("llada-moe", "qk_layernorm", False),
    ("llada-moe", "rope_scaling", {"factor": 2}),
    ("llada-moe", "routed_scaling_factor", 2.5),
    ("llada-moe", "router_num_group", 4),
    ("llada-moe", "router_topk_group", 2),
    ("llada-moe", "shared_expert_intermediate_size", 64),
    ("dream", "attention_dropout", 0.1),
    ("dream", "hidden_act", "gelu"),
    ("dream", "novelty", 1),
    ("dream", "rope_scaling", {"factor": 2}),
    ("dream", "use_mrope", True),
    ("dream", "use_sliding_window", True),
    ("a2d-qwen3", "hidden_act", "gelu"),
    ("a2d-qwen3", "is_causal", True),
    ("a2d-qwen3", "layer_types", ["full_attention", "sliding_attention"]),
    ("a2d-qwen3", "novelty", 1),
    ("a2d-qwen3", "num_experts", 4),
    ("a2d-qwen3", "rope_parameters", {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}),
    ("a2d-qwen3", "rope_scaling", {"rope_type": "llama3", "factor": 32.0}),
    ("a2d-qwen3", "use_sliding_window", True),
    ("a2d-llama", "pretraining_tp", 2),
    ("sdar", "block_causal_prompt", False),
    ("sdar_moe", "decoder_sparse_step", 2),
    ("sdar_moe", "mlp_only_layers", [0]),
    ("a2d-llama", "sliding_window", 4096),
    ("llada2_moe", "norm_head", True),
    ("llada2_moe", "norm_softmax", True),
    ("llada2_moe", "norm_topk_prob", False),
    ("llada2_moe", "output_dropout", 0.1),
    ("llada2_moe", "rotary_dim", 4),
    ("llada2_moe", "router_dtype", "bf16"),
    ("llada2_moe", "score_function", "softmax"),
    ("llada2_moe", "use_bias", True),
    ("llada2_moe", "use_qk_norm", False),
    ("llada2_moe", "use_qkv_bias", True),
    ("llada2_moe", "use_rmsnorm", False),
    ("llada2_moe", "using_split_qkv_in_self_attention", True),
]


@pytest.mark.parametrize(("family", "name", "value"), REFUSED)
def test_a_field_that_is_not_understood_is_refused_by_name(tmp_path, family, name, value):
    write_checkpoint(tmp_path, family, **{name: value})
    with pytest.raises(ValueError, match=f"{name} = ") as error:
        load_denoiser(str(tmp_path))
    assert "\n" not in str(error.value)


def test_every_allowed_value_is_the_only_one(tmp_path):
    """No field of ALLOWED_VALUES was forgotten above, and no family takes another value of any."""
    assert set(families.ALLOWED_VALUES) <= {name for _, name, _ in REFUSED}
    for family in (
        "llada",
        "llada-moe",
        "dream",
        "a2d-qwen3",
        "a2d-qwen2",
        "a2d-llama",
        "sdar",
        "sdar_moe",
        "llada2_moe",
    ):
        folder = tmp_path / family
        write_checkpoint(folder, family)
        published = (folder / "config.json").read_text()
        for name in families.ALLOWED_VALUES.keys() - families.FAMILIES[family].fields.keys():
            if name == "sliding_window":
                edit_config(folder, use_sliding_window=None)  # False would make it irrelevant
            if name == "use_sliding_window":
                edit_config(folder, sliding_window=None)  # a number would be named first
            edit_config(folder, **{name: "other"})
            with pytest.raises(ValueError, match=f"{name} = 'other'"):
                families.read_config(folder)
            (folder / "config.json").write_text(published)


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
    write_checkpoint(tmp_path, "llada")
    for shard in tmp_path.glob("*.safetensors"):
        weights = load_file(shard)
        for name, weight in weights.items():
            if "ff_proj" in name or "up_proj" in name:
                weights[name] = weight.repeat(2, 1)[:64].contiguous()
            elif "blocks" in name and "ff_out" in name:  # outside the blocks it is the output layer
                weights[name] = weight.repeat(1, 2)[:, :64].contiguous()
        save_file(weights, shard, metadata={"format": "pt"})
    edit_config(tmp_path, mlp_hidden_size=None, mlp_ratio=2)
    denoiser, _ = load_denoiser(str(tmp_path))
    assert denoiser.config.intermediate_size == 2 * HIDDEN


IRRELEVANT = [
    ("dream", {"sliding_window": 4096}),
    ("dream", {"return_dict": True, "output_attentions": False, "attn_implementation": "eager"}),
    ("dream", {"layer_types": ["full_attention"] * 2}),
    ("a2d-qwen3", {"sliding_window": 4096}),
    ("llada", {"tie_word_embeddings": False}),
    ("llada", {"flash_attn_varlen": True, "include_qkv_bias": None}),
    ("llada-tied", {"tie_word_embeddings": True}),
    ("llada-moe", {"model_type": "lladamoe"}),
]


@pytest.mark.parametrize(("family", "fields"), IRRELEVANT)
def test_a_field_that_changes_nothing_is_no_reason_to_refuse(tmp_path, family, fields):
    write_checkpoint(tmp_path, family)
    expected_config, expected_family = families.read_config(tmp_path)
    edit_config(tmp_path, **fields)
    config, read_as = families.read_config(tmp_path)
    assert config.to_dict() == expected_config.to_dict()
    assert read_as == expected_family


def test_rope_theta_is_also_read_as_newer_transformers_write_it(tmp_path):
    write_checkpoint(tmp_path, "a2d-qwen3", rope_parameters={"rope_type": "default"})
    with pytest.raises(ValueError, match="rope_parameters = "):
        families.read_config(tmp_path)
    rope = {"rope_type": "default", "rope_theta": 5e5}
    edit_config(tmp_path, rope_parameters=rope)
    drop_field(tmp_path, "rope_theta")
    config, _ = families.read_config(tmp_path)
    assert config.rope_parameters == rope
    drop_field(tmp_path, "rope_parameters")
    with pytest.raises(ValueError, match="rope_theta is missing"):
        families.read_config(tmp_path)


WHY_REFUSED = [
    ({"model_type": "sdar"}, "renamed", "block_size.*4 for SDAR"),
    ({"model_type": "llada2_moe"}, "renamed", "block_size.*32 if it is a LLaDA2.0"),
    ({"model_type": "llada2_moe"}, "inclusionAI/LLaDA2.1-mini", "edits tokens"),
    ({"model_type": "llada2_moe_veomni"}, "", "with merged experts"),
    ({"model_type": "nemotron_labs_diffusion"}, "", "tokens before a block causally"),
    (
        {"model_type": "nemotron_labs_diffusion", "dlm_paradigm": "bidirectional"},
        "",
        "tokens before a block causally, and is bidirectional at most within the block",
    ),
    ({}, "dllm-hub/Qwen3-0.6B-diffusion-bd3lm-v0.1", "block-causal"),
    ({"model_type": "llama", "architectures": ["StableDiffcoderForCausalLM"]}, "", "block-causal"),
    ({"model_type": "qwen2"}, "ByteDance-Seed/Stable-DiffCoder-8B-Instruct", "block-causal"),
    ({"model_type": "qwen2"}, "OpenGVLab/SDLM-3B-D4", "tokens before a block causally"),
    ({"model_type": "qwen2", "causal_attn": False}, "", "causal_attn is block-causal"),
    ({"model_type": "qwen2", "bd_size": 4}, "", "bd_size is block-causal"),
    ({"model_type": "qwen3"}, "someone/Efficient-DLM-4B", "block-causal"),
    ({"model_type": "edlm", "architectures": ["EfficientDLM"]}, "", "block-causal"),
    ({"model_type": "wedlm"}, "", "causal attention"),
    ({"model_type": "qwen3", "architectures": ["WeDLMForCausalLM"]}, "", "causal attention"),
    ({"model_type": "diffusion_gemma"}, "", "random tokens instead of masks"),
    ({"architectures": ["DiffusionGemmaForBlockDiffusion"]}, "", "random tokens instead of masks"),
    ({"model_type": "CoDA"}, "", "config.json was not available"),
    ({"model_type": "rnd1"}, "", "config.json was not available"),
    (
        {"model_type": "llada", "architectures": ["MMadaModelLM"]},
        "",
        "config.json was not available",
    ),
]


@pytest.mark.parametrize(("fields", "name", "reason"), WHY_REFUSED)
def test_a_model_that_is_refused_is_told_why(tmp_path, fields, name, reason):
    write_checkpoint(tmp_path, "a2d-qwen3", **fields)
    with pytest.raises(ValueError, match=reason) as error:
        families.read_config(tmp_path, name)
    assert "\n" not in str(error.value)
    assert "is_causal" not in str(error.value)  # that would be wrong advice


def test_a_folder_may_have_the_name_of_another_method_where_its_type_is_clear(tmp_path):
    for family, name in (("llada", "fast-dllm"), ("dream", "wedlm-against-dream")):
        write_checkpoint(tmp_path / name, family)
        assert families.read_config(tmp_path / name)[1] == family


def test_an_a2d_that_is_not_known_to_be_bidirectional_is_asked_about(tmp_path):
    """Its mdlm and its bd3lm have one configuration; a renamed bd3lm ran as the other, silently."""
    folder = tmp_path / "renamed"
    write_checkpoint(folder, "a2d-qwen3")
    drop_field(folder, "is_causal")  # as published
    with pytest.raises(ValueError, match='mdlm.*bd3lm.*add "is_causal": false') as error:
        load_denoiser(str(folder))
    assert "\n" not in str(error.value)
    families.read_config(folder, "dllm-hub/Qwen3-0.6B-diffusion-mdlm-v0.1")
    edit_config(folder, is_causal=False)
    load_denoiser(str(folder))
    drop_field(folder, "is_causal")
    for kind, is_known in (("mdlm", True), ("bd3lm", False)):
        cached = tmp_path / f"models--dllm-hub--a-{kind}" / "snapshots" / "0123"
        cached.parent.mkdir(parents=True)
        cached.symlink_to(folder)
        if is_known:
            load_denoiser(str(cached))
        else:
            with pytest.raises(ValueError, match='add "block_size": N'):
                load_denoiser(str(cached))


# ---- folders in transformers' own format ---------------------------------------------------------

PLAIN_CLASSES = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


@pytest.fixture(params=PLAIN_CLASSES)
def plain_folder(request, tmp_path):
    """A folder as transformers writes it, with a random model and our tokenizer."""
    config_class, model_class = PLAIN_CLASSES[request.param]
    tokenizer = tiny_tokenizer()
    config = config_class(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        is_causal=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    if request.param == "qwen3":
        config.head_dim = 8  # Qwen2 has no such field
    torch.manual_seed(0)
    model_class(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def test_a_kernel_that_a_folder_names_is_not_fetched(plain_folder):
    edit_config(plain_folder, attn_implementation="evil/kernel", _attn_implementation="evil/kernel")
    config, _ = families.read_config(plain_folder)
    assert "evil" not in str(config.to_dict())
    assert config._attn_implementation != "evil/kernel"
    load_denoiser(str(plain_folder))


def test_a_plain_folder_loads_as_it_was_saved_if_it_says_that_it_is_not_causal(plain_folder):
    ids = torch.randint(0, 100, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(9) >= torch.tensor([[0], [4], [0]])
    denoiser, tokenizer = load_denoiser(str(plain_folder))
    _, model_class = PLAIN_CLASSES[denoiser.config.model_type]
    model = model_class.from_pretrained(plain_folder).eval()
    expected = model(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(denoiser(input_ids=ids, attention_mask=mask).logits, expected)
    assert tokenizer.mask_token == "[MASK]"
    assert not getattr(denoiser.config, "shift_logits", False)
    states = make_policy(denoiser, tokenizer).hidden(ids, mask)
    edit_config(plain_folder, shift_logits=True)
    shifted = make_policy(*load_denoiser(str(plain_folder))).hidden(ids, mask)
    assert torch.equal(shifted[:, 1:][mask[:, :-1]], states[:, :-1][mask[:, :-1]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: edit_config(f, is_causal=True), '"is_causal": false.*"shift_logits": true'),
        (lambda f: drop_field(f, "is_causal"), '"is_causal": false.*"shift_logits": true'),
        (lambda f: edit_config(f, use_sliding_window=True), "sliding-window attention"),
        (lambda f: edit_config(f, residual_scale=3.0), "residual_scale = 3.0 is not supported"),
        (lambda f: edit_config(f, quantization_config={}), "quantization_config = "),
        (lambda f: edit_config(f, auto_map={}, rope_scaling={"factor": 2}), "rope_scaling = "),
        (
            lambda f: edit_config(f, layer_types=["full_attention", "sliding_attention"]),
            "sliding-window",
        ),
    ],
)
def test_any_other_plain_folder_is_refused_with_what_to_write_into_it(
    plain_folder, change, message
):
    change(plain_folder)
    with pytest.raises(ValueError, match=message) as error:
        load_denoiser(str(plain_folder))
    assert "\n" not in str(error.value)


# ---- what others have published ------------------------------------------------------------------

PUBLISHED = json.loads((Path(__file__).parent / "published_configs.json").read_text())


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_configuration_is_read_as_its_family_or_refused_with_the_reason(name, tmp_path):
    published = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(published["config"]))
    if "refused" in published:
        with pytest.raises(ValueError, match=published["refused"]):
            families.read_config(tmp_path, name)
        return
    config, family = families.read_config(tmp_path, name)
    assert family == published["read_as"]
    assert config.is_causal is False
    sizes = {
        theirs: ours
        for theirs, ours in families.FAMILIES[family].fields.items()
        if theirs.startswith(("n_", "num_", "d_")) or "size" in theirs
    }
    assert len(sizes) >= 6
    for theirs, ours in sizes.items():
        if theirs == "block_size":
            # Mostly not published.
            assert config.block_size == (32 if family == "llada2_moe" else 4)
        else:
            assert getattr(config, ours) == published["config"][theirs]
    assert config.rope_parameters["rope_theta"] == published["config"]["rope_theta"]
    assert getattr(config, "shift_logits", False) == (family in ("dream", "fast_dllm_qwen"))
