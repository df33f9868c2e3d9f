"""The supported model families, one row each in FAMILIES.

LLaDA is a Llama without the causal mask. Dream is a Qwen2 without it that predicts each token from
the position before it. SDAR is a Qwen3, and LLaDA2.0 a GLM-4.5, with a block-causal mask (made by
models/block_causal.py). So transformers' own classes run them all, and a family's row says how its
config.json and the names of its weights translate into such a class. Any field of a config.json
that is not understood is refused by name.

To add a family, add a row. test_loading.py compares a family's logits with those of the published
architecture.
"""

import atexit
import gc
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from transformers import (
    Glm4MoeForCausalLM,
    LlamaForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
    Qwen3MoeForCausalLM,
)

from models.errors import as_value_error, unforeseen_as_value_error

# On exit Python spends a second searching all objects of torch and transformers for garbage. Frozen
# objects are skipped, so every program that imports this file exits at once.
atexit.register(gc.freeze)


LORA = [  # the layers' matrices, as all transformers classes in this file name them
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
]


@dataclass
class Family:
    """How the checkpoints of one family are read."""

    # The transformers class that computes the same function.
    model: type
    # {field of the family's config.json: field of our configuration that it becomes}
    fields: dict
    # Fields that have to be present although only one value of each is understood.
    required: tuple = ()
    # Additional fields of our configuration, which are the same for all checkpoints of the family.
    constants: dict = field(default_factory=dict)
    # {pattern of a weight's name in the family's files: its name in `model`}, where they differ.
    weights: dict = field(default_factory=dict)
    # {matrix in the family's files: the matrices of `model` stacked in it} (weights.py)
    fused: dict = field(default_factory=dict)
    # Tokens per block in the family's own decoding example; 0: the whole canvas is one block.
    block_length: int = 0


COMMON_FIELDS = {
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "mask_token_id": "mask_token_id",
    "pad_token_id": "pad_token_id",
    "rms_norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
}
LLADA_FIELDS = COMMON_FIELDS | {
    "d_model": "hidden_size",
    "embedding_size": "vocab_size",
    "max_sequence_length": "max_position_embeddings",
    "mlp_hidden_size": "intermediate_size",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "n_layers": "num_hidden_layers",
    "weight_tying": "tie_word_embeddings",
}
QWEN_FIELDS = COMMON_FIELDS | {
    "hidden_size": "hidden_size",
    "max_position_embeddings": "max_position_embeddings",
    "num_attention_heads": "num_attention_heads",
    "num_hidden_layers": "num_hidden_layers",
    "num_key_value_heads": "num_key_value_heads",
    "tie_word_embeddings": "tie_word_embeddings",
    "vocab_size": "vocab_size",
}
QWEN3_FIELDS = QWEN_FIELDS | {
    "attention_bias": "attention_bias",
    "block_size": "block_size",
    "head_dim": "head_dim",
    "intermediate_size": "intermediate_size",
}

# The only group reference that works in these patterns is \1, since transformers reverses them on
# saving.
LLADA_WEIGHTS = {
    r"^model\.transformer\.wte\.": "model.embed_tokens.",
    r"^model\.transformer\.ln_f\.": "model.norm.",
    r"^model\.transformer\.ff_out\.": "lm_head.",
    r"^model\.transformer\.blocks\.(\d+)\.attn_norm\.": r"model.layers.\1.input_layernorm.",
    r"^model\.transformer\.blocks\.(\d+)\.ff_norm\.": r"model.layers.\1.post_attention_layernorm.",
    r"^model\.transformer\.blocks\.(\d+)\.q_proj\.": r"model.layers.\1.self_attn.q_proj.",
    r"^model\.transformer\.blocks\.(\d+)\.k_proj\.": r"model.layers.\1.self_attn.k_proj.",
    r"^model\.transformer\.blocks\.(\d+)\.v_proj\.": r"model.layers.\1.self_attn.v_proj.",
    r"^model\.transformer\.blocks\.(\d+)\.attn_out\.": r"model.layers.\1.self_attn.o_proj.",
    r"^model\.transformer\.blocks\.(\d+)\.ff_proj\.": r"model.layers.\1.mlp.gate_proj.",  # SiLU's
    r"^model\.transformer\.blocks\.(\d+)\.up_proj\.": r"model.layers.\1.mlp.up_proj.",
    r"^model\.transformer\.blocks\.(\d+)\.ff_out\.": r"model.layers.\1.mlp.down_proj.",
}

