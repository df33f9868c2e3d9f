"""Writing a whole model for other tools of its family."""

import re
import shutil
from pathlib import Path

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open

from models.loading import dtype_of, load_denoiser
from models.lora import _adapted


def export_model(denoiser, tokenizer, folder, weights=None):
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
