"""Loading LLaDA-class checkpoints, from a folder or from the hub.

They run in transformers' own classes with is_causal=False (see families.py), and no code from the
hub is ever executed. Weights and settings that are missing, left over or not understood are refused
by name, so a model that loads is the model that was trained.
"""

import warnings
from pathlib import Path
from types import MethodType

import huggingface_hub
import torch
import transformers
from safetensors.torch import load_file

from models.errors import as_value_error, unforeseen_as_value_error
from models.families import FAMILIES, PLAIN, Family, read_config
from models.hub import is_hub_name
from models.tiny import BASE
from models.weights import (
    read_headers,
    refuse_misfits,
    refuse_non_finite,
    split_experts,
    take_apart,
    to_model,
    weight_files,
)

warnings.filterwarnings("ignore", ".*gradient_checkpointing.*deprecated", FutureWarning)  # peft's
warnings.filterwarnings("ignore", ".*past_key_values.*deprecated", FutureWarning)  # since 5.24
transformers.logging.disable_progress_bar()  # one bar per file would bury the run's own
transformers.logging.set_verbosity_error()  # load_denoiser checks missing weights itself
# On an H100 or newer, torch may prefer cuDNN's attention, which makes a plan for each new shape, in
# 0.4 s on a B200 (modelscope/FunASR, issue 3704). In rollouts the number of rows keeps changing.
torch.backends.cuda.enable_cudnn_sdp(False)

LLADA = "GSAI-ML/LLaDA-8B-Instruct"
DTYPES = {  # the choices of --dtype
    "auto": None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "4bit": "4bit",
}
TIED = {"model.embed_tokens.weight", "lm_head.weight"}
TYING = "tie_word_embeddings; in a LLaDA's config.json weight_tying"
MAX_LAYERS = 1000  # a broken config.json can ask for any number, and building takes long


def load_denoiser(name_or_path, device="cpu", dtype=None, on_host=False):
    """Returns (denoiser, tokenizer) of "tiny", of a checkpoint's folder, or of a hub name.

    "tiny" is the embedded model as shipped.

    device   where the model will run
    dtype    a torch.dtype, "4bit" or None. None is float32 on a CPU and for tiny, else bfloat16.
             "4bit" rounds the layers' matrices to 4 bits and treats the rest as None does.
    on_host  load the weights as for `device`, but leave them in the CPU's memory. (A model that is
             to be split over GPUs may not fit into one.)

    The denoiser gets five attributes in addition to transformers' own:

    source        the hub name or the folder's absolute path; a LoRA adapter records it as its base
    renames       {pattern of a weight's name in the files: its name in the denoiser}
    fused         {matrix in the files: the matrices of the denoiser stacked in it}
    hub_folder    the folder whose layout an export copies; None for transformers' own format
    block_length  tokens per block of a block-causal model, or in the family's own decoding example;
                  0: one block

    Raises a one-line ValueError for whatever is broken, missing, left over or not understood.
    """
    folder = model_folder(name_or_path)
    config, family = read_config(folder, name_or_path)
    if not 0 < config.num_hidden_layers <= MAX_LAYERS:
        raise ValueError(f"{folder}: config.json says {config.num_hidden_layers} layers")
    row = FAMILIES.get(family) or Family(model=PLAIN[family], fields={})
    with unforeseen_as_value_error(f"{folder}: config.json or the tokenizer is not understood"):
        tokenizer = _load_tokenizer(folder, config)

    is_tiny = getattr(config, "compact_prompts", False)
    on_cpu = torch.device(device).type == "cpu"
    default_dtype = torch.float32 if on_cpu or is_tiny else torch.bfloat16
    files = weight_files(folder)
    headers = read_headers(files)
    with as_value_error(f"{folder} cannot be loaded"):
        weights, sources = to_model(headers, config, row.weights, row.fused)
        with torch.device("meta"):
            expected = split_experts(row.model(config).state_dict())
        if config.tie_word_embeddings and TIED & weights.keys():  # one of the two is enough
            for name in TIED - weights.keys():
                del expected[name]
        advice = "config.json and the weights do not match, or are incomplete: download both again"
        if expected.keys() - weights.keys() == {"lm_head.weight"}:
            advice = f"if the output layer is the embedding, config.json has to say so ({TYING})"
        refuse_misfits(
            weights,
            sources,
            expected=expected,
            advice=advice,
            renames=row.weights,
            fused=row.fused,
        )
        if dtype == "4bit":  # check now: after rounding a NaN is no longer visible
            for file in files:
                refuse_non_finite(load_file(file), sources={})
        state_dict = None  # transformers reads it from the folder
        if row.fused:
            state_dict = {}
            for file in files:
                # The file is memory-mapped and its parts are views of it: nothing is copied.
                for name, weight in load_file(file).items():
                    state_dict |= take_apart(name, weight, config, row.fused)
        denoiser, info = row.model.from_pretrained(
            folder if state_dict is None else None,
            state_dict=state_dict,
            config=config,
            dtype=default_dtype if dtype in (None, "4bit") else dtype,
            quantization_config=_four_bit_config(default_dtype) if dtype == "4bit" else None,
            device_map={"": "cpu" if on_host else device},
            key_mapping=row.weights or None,
            use_safetensors=True,
            output_loading_info=True,
        )
    for problem, keys in info.items():  # transformers only warns of missing or unexpected weights
        if keys:
            raise ValueError(f"{folder} does not fit its configuration: {problem} {list(keys)[:3]}")
    embedding = denoiser.get_input_embeddings().weight
    if config.tie_word_embeddings and denoiser.get_output_embeddings().weight is not embedding:
        raise ValueError(
            f"{folder}: config.json ties the output layer to the embedding, but in the files the "
            f"two differ: config.json has to say that they are not tied ({TYING})"
        )
    with as_value_error(f"{folder} cannot be loaded"):
        refuse_non_finite(split_experts(denoiser.state_dict()), sources)
    _make_products_reproducible(denoiser)
    fuse_norms(denoiser)

    is_folder = name_or_path != "tiny" and Path(name_or_path).is_dir()
    denoiser.source = str(folder.absolute() if is_folder else name_or_path)
    denoiser.renames = row.weights
    denoiser.fused = row.fused
    block_size = getattr(config, "block_size", None) or 0
    denoiser.block_length = block_size or row.block_length
    # absolute(), not resolve(): a link's name may tell the block size (families.py).
    denoiser.hub_folder = None if family in PLAIN else folder.absolute()
    denoiser.eval()
    with unforeseen_as_value_error(f"{folder} cannot be run"):
        check_attention(denoiser)
    return denoiser, tokenizer


