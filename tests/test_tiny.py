"""The embedded model: its tokenizer, its size, its warm start."""

import math

import pytest
import torch

from diffusion_policy import DiffusionPolicy
from tiny import WarmStart, tiny_denoiser, tiny_tokenizer, warm_start


def test_tiny_has_about_a_million_parameters():
    assert 0.8e6 < sum(p.numel() for p in tiny_denoiser(tiny_tokenizer()).parameters()) < 1.2e6


def test_every_integer_operator_and_tag_is_one_token_whatever_the_spaces():
    tokenizer = tiny_tokenizer()
    words = ["<answer>", "(", "3", "+", "14", ")", "*", "50", "</answer>", "[EOS]"]
    for text in ("".join(words), " ".join(words)):
        assert [tokenizer.decode([i]) for i in tokenizer(text).input_ids] == words


def test_what_the_tokenizer_cannot_write_is_an_error():
    with pytest.raises(ValueError, match="no tokens"):
        DiffusionPolicy(tiny_denoiser(tiny_tokenizer()), tiny_tokenizer()).encode(
            ["3 4 5 = 35", "three"]
        )


def test_the_same_seed_gives_the_same_weights_and_leaves_the_global_generator_alone():
    state = torch.random.get_rng_state()
    first, same, other = (
        tiny_denoiser(tiny_tokenizer(), seed).lm_head.weight for seed in (1, 1, 2)
    )
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), state)


def masked_diffusion_loss(denoiser, prompt, completion, mask_id):
    """The bound that the warm start minimises, summed over every mask pattern.

    With t uniform, E_t[1/t * 1(mask = M)] over patterns M of k of L masks is the integral of
    t^(k-1) (1-t)^(L-k), which is the beta function B(k, L-k+1).
    """
    L, loss = completion.shape[1], 0.0
    for pattern in range(1, 2**L):
        masked = torch.tensor([bool(pattern >> i & 1) for i in range(L)])
        k = int(masked.sum())
        weight = math.gamma(k) * math.gamma(L - k + 1) / math.gamma(L + 1)
        with torch.no_grad():
            ids = torch.cat([prompt, completion.masked_fill(masked, mask_id)], dim=1)
            logp = denoiser(input_ids=ids).logits[:, prompt.shape[1] :].log_softmax(-1)
        logp = logp.gather(-1, completion.unsqueeze(-1)).squeeze(-1)[:, masked]
        loss -= weight * logp.sum().item() / L / len(prompt)
    return loss


def test_the_warm_start_learns_and_repeats_itself():
    tokenizer, weights = tiny_tokenizer(), []
    demonstrations = [("3 4", "8 9"), ("5 6", "10 11")]
    prompt = torch.tensor([[15, 16], [17, 18]])
    completion = torch.tensor([[20, 21, 2], [22, 23, 2]])  # the last is [EOS]
    for _ in range(2):
        denoiser = tiny_denoiser(tokenizer, hidden_size=32, layers=1)
        target = (prompt, completion, tokenizer.mask_token_id)
        before = masked_diffusion_loss(denoiser, *target)
        warm_start(denoiser, tokenizer, demonstrations, WarmStart(80, 16, 1e-2))
        assert masked_diffusion_loss(denoiser, *target) < 0.2 * before
        weights.append(torch.nn.utils.parameters_to_vector(denoiser.parameters()))
    assert torch.equal(*weights) and not denoiser.training


def calls_of_a_warm_start(demonstrations, length=None):
    """(options, logits) of each call of a denoiser that stands still: its learning rate is 0."""
    tokenizer, calls = tiny_tokenizer(), []
    denoiser = tiny_denoiser(tokenizer, hidden_size=32, layers=1)
    note = lambda _, args, options, output: calls.append((options, output.logits))  # noqa: E731
    hook = denoiser.register_forward_hook(note, with_kwargs=True)
    warm_start(denoiser, tokenizer, demonstrations, WarmStart(4, 16, 0.0), iter, length)
    hook.remove()
    return denoiser, calls


def test_prompts_of_unequal_length_are_learned_from_as_if_each_stood_alone():
    denoiser, calls = calls_of_a_warm_start([("3 4 5 6", "8 9"), ("7", "10"), ("3 4", "")])
    lengths = set()
    for options, logits in calls:
        mask = options["attention_mask"].bool()
        for row, ids in enumerate(options["input_ids"]):
            alone = denoiser(input_ids=ids[mask[row]].unsqueeze(0)).logits[0]
            torch.testing.assert_close(logits[row, mask[row]], alone, rtol=1e-4, atol=1e-5)
            lengths.add(len(alone))
    assert lengths == {1 + 3, 2 + 3, 4 + 3}


@pytest.mark.parametrize(("length", "L"), [(None, 3), (2, 2), (6, 6)])
def test_end_tokens_fill_the_canvas_and_prompts_of_one_length_need_no_mask(length, L, monkeypatch):
    targets = []
    loss = lambda logits, tokens, **_: targets.extend(tokens.tolist()) or logits.sum()  # noqa: E731
    monkeypatch.setattr("tiny.cross_entropy", loss)
    _, calls = calls_of_a_warm_start([("3 4", "8 9"), ("5 6", "8")], length)
    assert all(options["input_ids"].shape == (16, 2 + L) for options, _ in calls)
    assert not any("attention_mask" in options for options, _ in calls)
    assert set(targets) == {20, 21, 2}  # no [PAD], which is 0


@pytest.mark.parametrize(
    ("pair", "says"),
    [(("3 4", "8 9 10"), "3 tokens.*length is 2"), (("three", "8"), "no tokens")],
)
def test_demonstrations_that_do_not_fit_are_refused_in_one_line(pair, says):
    with pytest.raises(ValueError, match=says) as error:
        calls_of_a_warm_start([("3 4", "8 9"), pair], 2)
    assert "\n" not in str(error.value)


def test_the_progress_sees_every_step():
    tokenizer, seen = tiny_tokenizer(), []
    denoiser = tiny_denoiser(tokenizer, hidden_size=32, layers=1)

    def progress(steps):
        for step in steps:
            seen.append(step)
            yield step

    warm_start(denoiser, tokenizer, [("3", "4")], WarmStart(3, 2), progress)
    assert seen == [0, 1, 2]
