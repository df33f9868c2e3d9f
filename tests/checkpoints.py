"""Tiny random checkpoints in the hub's exact layout, and a plain forward pass of their models.

The forward pass is written from the published architectures, under the checkpoints' own weight
names, and shares nothing with the code under test.

dream-slow has vocab.json and merges.txt but no tokenizer.json.
"""

import json
import math

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch.nn.functional import silu, softmax
from transformers import PreTrainedTokenizerFast

from models.lora import add_lora, lora_layers

HIDDEN = 32
HEADS = 4
HEAD = HIDDEN // HEADS
LAYERS = 2
MLP = 48
EXPERTS = 4
ACTIVE = 2  # experts of a token
VOCABULARY = 320

FAMILIES = [
    "llada",
    "llada-gqa",
    "llada-tied",
    "llada-moe",
    "dream",
    "dream-slow",
    "a2d-qwen3",
    "a2d-qwen2",
    "a2d-llama",
    "sdar",
    "sdar_moe",
    "fast_dllm_qwen",
    "llada2_moe",
]
TIED = ("llada-tied", "a2d-qwen3", "a2d-qwen2", "fast_dllm_qwen")
QKV_BIAS = ("dream", "dream-slow", "a2d-qwen2", "fast_dllm_qwen")
QK_NORM = ("llada-moe", "a2d-qwen3", "sdar", "sdar_moe", "llada2_moe")
MOE = ("llada-moe", "sdar_moe", "llada2_moe")
SHIFTED = ("dream", "dream-slow", "fast_dllm_qwen")
BLOCK_SIZE = 4  # of the block-causal ones


def style_of(family):
    """Whose tokenizer a family has: "llada", "llada2", "dream" or "qwen"."""
    if family == "llada2_moe":
        return "llada2"
    if family.startswith("llada"):
        return "llada"
    return "dream" if family.startswith("dream") else "qwen"


# ---- tokenizers ----------------------------------------------------------------------------------

SPECIAL_TOKENS = {
    "llada": [
        "<|startoftext|>",
        "<|endoftext|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|mdm_mask|>",
        "<|eot_id|>",
        "[gMASK]",
    ],
    "llada2": [
        "<|startoftext|>",
        "<|endoftext|>",
        "<role>",
        "</role>",
        "<|mask|>",
        "<|role_end|>",
        "[gMASK]",
    ],
    "dream": [
        "<|beginoftext|>",
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_sep|>",
        "<|mask|>",
        "<|im_end|>",
    ],
    "qwen": [
        "<|beginoftext|>",
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|mask|>",
        "<think>",
    ],
}
MASK_TOKEN = {
    "llada": "<|mdm_mask|>",
    "llada2": "<|mask|>",
    "dream": "<|mask|>",
    "qwen": "<|mask|>",
}
END_TOKEN = {
    "llada": "<|endoftext|>",
    "llada2": "<|endoftext|>",
    "dream": "<|endoftext|>",
    "qwen": "<|im_end|>",
}
LLADA_TEMPLATE = (
    "{% for m in messages %}{{ ('<|startoftext|>' if loop.first else '')"
    " + '<|start_header_id|>' + m['role']"
    " + '<|end_header_id|>\n\n' + (m['content'] | trim) + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLADA2_TEMPLATE = (
    "{% for m in messages %}"
    "{{ '<role>' + m['role'] + '</role>' + m['content'] + '<|role_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<role>assistant</role>' }}{% endif %}"
)
DREAM_TEMPLATE = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN_TEMPLATE = DREAM_TEMPLATE + (
    "{% if add_generation_prompt %}"
    "{% if enable_thinking is defined and not enable_thinking %}<think>-{% endif %}"
    "{% endif %}"
)
TEMPLATES = {
    "llada": LLADA_TEMPLATE,
    "llada2": LLADA2_TEMPLATE,
    "dream": DREAM_TEMPLATE,
    "qwen": QWEN_TEMPLATE,
}


