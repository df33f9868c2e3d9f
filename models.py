"""LLaDA-class checkpoints: reading, adapters, export.

A LLaDA *is* a Llama without the causal mask. So transformers' own classes run it with
`is_causal=False`, and no code from a hub is ever imported. Whatever in a checkpoint is not
understood is refused by name: a model that loads is the model that was trained.
"""

import json
import shutil
import warnings
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from transformers import LlamaForCausalLM, Qwen2ForCausalLM, Qwen3MoeForCausalLM

from tiny import BASE

warnings.filterwarnings("ignore", ".*gradient_checkpointing.*deprecated", FutureWarning)  # peft's
transformers.logging.disable_progress_bar()  # a bar for each file would bury the run's own
LLADA = "GSAI-ML/LLaDA-8B-Instruct"


def default_model():
    """(name, why): which model a bare command trains."""
    if torch.cuda.is_available():
        return LLADA, "a GPU was found; --model tiny trains the embedded model instead"
    return "tiny", "no GPU was found, and this one needs neither GPU nor download"


def names(text):  # "a=b c" -> {"a": "b", "c": "c"}
    return {word.partition("=")[0]: word.partition("=")[2] or word for word in text.split()}


# What a family's config.json has to say: {field: its name in our configuration}.
COMMON = "eos_token_id pad_token_id bos_token_id mask_token_id rms_norm_eps rope_theta "
QWEN = COMMON + """vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads
    max_position_embeddings tie_word_embeddings """  # fmt: skip
FIELDS = {
    "llada": names(COMMON + """d_model=hidden_size n_layers=num_hidden_layers
        n_heads=num_attention_heads n_kv_heads=num_key_value_heads mlp_hidden_size=intermediate_size
        embedding_size=vocab_size max_sequence_length=max_position_embeddings include_bias=mlp_bias
        include_qkv_bias=attention_bias weight_tying=tie_word_embeddings"""),
    "llada-moe": names(QWEN + """expert_intermediate_size=moe_intermediate_size num_experts
        num_experts_per_tok norm_topk_prob attention_bias head_dim"""),
    "dream": names(QWEN + "intermediate_size"),
}  # fmt: skip
OPTIONAL = names("""bos_token_id mask_token_id n_kv_heads include_qkv_bias norm_topk_prob head_dim
    attention_bias""")  # fmt: skip
# Fields of which our classes implement these values alone.
KNOWN = {name: values for values, fields in (
    (["llama"], "block_type"), (["rms"], "layer_norm_type"), ([1, None], "moe_layer_freq"),
    (["silu"], "activation_type hidden_act"), (["softmax"], "moe_router_score_function"),
    ([1], "block_group_size partial_rotary_factor"), ([1, None], "routed_scaling_factor"),
    ([0, None], "shared_expert_intermediate_size num_shared_experts"), ([False], "use_mrope"),
    ([0.0], "attention_dropout embedding_dropout residual_dropout"),
    ([True], "layer_norm_with_affine rope rope_full_precision qk_layernorm"),
    ([False], "alibi attention_layer_norm input_emb_norm scale_logits use_sliding_window"),
    ([False, None], "bias_for_layer_norm moe_router_enable_expert_bias multi_query_attention"),
    ([None], "clip_qkv n_group rope_scaling router_num_group router_topk_group sliding_window"),
) for name in fields.split()}  # fmt: skip
# Fields of no consequence for what these models compute.
IGNORED = names("""_name_or_path alibi_bias_max architectures attention_layer_norm_with_affine dtype
    auto_map dense_intermediate_size flash_attention init_cutoff_factor init_device init_fn init_std
    initializer_range intermediate_size max_window_layers mlp_ratio model_type output_router_logits
    precision router_aux_loss_coef torch_dtype transformers_version use_cache vocab_size""")
