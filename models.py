"""The denoiser: a bidirectional transformer that predicts every masked token at once.

A LLaDA-class model *is* a Llama without the causal mask. So it runs on transformers' own classes with `is_causal=False` in the
configuration, and needs no code from a hub:

    "tiny"                   about 1M parameters and a tokenizer of some 120 words, built in code; random until train.py's warm start
    LLaDA-8B (all three)     LlamaForCausalLM, configuration and weight names translated
    LLaDA-MoE-7B-A1B         Qwen3MoeForCausalLM, configuration translated
    Dream-7B                 Qwen2ForCausalLM; it reads a position's logits one to its left, which a hook puts right
    any bidirectional Llama or Qwen2 that save_pretrained wrote, with a mask token in its tokenizer

The last four by hub name or from a folder. Whatever in a checkpoint is not understood is refused by name: a model that loads is
the model that was trained. Needs transformers >= 5.2: older versions ignore `is_causal` silently. `check_bidirectional` finds out.
"""

import json
import math
import shutil
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Sequence, Split, WhitespaceSplit
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

warnings.filterwarnings("ignore", ".*gradient_checkpointing.*deprecated", FutureWarning)  # peft still calls it by that name
transformers.logging.disable_progress_bar()  # a bar for every file of every checkpoint would bury the run's own
LLADA = "GSAI-ML/LLaDA-8B-Instruct"


def default_model():
    """(name, why): which model a bare command trains."""
    if torch.cuda.is_available():
        return LLADA, "a GPU was found; --model tiny trains the embedded model instead"
    return "tiny", "no GPU was found, and this one needs neither GPU nor download"


# ---- the embedded model ------------------------------------------------------------------------------------------------


def tiny_tokenizer():
    """One token for every integer of 0 to 99, operator and tag: `( 3 + 4 ) * 5` is seven tokens. 100 is read as 10 and 0."""
    special = ["[PAD]", "[MASK]", "[EOS]"]
    words = special + ["<answer>", "</answer>"] + list("+-*/()=") + [str(i) for i in range(100)]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}))  # no unknown token: an unknown word is an error
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in special])
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in ("<answer>", "</answer>")])
    tokenizer.pre_tokenizer = Sequence([WhitespaceSplit(), Split(Regex(r"\d{1,2}|[^\d\s]"), "isolated")])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", mask_token="[MASK]", eos_token="[EOS]", padding_side="left"
    )


def tiny_denoiser(tokenizer, seed=0, hidden_size=128, layers=4):
    """A random bidirectional Llama of 0.9M parameters.

    Tied embeddings and a larger initial range than a big model's: with them the warm start learns to copy the prompt's
    numbers in half as many steps.
    """
    config = LlamaConfig(
        is_causal=False,  # the whole difference between a Llama and a LLaDA
        compact_prompts=True,  # it reads the tasks' compact prompts, not instructions
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=512,
        initializer_range=0.08,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        mask_token_id=tokenizer.mask_token_id,
    )
    with torch.random.fork_rng(devices=[]):  # transformers draws initial weights from the global generator: give it back
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


# ---- checkpoints: what their configurations mean ------------------------------------------------------------------------


def names(text):
    """ "a=b c" -> {"a": "b", "c": "c"}"""
    return {word.partition("=")[0]: word.partition("=")[2] or word for word in text.split()}


@dataclass
class Family:
    """How one family's config.json is read, field by field. What is in none of these three lists is refused by name."""

    config: type
    model: type
    renamed: dict  # field -> its name in our configuration
    known: dict  # field -> the values that are understood; nothing but these is implemented by our class
    needed: tuple = ()  # fields that have to be there; all of `renamed` that is not `optional`, too
    optional: tuple = ()
    extra: dict = field(default_factory=dict)  # what goes into our configuration besides
    key_mapping: dict | None = None  # weight names there -> here, as transformers' from_pretrained takes it


