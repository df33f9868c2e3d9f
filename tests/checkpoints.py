"""Tiny random checkpoints in the hub's exact layout, and a plain forward pass of their models.

The forward pass is written from the published architectures, under the checkpoints' own weight
names. It shares nothing with the code under test. Families: llada, llada-gqa, llada-tied,
llada-qkv (a bias for q, k and v), llada-bias (for every matrix), llada-moe, dream, dream-slow,
which has vocab.json and merges.txt but no tokenizer.json, a2d-qwen3, a2d-qwen2 and a2d-llama.
"""

import json
import math

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch.nn.functional import silu, softmax
from transformers import PreTrainedTokenizerFast

HIDDEN, HEADS, LAYERS, MLP, EXPERTS, ACTIVE, VOCABULARY = 32, 4, 2, 48, 4, 2, 320
HEAD = HIDDEN // HEADS
SPECIAL = {
    "llada": [
        "<|startoftext|>",
        "<|endoftext|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|mdm_mask|>",
        "<|eot_id|>",
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
END = {"llada": "<|endoftext|>", "dream": "<|endoftext|>", "qwen": "<|im_end|>"}
TEMPLATES = {
    "llada": "{% for m in messages %}{{ ('<|startoftext|>' if loop.first else '')"
    " + '<|start_header_id|>' + m['role']"
    " + '<|end_header_id|>\n\n' + (m['content'] | trim) + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    "dream": "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
}
THINKING = "{% if enable_thinking is defined and not enable_thinking %}<think>-{% endif %}"
TEMPLATES["qwen"] = TEMPLATES["dream"] + "{% if add_generation_prompt %}" + THINKING + "{% endif %}"


def style_of(family):
    return "llada" if family.startswith("llada") else "qwen" if "a2d" in family else "dream"


TIED = ("llada-tied", "llada-bias", "a2d-qwen3", "a2d-qwen2")
QKV_BIAS = ("dream", "dream-slow", "a2d-qwen2", "llada-qkv", "llada-bias")
QK_NORM = ("llada-moe", "a2d-qwen3")


def write_tokenizer(folder, style, slow=False):
    """A byte-level tokenizer that can write any text. Behind the 256 bytes come special tokens.

    Returns their ids.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    tokenizer = Tokenizer(BPE(vocabulary, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    tokenizer.add_special_tokens(
        [AddedToken(word, special=True, normalized=False) for word in SPECIAL[style]]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END[style], pad_token="<|endoftext|>"
    )
    fast.chat_template = TEMPLATES[style]
    fast.save_pretrained(folder)
    if slow:
        (folder / "tokenizer.json").unlink()
        (folder / "vocab.json").write_text(json.dumps(vocabulary))
        (folder / "merges.txt").write_text("#version: 0.2\n")
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        added = {
            str(256 + i): {"content": word, "special": True, "normalized": False}
            for i, word in enumerate(SPECIAL[style])
        }
        settings |= {
            "tokenizer_class": "DreamTokenizer",
            "auto_map": {"AutoTokenizer": ["x.y", None]},
            "added_tokens_decoder": added,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return {word: 256 + i for i, word in enumerate(SPECIAL[style])}


def write_checkpoint(folder, family, **changes):
    """Write a random checkpoint. Returns (weights, config).

    `changes` are made to config.json; those of value None are kept, as null.
    """
    folder.mkdir(parents=True, exist_ok=True)
    style = style_of(family)
    ids = write_tokenizer(folder, style, slow=family == "dream-slow")
    mask_id, end_id = ids["<|mdm_mask|>" if style == "llada" else "<|mask|>"], ids["<|endoftext|>"]
    kv_heads = 2 if style != "llada" or family == "llada-gqa" else HEADS
    special = {"eos_token_id": ids[END[style]], "pad_token_id": end_id, "mask_token_id": mask_id}
    common = {
        "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "num_key_value_heads": kv_heads, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False, "vocab_size": VOCABULARY, "hidden_act": "silu",
        "attention_dropout": 0.0, "rope_scaling": None, "initializer_range": 0.02,
        "use_cache": False, "torch_dtype": "bfloat16", "transformers_version": "4.46.2",
    }  # fmt: skip
    if family == "llada-moe":
        config = common | special | {
            "model_type": "llada", "architectures": ["LLaDAMoEModelLM"],
            "auto_map": {"AutoConfig": "configuration_lladamoe.LLaDAConfig"},
            "num_experts": EXPERTS, "num_experts_per_tok": ACTIVE, "expert_intermediate_size": MLP,
            "dense_intermediate_size": 2 * MLP, "shared_expert_intermediate_size": None,
            "moe_layer_freq": [1] * LAYERS, "moe_router_score_function": "softmax",
            "routed_scaling_factor": 1, "partial_rotary_factor": 1, "qk_layernorm": True,
            "attention_bias": False, "norm_topk_prob": None, "rope_theta": 50000,
            "router_aux_loss_coef": 0.01, "output_router_logits": False, "clip_qkv": None,
            "router_num_group": None, "router_topk_group": None,
        }  # fmt: skip
        del config["mask_token_id"]  # the tokenizer names it
    elif style == "dream":
        config = common | special | {
            "model_type": "Dream", "architectures": ["DreamModel"],
            "auto_map": {"AutoModel": "modeling_dream.DreamModel"}, "intermediate_size": MLP,
            "rope_theta": 1e6, "bos_token_id": end_id, "max_window_layers": 28,
            "sliding_window": None, "use_sliding_window": False,
        }  # fmt: skip
    elif style == "qwen":
        config = common | special | {
            "model_type": family, "architectures": ["A2DLMHeadModel"],
            "auto_map": {"AutoModelForMaskedLM": "modeling.A2DLMHeadModel"}, "rope_theta": 1e6,
            "intermediate_size": MLP, "bos_token_id": end_id, "dtype": "bfloat16",
            "tie_word_embeddings": family != "a2d-llama",
        }  # fmt: skip
        del config["torch_dtype"]  # the word that newer transformers write is dtype
        if family != "a2d-llama":
            config |= {
                "layer_types": ["full_attention"] * LAYERS, "max_window_layers": 28,
                "sliding_window": None, "use_sliding_window": False,
            }  # fmt: skip
        config |= {"a2d-llama": {"mlp_bias": False, "pretraining_tp": 1}}.get(family, {})
        if family == "a2d-qwen3":
            config |= {"head_dim": 2 * HEAD, "attention_bias": False}  # 64 wide, as Qwen3's own
    else:
        config = special | {
            "activation_type": "silu", "alibi": False, "alibi_bias_max": 8.0,
            "architectures": ["LLaDAModelLM"], "attention_dropout": 0.0,
            "attention_layer_norm": False, "attention_layer_norm_with_affine": True,
            "bias_for_layer_norm": False, "block_group_size": 1,
            "auto_map": {"AutoModel": "modeling_llada.LLaDAModelLM"},
            "block_type": "llama", "d_model": HIDDEN, "embedding_dropout": 0.0,
            "embedding_size": VOCABULARY, "flash_attention": False,
            "include_bias": family == "llada-bias", "include_qkv_bias": family == "llada-qkv",
            "init_cutoff_factor": None, "init_device": "meta",
            "init_fn": "mitchell", "init_std": 0.02, "input_emb_norm": False,
            "layer_norm_type": "rms", "layer_norm_with_affine": True, "max_sequence_length": 512,
            "mlp_hidden_size": MLP, "mlp_ratio": 4, "model_type": "llada",
            "multi_query_attention": None, "n_heads": HEADS, "n_kv_heads": kv_heads,
            "n_layers": LAYERS, "precision": "amp_bf16", "residual_dropout": 0.0,
            "rms_norm_eps": 1e-5, "rope": True, "rope_full_precision": True, "rope_theta": 500000.0,
            "scale_logits": False, "transformers_version": "4.46.3", "use_cache": False,
            "vocab_size": VOCABULARY, "weight_tying": family in TIED,
        }  # fmt: skip
    config |= changes
    weights = random_weights(family, kv_heads, config.get("head_dim") or HEAD)
    shards = [dict(list(weights.items())[i::2]) for i in range(2)]
    names = [f"model-{i + 1:05d}-of-00002.safetensors" for i in range(2)]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name, metadata={"format": "pt"})
    index = {
        "metadata": {"total_size": 0},
        "weight_map": {
            key: name for name, shard in zip(names, shards, strict=True) for key in shard
        },
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "modeling_llada.py").write_text(
        "raise RuntimeError('code from a checkpoint must not be run')\n"
    )
    return weights, config


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def drop_field(folder, name):
    config = json.loads((folder / "config.json").read_text())
    del config[name]
    (folder / "config.json").write_text(json.dumps(config))


def random_weights(family, kv_heads, head):
    """The weights of one family under its own names."""
    generator = torch.Generator().manual_seed(7)

    def matrix(*shape):
        return torch.randn(shape, generator=generator) * (
            0.7 if len(shape) == 1 else 1.2 / math.sqrt(shape[-1])
        )

    if family.startswith("llada") and family != "llada-moe":
        names = {
            "embed": "model.transformer.wte",
            "norm": "model.transformer.ln_f",
            "head": "model.transformer.ff_out",
        }
        layer, o, norms, mlp = (
            "model.transformer.blocks.{}.",
            "attn_out",
            ("attn_norm", "ff_norm"),
            ("ff_proj", "up_proj", "ff_out"),
        )
        attention = ""
    else:
        names = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
        layer, o, norms = (
            "model.layers.{}.",
            "o_proj",
            ("input_layernorm", "post_attention_layernorm"),
        )
        mlp, attention = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"), "self_attn."
    weights = {names["embed"]: matrix(VOCABULARY, HIDDEN), names["norm"]: 1 + 0.3 * matrix(HIDDEN)}
    if family not in TIED:
        weights[names["head"]] = matrix(VOCABULARY, HIDDEN)
    biases = {}
    for i in range(LAYERS):
        prefix = layer.format(i)
        for norm in norms:
            weights[prefix + norm] = 1 + 0.3 * matrix(HIDDEN)
        for kind, heads in (("q_proj", HEADS), ("k_proj", kv_heads), ("v_proj", kv_heads)):
            weights[prefix + attention + kind] = matrix(heads * head, HIDDEN)
            if family in QKV_BIAS:
                biases[f"{prefix}{attention}{kind}.bias"] = matrix(heads * head)
        weights[prefix + attention + o] = matrix(HIDDEN, HEADS * head)
        if family in QK_NORM:
            for kind in ("q_norm", "k_norm"):
                weights[f"{prefix}self_attn.{kind}"] = 1 + 0.3 * matrix(head)
        if family == "llada-moe":
            weights[prefix + "mlp.gate"] = matrix(EXPERTS, HIDDEN)
            experts = [f"{prefix}mlp.experts.{e}." for e in range(EXPERTS)]
            shapes = {
                f"{e}{kind}": (MLP, HIDDEN) for e in experts for kind in ("gate_proj", "up_proj")
            }
            shapes |= {f"{e}down_proj": (HIDDEN, MLP) for e in experts}
        else:
            shapes = {
                prefix + mlp[0]: (MLP, HIDDEN),
                prefix + mlp[1]: (MLP, HIDDEN),
                prefix + mlp[2]: (HIDDEN, MLP),
            }
        weights |= {name: matrix(*shape) for name, shape in shapes.items()}
        if family == "llada-bias":
            for name in (*shapes, prefix + attention + o):
                biases[f"{name}.bias"] = matrix(len(weights[name]))
    return {f"{name}.weight": value for name, value in weights.items()} | biases


@torch.no_grad()
def reference_logits(family, weights, config, ids, mask=None, cache=None, part=None):
    """ids (B, S), mask (B, S) bool or None -> logits (B, S, V), by plain products.

    Attention is bidirectional; Dream's logits are shifted by one. cache, an empty list, gets each
    layer's keys and values. With a slice `part` of the positions all others take theirs from it.
    """
    native = family.startswith("llada") and family != "llada-moe"
    theta, eps = config["rope_theta"], config["rms_norm_eps"]
    S, HEAD = ids.shape[1], config.get("head_dim") or HIDDEN // HEADS

    def w(name, suffix="weight"):
        return weights.get(f"{name}.{suffix}")

    def norm(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight

    def linear(x, name):
        bias = w(name, "bias")
        return x @ w(name).T + (0 if bias is None else bias)

    angle = torch.arange(S).unsqueeze(1) / theta ** (
        torch.arange(0, HEAD, 2) / HEAD
    )  # (S, HEAD / 2)
    cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)

    def rotate(x):  # (B, heads, S, HEAD)
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin

    x = w("model.transformer.wte" if native else "model.embed_tokens")[ids]
    for i in range(LAYERS):
        prefix = f"model.transformer.blocks.{i}." if native else f"model.layers.{i}."
        attention = prefix if native else f"{prefix}self_attn."
        h = norm(x, w(prefix + ("attn_norm" if native else "input_layernorm")))
        q, k, v = (
            linear(h, attention + kind).unflatten(-1, (-1, HEAD)).transpose(1, 2)
            for kind in ("q_proj", "k_proj", "v_proj")
        )
        if family in QK_NORM:
            q, k = norm(q, w(attention + "q_norm")), norm(k, w(attention + "k_norm"))
        q, k = rotate(q), rotate(k)
        if part is not None:
            stale = torch.ones(S, 1, dtype=torch.bool)
            stale[part] = False
            k, v = (torch.where(stale, *pair) for pair in zip(cache[i], (k, v), strict=True))
        elif cache is not None:
            cache.append((k, v))
        k, v = (y.repeat_interleave(HEADS // y.shape[1], dim=1) for y in (k, v))
        scores = q @ k.transpose(-1, -2) / math.sqrt(HEAD)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
        x = x + linear(
            (softmax(scores, -1) @ v).transpose(1, 2).flatten(2),
            attention + ("attn_out" if native else "o_proj"),
        )
        h = norm(x, w(prefix + ("ff_norm" if native else "post_attention_layernorm")))
        if family == "llada-moe":
            routed = softmax(linear(h, f"{prefix}mlp.gate"), -1)
            share, chosen = routed.topk(ACTIVE, dim=-1)  # not normalised again
            for e in range(EXPERTS):
                name = f"{prefix}mlp.experts.{e}."
                out = linear(
                    silu(linear(h, name + "gate_proj")) * linear(h, name + "up_proj"),
                    name + "down_proj",
                )
                x = x + out * (share * (chosen == e)).sum(-1, keepdim=True)
        else:
            gate, up, down = (
                ("ff_proj", "up_proj", "ff_out")
                if native
                else ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
            )
            x = x + linear(silu(linear(h, prefix + gate)) * linear(h, prefix + up), prefix + down)
    x = norm(x, w("model.transformer.ln_f" if native else "model.norm"))
    head = w("model.transformer.ff_out" if native else "lm_head")
    embedding = w("model.transformer.wte" if native else "model.embed_tokens")
    logits = x @ (embedding if head is None else head).T
    return (
        torch.cat([logits[:, :1], logits[:, :-1]], dim=1) if family.startswith("dream") else logits
    )
