"""Which checkpoints are understood: what their config.json says, how their weights are named.

A LLaDA *is* a Llama without the causal mask, a Dream is a Qwen2 that predicts each token from the
position before it. A family is a row of each table here. Whatever in a configuration is not
understood is refused by name.
"""

import json
from contextlib import contextmanager
from pathlib import Path

from transformers import (
    LlamaForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
    Qwen3MoeForCausalLM,
)


@contextmanager
def one_line(what):
    """Turns any error inside into a ValueError of one line: `what`, and what was said."""
    try:
        yield
    except Exception as error:  # safetensors, tokenizers, peft and the hub each raise their own
        raise ValueError(f"{what} ({' '.join(str(error).split())[:160]})") from None


def names(text):  # "a=b c" -> {"a": "b", "c": "c"}
    return {word.partition("=")[0]: word.partition("=")[2] or word for word in text.split()}


# What a family's config.json has to say: {field: its name in our configuration}.
COMMON = "eos_token_id pad_token_id bos_token_id mask_token_id rms_norm_eps rope_theta "
QWEN = COMMON + """vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads
    max_position_embeddings tie_word_embeddings """  # fmt: skip
LLADA = COMMON + """d_model=hidden_size n_layers=num_hidden_layers n_heads=num_attention_heads
    n_kv_heads=num_key_value_heads mlp_hidden_size=intermediate_size embedding_size=vocab_size
    max_sequence_length=max_position_embeddings weight_tying=tie_word_embeddings """  # fmt: skip
FIELDS = {
    "llada": names(LLADA + "include_bias=mlp_bias include_qkv_bias=attention_bias"),
    "llada-qkv": names(LLADA),
    "llada-moe": names(QWEN + """expert_intermediate_size=moe_intermediate_size num_experts
        num_experts_per_tok norm_topk_prob attention_bias head_dim"""),
    "dream": names(QWEN + "intermediate_size"),
    "a2d-qwen2": names(QWEN + "intermediate_size"),
    "a2d-qwen3": names(QWEN + "intermediate_size head_dim attention_bias"),
    "a2d-llama": names(QWEN + "intermediate_size head_dim attention_bias mlp_bias"),
}  # fmt: skip
OPTIONAL = names("""bos_token_id mask_token_id pad_token_id n_kv_heads include_qkv_bias head_dim
    norm_topk_prob attention_bias mlp_bias""")  # fmt: skip
# Fields of which our classes implement these values alone.
KNOWN = {name: values for values, fields in (
    (["llama"], "block_type"), (["rms"], "layer_norm_type"), ([False], "use_mrope"),
    (["silu"], "activation_type hidden_act"), (["softmax"], "moe_router_score_function"),
    ([1], "block_group_size partial_rotary_factor pretraining_tp"),
    ([1, None], "moe_layer_freq routed_scaling_factor"),
    ([0, None], "shared_expert_intermediate_size num_shared_experts"),
    ([0.0], "attention_dropout embedding_dropout residual_dropout"),
    ([True], "layer_norm_with_affine rope rope_full_precision qk_layernorm"),
    ([False], "alibi attention_layer_norm input_emb_norm scale_logits use_sliding_window"),
    ([False, None], "bias_for_layer_norm moe_router_enable_expert_bias multi_query_attention"),
    ([None], "clip_qkv n_group rope_scaling router_num_group router_topk_group sliding_window"),
) for name in fields.split()}  # fmt: skip
# Fields of no consequence for what these models compute.
IGNORED = names("""_attn_implementation _name_or_path alibi_bias_max architectures
    attention_layer_norm_with_affine attn_implementation auto_map dense_intermediate_size dtype
    flash_attention flash_attn_varlen id2label init_cutoff_factor init_device init_fn init_std
    initializer_range intermediate_size label2id max_window_layers mlp_ratio model_type
    output_attentions output_hidden_states output_router_logits precision return_dict
    router_aux_loss_coef torch_dtype transformers_version use_cache vocab_size""")  # fmt: skip
# model_type: class, what else config.json has to say, what else goes into our configuration.
NEEDED = ["block_type", "activation_type", "layer_norm_type", "rope"]
FULL = {"use_sliding_window": False}
FAMILIES = {
    "llada": (LlamaForCausalLM, NEEDED, {}),
    "llada-qkv": (Qwen2ForCausalLM, NEEDED, FULL),  # a bias for q, k and v alone: Qwen2 has that
    "llada-moe": (Qwen3MoeForCausalLM, [], {"norm_topk_prob": False, "decoder_sparse_step": 1}),
    "dream": (Qwen2ForCausalLM, [], {"shift_logits": True} | FULL),
    "a2d-qwen3": (Qwen3ForCausalLM, ["hidden_act"], FULL),
    "a2d-qwen2": (Qwen2ForCausalLM, ["hidden_act"], FULL),
    "a2d-llama": (LlamaForCausalLM, ["hidden_act"], {}),
}
# Folders in transformers' own form, as this project exports them. They say "is_causal": false.
PLAIN = {"llama": LlamaForCausalLM, "qwen2": Qwen2ForCausalLM, "qwen3": Qwen3ForCausalLM}
OURS = names("is_causal shift_logits compact_prompts mask_token_id rope_theta")
BLOCK_CAUSAL = ("sdar", "fast_dllm", "llada2", "bd3lm", "block_diffusion")
BLOCK = names("""attn_norm=input_layernorm ff_norm=post_attention_layernorm q_proj=self_attn.q_proj
    k_proj=self_attn.k_proj v_proj=self_attn.v_proj attn_out=self_attn.o_proj
    ff_proj=mlp.gate_proj up_proj=mlp.up_proj ff_out=mlp.down_proj""")  # ff_proj has the SiLU