# Of no consequence for what the model computes.
IGNORED = names(
    "_name_or_path alibi_bias_max architectures attention_layer_norm_with_affine auto_map dtype flash_attention init_cutoff_factor "
    "init_device init_fn init_std initializer_range model_type output_router_logits precision router_aux_loss_coef torch_dtype "
    "transformers_version use_cache"
)
COMMON = names("eos_token_id pad_token_id bos_token_id mask_token_id rms_norm_eps rope_theta")
QWEN = COMMON | names(
    "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads max_position_embeddings tie_word_embeddings"
)
ANY_SIZE = range(10**9)
BLOCK = r"^model\.transformer\.blocks\.(\d+)\."
FAMILIES = {
    "LLaDA": Family(
        LlamaConfig,
        LlamaForCausalLM,
        COMMON
        | names(
            "d_model=hidden_size n_layers=num_hidden_layers n_heads=num_attention_heads n_kv_heads=num_key_value_heads "
            "mlp_hidden_size=intermediate_size embedding_size=vocab_size max_sequence_length=max_position_embeddings "
            "weight_tying=tie_word_embeddings include_qkv_bias=attention_bias include_bias=mlp_bias"
        ),
        {
            "block_type": ["llama"], "activation_type": ["silu"], "layer_norm_type": ["rms"], "layer_norm_with_affine": [True],
            "rope": [True], "rope_full_precision": [True], "alibi": [False], "attention_layer_norm": [False], "input_emb_norm": [False],
            "scale_logits": [False], "bias_for_layer_norm": [False, None], "multi_query_attention": [None, False], "clip_qkv": [None],
            "block_group_size": [1], "attention_dropout": [0.0], "embedding_dropout": [0.0], "residual_dropout": [0.0],
            "mlp_ratio": ANY_SIZE, "vocab_size": ANY_SIZE,  # the tokenizer's: the embedding may have more rows
        },
        needed=("block_type", "activation_type", "layer_norm_type", "rope"),  # the published code's defaults are others
        optional=("n_kv_heads", "include_qkv_bias"),
        key_mapping={
            r"^model\.transformer\.wte\.": "model.embed_tokens.",
            r"^model\.transformer\.ln_f\.": "model.norm.",
            r"^model\.transformer\.ff_out\.": "lm_head.",
            BLOCK + r"attn_norm\.": r"model.layers.\1.input_layernorm.",
            BLOCK + r"ff_norm\.": r"model.layers.\1.post_attention_layernorm.",
            BLOCK + r"attn_out\.": r"model.layers.\1.self_attn.o_proj.",
            BLOCK + r"q_proj\.": r"model.layers.\1.self_attn.q_proj.",
            BLOCK + r"k_proj\.": r"model.layers.\1.self_attn.k_proj.",
            BLOCK + r"v_proj\.": r"model.layers.\1.self_attn.v_proj.",
            BLOCK + r"ff_proj\.": r"model.layers.\1.mlp.gate_proj.",  # the one with the SiLU
            BLOCK + r"up_proj\.": r"model.layers.\1.mlp.up_proj.",
            BLOCK + r"ff_out\.": r"model.layers.\1.mlp.down_proj.",
        },
    ),
    "LLaDA-MoE": Family(
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        QWEN
        | names("expert_intermediate_size=moe_intermediate_size num_experts num_experts_per_tok norm_topk_prob attention_bias head_dim"),
        {
            "hidden_act": ["silu"], "qk_layernorm": [True], "moe_layer_freq": [1, None], "rope_scaling": [None], "attention_dropout": [0.0],
            "shared_expert_intermediate_size": [None, 0], "num_shared_experts": [None, 0], "partial_rotary_factor": [1], "n_group": [None],
            "routed_scaling_factor": [1, None], "moe_router_score_function": ["softmax"], "moe_router_enable_expert_bias": [False, None],
            "clip_qkv": [None], "router_num_group": [None], "router_topk_group": [None],
            "dense_intermediate_size": ANY_SIZE, "intermediate_size": ANY_SIZE,  # of layers without experts: there are none
        },
        optional=("norm_topk_prob", "attention_bias", "head_dim", "num_key_value_heads"),
        extra={"norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
    "Dream": Family(
        Qwen2Config,
        Qwen2ForCausalLM,
        QWEN | names("intermediate_size"),
        {
            "hidden_act": ["silu"], "attention_dropout": [0.0], "rope_scaling": [None], "use_sliding_window": [False],
            "sliding_window": [None], "use_mrope": [False], "max_window_layers": ANY_SIZE,  # the last is of sliding windows
        },
        extra={"shift_logits": True, "use_sliding_window": False},
    ),
}  # fmt: skip
PLAIN = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}


def read_config(folder):
    """(our configuration, model class, key mapping) of a checkpoint folder. Raises ValueError for all that is not understood."""
    file = folder / "config.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        kind = str(found.get("model_type")).lower()
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{folder} is no checkpoint: config.json cannot be read ({' '.join(str(error).split())})") from None
    if kind in PLAIN:
        config, model = PLAIN[kind]
        return config.from_pretrained(folder), model, None
    name = {"llada": "LLaDA-MoE" if "num_experts" in found else "LLaDA", "dream": "Dream"}.get(kind)
    if name is None:
        raise ValueError(f"{file}: model_type {kind} is not known, only LLaDA, LLaDA-MoE, Dream, and bidirectional llama and qwen2")
    family = FAMILIES[name]
    if name == "LLaDA":
        if found.get("mlp_hidden_size") is None and "d_model" in found:
            found["mlp_hidden_size"] = found.get("mlp_ratio", 4) * found["d_model"]
        found["embedding_size"] = found.get("embedding_size") or found.get("vocab_size")
    if isinstance(found.get("moe_layer_freq"), list) and set(found["moe_layer_freq"]) == {1}:  # one number a layer
        found["moe_layer_freq"] = 1
    for key, value in found.items():
        if key in family.known and value not in family.known[key]:
            raise ValueError(f"{file}: {key} = {value!r} is not known for {name}, only {family.known[key][0]!r}")
        if key not in family.known and key not in family.renamed and key not in IGNORED:
            raise ValueError(f"{file}: {key} = {value!r} is a field that is not known for {name}")
    optional = {"bos_token_id", "mask_token_id", *family.optional}
    missing = [key for key in (*family.renamed, *family.needed) if found.get(key) is None and key not in optional]
    if missing:
        raise ValueError(f"{file}: {missing[0]} is missing, and {name} needs it")
    ours = family.extra | {ours: found[key] for key, ours in family.renamed.items() if found.get(key) is not None}
    ours["rope_parameters"] = {"rope_type": "default", "rope_theta": ours.pop("rope_theta")}
    return family.config(is_causal=False, **ours), family.model, family.key_mapping


# ---- checkpoints: loading ------------------------------------------------------------------------------------------------


def load_denoiser(name_or_path, seed=0, device="cpu", dtype=None):
    """(denoiser, tokenizer) of "tiny", freshly initialised, of a checkpoint folder, or of a model on the hub.

    dtype None is bfloat16 on a GPU and float32 elsewhere; tiny is always float32. The tokenizer's mask, eos and pad tokens are the
    checkpoint's; `denoiser.source` says where it came from. Raises ValueError, in one line, for a name that is nothing of these, a
    configuration that is not fully understood, missing, unexpected or broken weights, no tokenizer, a mask token that is none, or
    causal attention.
    """
    if name_or_path == "tiny":
        tokenizer = tiny_tokenizer()
        denoiser = tiny_denoiser(tokenizer, seed).to(device)
        denoiser.source = denoiser.source_folder = None
    else:
        folder = Path(name_or_path)
        if not folder.is_dir():
            folder = _download(str(name_or_path))
        config, model, key_mapping = read_config(folder)
        tokenizer = _load_tokenizer(folder, config)
        if dtype is None:
            dtype = torch.float32 if torch.device(device).type == "cpu" or getattr(config, "compact_prompts", False) else torch.bfloat16
        try:
            denoiser, info = model.from_pretrained(
                folder, config=config, key_mapping=key_mapping, dtype=dtype, device_map={"": device}, output_loading_info=True,
                use_safetensors=True,
            )  # fmt: skip
        except Exception as error:  # safetensors, json and transformers each raise their own
            raise ValueError(f"{folder} cannot be loaded: {' '.join(str(error).split())[:200]}") from None
        for what, keys in info.items():  # transformers only warns about these, and goes on with random weights
            if keys:
                some = ", ".join(map(str, list(keys)[:3]))
                raise ValueError(f"{folder} does not fit its configuration: {what.replace('_', ' ')}: {some}")
        denoiser.eval()
        denoiser.source, denoiser.source_folder = str(name_or_path), folder
    if getattr(denoiser.config, "shift_logits", False):
        denoiser.get_decoder().register_forward_hook(_shift, with_kwargs=True)
    check_bidirectional(denoiser)
    return denoiser, tokenizer


def _download(name):
    from huggingface_hub import snapshot_download

    if name.count("/") != 1 or name.startswith((".", "/")):
        raise ValueError(f"unknown model {name!r}: choose tiny, a folder that holds a checkpoint, or a hub name such as {LLADA}")
    try:  # a checkpoint's *.py go beside an export for the tools that want them; none is ever imported here
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja", "*.py"]))
    except Exception as error:
        why = " ".join(str(error).split())[:120]
        raise ValueError(
            f"{name} is no folder, and the hub has not given it ({why}): --model FOLDER reads a local copy, --model tiny needs none"
        ) from None


def _shift(module, args, kwargs, output):
    """Dream predicts position i from the state at i - 1 (the first keeps its own). Moved here, once, nobody else needs to know.

    In a call on a part of the canvas the first position's neighbour is missing: such calls begin one earlier (`hidden`).
    """
    states = output.last_hidden_state
    output.last_hidden_state = torch.cat([states[:, :1], states[:, :-1]], dim=1)
    return output


def _load_tokenizer(folder, config):
    """The folder's tokenizer, with the checkpoint's own [MASK], end and padding tokens. (AutoTokenizer would ask for remote code.)"""
    has = [(folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "merges.txt")]
    if not has[0] and not (has[1] and has[2]):
        raise ValueError(f"{folder} is no checkpoint: it has no tokenizer.json")
    try:  # Dream's hub folder has Qwen2's vocabulary and merges alone
        tokenizer = (PreTrainedTokenizerFast if has[0] else Qwen2Tokenizer).from_pretrained(folder)
    except Exception as error:
        raise ValueError(f"{folder} cannot be loaded: its tokenizer is broken ({' '.join(str(error).split())[:120]})") from None
    added = tokenizer.added_tokens_decoder  # id -> token
    masks = [i for i, token in added.items() if "mask" in token.content.lower() and token.content != "[gMASK]"]  # [gMASK] is no mask
    mask_id = getattr(config, "mask_token_id", None)
    if mask_id is None:
        mask_id = tokenizer.mask_token_id if tokenizer.mask_token_id is not None else masks[0] if len(masks) == 1 else None
    if mask_id is None:
        raise ValueError(f"{folder} names no mask token, neither in config.json nor in its tokenizer: this is no masked-diffusion model")
    if mask_id not in masks or not 0 <= mask_id < config.vocab_size or tokenizer.mask_token_id not in (None, mask_id):
        token = tokenizer.convert_ids_to_tokens(mask_id) if 0 <= mask_id < len(tokenizer) else None
        expected = f", and the tokenizer's mask token is {masks[0]}" if len(masks) == 1 else ""
        raise ValueError(f"mask_token_id {mask_id} of {folder}/config.json is the token {token!r}{expected}: put the right id there")
    tokenizer.mask_token = added[mask_id].content
    eos_id = config.eos_token_id[0] if isinstance(config.eos_token_id, list) else config.eos_token_id
    if eos_id is not None:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(eos_id)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{folder} names no end token, neither in config.json nor in its tokenizer")
    pad_id = config.pad_token_id if config.pad_token_id is not None else tokenizer.eos_token_id
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad_id)
    tokenizer.padding_side = "left"
    config.mask_token_id = mask_id
    return tokenizer


