"""The embedded model: its tokenizer, its size, its warm start."""

import hashlib
import json
import math
import random

import pytest
import torch

from diffusion_policy import DiffusionPolicy
from models import make_base, tiny
from models.make_base import Recipe, Training, encode, masked_loss
from models.tiny import tiny_denoiser, tiny_tokenizer


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(tiny, "DEVICE", "cpu")


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


def bound(denoiser, prompt, completion, mask_id):
    """The masked-diffusion loss, summed over every mask pattern.

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


class Pairs:
    """A task of a few demonstrations: what Training asks of one."""

    def __init__(self, good, careless, length):
        self.shown, self.length = (good, careless), length

    def prompt(self, problem):
        return problem

    def demonstrations(self, n, seed, careless):
        chance, (good, other) = random.Random(seed), self.shown
        for _ in range(n):
            yield chance.choice(other if chance.random() < careless else good)


@pytest.fixture
def small(monkeypatch):
    """tiny in miniature: 32 wide, 1 layer."""
    make = tiny.tiny_denoiser
    monkeypatch.setattr(tiny, "tiny_denoiser", lambda *how: make(*how, hidden_size=32, layers=1))


GOOD, CARELESS = [("3 4", "8 9"), ("5 6", "10 11")], [("3 4", "8 8"), ("5 6", "10 10")]
PROMPT = torch.tensor([[15, 16], [17, 18]])
GOOD_IDS = torch.tensor([[20, 21, 2], [22, 23, 2]])  # the last is [EOS]
CARELESS_IDS = torch.tensor([[20, 20, 2], [22, 22, 2]])


def test_the_loss_drawn_is_the_bound_on_average():
    tokenizer = tiny_tokenizer()
    denoiser = tiny_denoiser(tokenizer, hidden_size=32, layers=1)
    batch = encode(tokenizer, GOOD * 128, 3)
    generator, mask_id = torch.Generator().manual_seed(0), tokenizer.mask_token_id
    with torch.no_grad():
        drawn = [masked_loss(denoiser, *batch, mask_id, generator).item() for _ in range(300)]
    expected = bound(denoiser, PROMPT, GOOD_IDS, mask_id)
    error = torch.tensor(drawn).std().item() / len(drawn) ** 0.5
    assert abs(sum(drawn) / len(drawn) - expected) < 4 * error < 0.1 * expected


def test_the_first_lesson_is_learned_and_the_second_becomes_a_habit(small):
    recipe = Recipe(steps=80, habit_steps=60, batch=16, learning_rate=1e-2, careless=0.9)
    training = Training([Pairs(GOOD, CARELESS, 3)], recipe)
    mask_id, denoiser = training.tokenizer.mask_token_id, training.denoiser
    before = bound(denoiser, PROMPT, GOOD_IDS, mask_id)
    while training.done < 80:
        training.step()
    assert bound(denoiser, PROMPT, GOOD_IDS, mask_id) < 0.2 * before
    while training.done < 140:
        training.step()
    good, habit = (bound(denoiser, PROMPT, ids, mask_id) for ids in (GOOD_IDS, CARELESS_IDS))
    assert habit < 0.4 < good < before  # the habit is likelier, the lesson not forgotten


def test_a_training_that_was_broken_off_goes_on_to_the_same_weights(small, tmp_path):
    recipe = Recipe(steps=6, habit_steps=4, batch=4)
    tasks = [Pairs(GOOD, CARELESS, 3), Pairs([("7", "1")], [("7", "2")], 2)]
    make_base.make(tmp_path / "whole", tasks, recipe, {"task": "a"}, save_every=4)
    with pytest.MonkeyPatch.context() as patch:
        step = Training.step
        broken = lambda self: step(self) if self.done < 7 else 1 / 0  # noqa: E731
        patch.setattr(Training, "step", broken)
        with pytest.raises(ZeroDivisionError):
            make_base.make(tmp_path / "broken", tasks, recipe, {"task": "a"}, save_every=4)
    assert [path.name for path in tmp_path.glob("broken*")] == ["broken.training"]
    with pytest.raises(ValueError, match="another recipe"):
        make_base.make(tmp_path / "broken", tasks, Recipe(), {"task": "a"}, save_every=4)
    make_base.make(tmp_path / "broken", tasks, recipe, {"task": "a"}, save_every=4)
    files = [tmp_path / name / "model.safetensors" for name in ("whole", "broken")]
    assert files[0].read_bytes() == files[1].read_bytes()
    made = json.loads((tmp_path / "broken" / "made.json").read_text())
    assert made["task"] == "a" and made["recipe"]["steps"] == 6
    assert made["sha256"] == hashlib.sha256(files[1].read_bytes()).hexdigest()
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "broken"}


def test_muon_steps_by_a_nearly_orthogonal_matrix_in_the_gradients_directions():
    for shape in ((6, 10), (10, 6), (8, 8)):
        p = torch.nn.Parameter(torch.zeros(shape))
        p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        u, _, v = torch.linalg.svd(p.grad, full_matrices=False)
        make_base.Muon([p], lr=1.0).step()
        moved = u.T @ -p.detach() @ v.T / max(1, shape[0] / shape[1]) ** 0.5
        assert moved.diagonal().min() > 0.5 and moved.diagonal().max() < 1.4
        assert (moved - moved.diagonal().diag()).abs().max() < 1e-3


def test_prompts_of_unequal_length_are_learned_from_as_if_each_stood_alone():
    tokenizer = tiny_tokenizer()
    denoiser, calls = tiny_denoiser(tokenizer, hidden_size=32, layers=1), []
    note = lambda _, args, options, output: calls.append((options, output.logits))  # noqa: E731
    denoiser.register_forward_hook(note, with_kwargs=True)
    batch = encode(tokenizer, [("3 4 5 6", "8 9"), ("7", "10"), ("3 4", "")], 3)
    masked_loss(denoiser, *batch, tokenizer.mask_token_id, torch.Generator().manual_seed(0))
    [(options, logits)] = calls
    mask = options["attention_mask"].bool()
    assert mask.sum(1).tolist() == [7, 4, 5]
    for row, ids in enumerate(options["input_ids"]):
        alone = denoiser(input_ids=ids[mask[row]].unsqueeze(0)).logits[0]
        torch.testing.assert_close(logits[row, mask[row]], alone, rtol=1e-4, atol=1e-5)


def test_end_tokens_fill_the_canvas_and_prompts_of_one_length_need_no_mask():
    prompt, mask, completion = encode(tiny_tokenizer(), [("3 4", "8 9"), ("5 6", "8")], 4)
    assert prompt.tolist() == PROMPT.tolist() and bool(mask.all())
    assert completion.tolist() == [[20, 21, 2, 2], [20, 2, 2, 2]]


@pytest.mark.parametrize(
    ("pair", "says"),
    [(("3 4", "8 9 10"), "3 tokens.*length is 2"), (("three", "8"), "no tokens")],
)
def test_demonstrations_that_do_not_fit_are_refused_in_one_line(pair, says):
    with pytest.raises(ValueError, match=says) as error:
        encode(tiny_tokenizer(), [("3 4", "8 9"), pair], 2)
    assert "\n" not in str(error.value)


# ---- the command ---------------------------------------------------------------------------------


def test_a_base_for_ones_own_task_is_made_by_one_command(small, tmp_path, capsys):
    source = """