def _four_bit_config(dtype):
    """NF4 as in QLoRA (Dettmers et al. 2023), computing in `dtype`. d1 trained on such a base."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise ValueError("dtype 4bit needs bitsandbytes: pip install bitsandbytes") from None
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _make_products_reproducible(denoiser):
    """Makes a loaded model compute exactly what the model that was saved computed."""
    for module in denoiser.modules():
        # On a CPU with AVX512-BF16 bitsandbytes would repack 4-bit weights for inference, with
        # coarser scales than it trains with.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    for parameter in denoiser.parameters():
        # A memory-mapped weight may not be aligned to 64 bytes, and then a CPU's products round
        # differently from those before it was saved.
        if parameter.data_ptr() % 64:
            parameter.data = parameter.data.clone()


def fuse_norms(denoiser):
    """Makes each RMSNorm one kernel on a GPU, where transformers' own code launches eight.

    A norm does so little arithmetic that on a GPU its time is that of reading and writing. In
    float32 on a CPU the results are transformers' to the last bit; in bfloat16 they are rounded
    once instead of twice.
    """
    for module in denoiser.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = MethodType(_rms_norm, module)


def _rms_norm(self, hidden):
    """The forward method of transformers' RMSNorm, in one call."""
    with torch.autocast(hidden.device.type, enabled=False):  # it would return float32
        return torch.nn.functional.rms_norm(
            hidden, self.weight.shape, self.weight, self.variance_epsilon
        )


def dtype_of(denoiser):
    """How a denoiser's weights are stored: "float32", "bfloat16" or "4bit"."""
    if getattr(denoiser, "is_loaded_in_4bit", False):
        return "4bit"
    return str(denoiser.dtype).removeprefix("torch.")


def model_folder(name_or_path):
    """The local folder of a model or an adapter; a hub name is downloaded first.

    The hub is never asked for what looks like a path: a stranger could own that name. Raises
    ValueError if there is neither such a folder nor such a hub repository.
    """
    folder = BASE if name_or_path == "tiny" else Path(name_or_path)
    if folder.is_dir():
        return folder
    name = str(name_or_path)
    advice = "give a local checkpoint as its folder; tiny needs none"
    owner, _, repository = name.partition("/")
    if "/" in repository and not folder.parent.exists() and owner not in (".", "..", "runs", ""):
        repository, _, subfolder = repository.partition("/")
        raise ValueError(
            f"{name} is not a folder here. For {subfolder} of {owner}/{repository} on the hub "
            f"run hf download {owner}/{repository} --include '{subfolder}/*' --local-dir DIR"
        )
    if not is_hub_name(name):
        reason = f"and not a hub name such as {LLADA}"
        if repository and owner not in (".", "..") and Path(owner).is_dir():
            reason = f"though {owner} is one, so the hub is not asked"
        raise ValueError(f"{name!r} is not a folder here {reason}: {advice}")
    with as_value_error(f"{name} is not a folder, and cannot be downloaded from the hub: {advice}"):
        return Path(
            huggingface_hub.snapshot_download(
                name,
                # The *.py are never executed; exports include them for other tools.
                allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja", "*.py"],
            )
        )