def write_tokenizer(folder, style, slow=False):
    """A byte-level tokenizer that can write any text. Behind the 256 bytes come special tokens.

    Returns their ids, {token: id}.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    special_tokens = SPECIAL_TOKENS[style]
    tokenizer = Tokenizer(BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in special_tokens]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_TOKEN[style],
        pad_token="<|endoftext|>",
    )
    fast.chat_template = TEMPLATES[style]
    fast.save_pretrained(folder)
    if slow:
        (folder / "tokenizer.json").unlink()
        (folder / "vocab.json").write_text(json.dumps(vocabulary))
        (folder / "merges.txt").write_text("#version: 0.2\n")
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        settings["tokenizer_class"] = "DreamTokenizer"
        settings["auto_map"] = {"AutoTokenizer": ["x.y", None]}
        settings["added_tokens_decoder"] = {
            str(256 + i): {"content": token, "special": True, "normalized": False}
            for i, token in enumerate(special_tokens)
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return {token: 256 + i for i, token in enumerate(special_tokens)}


# ---- configurations, with every field that the published ones have -------------------------------


def kv_heads_of(family):
    return 2 if style_of(family) != "llada" or family == "llada-gqa" else HEADS


def llada_config(family):
    return {
        "model_type": "llada",
        "architectures": ["LLaDAModelLM"],
        "auto_map": {"AutoModel": "modeling_llada.LLaDAModelLM"},
        "activation_type": "silu",
        "alibi": False,
        "alibi_bias_max": 8.0,
        "attention_dropout": 0.0,
        "attention_layer_norm": False,
        "attention_layer_norm_with_affine": True,
        "bias_for_layer_norm": False,
        "block_group_size": 1,
        "block_type": "llama",
        "d_model": HIDDEN,
        "embedding_dropout": 0.0,
        "embedding_size": VOCABULARY,
        "flash_attention": False,
        "include_bias": False,
        "include_qkv_bias": False,
        "init_cutoff_factor": None,
        "init_device": "meta",
        "init_fn": "mitchell",
        "init_std": 0.02,
        "input_emb_norm": False,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "max_sequence_length": 512,
        "mlp_hidden_size": MLP,
        "mlp_ratio": 4,
        "multi_query_attention": None,
        "n_heads": HEADS,
        "n_kv_heads": kv_heads_of(family),
        "n_layers": LAYERS,
        "precision": "amp_bf16",
        "residual_dropout": 0.0,
        "rms_norm_eps": 1e-5,
        "rope": True,
        "rope_full_precision": True,
        "rope_theta": 500000.0,
        "scale_logits": False,
        "transformers_version": "4.46.3",
        "use_cache": False,
        "vocab_size": VOCABULARY,
        "weight_tying": family in TIED,
    }


def common_config(family):
    """The fields that all families but LLaDA's own share."""
    return {
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "initializer_range": 0.02,
        "max_position_embeddings": 512,
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": kv_heads_of(family),
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "tie_word_embeddings": family in TIED,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.46.2",
        "use_cache": False,
        "vocab_size": VOCABULARY,
    }


def llada_moe_config(family):
    return common_config(family) | {
        "model_type": "llada",
        "architectures": ["LLaDAMoEModelLM"],
        "auto_map": {"AutoConfig": "configuration_lladamoe.LLaDAConfig"},
        "attention_bias": False,
        "clip_qkv": None,
        "dense_intermediate_size": 2 * MLP,
        "expert_intermediate_size": MLP,
        "moe_layer_freq": [1] * LAYERS,
        "moe_router_score_function": "softmax",
        "norm_topk_prob": None,
        "num_experts": EXPERTS,
        "num_experts_per_tok": ACTIVE,
        "output_router_logits": False,
        "partial_rotary_factor": 1,
        "qk_layernorm": True,
        "rope_theta": 50000,
        "routed_scaling_factor": 1,
        "router_aux_loss_coef": 0.01,
        "router_num_group": None,
        "router_topk_group": None,
        "shared_expert_intermediate_size": None,
    }


def dream_config(family):
    return common_config(family) | {
        "model_type": "Dream",
        "architectures": ["DreamModel"],
        "auto_map": {"AutoModel": "modeling_dream.DreamModel"},
        "intermediate_size": MLP,
        "max_window_layers": 28,
        "rope_theta": 1e6,
        "sliding_window": None,
        "use_sliding_window": False,
    }


def a2d_config(family):
    config = common_config(family) | {
        "model_type": family,
        "architectures": ["A2DLMHeadModel"],
        "auto_map": {"AutoModelForMaskedLM": "modeling.A2DLMHeadModel"},
        "is_causal": False,  # not published: without it a folder's name has to say mdlm
        "intermediate_size": MLP,
        "rope_theta": 1e6,
    }
    config["dtype"] = config.pop("torch_dtype")  # as newer versions of transformers call it
    if family == "a2d-llama":
        config["mlp_bias"] = False
        config["pretraining_tp"] = 1
    else:
        config["layer_types"] = ["full_attention"] * LAYERS
        config["max_window_layers"] = 28
        config["sliding_window"] = None
        config["use_sliding_window"] = False
    if family == "a2d-qwen3":
        config["attention_bias"] = False
        config["head_dim"] = 2 * HEAD  # wider than HIDDEN / HEADS, as Qwen3's own
    return config