# model_type: class, what else config.json has to say, what else goes into our configuration.
FAMILIES = {
    "llada": (LlamaForCausalLM, ["block_type", "activation_type", "layer_norm_type", "rope"], {}),
    "llada-moe": (Qwen3MoeForCausalLM, [], {"norm_topk_prob": False, "decoder_sparse_step": 1}),
    "dream": (Qwen2ForCausalLM, [], {"shift_logits": True, "use_sliding_window": False}),
    "llama": (LlamaForCausalLM,), "qwen2": (Qwen2ForCausalLM,),  # read as they are
}  # fmt: skip
BLOCK = names("""attn_norm=input_layernorm ff_norm=post_attention_layernorm q_proj=self_attn.q_proj
    k_proj=self_attn.k_proj v_proj=self_attn.v_proj attn_out=self_attn.o_proj
    ff_proj=mlp.gate_proj up_proj=mlp.up_proj ff_out=mlp.down_proj""")  # ff_proj has the SiLU
WEIGHTS = {"llada": {rf"^model\.transformer\.{there}\.": f"{here}." for there, here in (
    ("wte", "model.embed_tokens"), ("ln_f", "model.norm"), ("ff_out", "lm_head"),
    *((rf"blocks\.(\d+)\.{there}", rf"model.layers.\1.{here}") for there, here in BLOCK.items()),
)}}  # fmt: skip
LORA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@contextmanager
def one_line(what):
    """Turns any error inside into a ValueError of one line: `what`, and what was said."""
    try:
        yield
    except Exception as error:  # safetensors, tokenizers, peft and the hub each raise their own
        raise ValueError(f"{what} ({' '.join(str(error).split())[:160]})") from None


def read_config(folder):
    """(our configuration, its kind, a key of FAMILIES) of a folder. Raises ValueError."""
    file = folder / "config.json"
    with one_line(f"{folder} is no checkpoint: config.json cannot be read"):
        found = json.loads(file.read_text(encoding="utf-8"))
        kind = str(found.get("model_type")).lower()
    kind += "-moe" if kind == "llada" and "num_experts" in found else ""
    if kind not in FAMILIES:
        raise ValueError(f"{file}: model_type {kind} is not known, only {', '.join(FAMILIES)}")
    model, *more = FAMILIES[kind]
    if not more:
        return model.config_class.from_pretrained(folder), kind
    fields, (needed, extra) = FIELDS[kind], more
    if kind == "llada":
        if found.get("mlp_hidden_size") is None and found.get("d_model"):
            found["mlp_hidden_size"] = (found.get("mlp_ratio") or 4) * found["d_model"]
        found["embedding_size"] = found.get("embedding_size") or found.get("vocab_size")
    if found.get("moe_layer_freq") == [1] * (found.get("num_hidden_layers") or 0):
        found["moe_layer_freq"] = 1
    for key in sorted(found.keys() - {*fields, *IGNORED}):
        if found[key] not in KNOWN.get(key, []):
            raise ValueError(f"{file}: {key} = {found[key]!r} is not known for {kind}")
    for key in (*fields, *needed):
        if found.get(key) is None and key not in OPTIONAL:
            raise ValueError(f"{file}: {key} is missing, and {kind} needs it")
    given = {ours: found[key] for key, ours in fields.items() if found.get(key) is not None}
    given["rope_parameters"] = {"rope_type": "default", "rope_theta": given.pop("rope_theta")}
    return model.config_class(**extra | given, is_causal=False), kind