def end_token_ids(tokenizer):
    """The tokens that end a completion: eos, and what ends an assistant's turn in the tokenizer's own chat template (LLaDA: eot)."""
    ends = [tokenizer.eos_token_id]
    if tokenizer.chat_template is not None:
        turn = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "ANSWER"}]
        try:
            after = tokenizer.apply_chat_template(turn, tokenize=False).rpartition("ANSWER")[2]
        except Exception:  # a template may refuse whatever it likes
            return ends
        special = [i for i in tokenizer(after, add_special_tokens=False).input_ids if i in tokenizer.added_tokens_decoder]
        ends += [i for i in special[:1] if i not in ends]
    return ends


@torch.no_grad()
def check_bidirectional(denoiser):
    """Raises ValueError unless the first position sees the last one, with padding and without.

    transformers before 5.2 ignores `is_causal=False` without a word; a causal denoiser would train, badly.
    """
    ids = torch.arange(1, 9, device=denoiser.device).unsqueeze(0)  # (1, 8)
    changed = ids.clone()
    changed[0, -1] += 1
    padded = torch.ones_like(ids)
    padded[0, 1] = 0
    for mask in (None, padded):
        first, other = (denoiser(input_ids=x, attention_mask=mask).logits[0, 0] for x in (ids, changed))
        if torch.equal(first, other):
            raise ValueError("this model's attention is causal: a denoiser needs is_causal=False in its config, and transformers >= 5.2")