LLADA2_WEIGHTS = {
    r"^model\.word_embeddings\.": "model.embed_tokens.",
    r"^model\.layers\.(\d+)\.attention\.query_layernorm\.": r"model.layers.\1.self_attn.q_norm.",
    r"^model\.layers\.(\d+)\.attention\.key_layernorm\.": r"model.layers.\1.self_attn.k_norm.",
    r"^model\.layers\.(\d+)\.attention\.dense\.": r"model.layers.\1.self_attn.o_proj.",
    r"^model\.layers\.(\d+)\.mlp\.gate\.expert_bias": (
        r"model.layers.\1.mlp.gate.e_score_correction_bias"
    ),
}

FAMILIES = {
    "llada": Family(
        model=LlamaForCausalLM,
        fields=LLADA_FIELDS,
        required=("block_type", "activation_type", "include_bias", "layer_norm_type", "rope"),
        weights=LLADA_WEIGHTS,
        block_length=32,
    ),
    "llada-moe": Family(
        model=Qwen3MoeForCausalLM,
        fields=QWEN_FIELDS
        | {
            "attention_bias": "attention_bias",
            "expert_intermediate_size": "moe_intermediate_size",
            "head_dim": "head_dim",
            "norm_topk_prob": "norm_topk_prob",
            "num_experts": "num_experts",
            "num_experts_per_tok": "num_experts_per_tok",
        },
        constants={"norm_topk_prob": False, "decoder_sparse_step": 1},
        block_length=32,
    ),
    "dream": Family(
        model=Qwen2ForCausalLM,
        fields=QWEN_FIELDS | {"intermediate_size": "intermediate_size"},
        constants={"shift_logits": True, "use_sliding_window": False},
    ),
    # Autoregressive models turned into diffusion models by dllm ("a2d").
    "a2d-qwen3": Family(
        model=Qwen3ForCausalLM,
        fields=QWEN3_FIELDS,
        required=("hidden_act",),
        constants={"use_sliding_window": False},
    ),
    "a2d-qwen2": Family(
        model=Qwen2ForCausalLM,
        fields=QWEN_FIELDS
        | {
            "block_size": "block_size",
            "intermediate_size": "intermediate_size",
        },
        required=("hidden_act",),
        constants={"use_sliding_window": False},
    ),
    "a2d-llama": Family(
        model=LlamaForCausalLM,
        fields=QWEN3_FIELDS | {"mlp_bias": "mlp_bias"},
        required=("hidden_act",),
    ),
    # Fast-dLLM v2: block-causal, and shifted like Dream.
    "fast_dllm_qwen": Family(
        model=Qwen2ForCausalLM,
        fields=QWEN_FIELDS
        | {
            "bd_size": "block_size",
            "intermediate_size": "intermediate_size",
        },
        required=("hidden_act",),
        constants={"shift_logits": True, "use_sliding_window": False},
    ),
    # SDAR, and TraDo, which was trained from it: block-causal (see complete_sdar).
    "sdar": Family(
        model=Qwen3ForCausalLM,
        fields=QWEN3_FIELDS,
        required=("hidden_act",),
        constants={"use_sliding_window": False},
    ),
    "sdar_moe": Family(
        model=Qwen3MoeForCausalLM,
        fields=QWEN3_FIELDS
        | {
            "moe_intermediate_size": "moe_intermediate_size",
            "norm_topk_prob": "norm_topk_prob",
            "num_experts": "num_experts",
            "num_experts_per_tok": "num_experts_per_tok",
        },
        required=("hidden_act",),
        constants={"decoder_sparse_step": 1, "use_sliding_window": False},
    ),
    # LLaDA2.0: block-causal, with experts routed like GLM-4.5's (see complete_llada2).
    "llada2_moe": Family(
        model=Glm4MoeForCausalLM,
        fields=QWEN_FIELDS
        | {
            "block_size": "block_size",
            "first_k_dense_replace": "first_k_dense_replace",
            "head_dim": "head_dim",
            "intermediate_size": "intermediate_size",
            "moe_intermediate_size": "moe_intermediate_size",
            "n_group": "n_group",
            "num_experts": "n_routed_experts",
            "num_experts_per_tok": "num_experts_per_tok",
            "num_shared_experts": "n_shared_experts",
            "partial_rotary_factor": "partial_rotary_factor",
            "routed_scaling_factor": "routed_scaling_factor",
            "topk_group": "topk_group",
        },
        required=("hidden_act", "score_function"),
        constants={"norm_topk_prob": True, "use_qk_norm": True},
        weights=LLADA2_WEIGHTS,
        fused={
            "attention.query_key_value": (
                "self_attn.q_proj",
                "self_attn.k_proj",
                "self_attn.v_proj",
            )
        },
    ),
}

