"""LLaDA-class checkpoints: reading, adapters, export.

Transformers' own classes run them with `is_causal=False` (families.py says how), and no code from a
hub is ever imported. Whatever is missing, left over or not understood is refused by name: a model
that loads is the model that was trained.
"""

import json
import re
import shutil
import warnings
from dataclasses import fields
from pathlib import Path

import huggingface_hub
import torch
import transformers
from peft import (
    LoraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors import safe_open
from safetensors.torch import load_file

from config import RECIPES
from models.families import FAMILIES, PLAIN, WEIGHTS, one_line, read_config
from models.tiny import BASE
from training import memory

warnings.filterwarnings("ignore", ".*gradient_checkpointing.*deprecated", FutureWarning)  # peft's
transformers.logging.disable_progress_bar()  # a bar for each file would bury the run's own
LLADA = "GSAI-ML/LLaDA-8B-Instruct"
SMALL = "dllm-hub/Qwen3-0.6B-diffusion-mdlm-v0.1"
DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "4bit": "4bit"}


def gpu():
    """(its name, its GiB), or None where there is none."""
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    return found.name, found.total_memory / 2**30


def default_model():
    """(name, why): which model a bare command trains."""
    if not gpu():
        return "tiny", "no GPU was found, and this one needs neither GPU nor download"
    name, gib = gpu()
    why = f"a GPU of {gib:.0f} GiB was found, {name}; --model tiny trains the embedded model"
    return LLADA if gib > 21 else SMALL, why  # a card of 24 GB has 23.5 of them, or 22.1


def recipe_by_size(config):
    """The recipe of a checkpoint that is not tiny, before the GPU is looked at."""
    return RECIPES["LLaDA" if memory.parameters(config)[1] > 2e9 else "small"]


def recipe_of(name):
    """({setting: value}, words) for a checkpoint: by its size, and by the GPU's. Raises ValueError.

    The words say what memory and time to expect, by arithmetic: (settings) -> text.
    """
    config, _ = read_config(_folder(name), name)
    size = memory.parameters(config)[1]
    recipe, here = recipe_by_size(config), gpu()
    if here and recipe is RECIPES["LLaDA"] and here[1] < 70:
        recipe = recipe | RECIPES["24 GB" if here[1] < 40 else "48 GB"]

    def expect(settings):
        said = f"{size / 1e9:.1f} billion parameters"
        if not here:
            return said
        peak = memory.budget(config, settings, 200)["peak"]
        said += f"; {peak:.1f} of {here[1]:.1f} GiB expected"
        speeds = [speed for key, speed in memory.SPEEDS.items() if key in here[0]]
        if speeds:
            seconds = memory.work(config, settings, 200) * settings.steps / (0.3e12 * speeds[0])
            said += f", {seconds / 60:,.0f} minutes if the GPU reaches 30% of its peak speed"
        return f"{said} (by arithmetic, not measured: benchmark.py --memory {name})"

    return recipe, expect


# What an adapter's configuration says by the names of its modules, which are renamed here.
BY_NAME = ("rank_pattern", "alpha_pattern", "exclude_modules", "layers_pattern", "modules_to_save")
PEFT = "base_model.model."  # in front of the module's name in an adapter's weights
LORA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def load_denoiser(name_or_path, device="cpu", dtype=None, on_host=False):
    """(denoiser, tokenizer) of "tiny", of a checkpoint folder, or of a model on the hub.

    "tiny" is the embedded one, as shipped. dtype None is float32 on a CPU and for tiny, else
    bfloat16; "4bit" rounds the layers' matrices to that, and the rest is as with None.
    `denoiser.source` is that name, or the folder's absolute path. on_host: as for `device`, but
    still on the CPU. Raises ValueError, in one line, for whatever is broken, missing, left over or
    not understood.
    """
    folder = _folder(name_or_path)
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


def _folder(name):
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


def add_lora(denoiser, rank, alpha, dropout=0.0, seed=0):
    """A LoRA adapter on all of the layers' matrices, as a PeftModel; the rest is frozen.

    It is float32 even on a bfloat16 base, or its small steps would be rounded away. Raises
    ValueError where a matrix is not found.
    """
    kinds = _lora_kinds(denoiser)
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=kinds)
    with one_line("LoRA target not found"):
        model = _adapted(denoiser, config, seed)
    found, layers = lora_layers(model), model.config.num_hidden_layers
    for kind in kinds:
        if (number := sum(name.endswith(f".{kind}") for name in found)) != layers:
            raise ValueError(f"LoRA target not found: {kind} in {number} of {layers} layers")
    return model