# ---- adapters and export --------------------------------------------------------------------------------------------------

ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


def add_lora(denoiser, rank, alpha, dropout, seed=0):
    """A LoRA adapter (peft) on all of the layers' matrices, as a PeftModel; everything else is frozen.

    The adapter is float32 even on a bfloat16 base, or its small steps would be rounded away. Raises ValueError when a matrix is not
    found: other names on the same modules once left three of seven kinds without an adapter, and nobody noticed.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(_lora_kinds(denoiser)), bias="none")
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        try:
            model = get_peft_model(denoiser, config)
        except ValueError as error:
            raise ValueError(f"LoRA target not found: {' '.join(str(error).split())[:160]}") from None
    config.base_model_name_or_path = getattr(denoiser, "source", None)  # what load_policy looks for
    return _checked(model)


def load_lora(denoiser, folder, trainable=False):
    """The adapter that a PeftModel's `save_pretrained` wrote, on its base model. Raises ValueError."""
    from peft import PeftModel

    try:
        return _checked(PeftModel.from_pretrained(denoiser, folder, is_trainable=trainable))
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"the adapter in {folder} cannot be loaded: {' '.join(str(error).split())[:160]}") from None


def _lora_kinds(denoiser):
    """Of a mixture's experts transformers makes one tensor, no Linear modules: there the attention alone is adapted."""
    return ATTENTION if hasattr(denoiser.config, "num_experts") else ATTENTION + MLP