# Models in transformers' own format, as this project exports them. Their config.json has to say
# "is_causal": false.
PLAIN = {
    "llama": LlamaForCausalLM,
    "qwen2": Qwen2ForCausalLM,
    "qwen3": Qwen3ForCausalLM,
}
# Fields that their config.json may have although the configuration's class does not.
PLAIN_FIELDS = {
    "block_size",
    "compact_prompts",
    "is_causal",
    "mask_token_id",
    "rope_theta",
    "shift_logits",
}

# Models that are refused, and why: {reason: words in their type or architecture, without - and _}.
# Where several kinds of models share a type, these words are also looked for in the model's name.
BLOCK_CAUSAL = (
    "is block-causal in a way that is not supported; SDAR, TraDo, LLaDA2.0, Fast-dLLM v2 and "
    "bd3lm are"
)
REFUSED = {
    "is noised with random tokens instead of masks, which no sampler or likelihood here supports": (
        "diffusiongemma",
    ),
    BLOCK_CAUSAL: (
        "blockdiffusion",
        "efficientdlm",
        "stablediffcoder",
    ),
    "is a LLaDA2 with merged experts, as dFactory trains it: split them with dFactory's "
    "moe_convertor.py": ("llada2moeveomni",),
    # Nemotrons are published with a bidirectional and with an autoregressive dlm_paradigm, but
    # their generate() reads the prompt and finished blocks causally in both cases.
    "reads the tokens before a block causally, and is bidirectional at most within the block, "
    "which no rollout or likelihood here supports": (
        "nemotronlabsdiffusion",
        "sdlm",
    ),
    "has causal attention, which no rollout or likelihood here supports": ("wedlm",),
    "could be supported, but its published config.json was not available to us": (
        "coda",
        "mmada",
        "rnd1",
    ),
}
# Fields that mark a model in transformers' own format as block-causal in an unsupported way.
BLOCK_FIELDS = {"bd_size", "causal_attn"}

# Fields of a family that may be missing or null.
OPTIONAL_FIELDS = {
    "attention_bias",
    "block_size",
    "bos_token_id",
    "head_dim",
    "mask_token_id",
    "mlp_bias",
    "n_kv_heads",
    "norm_topk_prob",
    "pad_token_id",
}