def load_lora(denoiser, name_or_path, trainable=False):
    """The adapter of a folder or the hub, on its base model. Raises ValueError, in one line.

    Others' adapters of a LLaDA name its own modules, so they are renamed as its weights are. Every
    weight has to find its place, or the bare base would be there instead, without a word.
    """
    folder, renamed = _folder(name_or_path), {}
    with one_line(f"the adapter in {name_or_path} cannot be loaded"):
        config = _lora_config(folder, denoiser.renames)
        for key, weight in load_file(folder / "adapter_model.safetensors").items():
            name = key.removeprefix(PEFT)
            for there, here in denoiser.renames.items():
                name = re.sub(there, here, name)
            renamed[PEFT + name] = weight
        config.target_modules = {name.split(".lora_")[0].split(".")[-1] for name in renamed}
        config.inference_mode = not trainable
        model = _adapted(denoiser, config)
        ours = get_peft_model_state_dict(model, save_embedding_layers=False)
        if odd := sorted(ours.keys() ^ renamed.keys()):
            raise ValueError(f"{len(odd)} weights without a counterpart, the first {odd[0]}")
        set_peft_model_state_dict(model, renamed)
    return model


def _lora_config(folder, renames):
    """An adapter's configuration. What in it would be passed over is an error."""
    found = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    known = {field.name for field in fields(LoraConfig)} - set(BY_NAME if renames else ())
    for key, value in found.items():
        if value and key not in known or key == "peft_type" and value != "LORA":
            raise ValueError(f"{key} = {value!r} is not known")
    return LoraConfig(**{key: value for key, value in found.items() if key in known})


def _adapted(denoiser, config, seed=0):
    config.base_model_name_or_path = None  # or peft warns of another name
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        model = get_peft_model(denoiser, config)
    config.base_model_name_or_path = getattr(denoiser, "source", None)
    for module in lora_layers(model).values():
        module.cast_input_dtype_enabled = False  # autocast does it (DiffusionPolicy.hidden)
    return model.eval()


def _lora_kinds(model):  # of a mixture attention alone: its experts are no Linear modules
    return LORA[:4] if hasattr(model.config, "num_experts") else LORA


def lora_layers(model):
    """The adapted modules, {name: module}."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def describe_lora(model):
    """What is adapted, in one line, counted on the model itself."""
    found, layers = len(lora_layers(model)), model.config.num_hidden_layers
    n, total = (n / 1e6 for n in model.get_nb_trainable_parameters())
    kinds = f"{found // layers} kinds x {layers} layers), rank {model.peft_config['default'].r}"
    return f"LoRA: {found} matrices ({kinds}: {n:.1f}M of {total:,.1f}M parameters are trained"


def export(denoiser, tokenizer, folder, weights=None):
    """Write the whole model to `folder` as its source was stored, for other tools of its family.

    An adapter is merged first, in place: there is no room for two of 8 billion. The source's small
    files go beside the weights, which `weights`, a state dict, may have whole where they are split.
    Raises ValueError where transformers (5.2, say) renames those.
    """
    folder, source = Path(folder), getattr(denoiser, "hub_folder", None)
    if dtype_of(denoiser) == "4bit":  # merged into the base as it was before it was rounded
        lora = get_peft_model_state_dict(denoiser, save_embedding_layers=False)
        base, _ = load_denoiser(denoiser.source, dtype=torch.bfloat16)
        denoiser = _adapted(base, denoiser.peft_config["default"])
        set_peft_model_state_dict(denoiser, lora)
    if hasattr(denoiser, "disable_adapter"):
        denoiser = denoiser.merge_and_unload()
    denoiser.save_pretrained(folder, max_shard_size="5GB", state_dict=weights)
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
    file, dtype = folder / "config.json", dtype_of(denoiser)  # float32 of a bfloat16 source, say
    text = re.sub(r'("(?:torch_)?dtype"\s*:\s*)"\w+"', rf'\1"{dtype}"', file.read_text("utf-8"))
    file.write_text(text, encoding="utf-8")