def lora_layers(model):
    """The adapted modules, {name: module}."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A") and hasattr(module, "base_layer")}


def _checked(model):
    found, layers = lora_layers(model), model.config.num_hidden_layers
    for kind in _lora_kinds(model):
        number = sum(name.endswith(f".{kind}") for name in found)
        if number != layers:
            raise ValueError(f"LoRA target not found: {kind} in {number} of {layers} layers")
    for module in found.values():
        module.cast_input_dtype_enabled = False  # autocast does that (DiffusionPolicy.hidden), without making inputs float32 first
    model.eval()
    return model


def describe_lora(model):
    """What is adapted, in one line, counted on the model itself."""
    found = lora_layers(model)
    kinds = len({name.rpartition(".")[2] for name in found})
    adapter = sum(p.numel() for module in found.values() for p in (*module.lora_A.parameters(), *module.lora_B.parameters()))
    total = sum(p.numel() for p in model.parameters())
    rank = next(iter(model.peft_config.values())).r
    return (
        f"LoRA: {len(found)} matrices ({kinds} kinds x {model.config.num_hidden_layers} layers), rank {rank}: "
        f"{adapter / 1e6:.1f}M of {total / 1e6:,.1f}M parameters are trained"
    )


def _stored_names(folder):
    """The names of the weights in a checkpoint folder."""
    names = set()
    for path in folder.glob("model*.safetensors"):
        with safe_open(path, "pt") as file:
            names |= set(file.keys())
    return names


def export(denoiser, tokenizer, folder):
    """Write the whole model to `folder` as its source was stored, so that other tools of its family load it.

    An adapter is merged first, in place (there is no room for two of 8 billion), so this comes last. LLaDA's weights get LLaDA's
    names back, and its own config.json and all other small files of the source go beside them. Raises ValueError where transformers
    does not give the names back (5.2 does not, 5.23 does).
    """
    folder = Path(folder)
    if hasattr(denoiser, "disable_adapter"):
        denoiser = denoiser.merge_and_unload()
    denoiser.save_pretrained(folder, max_shard_size="5GB")
    tokenizer.save_pretrained(folder)
    source = getattr(denoiser, "source_folder", None)
    if source is None or json.loads((source / "config.json").read_text(encoding="utf-8")).get("model_type") in PLAIN:
        return
    if _stored_names(folder) != _stored_names(source):
        raise ValueError(
            f"transformers {transformers.__version__} stores these weights under other names than {source} does, where no tool would "
            "find them: take the version in requirements.txt"
        )
    for path in source.iterdir():
        weights = path.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf") or path.name.endswith(".index.json")
        if path.is_file() and not weights:
            shutil.copyfile(path, folder / path.name)


# ---- the warm start -----------------------------------------------------------------------------------------------------


def warm_start(denoiser, prompt_ids, completion_ids, mask_id, steps, batch_size, learning_rate, seed=0, progress=iter):
    """Masked-diffusion training, in place: how LLaDA itself was trained, here on demonstrations.

    Mask each completion token with probability t, t uniform in (0, 1); cross-entropy on the masked tokens, weighted by 1/t:
    an upper bound of the negative log-likelihood. Prompts stay visible.

    prompt_ids (N, P), completion_ids (N, L) long, nothing padded on the left.
    """
    # Muon for the matrices inside the layers, AdamW for the rest: countdown is learned in 300 steps as well as by AdamW alone in 400.
    layers = [p for name, p in denoiser.named_parameters() if p.ndim == 2 and "layers" in name]
    others = [p for name, p in denoiser.named_parameters() if not (p.ndim == 2 and "layers" in name)]
    optimizers = [
        torch.optim.Muon(layers, lr=5 * learning_rate, weight_decay=0.0),
        torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]

    def rate(step):
        return min(1.0, (step + 1) / 50) * (0.55 + 0.45 * math.cos(math.pi * step / steps))  # warm-up, then a cosine to a tenth

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    generator = torch.Generator().manual_seed(seed)
    device, L = denoiser.device, completion_ids.shape[1]
    prompt_ids, completion_ids = prompt_ids.to(device), completion_ids.to(device)
    denoiser.train()
    for _ in progress(range(steps)):
        index = torch.randint(0, len(prompt_ids), (batch_size,), generator=generator).to(device)  # (B,)
        t = (torch.arange(batch_size) + torch.rand(batch_size, generator=generator)) / batch_size  # one in each of B equal parts
        t = t.clamp(min=1e-3).unsqueeze(1).expand(-1, L)  # (B, L)
        masked = (torch.rand((batch_size, L), generator=generator) < t).to(device)
        t, tokens = t.to(device), completion_ids[index]
        ids = torch.cat([prompt_ids[index], tokens.masked_fill(masked, mask_id)], dim=1)
        logits = denoiser(input_ids=ids, use_cache=False).logits[:, -L:][masked]  # (N, V)
        cross_entropy = torch.nn.functional.cross_entropy(logits, tokens[masked], reduction="none")
        loss = (cross_entropy / t[masked]).sum() / (batch_size * L)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
    denoiser.eval()
