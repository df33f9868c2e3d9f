"""The embedded model: its tokenizer, its size, its seed, and the base as shipped."""

import hashlib
import json

import pytest
import torch

from diffusion_policy import DiffusionPolicy
from models import make_base, tiny
from models.lora import add_lora, describe_lora
from models.prompting import encode_prompts
from models.tiny import tiny_denoiser, tiny_tokenizer


def test_tiny_has_as_many_parameters_as_the_texts_say():
    """0.9M, and 0.2M in the default adapter; together they would be 1.1M."""
    denoiser = tiny_denoiser(tiny_tokenizer())
    assert sum(p.numel() for p in denoiser.parameters()) == 856_648
    model = add_lora(denoiser, rank=16, alpha=32)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 199_680
    assert "856,648" in tiny.__doc__
    assert "199,680" in tiny.__doc__
    assert "0.2M parameters on a base of 0.9M" in describe_lora(model)


def test_every_integer_operator_and_tag_is_one_token_whatever_the_spaces():
    tokenizer = tiny_tokenizer()
    words = ["<answer>", "(", "3", "+", "14", ")", "*", "50", "</answer>", "[EOS]"]
    for text in ("".join(words), " ".join(words)):
        assert [tokenizer.decode([i]) for i in tokenizer(text).input_ids] == words


def test_what_the_tokenizer_cannot_write_is_an_error():
    tokenizer = tiny_tokenizer()
    policy = DiffusionPolicy(tiny_denoiser(tokenizer), tokenizer)
    with pytest.raises(ValueError, match="no tokens"):
        encode_prompts(policy, ["3 4 5 = 35", "three"])


def test_the_same_seed_gives_the_same_weights_and_leaves_the_global_generator_alone():
    state = torch.random.get_rng_state()
    first = tiny_denoiser(tiny_tokenizer(), seed=1).lm_head.weight
    same = tiny_denoiser(tiny_tokenizer(), seed=1).lm_head.weight
    other = tiny_denoiser(tiny_tokenizer(), seed=2).lm_head.weight
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_shipped_base_is_small_and_knows_how_it_was_made():
    made = json.loads((tiny.BASE / "made.json").read_text())
    weights = (tiny.BASE / "model.safetensors").read_bytes()
    assert made["sha256"] == hashlib.sha256(weights).hexdigest()
    assert made["task"] == make_base.SHIPPED_TASKS
    assert make_base.Recipe(**made["recipe"]) == make_base.SHIPPED
    assert sum(path.stat().st_size for path in tiny.BASE.iterdir()) < 4e6