# Fields for which transformers' classes implement only these values.
ALLOWED_VALUES = {
    "activation_type": ["silu"],
    "alibi": [False],
    "attention_dropout": [0.0],
    "attention_layer_norm": [False],
    "bias_for_layer_norm": [False, None],
    "block_group_size": [1],
    "block_causal_prompt": [True],
    "block_type": ["llama"],
    "clip_qkv": [None],
    "decoder_sparse_step": [1],
    "embedding_dropout": [0.0],
    "hidden_act": ["silu"],
    "include_bias": [False],
    "include_qkv_bias": [False, None],
    "input_emb_norm": [False],
    "is_causal": [False],
    "layer_norm_type": ["rms"],
    "layer_norm_with_affine": [True],
    "mlp_only_layers": [[]],
    "moe_layer_freq": [1, None],
    "moe_router_enable_expert_bias": [False, None],
    "moe_router_score_function": ["softmax"],
    "multi_query_attention": [False, None],
    "n_group": [None],
    "norm_head": [False],
    "norm_softmax": [False],
    "norm_topk_prob": [True, None],
    "num_shared_experts": [0, None],
    "output_dropout": [0.0],
    "partial_rotary_factor": [1],
    "pretraining_tp": [1],
    "qk_layernorm": [True],
    "residual_dropout": [0.0],
    "rope": [True],
    "rope_full_precision": [True],
    "rope_scaling": [None],
    "routed_scaling_factor": [1, None],
    "router_dtype": ["fp32"],
    "router_num_group": [None],
    "router_topk_group": [None],
    "scale_logits": [False],
    "score_function": ["sigmoid"],
    "shared_expert_intermediate_size": [0, None],
    "sliding_window": [None],
    "use_bias": [False],
    "use_mrope": [False],
    "use_qk_norm": [True],
    "use_qkv_bias": [False],
    "use_rmsnorm": [True],
    "use_sliding_window": [False],
    "using_split_qkv_in_self_attention": [False],
}

# Fields that do not change what these models compute.
IGNORED_FIELDS = {
    "_attn_implementation",
    "_name_or_path",
    "alibi_bias_max",
    "architectures",
    "attention_layer_norm_with_affine",
    "attn_implementation",
    "auto_map",
    "dense_intermediate_size",
    "dtype",
    "debug",
    "ep_size",
    "flash_attention",
    "flash_attn_varlen",
    "fuse_cross_entropy",
    "id2label",
    "init_cutoff_factor",
    "init_device",
    "init_fn",
    "init_std",
    "initializer_range",
    "intermediate_size",
    "label2id",
    "max_window_layers",
    "micro_forward",
    "mlp_ratio",
    "model_type",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "precision",
    "return_dict",
    "router_aux_loss_coef",
    "skip_checkpoint",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "use_deepep",
    "vocab_size",
}


def read_config(folder, name=""):
    """Returns (configuration, family) of the checkpoint in `folder`.

    folder  a Path
    name    the name by which the user refers to the model; a hub name can tell its block size

    The configuration is an instance of a transformers class, with is_causal False; the family is a
    key of FAMILIES or of PLAIN. Raises a one-line ValueError for a checkpoint that is not
    understood.
    """
    file = folder / "config.json"
    if (folder / "adapter_config.json").exists():  # transformers would silently apply the adapter
        raise ValueError(
            f"{name or folder} is a LoRA adapter or contains one: an adapter needs its own folder. "
            "Give its base as the model, and the adapter as --adapter"
        )
    parent = folder.absolute().parent
    if parent.name == "snapshots":  # the hub's cache: models--OWNER--NAME/snapshots/COMMIT
        name = f"{name} {parent.parent.name}"
    with as_value_error(f"{folder} is not a checkpoint: config.json cannot be read"):
        config = json.loads(file.read_text(encoding="utf-8"))
        family = str(config.get("model_type")).lower()
        architectures = config.get("architectures")
    name = Path(name or folder).absolute().name.lower()  # "." has no name
    is_a2d = family.startswith("a2d")
    description = f"{family} {architectures} {name if is_a2d or family in PLAIN else ''}"
    description = description.lower().replace("-", "").replace("_", "")
    for reason, words in REFUSED.items():
        for word in words:
            if word in description:
                raise ValueError(f"{file}: {word} {reason}")
    if is_a2d and not config.get("block_size"):
        if "bd3lm" in name:
            raise ValueError(
                f"{file}: a bd3lm is block-causal, but this file does not say how many tokens a "
                'block has: add "block_size": N'
            )
        if "mdlm" not in name and config.get("is_causal") is None:
            raise ValueError(
                f"{file}: {family} can be fully bidirectional (mdlm) or block-causal (bd3lm), and "
                f"neither it nor the name {name} says which. If it is an mdlm, add "
                '"is_causal": false; if a bd3lm, "block_size": N'
            )
    with unforeseen_as_value_error(f"{file} is not understood"):
        if family in PLAIN:
            return read_plain_config(config, file), family
        if family == "lladamoe" or (family == "llada" and "num_experts" in config):
            family = "llada-moe"
        if family not in FAMILIES:
            known = ", ".join([*FAMILIES, *PLAIN])
            raise ValueError(f"{file}: model_type {family} is not supported, only {known}")
        simplify(config)
        if family == "llada":
            complete_llada(config)
        if family in ("sdar", "sdar_moe"):
            complete_sdar(config, name, file)
        if family == "llada2_moe":
            complete_llada2(config, name, file)
        return translate(config, family, file), family