def load_denoiser(name_or_path, device="cpu", dtype=None):
    """(denoiser, tokenizer) of "tiny", of a checkpoint folder, or of a model on the hub.

    "tiny" is the embedded one, as shipped. dtype None is float32 on a CPU and for tiny, else
    bfloat16. `denoiser.source` is that name, or the folder's absolute path. Raises ValueError, in
    one line, for whatever is broken, missing, left over or not understood.
    """
    folder = BASE if name_or_path == "tiny" else Path(name_or_path)
    is_folder = folder.is_dir() and name_or_path != "tiny"
    folder = folder if folder.is_dir() else _download(str(name_or_path))
    config, kind = read_config(folder)
    tokenizer = _load_tokenizer(folder, config)
    small = torch.device(device).type == "cpu" or getattr(config, "compact_prompts", False)
    options = {"dtype": dtype or (torch.float32 if small else torch.bfloat16), "config": config}
    options |= {"key_mapping": WEIGHTS.get(kind), "device_map": {"": device}}
    with one_line(f"{folder} cannot be loaded"):
        denoiser, info = FAMILIES[kind][0].from_pretrained(
            folder, use_safetensors=True, output_loading_info=True, **options
        )
    odd = [f"{what} {list(keys)[:3]}" for what, keys in info.items() if keys]  # only warned of
    if odd:
        raise ValueError(f"{folder} does not fit its configuration: {odd[0]}")
    for p in denoiser.parameters():
        if p.data_ptr() % 64:  # askew in memory, as a mapped file can be: a CPU would round its
            p.data = p.data.clone()  # products otherwise than before the weights were saved
    denoiser.source = str(folder.resolve() if is_folder else name_or_path)
    denoiser.hub_folder = folder.resolve() if kind in FIELDS else None  # whose layout exports have
    if getattr(config, "shift_logits", False):
        denoiser.get_decoder().register_forward_hook(_shift)
    check_attention(denoiser.eval())
    return denoiser, tokenizer


def _download(name):
    """The folder of a hub model. A path is never asked for: a stranger could own that name."""
    advice = "--model FOLDER reads a local checkpoint, --model tiny needs none"
    if name.count("/") != 1 or name.startswith((".", "/")):
        raise ValueError(f"{name!r} is no folder here and no hub name such as {LLADA}: {advice}")
    wanted = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.py"]  # *.py only goes into exports
    with one_line(f"{name} is no folder, and the hub has not given it: {advice}"):
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted))


def _shift(module, args, output):
    """Dream predicts position i from the state at i - 1: moved here, nobody else needs to know."""
    states = output.last_hidden_state
    output.last_hidden_state = torch.cat([states[:, :1], states[:, :-1]], dim=1)


def _load_tokenizer(folder, config):
    """The folder's tokenizer, with the checkpoint's own mask, end and padding tokens."""
    slow = (folder / "merges.txt").is_file() and not (folder / "tokenizer.json").is_file()  # Dream
    kind = transformers.Qwen2Tokenizer if slow else transformers.PreTrainedTokenizerFast
    with one_line(f"{folder} cannot be loaded: it has no tokenizer.json, or a broken one"):
        tokenizer = kind.from_pretrained(folder, padding_side="left")
    words = {i: word for word, i in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder  # of which GLM's [gMASK] is no mask
    masks = [i for i in added if "mask" in words[i].lower().replace("[gmask]", "")]
    named = getattr(config, "mask_token_id", None), tokenizer.mask_token_id
    named = [i for i in named if i is not None] or masks[: len(masks) == 1]
    mask_id = named[0] if named else None
    if mask_id not in masks or mask_id >= config.vocab_size or named[-1] != mask_id:
        what = f"mask_token_id {mask_id} of {folder}/config.json is token {words.get(mask_id)!r}"
        raise ValueError(f"{what}, and the tokenizer's mask tokens are {masks or 'none at all'}")
    config.mask_token_id, tokenizer.mask_token = mask_id, words[mask_id]
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    tokenizer.eos_token = tokenizer.eos_token if ends[0] is None else words.get(ends[0])
    if tokenizer.eos_token is None:
        raise ValueError(f"{folder} names no end token, in config.json or in its tokenizer")
    tokenizer.pad_token = words.get(config.pad_token_id, tokenizer.eos_token)
    return tokenizer


@torch.no_grad()
def check_attention(denoiser):
    """Raises ValueError unless attention is bidirectional and left padding changes nothing."""
    ids = torch.arange(1, 9, device=denoiser.device).repeat(2, 1)  # (2, 8)
    changed = ids + (ids == 8)  # the last token is another
    mask = ids > torch.tensor([[0], [3]], device=ids.device)  # the second row: 3 tokens of padding
    padding = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    for options in ({}, padding):
        first, other = (denoiser(input_ids=x, **options).logits[1, 4] for x in (ids, changed))
        if torch.equal(first, other):
            raise ValueError("causal attention: it needs is_causal=False and transformers >= 5.2")
    padded = denoiser(input_ids=ids, **padding).logits[1, 4:]  # not 3: Dream's comes from padding
    alone = denoiser(input_ids=ids[1:, 3:]).logits[0, 1:]
    rounding = 1e-3 if denoiser.dtype == torch.float32 else 0.1
    if not (padded - alone).abs().max() <= rounding * alone.abs().max():  # refuses nan too
        raise ValueError("left padding changes this model's logits: it ignores mask or positions")


def add_lora(denoiser, rank, alpha, dropout=0.0, seed=0):
    """A LoRA adapter on all of the layers' matrices, as a PeftModel; the rest is frozen.

    It is float32 even on a bfloat16 base, or its small steps would be rounded away. Raises
    ValueError where a matrix is not found.
    """
    kinds = _lora_kinds(denoiser)
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=kinds)
    with one_line("LoRA target not found"), torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        model = get_peft_model(denoiser, config)
    config.base_model_name_or_path = getattr(denoiser, "source", None)
    return _checked(model)


