"""The tiny model and its tokenizer, loading, and the warm start."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import models
from diffusion_policy import DiffusionPolicy
from models import check_bidirectional, load_denoiser, tiny_denoiser, tiny_tokenizer, warm_start


@pytest.fixture(scope="module")
def tiny():
    return load_denoiser("tiny")


@pytest.fixture
def folder(tiny, tmp_path):
    for part in tiny:
        part.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_tiny_has_about_a_million_parameters(tiny):
    assert 0.8e6 < sum(p.numel() for p in tiny[0].parameters()) < 1.2e6


def test_a_saved_model_is_loaded_with_equal_logits_and_tokens(tiny, folder):
    denoiser, tokenizer = load_denoiser(str(folder))
    ids = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    assert torch.equal(denoiser(input_ids=ids).logits, tiny[0](input_ids=ids).logits)
    text = "3 14 99 = 7 <answer>( 3 + 14 ) * 5</answer>[EOS][MASK][PAD]"
    assert tokenizer(text).input_ids == tiny[1](text).input_ids
    assert (tokenizer.mask_token, tokenizer.eos_token, tokenizer.pad_token) == ("[MASK]", "[EOS]", "[PAD]")


def test_every_integer_operator_and_tag_is_one_token_whatever_the_spaces():
    tokenizer = tiny_tokenizer()
    words = ["<answer>", "(", "3", "+", "14", ")", "*", "50", "</answer>", "[EOS]"]
    for text in ("".join(words), " ".join(words)):
        assert [tokenizer.decode([i]) for i in tokenizer(text).input_ids] == words


def test_what_the_tokenizer_cannot_write_is_an_error():
    with pytest.raises(ValueError, match="no tokens"):
        DiffusionPolicy(*load_denoiser("tiny")).encode(["3 4 5 = 35", "three"])


def test_the_same_seed_gives_the_same_weights_and_leaves_the_global_generator_alone():
    state = torch.random.get_rng_state()
    first, same, other = (tiny_denoiser(tiny_tokenizer(), seed).lm_head.weight for seed in (1, 1, 2))
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_first_position_sees_the_last_one_with_and_without_padding(tiny):
    check_bidirectional(tiny[0])
    ids = torch.tensor([[5, 6, 7, 8]])
    gradient = []
    for mask in (None, torch.tensor([[0, 1, 1, 1]])):
        embedded = tiny[0].get_input_embeddings()(ids).detach().requires_grad_()
        tiny[0](inputs_embeds=embedded, attention_mask=mask).logits[0, 1].sum().backward()
        gradient.append(embedded.grad[0].abs().sum(-1))
    assert (gradient[0] > 0).all()
    assert gradient[1][0] == 0 and (gradient[1][1:] > 0).all()  # the padded one alone is not seen


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def drop_weight(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def add_weight(folder):
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"model.stranger": torch.zeros(3)}, folder / "model.safetensors", metadata={"format": "pt"})


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: edit_config(f, is_causal=True), "causal"),
        (lambda f: edit_config(f, vocab_size=50), "mismatched|size"),
        (drop_weight, "missing"),
        (add_weight, "unexpected"),
        (truncate, "cannot be loaded"),
        (lambda f: (f / "config.json").write_text("{"), "cannot be loaded"),
        (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors"),
        (lambda f: (f / "tokenizer.json").write_text("[]"), "cannot be loaded"),
    ],
)
def test_a_damaged_checkpoint_is_refused_in_one_line(folder, damage, says):
    damage(folder)
    with pytest.raises(ValueError, match=says) as error:
        load_denoiser(str(folder))
    assert "\n" not in str(error.value)


def test_a_tokenizer_without_a_mask_token_is_refused(folder):
    tokenizer = tiny_tokenizer()
    tokenizer.mask_token = None
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match="mask"):
        load_denoiser(str(folder))


@pytest.mark.parametrize("name", ["no-such-model", models.LLADA])
def test_a_name_that_cannot_be_loaded_says_what_to_do(name):
    with pytest.raises(ValueError, match="tiny"):
        load_denoiser(name)


def test_the_default_model_is_tiny_without_a_gpu_and_llada_with_one(monkeypatch):
    for gpu, name in ((False, "tiny"), (True, models.LLADA)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        assert models.default_model()[0] == name and "GPU" in models.default_model()[1]


def masked_diffusion_loss(denoiser, prompt, completion, mask_id):
    """The bound that the warm start minimises, summed over every mask pattern instead of drawn at random.

    With t uniform, E_t[1/t * 1(mask = M)] over patterns M of k of L masks is the integral of t^(k-1) (1-t)^(L-k) = B(k, L-k+1).
    """
    L, loss = completion.shape[1], 0.0
    for pattern in range(1, 2**L):
        masked = torch.tensor([bool(pattern >> i & 1) for i in range(L)])
        k = int(masked.sum())
        weight = torch.exp(torch.lgamma(torch.tensor(k)) + torch.lgamma(torch.tensor(L - k + 1)) - torch.lgamma(torch.tensor(L + 1)))
        with torch.no_grad():
            ids = torch.cat([prompt, completion.masked_fill(masked, mask_id)], dim=1)
            logp = denoiser(input_ids=ids).logits[:, prompt.shape[1] :].log_softmax(-1)
        loss -= (weight * logp.gather(-1, completion.unsqueeze(-1)).squeeze(-1)[:, masked].sum() / L / len(prompt)).item()
    return loss


def test_the_warm_start_learns_and_repeats_itself():
    tokenizer = tiny_tokenizer()
    prompt = torch.tensor([[15, 16], [17, 18]])
    completion = torch.tensor([[20, 21, 2], [22, 23, 2]])
    weights = []
    for _ in range(2):
        denoiser = tiny_denoiser(tokenizer, hidden_size=32, layers=1)
        before = masked_diffusion_loss(denoiser, prompt, completion, tokenizer.mask_token_id)
        warm_start(denoiser, prompt, completion, tokenizer.mask_token_id, steps=80, batch_size=16, learning_rate=1e-2)
        assert masked_diffusion_loss(denoiser, prompt, completion, tokenizer.mask_token_id) < 0.2 * before
        weights.append(torch.nn.utils.parameters_to_vector(denoiser.parameters()))
    assert torch.equal(*weights) and not denoiser.training
