"""The embedded model: a masked-diffusion language model that a laptop trains in minutes.

It is a LLaDA in miniature: a bidirectional Llama of 0.9M parameters (856,648) and 112 tokens. The
default LoRA adapter of rank 16 adds 0.2M (199,680). bases/tiny holds its trained base, which
models/make_base.py made; it can also make one for your own task.
"""

import math
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, logging

logging.disable_progress_bar()  # even a file of 2 MB would get one

BASE = Path(__file__).parent.parent / "bases" / "tiny"  # the base as shipped
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where a base is trained


def tiny_tokenizer():
    """A tokenizer with one token for each integer from 0 to 99, each operator and each tag.

    Spaces are dropped. Any other text is an error.
    """
    numbers = [str(n) for n in range(100)]
    words = ["[PAD]", "[MASK]", "[EOS]", "<answer>", "</answer>", *"+-*/()=", *numbers]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}))
    one_token = Regex(r"</?answer>|\d{1,2}|\S")  # 100 is read as 10 and 0
    tokenizer.pre_tokenizer = pre_tokenizers.Split(one_token, "removed", invert=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        padding_side="left",
        pad_token="[PAD]",
        mask_token="[MASK]",
        eos_token="[EOS]",
    )


def tiny_denoiser(tokenizer, seed=0, hidden_size=104, layers=6):
    """A bidirectional Llama of 0.9M parameters with random weights, float32 on the CPU."""
    config = LlamaConfig(
        is_causal=False,  # the only difference between a Llama and a LLaDA
        compact_prompts=True,  # it reads the tasks' compact prompts, not instructions
        initializer_range=0.08,
        tie_word_embeddings=True,  # so that it learns to copy twice as fast
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=512,
        vocab_size=len(tokenizer),
        mask_token_id=tokenizer.mask_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):  # transformers draws from the global generator
        torch.manual_seed(seed)
        denoiser = LlamaForCausalLM(config).eval()
        _start_numbers_as_waves(denoiser.get_input_embeddings().weight, tokenizer)
    return denoiser


@torch.no_grad()
def _start_numbers_as_waves(embeddings, tokenizer):
    """Initialises the numbers' rows of `embeddings` (V, D): nearby numbers start similar.

    A number n starts as a random mixture of sines and cosines of n with several periods, plus
    noise. With this start the model learns addition sooner.
    """
    n = torch.arange(100.0).unsqueeze(1)  # (100, 1)
    periods = torch.tensor([2, 3, 5, 7, 10, 20, 50, 100, 200])
    angle = 2 * math.pi * n / periods  # (100, 9)
    waves = torch.cat([angle.cos(), angle.sin(), n / 50 - 1, (n + 1).log() / 2 - 1], 1)  # (100, 20)
    mixed = waves @ torch.randn(20, embeddings.shape[1]) * (0.12 / 20**0.5)  # (100, D)
    first = tokenizer.convert_tokens_to_ids("0")
    embeddings[first : first + 100] = mixed + 0.05 * torch.randn_like(mixed)
