"""The embedded model: a masked-diffusion language model that a laptop trains in minutes.

It is a LLaDA in miniature: 0.9M parameters, 112 tokens. Its base, trained already, is bases/tiny.

    python -m models.tiny --out bases/again  makes that base again, in about an hour
    python -m models.tiny --task my_task.py:MyTask --out bases/my  one for your own task

A base model knows more than it shows, and RL uncovers it. Here that is arranged, in two lessons:
    1. The model learns from good demonstrations: problems with right answers.
    2. It falls into a habit: for a short while most demonstrations are careless. (Countdown's write
       + for - and * for /. Sudoku's fill each row in ascending order and look at nothing else.)
Then its most likely answer is a careless one, though it has learned the right one too. Without the
second lesson greedy answers are about as good as the model can do, and RL has little to gain.

It is interrupted and goes on by the same command. All chance comes from seeds.

Shapes: N demonstrations, B of them a step, P prompt tokens, L completion tokens.
"""

import math
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, logging

logging.disable_progress_bar()  # it would show one for a file of 2 MB
BASE = Path(__file__).parent.parent / "bases" / "tiny"  # as shipped
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where a base is trained


def tiny_tokenizer():
    """A token for each integer of 0 to 99, operator and tag; what it cannot write is an error."""
    special = {"pad_token": "[PAD]", "mask_token": "[MASK]", "eos_token": "[EOS]"}
    words = [*special.values(), "<answer>", "</answer>", *"+-*/()=", *map(str, range(100))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}))
    one_token = Regex(r"</?answer>|\d{1,2}|\S")  # 100 is read as 10 and 0
    tokenizer.pre_tokenizer = pre_tokenizers.Split(one_token, "removed", invert=True)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **special)


def tiny_denoiser(tokenizer, seed=0, hidden_size=104, layers=6):
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
        denoiser = LlamaForCausalLM(config).eval()
        _numbers_begin_as_waves(denoiser.get_input_embeddings().weight, tokenizer)
    return denoiser


@torch.no_grad()
def _numbers_begin_as_waves(embeddings, tokenizer):
    """Near numbers begin alike: waves of several lengths, mixed. Sums are learned sooner."""
    n = torch.arange(100.0).unsqueeze(1)
    angle = 2 * math.pi * n / torch.tensor([2, 3, 5, 7, 10, 20, 50, 100, 200])
    waves = torch.cat([angle.cos(), angle.sin(), n / 50 - 1, (n + 1).log() / 2 - 1], 1)  # (100, 20)
    mixed = waves @ torch.randn(20, embeddings.shape[1]) * (0.12 / 20**0.5)
    first = tokenizer.convert_tokens_to_ids("0")
    embeddings[first : first + 100] = mixed + 0.05 * torch.randn_like(mixed)