def translate(config, family, file):
    """Translates a config.json, the dict `config`, into a configuration of the family's class.

    Raises ValueError, naming the field, for one that is not understood or missing.
    """
    row = FAMILIES[family]
    for key in sorted(config.keys() - row.fields.keys() - IGNORED_FIELDS):
        if config[key] not in ALLOWED_VALUES.get(key, []):
            raise ValueError(f"{file}: {key} = {config[key]!r} is not supported for {family}")
    for key in (*row.fields, *row.required):
        if config.get(key) is None and key not in OPTIONAL_FIELDS:
            raise ValueError(f"{file}: {key} is missing, but {family} needs it")

    values = dict(row.constants)
    for theirs, ours in row.fields.items():
        if config.get(theirs) is not None:
            values[ours] = config[theirs]
    check_block_size(values.get("block_size"), file)
    values["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": values.pop("rope_theta"),
    }
    if "partial_rotary_factor" in values:  # the fraction of each head's dimensions that is rotated
        rotary_factor = values.pop("partial_rotary_factor")
        values["rope_parameters"]["partial_rotary_factor"] = rotary_factor
    return row.model.config_class(**values, is_causal=False)


def read_plain_config(config, file):
    """The configuration of a model in transformers' own format, from its config.json, a dict.

    Raises ValueError if the model is causal, if its attention is limited to a window, or for a
    field that is not understood.
    """
    model_type = config["model_type"]
    for field_name in sorted(BLOCK_FIELDS & config.keys()):
        raise ValueError(f"{file}: a {model_type} with {field_name} {BLOCK_CAUSAL}")
    if config.get("is_causal") is not False:
        raise ValueError(
            f'{file}: a causal model. If it is bidirectional, add "is_causal": false and, if it '
            'predicts each token from the position before it, as open-dcoder does, "shift_logits": '
            "true"
        )
    has_window = any(kind != "full_attention" for kind in config.get("layer_types") or ())
    if has_window or config.get("use_sliding_window"):
        raise ValueError(f"{file}: sliding-window attention is not supported")
    config_class = PLAIN[model_type.lower()].config_class
    known = config_class().to_dict().keys() | PLAIN_FIELDS | IGNORED_FIELDS
    for key in sorted(config.keys() - known):
        raise ValueError(f"{file}: {key} = {config[key]!r} is not supported for {model_type}")
    check_block_size(config.get("block_size"), file)
    # An attention kernel named here would be fetched from the hub and executed: a stranger's code.
    for key in ("attn_implementation", "_attn_implementation"):
        config.pop(key, None)
    return config_class.from_dict(config)