def sdar_config(family):
    return common_config(family) | {
        "model_type": "sdar",
        "architectures": ["SDARForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM"},
        "attention_bias": False,
        "block_size": BLOCK_SIZE,
        "debug": False,
        "ep_size": 1,
        "fuse_cross_entropy": True,
        "head_dim": 2 * HEAD,
        "intermediate_size": MLP,
        "max_window_layers": 28,
        "micro_forward": False,
        "rope_theta": 1e6,
        "skip_checkpoint": False,
        "sliding_window": None,
        "use_deepep": False,
        "use_sliding_window": False,
    }


def fast_dllm_config(family):
    return common_config(family) | {
        "model_type": "Fast_dLLM_Qwen",
        "architectures": ["Fast_dLLM_QwenForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling.Fast_dLLM_QwenForCausalLM"},
        "bd_size": BLOCK_SIZE,
        "intermediate_size": MLP,
        "layer_types": ["full_attention"] * LAYERS,
        "max_window_layers": 21,
        "rope_theta": 1e6,
        "sliding_window": None,
        "use_sliding_window": False,
    }


def sdar_moe_config(family):
    config = sdar_config("sdar") | {
        "model_type": "sdar_moe",
        "architectures": ["SDARMoeForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_sdar_moe.SDARMoeForCausalLM"},
        "decoder_sparse_step": 1,
        "intermediate_size": 2 * MLP,
        "mlp_only_layers": [],
        "moe_intermediate_size": MLP,
        "norm_topk_prob": True,
        "num_experts": EXPERTS,
        "num_experts_per_tok": ACTIVE,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
    }
    for name in ("debug", "ep_size", "fuse_cross_entropy", "micro_forward"):
        del config[name]
    return config


def llada2_config(family):
    """LLaDA2.0: the first layer is dense, the experts are in groups, half of a head is rotated."""
    config = common_config(family) | {
        "model_type": "llada2_moe",
        "architectures": ["LLaDA2MoeModelLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_llada2_moe.LLaDA2MoeModelLM"},
        "block_size": BLOCK_SIZE,  # not published: without it a folder's name has to say LLaDA2.0
        "embedding_dropout": 0.0,
        "first_k_dense_replace": 1,
        "head_dim": 2 * HEAD,
        "intermediate_size": 2 * MLP,
        "max_window_layers": 28,
        "moe_intermediate_size": MLP,
        "moe_router_enable_expert_bias": True,
        "n_group": 4,
        "norm_head": False,
        "norm_softmax": False,
        "norm_topk_prob": True,
        "num_experts": 2 * EXPERTS,
        "num_experts_per_tok": ACTIVE,
        "num_shared_experts": 1,
        "output_dropout": 0.0,
        "output_router_logits": False,
        "partial_rotary_factor": 0.5,
        "rope_theta": 600000,
        "rotary_dim": HEAD,
        "routed_scaling_factor": 2.5,
        "router_dtype": "fp32",
        "score_function": "sigmoid",
        "sliding_window": 4096,
        "topk_group": 2,
        "use_bias": False,
        "use_qkv_bias": False,
        "use_rmsnorm": True,
        "use_sliding_window": False,
        "using_split_qkv_in_self_attention": False,
    }
    config["dtype"] = config.pop("torch_dtype")
    return config


def config_of(family, token_ids):
    """The published config.json of a family in miniature, a dict."""
    style = style_of(family)
    if family == "llada-moe":
        config = llada_moe_config(family)
    elif style == "llada":
        config = llada_config(family)
    elif style == "dream":
        config = dream_config(family)
    elif family == "sdar":
        config = sdar_config(family)
    elif family == "sdar_moe":
        config = sdar_moe_config(family)
    elif family == "fast_dllm_qwen":
        config = fast_dllm_config(family)
    elif family == "llada2_moe":
        config = llada2_config(family)
    else:
        config = a2d_config(family)
    config["eos_token_id"] = token_ids[END_TOKEN[style]]
    config["pad_token_id"] = token_ids["<|endoftext|>"]
    if family == "llada2_moe":  # only the tokenizer names the others
        del config["eos_token_id"]
    elif style != "llada":
        config["bos_token_id"] = token_ids["<|endoftext|>"]
    if family not in ("llada-moe", "llada2_moe"):  # there only the tokenizer names it
        config["mask_token_id"] = token_ids[MASK_TOKEN[style]]
    return config


