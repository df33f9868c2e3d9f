"""How a base is trained: the loss against its definition, both lessons, exact continuation."""

import hashlib
import json
import math
import os
import random
import signal
import stat

import pytest
import torch

from models import pretraining
from models.make_base import Recipe
from models.pretraining import Muon, Training, encode, make, masked_loss
from models.tiny import tiny_denoiser, tiny_tokenizer


@pytest.fixture
def small(monkeypatch):
    """The tiny model in miniature: 32 wide, 1 layer."""

    def small_denoiser(tokenizer, seed, layers):
        return tiny_denoiser(tokenizer, seed, hidden_size=32, layers=1)

    monkeypatch.setattr(pretraining, "tiny_denoiser", small_denoiser)


class Pairs:
    """A task of a few demonstrations: what Training asks of one."""

    def __init__(self, good, careless, length):
        self.good = good
        self.careless = careless
        self.length = length

    def prompt(self, problem):
        return problem

    def demonstrations(self, n, seed, careless):
        rng = random.Random(seed)
        for _ in range(n):
            is_careless = rng.random() < careless
            yield rng.choice(self.careless if is_careless else self.good)


GOOD = [("3 4", "8 9"), ("5 6", "10 11")]
CARELESS = [("3 4", "8 8"), ("5 6", "10 10")]
PROMPT = torch.tensor([[15, 16], [17, 18]])
GOOD_IDS = torch.tensor([[20, 21, 2], [22, 23, 2]])  # the last is [EOS]
CARELESS_IDS = torch.tensor([[20, 20, 2], [22, 22, 2]])


# ---- the loss ------------------------------------------------------------------------------------


def expected_loss(denoiser, prompt, completion, mask_id):
    """The masked-diffusion loss, summed over every mask pattern.

    With t uniform, E_t[1/t * 1(mask = M)] over patterns M of k of L masks is the integral of
    t^(k-1) (1-t)^(L-k), which is the beta function B(k, L-k+1).
    """
    N, L = completion.shape
    loss = 0.0
    for pattern in range(1, 2**L):
        masked = torch.tensor([bool(pattern >> i & 1) for i in range(L)])
        k = int(masked.sum())
        weight = math.gamma(k) * math.gamma(L - k + 1) / math.gamma(L + 1)
        ids = torch.cat([prompt, completion.masked_fill(masked, mask_id)], dim=1)
        with torch.no_grad():
            logits = denoiser(input_ids=ids).logits[:, prompt.shape[1] :]
        logp = logits.log_softmax(-1).gather(-1, completion.unsqueeze(-1)).squeeze(-1)
        loss -= weight * logp[:, masked].sum().item() / L / N
    return loss


def test_the_loss_drawn_is_the_expected_one_on_average():
    tokenizer = tiny_tokenizer()
    mask_id = tokenizer.mask_token_id
    denoiser = tiny_denoiser(tokenizer, hidden_size=32, layers=1)
    prompt, prompt_mask, completion = encode(tokenizer, GOOD * 128, 3)
    generator = torch.Generator().manual_seed(0)
    losses = []
    with torch.no_grad():
        for _ in range(300):
            loss = masked_loss(denoiser, prompt, prompt_mask, completion, mask_id, generator)
            losses.append(loss.item())
    expected = expected_loss(denoiser, PROMPT, GOOD_IDS, mask_id)
    error = torch.tensor(losses).std().item() / len(losses) ** 0.5
    assert abs(sum(losses) / len(losses) - expected) < 4 * error < 0.1 * expected


def test_prompts_of_unequal_length_are_learned_from_as_if_each_stood_alone():
    tokenizer = tiny_tokenizer()
    denoiser = tiny_denoiser(tokenizer, hidden_size=32, layers=1)
    calls = []

    def note(module, args, options, output):
        calls.append((options["input_ids"], options["attention_mask"].bool(), output.logits))

    hook = denoiser.register_forward_hook(note, with_kwargs=True)
    prompt, prompt_mask, completion = encode(
        tokenizer, [("3 4 5 6", "8 9"), ("7", "10"), ("3 4", "")], 3
    )
    generator = torch.Generator().manual_seed(0)
    masked_loss(denoiser, prompt, prompt_mask, completion, tokenizer.mask_token_id, generator)
    hook.remove()
    [(ids, mask, logits)] = calls
    assert mask.sum(1).tolist() == [7, 4, 5]
    for row in range(3):
        alone = denoiser(input_ids=ids[row, mask[row]].unsqueeze(0)).logits[0]
        torch.testing.assert_close(logits[row, mask[row]], alone, rtol=1e-4, atol=1e-5)


def test_end_tokens_fill_the_canvas_and_prompts_of_one_length_need_no_mask():
    prompt, prompt_mask, completion = encode(tiny_tokenizer(), [("3 4", "8 9"), ("5 6", "8")], 4)
    assert prompt.tolist() == PROMPT.tolist()
    assert prompt_mask.all()
    assert completion.tolist() == [[20, 21, 2, 2], [20, 2, 2, 2]]


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (("3 4", "8 9 10"), "3 tokens.*length is 2"),
        (("three", "8"), "no tokens"),
    ],
)
def test_demonstrations_that_do_not_fit_are_refused_in_one_line(pair, message):
    with pytest.raises(ValueError, match=message) as error:
        encode(tiny_tokenizer(), [("3 4", "8 9"), pair], 2)
    assert "\n" not in str(error.value)


def test_muon_steps_by_a_nearly_orthogonal_matrix_in_the_gradients_directions():
    for rows, columns in ((6, 10), (10, 6), (8, 8)):
        p = torch.nn.Parameter(torch.zeros(rows, columns))
        p.grad = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
        u, _, v = torch.linalg.svd(p.grad, full_matrices=False)
        Muon([p], lr=1.0).step()
        moved = u.T @ -p.detach() @ v.T / max(1, rows / columns) ** 0.5
        assert moved.diagonal().min() > 0.5
        assert moved.diagonal().max() < 1.4
        assert (moved - moved.diagonal().diag()).abs().max() < 1e-3