def simplify(config):
    """Removes fields of a config.json's dict that repeat another field or have no effect."""
    layers = config.get("num_hidden_layers") or 0
    if config.get("moe_layer_freq") == [1] * layers:
        config["moe_layer_freq"] = 1
    if config.get("layer_types") == ["full_attention"] * layers:
        del config["layer_types"]
    if config.get("use_sliding_window") is False:
        config.pop("sliding_window", None)
    rope = config.get("rope_parameters") or {}  # as newer versions of transformers write it
    if rope.keys() == {"rope_type", "rope_theta"} and rope["rope_type"] == "default":
        config["rope_theta"] = rope["rope_theta"]
        del config["rope_parameters"]


def complete_llada(config):
    """Fills in what a LLaDA's config.json leaves open."""
    if config.get("mlp_hidden_size") is None and config.get("d_model"):
        config["mlp_hidden_size"] = (config.get("mlp_ratio") or 4) * config["d_model"]
    config["embedding_size"] = config.get("embedding_size") or config.get("vocab_size")
    if config.get("tie_word_embeddings") == config.get("weight_tying"):
        config.pop("tie_word_embeddings", None)


def complete_sdar(config, name, file):
    """Fills in the block size of an SDAR or TraDo, which most published config.json leave out.

    According to the model cards it is N for names ending in -bN, else 4 for the published names.
    Raises ValueError for any other name: with a wrong block size a model runs, but is worse.
    """
    if config.get("block_size") is not None:
        return
    in_name = re.search(r"-b(\d+)$", name)
    if in_name:
        config["block_size"] = int(in_name.group(1))
    elif re.search(r"(sdar-[^-]+b(-a3b)?-chat|trado-[^-]+b-(instruct|thinking))$", name):
        config["block_size"] = 4
    else:
        raise ValueError(
            f"{file}: neither this file nor the name {name} says how many tokens a block of this "
            'block-causal model has: add "block_size": N (4 for SDAR-*-Chat and TraDo)'
        )


def complete_llada2(config, name, file):
    """Fills in what a LLaDA2.0's config.json leaves open: its blocks of 32 and its end token.

    LLaDA2.1, which is not supported, has the same configuration. Raises ValueError if the name is
    LLaDA2.1's, or does not say which of the two it is.
    """
    if "llada2.1" in name:
        raise ValueError(
            f"{file}: a LLaDA2.1 edits tokens that it has written, so one position may be drawn "
            "several times and has no single log-prob, which every likelihood here needs"
        )
    if config.get("block_size") is None:
        if not re.search(r"llada2\.0-(mini|flash)(-cap|-preview)?$", name):
            raise ValueError(
                f"{file}: neither this file nor the name {name} says how many tokens a block of "
                'this block-causal model has: add "block_size": 32 if it is a LLaDA2.0 (a LLaDA2.1 '
                "edits tokens, which no likelihood here supports)"
            )
        config["block_size"] = 32
    if config.get("eos_token_id") is None:  # its generate() ends with its padding token
        config["eos_token_id"] = config.get("pad_token_id")
    if config.get("moe_router_enable_expert_bias") is True:  # GLM-4.5's router always has it
        del config["moe_router_enable_expert_bias"]
    heads = config.get("num_attention_heads")
    if heads and config.get("head_dim") is None:
        config["head_dim"] = (config.get("hidden_size") or 0) // heads
    rotated = (config.get("partial_rotary_factor") or 1) * (config.get("head_dim") or 0)
    if config.get("rotary_dim") == rotated:
        del config["rotary_dim"]


def adaptable_matrices(config):
    """The names, from LORA, of the matrices that an adapter adapts in such a model.

    In a mixture of experts it adapts only attention, since the experts are not Linear modules.
    """
    return LORA[:4] if hasattr(config, "num_experts_per_tok") else LORA


def check_block_size(block_size, file):
    """Raises ValueError if block_size is neither a positive integer nor None (not block-causal)."""
    if block_size is None:
        return
    if not isinstance(block_size, int) or isinstance(block_size, bool) or block_size < 1:
        raise ValueError(f"{file}: block_size = {block_size!r} is not a number of tokens")