WEIGHTS = {rf"^model\.transformer\.{there}\.": f"{here}." for there, here in (
    ("wte", "model.embed_tokens"), ("ln_f", "model.norm"), ("ff_out", "lm_head"),
    *((rf"blocks\.(\d+)\.{there}", rf"model.layers.\1.{here}") for there, here in BLOCK.items()),
)}  # fmt: skip
WEIGHTS = {"llada": WEIGHTS, "llada-qkv": WEIGHTS}


def read_config(folder, name=""):
    """(our configuration, its family) of the folder of a model of this name. Raises ValueError."""
    file = folder / "config.json"
    with one_line(f"{folder} is no checkpoint: config.json cannot be read"):
        found = json.loads(file.read_text(encoding="utf-8"))
        kind = str(found.get("model_type")).lower()
        said = f"{kind} {found.get('architectures')} {Path(name).name}".lower()
    if any(word in said for word in BLOCK_CAUSAL):
        why = "its blocks see only those before them, which no rollout or likelihood here does"
        raise ValueError(f"{file}: {kind} is block-causal: {why}")
    if kind in PLAIN:
        return read_plain(found, file), kind
    kind = {"lladamoe": "llada-moe"}.get(kind, kind)
    kind += "-moe" if kind == "llada" and "num_experts" in found else ""
    if kind not in FAMILIES:
        known = ", ".join([*FAMILIES, *PLAIN])
        raise ValueError(f"{file}: model_type {kind} is not known, only {known}")
    found = tidied(found)
    if kind == "llada":
        kind = complete_llada(found, file)
    model, needed, extra = FAMILIES[kind]
    fields = FIELDS[kind]
    for key in sorted(found.keys() - {*fields, *IGNORED}):
        if found[key] not in KNOWN.get(key, []):
            raise ValueError(f"{file}: {key} = {found[key]!r} is not known for {kind}")
    for key in (*fields, *needed):
        if found.get(key) is None and key not in OPTIONAL:
            raise ValueError(f"{file}: {key} is missing, and {kind} needs it")
    given = {ours: found[key] for key, ours in fields.items() if found.get(key) is not None}
    given["rope_parameters"] = {"rope_type": "default", "rope_theta": given.pop("rope_theta")}
    return model.config_class(**extra | given, is_causal=False), kind


def read_plain(found, file):
    """The configuration of a folder in transformers' own form."""
    if found.get("is_causal") is not False:
        raise ValueError(
            f'{file}: a causal model, unless it says "is_causal": false; and "shift_logits": true'
            " where it predicts each token from the position before it, as open-dcoder does"
        )
    if {*(found.get("layer_types") or ())} - {"full_attention"} or found.get("use_sliding_window"):
        raise ValueError(f"{file}: layers that see only a window are not known here")
    config_class = PLAIN[found["model_type"].lower()].config_class
    known = config_class().to_dict().keys() | OURS.keys() | IGNORED.keys()
    for key in sorted(found.keys() - known):
        raise ValueError(f"{file}: {key} = {found[key]!r} is not known for {found['model_type']}")
    kernels = ("attn_implementation", "_attn_implementation")  # could be somebody's, from the hub
    return config_class.from_dict({key: found[key] for key in found.keys() - kernels})


def tidied(found):
    """A config.json's dict without what says the same twice, or nothing."""
    layers = found.get("num_hidden_layers") or 0
    if found.get("moe_layer_freq") == [1] * layers:
        found["moe_layer_freq"] = 1
    if found.get("layer_types") == ["full_attention"] * layers:
        del found["layer_types"]
    if found.get("use_sliding_window") is False:
        found.pop("sliding_window", None)
    rope = found.get("rope_parameters") or {}  # as newer transformers write it
    if rope.keys() == {"rope_type", "rope_theta"} and rope["rope_type"] == "default":
        found["rope_theta"] = found.pop("rope_parameters")["rope_theta"]
    return found


def complete_llada(found, file):
    """Fills in what a LLaDA's config.json leaves open. -> its family: which matrices have a bias"""
    if found.get("mlp_hidden_size") is None and found.get("d_model"):
        found["mlp_hidden_size"] = (found.get("mlp_ratio") or 4) * found["d_model"]
    found["embedding_size"] = found.get("embedding_size") or found.get("vocab_size")
    if found.get("tie_word_embeddings") == found.get("weight_tying"):
        found.pop("tie_word_embeddings", None)
    if found.get("include_bias"):
        if not found.get("weight_tying"):
            raise ValueError(f"{file}: include_bias = True is known only with tied embeddings")
        found["include_qkv_bias"] = True
    elif found.get("include_qkv_bias"):
        found.pop("include_bias", None)
        del found["include_qkv_bias"]
        return "llada-qkv"
    return "llada"