def load_lora(denoiser, folder, trainable=False):
    """The adapter in a folder, on its base model. Raises ValueError."""
    with one_line(f"the adapter in {folder} cannot be loaded"):
        return _checked(PeftModel.from_pretrained(denoiser, folder, is_trainable=trainable))


def _lora_kinds(model):  # of a mixture attention alone: its experts are no Linear modules
    return LORA[:4] if hasattr(model.config, "num_experts") else LORA


def lora_layers(model):
    """The adapted modules, {name: module}."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def _checked(model):
    found, layers = lora_layers(model), model.config.num_hidden_layers
    for kind in _lora_kinds(model):
        if (number := sum(name.endswith(f".{kind}") for name in found)) != layers:
            raise ValueError(f"LoRA target not found: {kind} in {number} of {layers} layers")
    for module in found.values():
        module.cast_input_dtype_enabled = False  # autocast does it (DiffusionPolicy.hidden)
    return model.eval()


def describe_lora(model):
    """What is adapted, in one line, counted on the model itself."""
    found, layers = len(lora_layers(model)), model.config.num_hidden_layers
    n, total = (n / 1e6 for n in model.get_nb_trainable_parameters())
    kinds = f"{found // layers} kinds x {layers} layers), rank {model.peft_config['default'].r}"
    return f"LoRA: {found} matrices ({kinds}: {n:.1f}M of {total:,.1f}M parameters are trained"


def export(denoiser, tokenizer, folder):
    """Write the whole model to `folder` as its source was stored, for other tools of its family.

    An adapter is merged first, in place: there is no room for two of 8 billion. The source's small
    files go beside the weights. Raises ValueError where transformers (5.2, say) renames those.
    """
    folder, source = Path(folder), getattr(denoiser, "hub_folder", None)
    if hasattr(denoiser, "disable_adapter"):
        denoiser = denoiser.merge_and_unload()
    denoiser.save_pretrained(folder, max_shard_size="5GB")
    tokenizer.save_pretrained(folder)
    if source is None:
        return
    files = [where.glob("model*.safetensors") for where in (folder, source)]
    ours, theirs = (set().union(*(safe_open(f, "pt").keys() for f in part)) for part in files)
    if ours != theirs:
        raise ValueError(f"this transformers renames {source}'s weights: see requirements.txt")
    for path in source.iterdir():
        weights = path.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf")
        if path.is_file() and not weights and not path.name.endswith(".index.json"):
            shutil.copyfile(path, folder / path.name)