class Echo:
    length = 2
    def problems(self, split, n, seed): return [{"x": 3}] * n
    def prompt(self, problem): return "3"
    def reward(self, problem, text): return float(text == "3")
    def solved(self, problem, text): return text == "3"
    def demonstrations(self, n, seed, careless): return [({"x": 3}, "3")] * n
"""
    (tmp_path / "echo.py").write_text(source)
    flags = f"--task {tmp_path}/echo.py:Echo --steps 2 --habit_steps 1 --batch 2"
    make_base.main(["--out", str(tmp_path / "base"), *flags.split()])
    assert f"--model {tmp_path}/base" in capsys.readouterr().out
    assert (tmp_path / "base" / "model.safetensors").exists()
    with pytest.raises(SystemExit) as exit:
        make_base.main(["--out", str(tmp_path / "base"), *flags.split()])
    assert exit.value.code == 2 and "there already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--task chess", "unknown task"),
        ("--task gsm8k", "no length and no demonstrations"),
        ("--turns 1,2,3", "turns"),
        ("--turns x,y", "turns"),
        ("--steps 0", "at least 1"),
        ("--batch 0", "at least 1"),
        ("--careless 2", "careless"),
    ],
)
def test_bad_flags_get_one_line(flags, says, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        make_base.main(["--out", str(tmp_path / "base"), *flags.split()])
    message = capsys.readouterr().err
    assert exit.value.code == 2 and says in message and message.count("\n") == 1
    assert not list(tmp_path.iterdir())


# ---- the base as shipped -------------------------------------------------------------------------


def test_the_shipped_base_is_small_and_knows_how_it_was_made():
    made = json.loads((tiny.BASE / "made.json").read_text())
    weights = (tiny.BASE / "model.safetensors").read_bytes()
    assert made["sha256"] == hashlib.sha256(weights).hexdigest()
    assert made["task"] == make_base.SHIPPED_TASKS and Recipe(**made["recipe"]) == make_base.SHIPPED
    assert sum(path.stat().st_size for path in tiny.BASE.iterdir()) < 4e6
