"""The embedded model: a masked-diffusion language model that a laptop trains in minutes.

It is a LLaDA in miniature: 0.9M parameters, 112 tokens, random until its warm start. Nothing is
downloaded, nothing here imports another file of this project, and all chance comes from seeds.

Shapes: N demonstrations, B of them a step, P prompt tokens, L completion tokens.
"""

import math
from dataclasses import dataclass

import torch
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def tiny_tokenizer():
    """A token for each integer of 0 to 99, operator and tag. 100 is read as 10 and 0.

    It has no unknown token: a text that it cannot write is an error.
    """
    special, tags = ["[PAD]", "[MASK]", "[EOS]"], ["<answer>", "</answer>"]
    words = special + tags + list("+-*/()=") + [str(i) for i in range(100)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}))
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in special])
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in tags])
    one_token = pre_tokenizers.Split(Regex(r"\d{1,2}|[^\d\s]"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), one_token])
    names = {"pad_token": "[PAD]", "mask_token": "[MASK]", "eos_token": "[EOS]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **names)


def tiny_denoiser(tokenizer, seed=0, hidden_size=128, layers=4):
    """A random bidirectional Llama of 0.9M parameters, float32 on the CPU."""
    config = LlamaConfig(
        is_causal=False,  # the whole difference between a Llama and a LLaDA
        compact_prompts=True,  # it reads the tasks' compact prompts, not instructions
        initializer_range=0.08, tie_word_embeddings=True,  # so it learns to copy twice as fast
        vocab_size=len(tokenizer), max_position_embeddings=512,
        hidden_size=hidden_size, intermediate_size=3 * hidden_size,
        num_hidden_layers=layers, num_attention_heads=4,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, mask_token_id=tokenizer.mask_token_id,
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


def warm_start(denoiser, tokenizer, demonstrations, recipe, progress=iter):
    """Masked-diffusion training in place, as LLaDA itself was trained.

    Each completion token is masked with probability t, and t is uniform in (0, 1). The loss is the
    masked tokens' cross-entropy times 1/t: an upper bound of the negative log-likelihood.

    demonstrations: N pairs of texts (prompt, completion). `progress` wraps the steps, as tqdm does.
    Raises ValueError unless all prompts have one length in tokens, and all completions.
    """
    prompts, texts = zip(*demonstrations, strict=True)
    texts, options = [text + tokenizer.eos_token for text in texts], {"add_special_tokens": False}
    prompt_ids = tokenizer(list(prompts), return_tensors="pt", **options).input_ids  # (N, P)
    completion_ids = tokenizer(texts, return_tensors="pt", **options).input_ids  # (N, L)
    (N, L), B, device = completion_ids.shape, recipe.batch, denoiser.device
    optimizers = _optimizers(denoiser, recipe)
    generator = torch.Generator().manual_seed(recipe.seed)
    denoiser.train()
    for _ in progress(range(recipe.steps)):
        index = torch.randint(0, N, (B,), generator=generator)
        t = (torch.arange(B) + torch.rand(B, generator=generator)) / B  # one in each B-th of (0, 1)
        t = t.clamp(min=1e-3).unsqueeze(1).expand(-1, L)  # (B, L)
        masked = torch.rand((B, L), generator=generator) < t
        tokens = completion_ids[index]
        noisy = tokens.masked_fill(masked, tokenizer.mask_token_id)
        ids = torch.cat([prompt_ids[index], noisy], dim=1).to(device)  # (B, P + L)
        logits = denoiser(input_ids=ids, use_cache=False).logits[:, -L:][masked.to(device)]
        nats = cross_entropy(logits, tokens[masked].to(device), reduction="none")
        loss = (nats / t[masked].to(device)).sum() / (B * L)
        denoiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        for part in optimizers:
            part.step()
    denoiser.eval()


def _optimizers(denoiser, recipe):
    """Muon for the layers' matrices, AdamW for the rest: countdown takes 300 steps instead of 400.

    Their schedules follow them in the list: a warm-up of 50 steps, then a cosine to a tenth.
    """
    parts = {True: [], False: []}
    for name, p in denoiser.named_parameters():
        parts["layers" in name and p.ndim == 2].append(p)
    muon = torch.optim.Muon(parts[True], lr=5 * recipe.learning_rate, weight_decay=0.0)
    adam = torch.optim.AdamW(parts[False], recipe.learning_rate, (0.9, 0.95), weight_decay=0.0)

    def factor(step):
        return min(1, (step + 1) / 50) * (0.55 + 0.45 * math.cos(math.pi * step / recipe.steps))

    return [muon, adam, LambdaLR(muon, factor), LambdaLR(adam, factor)]