# ---- the training --------------------------------------------------------------------------------


def test_the_first_lesson_is_learned_and_the_second_becomes_a_habit(small):
    recipe = Recipe(steps=80, habit_steps=60, batch=16, learning_rate=1e-2, careless=0.9)
    training = Training([Pairs(GOOD, CARELESS, 3)], recipe, device="cpu")
    mask_id = training.tokenizer.mask_token_id
    denoiser = training.denoiser
    before = expected_loss(denoiser, PROMPT, GOOD_IDS, mask_id)
    while training.done < 80:
        training.step()
    assert expected_loss(denoiser, PROMPT, GOOD_IDS, mask_id) < 0.2 * before
    while training.done < 140:
        training.step()
    good = expected_loss(denoiser, PROMPT, GOOD_IDS, mask_id)
    careless = expected_loss(denoiser, PROMPT, CARELESS_IDS, mask_id)
    assert careless < 0.4 < good < before  # the habit is likelier, the lesson not forgotten


def make_small(out, recipe):
    tasks = [Pairs(GOOD, CARELESS, 3), Pairs([("7", "1")], [("7", "2")], 2)]
    make(out, tasks, recipe, {"task": "a"}, save_every=4, device="cpu")


def test_a_training_that_was_broken_off_continues_to_the_same_weights(small, tmp_path, monkeypatch):
    recipe = Recipe(steps=6, habit_steps=4, batch=4)
    make_small(tmp_path / "whole", recipe)
    step = Training.step

    def broken_step(training):
        if training.done == 7:
            raise RuntimeError("broken off")
        return step(training)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "step", broken_step)
        with pytest.raises(RuntimeError, match="broken off"):
            make_small(tmp_path / "broken", recipe)
    assert [path.name for path in tmp_path.glob("broken*")] == ["broken.training"]
    with pytest.raises(ValueError, match="another recipe"):
        make_small(tmp_path / "broken", Recipe())
    make_small(tmp_path / "broken", recipe)

    weights = (tmp_path / "broken" / "model.safetensors").read_bytes()
    assert (tmp_path / "whole" / "model.safetensors").read_bytes() == weights
    made = json.loads((tmp_path / "broken" / "made.json").read_text())
    assert made["task"] == "a"
    assert made["recipe"]["steps"] == 6
    assert made["sha256"] == hashlib.sha256(weights).hexdigest()
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "broken"}


def test_whoever_may_read_new_files_may_read_a_base(small, tmp_path):
    make_small(tmp_path / "base", Recipe(steps=1, habit_steps=0, batch=2))
    modes = {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "base").iterdir()}
    (tmp_path / "new").touch()
    assert modes == {stat.S_IMODE((tmp_path / "new").stat().st_mode)}


def test_ctrl_c_ends_the_step_and_saves_and_the_same_call_continues(small, tmp_path, monkeypatch):
    recipe = Recipe(steps=6, habit_steps=4, batch=4)
    make_small(tmp_path / "whole", recipe)
    step = Training.step

    def interrupted_step(training):
        if training.done == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return step(training)

    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(Training, "step", interrupted_step)
        with pytest.raises(KeyboardInterrupt):
            make_small(tmp_path / "broken", recipe)
    assert signal.getsignal(signal.SIGINT) is handler
    assert torch.load(tmp_path / "broken.training", weights_only=True)["done"] == 2
    make_small(tmp_path / "broken", recipe)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "broken")]
    assert weights[0] == weights[1]


def test_what_lies_beside_a_base_is_not_touched(small, tmp_path):
    """Earlier versions overwrote OUT.tmp, and took OUT.made for their own."""
    for name in ("base.tmp", "base.made"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("the user's")
    make_small(tmp_path / "base", Recipe(steps=1, habit_steps=0, batch=2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "base.made", "base.tmp"]
    assert not (tmp_path / "base" / "file").exists()
    for name in ("base.tmp", "base.made"):
        assert (tmp_path / name / "file").read_text() == "the user's"


@pytest.mark.parametrize("content", [b"", b"PK", b"{}"])
def test_a_broken_state_is_one_line_and_left_where_it_is(small, tmp_path, content):
    (tmp_path / "base.training").write_bytes(content)
    with pytest.raises(ValueError, match="base.training was not written by make_base") as error:
        make_small(tmp_path / "base", Recipe(steps=1, habit_steps=0, batch=2))
    assert "\n" not in str(error.value)
    assert (tmp_path / "base.training").read_bytes() == content


def test_a_loss_that_is_not_finite_makes_no_base(small, tmp_path, monkeypatch):
    monkeypatch.setattr(Training, "step", lambda training: math.nan)
    with pytest.raises(ValueError, match="step 1: the loss is not finite"):
        make_small(tmp_path / "base", Recipe(steps=1, habit_steps=0, batch=2))
    assert not any(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_told_before_the_first_step(small, tmp_path, monkeypatch):
    monkeypatch.setattr(Training, "step", lambda training: pytest.fail("a step was made"))
    (tmp_path / "file").write_text("")
    with pytest.raises((ValueError, OSError)):
        make_small(tmp_path / "file" / "base", Recipe(steps=1, habit_steps=0, batch=2))
    monkeypatch.setattr("tempfile.TemporaryFile", lambda dir: open("/nowhere/x"))  # noqa: SIM115
    with pytest.raises(ValueError, match="base cannot be written"):
        make_small(tmp_path / "base", Recipe(steps=1, habit_steps=0, batch=2))