def _load_tokenizer(folder, config):
    """The folder's tokenizer, with the checkpoint's own mask, end and padding tokens.

    Sets config.mask_token_id. Raises ValueError if the mask token is unknown or ambiguous, or if
    there is no end token.
    """
    tokenizer_class = transformers.PreTrainedTokenizerFast
    if (folder / "merges.txt").is_file() and not (folder / "tokenizer.json").is_file():
        tokenizer_class = transformers.Qwen2Tokenizer  # Dream's
    with as_value_error(f"{folder} cannot be loaded: it has no tokenizer.json, or a broken one"):
        tokenizer = tokenizer_class.from_pretrained(folder, padding_side="left")
    token_of = {i: token for token, i in tokenizer.get_vocab().items()}
    if max(token_of, default=0) >= config.vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer has tokens up to {max(token_of)}, but by config.json the "
            f"embedding has {config.vocab_size} rows"
        )

    mask_ids = []
    for i in tokenizer.added_tokens_decoder:
        if "mask" in token_of[i].lower().replace("[gmask]", ""):  # GLM's [gMASK] is not a mask
            mask_ids.append(i)
    claimed_ids = [getattr(config, "mask_token_id", None), tokenizer.mask_token_id]
    claimed_ids = [i for i in claimed_ids if i is not None]
    if not claimed_ids and len(mask_ids) == 1:
        claimed_ids = mask_ids
    if not mask_ids:  # the mask has another name: config.json has to say which token it is
        mask_ids = [i for i in claimed_ids if i in tokenizer.added_tokens_decoder]
    mask_id = claimed_ids[0] if claimed_ids else None
    is_ambiguous = len(set(claimed_ids)) > 1
    if mask_id not in mask_ids or mask_id >= config.vocab_size or is_ambiguous:
        raise ValueError(
            f"mask_token_id {mask_id} of {folder}/config.json is token {token_of.get(mask_id)!r}, "
            f"but the tokenizer's mask tokens are {mask_ids or 'none at all'}: config.json has to "
            "say which special token is the mask"
        )
    config.mask_token_id = mask_id
    tokenizer.mask_token = token_of[mask_id]

    end_id = config.eos_token_id
    if isinstance(end_id, list):
        end_id = end_id[0]
    if end_id is not None:
        tokenizer.eos_token = token_of.get(end_id)
    if tokenizer.eos_token is None:
        raise ValueError(f"neither {folder}'s config.json nor its tokenizer names an end token")
    tokenizer.pad_token = token_of.get(config.pad_token_id, tokenizer.eos_token)
    return tokenizer


@torch.no_grad()
def check_attention(denoiser):
    """Raises ValueError unless attention is bidirectional and left padding changes nothing.

    Runs two rows of 8 tokens, with and without 3 tokens of padding in the second row. (A
    block-causal model also passes: its mask is made for each call by block_causal.py.)
    """
    ids = torch.arange(1, 9, device=denoiser.device).repeat(2, 1)  # (2, 8)
    changed_ids = ids + (ids == 8)  # with another last token
    mask = ids > torch.tensor([[0], [3]], device=ids.device)
    position_ids = (mask.cumsum(dim=1) - 1).clamp(min=0)

    def logits(ids, with_padding):
        if not with_padding:
            return denoiser(input_ids=ids).logits
        return denoiser(input_ids=ids, attention_mask=mask, position_ids=position_ids).logits

    for with_padding in (False, True):
        before = logits(ids, with_padding)[1, 4]
        after = logits(changed_ids, with_padding)[1, 4]
        if torch.equal(before, after):
            raise ValueError("causal attention: it needs is_causal=False and transformers >= 5.2")

    padded = logits(ids, with_padding=True)[1, 3:]
    alone = denoiser(input_ids=ids[1:, 3:]).logits[0]
    if not padded.isfinite().all():
        raise ValueError("the logits of this model are NaN or infinite: its files may be broken")
    tolerance = 1e-3 if denoiser.dtype == torch.float32 else 0.1
    if (padded - alone).abs().max() > tolerance * alone.abs().max():
        raise ValueError("left padding changes this model's logits: it ignores mask or positions")