# ---- checkpoints ---------------------------------------------------------------------------------


def write_checkpoint(folder, family, **changes):
    """Writes a random checkpoint, and returns (weights, config).

    `changes` are made to config.json; those of value None are kept, as null.
    """
    folder.mkdir(parents=True, exist_ok=True)
    token_ids = write_tokenizer(folder, style_of(family), slow=family == "dream-slow")
    config = config_of(family, token_ids) | changes
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "modeling_llada.py").write_text(
        "raise RuntimeError('code from a checkpoint must not be run')\n"
    )
    weights = random_weights(family, kv_heads_of(family), config.get("head_dim") or HEAD)
    weight_map = {}
    for i in range(2):
        name = f"model-{i + 1:05d}-of-00002.safetensors"
        shard = dict(list(weights.items())[i::2])
        save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return weights, config


def edit_config(folder, **changes):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | changes))


def drop_field(folder, name):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    del config[name]
    file.write_text(json.dumps(config))


def ids_and_mask():
    """Three rows of 11 tokens; the second one has four of padding on its left."""
    ids = torch.randint(0, 250, (3, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, :4] = False
    return ids, mask


def random_adapter(denoiser):
    """A LoRA adapter as training would leave it: its second factors start at zero, which shows
    nothing.
    """
    model = add_lora(denoiser, rank=3, alpha=6, dropout=0.2, seed=0)
    generator = torch.Generator().manual_seed(0)
    for layer in lora_layers(model).values():
        weight = layer.lora_B["default"].weight
        weight.data.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    return model


class LladaNames:
    """The names of LLaDA's weights, without their .weight or .bias."""

    embedding = "model.transformer.wte"
    last_norm = "model.transformer.ln_f"
    head = "model.transformer.ff_out"
    layer = "model.transformer.blocks.{}."
    attention_norm = "attn_norm"
    mlp_norm = "ff_norm"
    attention = ""  # in front of q_proj, k_proj and v_proj
    output = "attn_out"
    gate = "ff_proj"
    up = "up_proj"
    down = "ff_out"


class LlamaNames:
    """The names of transformers' own classes."""

    embedding = "model.embed_tokens"
    last_norm = "model.norm"
    head = "lm_head"
    layer = "model.layers.{}."
    attention_norm = "input_layernorm"
    mlp_norm = "post_attention_layernorm"
    attention = "self_attn."
    output = "self_attn.o_proj"
    q_norm = "self_attn.q_norm"
    k_norm = "self_attn.k_norm"
    gate = "mlp.gate_proj"
    up = "mlp.up_proj"
    down = "mlp.down_proj"


class Llada2Names(LlamaNames):
    """The names of LLaDA2's weights. Its q, k and v are one matrix."""

    embedding = "model.word_embeddings"
    attention = "attention."
    output = "attention.dense"
    q_norm = "attention.query_layernorm"
    k_norm = "attention.key_layernorm"


def names_of(family):
    if family == "llada2_moe":
        return Llada2Names
    if style_of(family) == "llada" and family != "llada-moe":
        return LladaNames
    return LlamaNames


def is_mixture(family, layer):
    """Whether the MLP of a layer is a mixture of experts. LLaDA2's first one is not."""
    return family in MOE and not (family == "llada2_moe" and layer == 0)


def random_weights(family, kv_heads, head):
    """The weights of one family under its own names, {name: tensor}."""
    names = names_of(family)
    generator = torch.Generator().manual_seed(7)

    def matrix(rows, columns):
        return torch.randn((rows, columns), generator=generator) * (1.2 / math.sqrt(columns))

    def vector(size):
        return torch.randn((size,), generator=generator) * 0.7

    def norm(size):
        return 1 + 0.3 * vector(size)

    weights = {}
    biases = {}
    weights[names.embedding] = matrix(VOCABULARY, HIDDEN)
    weights[names.last_norm] = norm(HIDDEN)
    if family not in TIED:
        weights[names.head] = matrix(VOCABULARY, HIDDEN)
    for i in range(LAYERS):
        layer = names.layer.format(i)
        weights[layer + names.attention_norm] = norm(HIDDEN)
        weights[layer + names.mlp_norm] = norm(HIDDEN)
        if family == "llada2_moe":
            rows = (HEADS + 2 * kv_heads) * head
            weights[f"{layer}attention.query_key_value"] = matrix(rows, HIDDEN)
        else:
            for kind, heads in (("q_proj", HEADS), ("k_proj", kv_heads), ("v_proj", kv_heads)):
                name = layer + names.attention + kind
                weights[name] = matrix(heads * head, HIDDEN)
                if family in QKV_BIAS:
                    biases[name] = vector(heads * head)
        weights[layer + names.output] = matrix(HIDDEN, HEADS * head)
        if family in QK_NORM:
            weights[layer + names.q_norm] = norm(head)
            weights[layer + names.k_norm] = norm(head)
        if is_mixture(family, i):
            num_experts = 2 * EXPERTS if family == "llada2_moe" else EXPERTS
            weights[f"{layer}mlp.gate"] = matrix(num_experts, HIDDEN)
            for e in range(num_experts):
                weights[f"{layer}mlp.experts.{e}.gate_proj"] = matrix(MLP, HIDDEN)
                weights[f"{layer}mlp.experts.{e}.up_proj"] = matrix(MLP, HIDDEN)
            for e in range(num_experts):
                weights[f"{layer}mlp.experts.{e}.down_proj"] = matrix(HIDDEN, MLP)
            if family == "llada2_moe":
                biases[f"{layer}mlp.gate.expert"] = 0.1 * vector(num_experts)
                weights[f"{layer}mlp.shared_experts.gate_proj"] = matrix(MLP, HIDDEN)
                weights[f"{layer}mlp.shared_experts.up_proj"] = matrix(MLP, HIDDEN)
                weights[f"{layer}mlp.shared_experts.down_proj"] = matrix(HIDDEN, MLP)
        else:
            size = 2 * MLP if family == "llada2_moe" else MLP
            weights[layer + names.gate] = matrix(size, HIDDEN)
            weights[layer + names.up] = matrix(size, HIDDEN)
            weights[layer + names.down] = matrix(HIDDEN, size)
    named_weights = {f"{name}.weight": value for name, value in weights.items()}
    named_biases = {}
    for name, value in biases.items():
        is_of_router = name.endswith(".expert")
        named_biases[f"{name}_bias" if is_of_router else f"{name}.bias"] = value
    return named_weights | named_biases


# ---- the models, by plain products ---------------------------------------------------------------


def grouped_experts(scores, bias, config):
    """scores (B, S, E), bias (E,) -> the scores and indices of the ACTIVE experts, (B, S, ACTIVE).

    Token by token: the groups whose two best experts sum to most, and of these the best experts.
    The bias counts for the choice alone.
    """
    chosen = torch.empty((*scores.shape[:2], ACTIVE), dtype=torch.long)
    group_size = scores.shape[2] // config["n_group"]
    for b in range(scores.shape[0]):
        for s in range(scores.shape[1]):
            preference = (scores[b, s] + bias).tolist()

            def sum_of_best_two(group, preference=preference):
                members = preference[group * group_size : (group + 1) * group_size]
                return sum(sorted(members)[-2:])

            groups = sorted(range(config["n_group"]), key=sum_of_best_two)
            allowed = groups[-config["topk_group"] :]
            experts = [e for e in range(scores.shape[2]) if e // group_size in allowed]
            experts = sorted(experts, key=preference.__getitem__)[-ACTIVE:]
            chosen[b, s] = torch.tensor(experts)
    return scores.gather(2, chosen), chosen


@torch.no_grad()
def reference_logits(family, weights, config, ids, mask=None, cache=None, part=None):
    """ids (B, S), mask (B, S) bool or None -> logits (B, S, V), by plain products.

    Attention is bidirectional, or block-causal if the config has a block_size or bd_size: a
    position sees what is before the end of its own block. SHIFTED logits are shifted by one.

    cache  an empty list, which gets each layer's keys and values; or such a list, with `part`
    part   a slice of the positions: all others take their keys and values from the cache
    """
    names = names_of(family)
    S = ids.shape[1]
    head_dim = config.get("head_dim") or HIDDEN // HEADS

    def norm(x, name):
        variance = x.square().mean(-1, keepdim=True)
        return x / (variance + config["rms_norm_eps"]).sqrt() * weights[f"{name}.weight"]

    def linear(x, name):
        bias = weights.get(f"{name}.bias")
        return x @ weights[f"{name}.weight"].T + (0 if bias is None else bias)

    rotated = int(head_dim * config.get("partial_rotary_factor", 1))  # of a head's numbers
    frequency = config["rope_theta"] ** (torch.arange(0, rotated, 2) / rotated)
    angle = torch.arange(S).unsqueeze(1) / frequency  # (S, rotated / 2)
    sees = torch.ones((len(ids), S, S), dtype=torch.bool)
    if mask is not None:
        sees = sees & mask[:, None, :]
    block_size = config.get("block_size") or config.get("bd_size")
    if block_size:
        for row in range(len(ids)):
            padding = 0 if mask is None else int((~mask[row]).sum())
            for i in range(padding, S):
                end = (i - padding) // block_size * block_size + block_size + padding
                sees[row, i, end:] = False
    cos = angle.cos().repeat(1, 2)
    sin = angle.sin().repeat(1, 2)

    def rotate(x):  # (B, heads, S, head_dim)
        x, rest = x.tensor_split([rotated], dim=-1)
        first, second = x.chunk(2, dim=-1)
        x = x * cos + torch.cat([-second, first], dim=-1) * sin
        return torch.cat([x, rest], dim=-1)

    def heads_of(x, name):  # -> (B, heads, S, head_dim)
        return linear(x, name).unflatten(-1, (-1, head_dim)).transpose(1, 2)

    x = weights[f"{names.embedding}.weight"][ids]  # (B, S, HIDDEN)
    for i in range(LAYERS):
        layer = names.layer.format(i)
        h = norm(x, layer + names.attention_norm)
        if family == "llada2_moe":
            qkv = heads_of(h, f"{layer}attention.query_key_value")
            kv_heads = config["num_key_value_heads"]
            q, k, v = qkv.split([HEADS, kv_heads, kv_heads], dim=1)
        else:
            q = heads_of(h, f"{layer}{names.attention}q_proj")
            k = heads_of(h, f"{layer}{names.attention}k_proj")
            v = heads_of(h, f"{layer}{names.attention}v_proj")
        if family in QK_NORM:
            q = norm(q, layer + names.q_norm)
            k = norm(k, layer + names.k_norm)
        q = rotate(q)
        k = rotate(k)
        if part is not None:
            stale = torch.ones(S, 1, dtype=torch.bool)
            stale[part] = False
            cached_k, cached_v = cache[i]
            k = torch.where(stale, cached_k, k)
            v = torch.where(stale, cached_v, v)
        elif cache is not None:
            cache.append((k, v))
        k = k.repeat_interleave(HEADS // k.shape[1], dim=1)
        v = v.repeat_interleave(HEADS // v.shape[1], dim=1)
        scores = q @ k.transpose(-1, -2) / math.sqrt(head_dim)
        scores = scores.masked_fill(~sees[:, None], -torch.inf)
        attended = (softmax(scores, -1) @ v).transpose(1, 2).flatten(2)
        x = x + linear(attended, layer + names.output)

        h = norm(x, layer + names.mlp_norm)
        if is_mixture(family, i):

            def expert(name, h=h, layer=layer):
                name = f"{layer}mlp.{name}."
                gated = silu(linear(h, f"{name}gate_proj")) * linear(h, f"{name}up_proj")
                return linear(gated, f"{name}down_proj")

            router_logits = linear(h, f"{layer}mlp.gate")
            if family == "llada2_moe":
                share, chosen = grouped_experts(
                    router_logits.sigmoid(), weights[f"{layer}mlp.gate.expert_bias"], config
                )
                x = x + expert("shared_experts")
            else:
                share, chosen = softmax(router_logits, -1).topk(ACTIVE, dim=-1)
            if config["norm_topk_prob"]:
                share = share / share.sum(-1, keepdim=True)
            share = share * (config.get("routed_scaling_factor") or 1)
            for e in range(router_logits.shape[-1]):
                x = x + expert(f"experts.{e}") * (share * (chosen == e)).sum(-1, keepdim=True)
        else:
            gated = silu(linear(h, layer + names.gate)) * linear(h, layer + names.up)
            x = x + linear(gated, layer + names.down)

    x = norm(x, names.last_norm)
    head = names.embedding if family in TIED else names.head
    logits = x @ weights[f"{head}.weight"].T
    if family in SHIFTED:
        logits = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)
    return logits
