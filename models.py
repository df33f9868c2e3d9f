"""The denoiser: a bidirectional transformer that predicts every masked token at once.

A LLaDA-class model *is* a Llama without the causal mask. So it runs on transformers' own `LlamaForCausalLM` with
`is_causal=False` in its configuration, and needs no code from a hub. Two kinds are known here:

    "tiny"     about 1M parameters and a tokenizer of some 120 words, built in code; random until train.py's warm start
    a folder   any bidirectional Llama saved by `save_pretrained` with a tokenizer that has a mask token

Needs transformers >= 5.2: older versions ignore `is_causal` silently. `check_bidirectional` finds out at load time.
"""

import math
from pathlib import Path

import torch
import transformers
from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Sequence, Split, WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

transformers.logging.disable_progress_bar()  # a bar for every file of every checkpoint would bury the run's own
LLADA = "GSAI-ML/LLaDA-8B-Instruct"


def default_model():
    """(name, why): which model a bare command trains."""
    if torch.cuda.is_available():
        return LLADA, "a GPU was found; --model tiny trains the embedded model instead"
    return "tiny", "no GPU was found, and this one needs neither GPU nor download"


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


def load_denoiser(name_or_path, seed=0, device="cpu"):
    """(denoiser, tokenizer) of "tiny", freshly initialised, or of a folder written by `save_pretrained`.

    Raises ValueError, in one line, for a name that is neither, a folder that is no checkpoint, missing or unexpected weights,
    a tokenizer without a mask token, or a model with causal attention.
    """
    if name_or_path == "tiny":
        tokenizer = tiny_tokenizer()
        denoiser = tiny_denoiser(tokenizer, seed)
    elif Path(name_or_path).is_dir():
        denoiser, tokenizer = _load_folder(Path(name_or_path))
    elif Path(name_or_path).name.startswith(("LLaDA", "Dream")):
        raise ValueError(f"{name_or_path} cannot be loaded yet (it is the next step): train the embedded model with --model tiny")
    else:
        raise ValueError(f"unknown model {name_or_path!r}: choose tiny, or a folder that holds a checkpoint")
    check_bidirectional(denoiser)
    return denoiser.to(device), tokenizer


def _load_folder(folder):
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is no checkpoint: it has no {name}")
    try:
        config = LlamaConfig.from_pretrained(folder)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        denoiser, info = LlamaForCausalLM.from_pretrained(folder, config=config, output_loading_info=True)
    except Exception as error:  # safetensors, json and transformers each raise their own
        raise ValueError(f"{folder} cannot be loaded: {' '.join(str(error).split())[:200]}") from None
    for what, keys in info.items():  # transformers only warns about these, and goes on with random weights
        if keys:
            raise ValueError(f"{folder} does not fit its configuration: {what.replace('_', ' ')}: {', '.join(map(str, list(keys)[:3]))}")
    if tokenizer.mask_token_id is None or tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {folder} has no mask or end token: this is no masked-diffusion model")
    return denoiser.eval(), tokenizer


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
