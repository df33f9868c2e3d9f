"""LLaDA-class checkpoints: reading, adapters, export.

Transformers' own classes run them with `is_causal=False` (families.py says how), and no code from a
hub is ever imported. Whatever is missing, left over or not understood is refused by name: a model
that loads is the model that was trained.
"""

import warnings
from pathlib import Path

import huggingface_hub
import torch
import transformers

from models.families import FAMILIES, PLAIN, WEIGHTS, one_line, read_config
from models.tiny import BASE

warnings.filterwarnings("ignore", ".*gradient_checkpointing.*deprecated", FutureWarning)  # peft's
transformers.logging.disable_progress_bar()  # a bar for each file would bury the run's own
LLADA = "GSAI-ML/LLaDA-8B-Instruct"
DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "4bit": "4bit"}


def load_denoiser(name_or_path, device="cpu", dtype=None, on_host=False):
    """(denoiser, tokenizer) of "tiny", of a checkpoint folder, or of a model on the hub.

    "tiny" is the embedded one, as shipped. dtype None is float32 on a CPU and for tiny, else
    bfloat16; "4bit" rounds the layers' matrices to that, and the rest is as with None.
    `denoiser.source` is that name, or the folder's absolute path. on_host: as for `device`, but
    still on the CPU. Raises ValueError, in one line, for whatever is broken, missing, left over or
    not understood.
    """
    folder = model_folder(name_or_path)
    config, kind = read_config(folder, name_or_path)
    if not 0 < config.num_hidden_layers <= 1000:  # building as many as it says takes for ever
        raise ValueError(f"{folder}: config.json says {config.num_hidden_layers} layers")
    tokenizer = _load_tokenizer(folder, config)
    small = torch.device(device).type == "cpu" or getattr(config, "compact_prompts", False)
    rest = torch.float32 if small else torch.bfloat16
    options = {"dtype": rest if dtype in (None, "4bit") else dtype, "config": config}
    if dtype == "4bit":
        options["quantization_config"] = _four_bit(rest)
    options |= {"key_mapping": WEIGHTS.get(kind), "device_map": {"": "cpu" if on_host else device}}
    with one_line(f"{folder} cannot be loaded"):
        model = PLAIN.get(kind) or FAMILIES[kind][0]
        denoiser, info = model.from_pretrained(
            folder, use_safetensors=True, output_loading_info=True, **options
        )
    for module in denoiser.modules():  # On a CPU with AVX512-BF16 bitsandbytes would repack 4-bit
        if hasattr(module, "support_avx512bf16_for_cpu"):  # weights for inference, with coarser
            module.support_avx512bf16_for_cpu = False  # scales than it trains with.
    odd = [f"{what} {list(keys)[:3]}" for what, keys in info.items() if keys]  # only warned of
    if odd:
        raise ValueError(f"{folder} does not fit its configuration: {odd[0]}")
    for p in denoiser.parameters():
        if p.data_ptr() % 64:  # askew in memory, as a mapped file can be: a CPU would round its
            p.data = p.data.clone()  # products otherwise than before the weights were saved
    is_folder = name_or_path != "tiny" and Path(name_or_path).is_dir()
    denoiser.source = str(folder.resolve() if is_folder else name_or_path)
    denoiser.renames = WEIGHTS.get(kind, {})  # {a name in its files: ours}
    denoiser.hub_folder = None if kind in PLAIN else folder.resolve()  # whose layout exports have
    if getattr(config, "shift_logits", False):
        denoiser.get_decoder().register_forward_hook(_shift)
    check_attention(denoiser.eval())
    return denoiser, tokenizer


def _four_bit(dtype):
    """NF4, as QLoRA's (Dettmers et al. 2023), computing in dtype. d1 trained on such a base."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise ValueError("dtype 4bit needs bitsandbytes: pip install bitsandbytes") from None
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )  # fmt: skip


def dtype_of(denoiser):
    """How its weights are stored, in a word."""
    is_4bit = getattr(denoiser, "is_loaded_in_4bit", False)
    return "4bit" if is_4bit else str(denoiser.dtype).removeprefix("torch.")


def model_folder(name):
    """A model's or an adapter's. The hub is never asked for a path: a stranger could own it."""
    folder, name = BASE if name == "tiny" else Path(name), str(name)
    if folder.is_dir():
        return folder
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
