"""The embedded model: a masked-diffusion language model that a laptop trains in minutes.

It is a LLaDA in miniature: 0.9M parameters, 112 tokens, random until its warm start. It needs no
download and no other file of this project, and all chance comes from seeds.

Shapes: N demonstrations, B of them a step, P prompt tokens, L completion tokens.
"""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch.nn.functional import cross_entropy, pad
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def tiny_tokenizer():
    """A token for each integer of 0 to 99, operator and tag; what it cannot write is an error."""
    special = {"pad_token": "[PAD]", "mask_token": "[MASK]", "eos_token": "[EOS]"}
    words = [*special.values(), "<answer>", "</answer>", *"+-*/()=", *map(str, range(100))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}))
    one_token = Regex(r"</?answer>|\d{1,2}|\S")  # 100 is read as 10 and 0
    tokenizer.pre_tokenizer = pre_tokenizers.Split(one_token, "removed", invert=True)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **special)


def tiny_denoiser(tokenizer, seed=0, hidden_size=128, layers=4):
    """A random bidirectional Llama of 0.9M parameters, float32 on the CPU."""
    config = LlamaConfig(
        is_causal=False,  # the whole difference between a Llama and a LLaDA
        compact_prompts=True,  # it reads the tasks' compact prompts, not instructions
        initializer_range=0.08, tie_word_embeddings=True,  # so it learns to copy twice as fast
        hidden_size=hidden_size, intermediate_size=3 * hidden_size, num_hidden_layers=layers,
        num_attention_heads=4, max_position_embeddings=512, vocab_size=len(tokenizer),
        mask_token_id=tokenizer.mask_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):  # transformers draws from the global generator
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


@dataclass
class WarmStart:
    steps: int = 500
    batch: int = 256  # B, demonstrations a step
    learning_rate: float = 3e-3  # peak of AdamW; Muon's is five times it
    seed: int = 0  # of the draws here; the first weights are of tiny_denoiser's


def _encode(tokenizer, demonstrations, length):
    """Prompts padded on the left, and their mask, (N, P) each; texts and then [EOS]s, (N, L)."""
    prompts, texts = map(list, zip(*demonstrations, strict=True))
    try:
        prompt = tokenizer(prompts, padding=True, return_tensors="pt")
        rows = tokenizer(texts).input_ids
    except Exception:  # tokenizers raises bare ones
        what = "tiny has no tokens for a demonstration: it reads numbers, +-*/()= and <answer> tags"
        raise ValueError(what) from None
    longest = max(map(len, rows))
    L = length or longest + 1
    if longest > L:
        raise ValueError(f"a demonstration has {longest} tokens, its task's length is {L}")
    completion_ids = [row + [tokenizer.eos_token_id] * (L - len(row)) for row in rows]
    return prompt.input_ids, prompt.attention_mask, torch.tensor(completion_ids)


def warm_start(denoiser, tokenizer, demonstrations, recipe, progress=iter, length=None):
    """Masked-diffusion training in place, as LLaDA itself was trained.

    Each completion token is masked with probability t, and t is uniform in (0, 1). The loss is the
    masked tokens' cross-entropy times 1/t: an upper bound of the negative log-likelihood.

    demonstrations: N pairs of texts (prompt, completion). length: L; None leaves the longest one
    [EOS]. `progress` wraps the steps, as tqdm does. Raises ValueError for a text that has no place.
    """
    prompt_ids, prompt_mask, completion_ids = _encode(tokenizer, demonstrations, length)
    (N, L), B, device, padding = completion_ids.shape, recipe.batch, denoiser.device, {}
    optimizers = _optimizers(denoiser, recipe)
    generator = torch.Generator().manual_seed(recipe.seed)
    denoiser.train()
    for _ in progress(range(recipe.steps)):
        index = torch.randint(0, N, (B,), generator=generator)
        t = (torch.arange(B) + torch.rand(B, generator=generator)) / B  # one in each B-th of (0, 1)
        t = t.clamp(min=1e-3).unsqueeze(1).expand(-1, L)  # (B, L)
        masked = torch.rand((B, L), generator=generator) < t
        t, masked, tokens = (x.to(device) for x in (t, masked, completion_ids[index]))
        noisy = tokens.masked_fill(masked, tokenizer.mask_token_id)
        ids = torch.cat([prompt_ids[index].to(device), noisy], dim=1)  # (B, P + L)
        if not prompt_mask.all():
            mask = pad(prompt_mask[index], (0, L), value=1).to(device)  # (B, P + L)
            padding = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        logits = denoiser(input_ids=ids, use_cache=False, **padding).logits[:, -L:]
        nats = cross_entropy(logits[masked], tokens[masked], reduction="none")
        loss = (nats / t[masked]).sum() / (B * L)
        denoiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        for part in optimizers:
            part.step()
    denoiser.eval()


def _optimizers(denoiser, recipe):
    """Muon for the layers' matrices (a quarter fewer steps), AdamW for the rest, schedules."""
    parts = {True: [], False: []}
    for name, p in denoiser.named_parameters():
        parts["layers" in name and p.ndim == 2].append(p)
    muon = torch.optim.Muon(parts[True], lr=5 * recipe.learning_rate, weight_decay=0.0)
    adam = torch.optim.AdamW(parts[False], recipe.learning_rate, (0.9, 0.95), weight_decay=0.0)

    def factor(step):  # a warm-up of 50 steps, then a cosine to a tenth
        return min(1, (step + 1) / 50) * (0.55 + 0.45 * math.cos(math.pi * step / recipe.steps))

    return [muon, adam, LambdaLR(muon, factor), LambdaLR(adam, factor)]


def for_tiny(task):
    """What the embedded model uses of a task. Raises ValueError where it has no such form."""
    task = getattr(task, "compact", task)
    missing = [f"no {name}" for name in ("length", "demonstrations") if not hasattr(task, name)]
    if missing:
        name, missing = getattr(task, "name", type(task).__name__), " and ".join(missing)
        way_out = "give --model a LLaDA-class checkpoint"
        raise ValueError(f"{name} has {missing} for the tiny model: {way_out}")
    return task


def base(task, careless, recipe, cache_dir, device="cpu"):
    """The folder of a base model for a task, made the first time and kept under a hash.

    It learns from demonstrations of mixed quality, and not for long: like a real base model, it
    knows more than it shows.
    """

    def pairs(n):
        shown = task.demonstrations(n, recipe.seed, careless)
        return [(task.prompt(problem), text) for problem, text in shown]

    name, code = getattr(task, "name", type(task).__name__), Path(__file__).read_text("utf-8")
    key = f"{recipe} {careless} {task.length} {pairs(100)} {torch.__version__} {code}"
    folder = Path(cache_dir) / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if not folder.exists():
        tokenizer = tiny_tokenizer()
        denoiser = tiny_denoiser(tokenizer, recipe.seed).to(device)
        shown = pairs(min(60_000, recipe.steps * recipe.batch))
        bar = lambda steps: tqdm(steps, "warm start", unit="step", dynamic_ncols=True)  # noqa: E731
        warm_start(denoiser, tokenizer, shown, recipe, bar, task.length)
        aside = folder.with_name(f"{folder.name}.tmp")  # a kill leaves no half of a base behind
        for part in (denoiser, tokenizer):
            part.save_pretrained(aside)
        aside.rename(folder)
    return folder
