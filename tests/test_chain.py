"""Chain: what a problem, an answer and the careless habit are, and that no split leaks."""

import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from task_examples import SPLITS, write_rows

from models.checkpoints import load_policy
from models.make_base import Recipe
from models.prompting import encode_prompts
from tasks.chain import NUMBERS, SIGNS, TABLES, Chain
from tasks.registry import TASKS

BASE = Path(__file__).parent.parent / "bases" / "chain"
CHAIN = TASKS["chain"]
PROBLEM = {"start": 7, "signs": "+(-*/)"}
RIGHT = [18, 19, 17, 1, 13, 7]  # as the head of chain.py says


def test_each_sign_sends_every_number_to_another_one():
    assert sorted(TABLES) == sorted(SIGNS)
    for table in TABLES.values():
        assert sorted(table) == list(range(NUMBERS))
    assert len({tuple(table) for table in TABLES.values()}) == len(SIGNS)


def test_the_last_number_alone_decides_the_reward():
    task = CHAIN.compact
    number = PROBLEM["start"]
    for sign, expected in zip(PROBLEM["signs"], RIGHT, strict=True):
        number = TABLES[sign][number]
        assert number == expected
    for text, reward in (
        ("18 19 17 1 13 7", 1.0),
        ("0 0 0 0 0 7", 1.0),
        ("18 19 17 1 13 8", 0.0),
        ("18 19 17 1 13 7 7 [EOS]", 0.0),
        ("18 19 17 1 13 07", 0.0),
        ("", 0.0),
    ):
        assert task.reward(PROBLEM, text) == reward
        assert task.solved(PROBLEM, text) == (reward == 1.0)


def test_a_large_model_reads_the_tables_and_answers_in_tags():
    prompt = CHAIN.prompt(PROBLEM)
    for sign, table in TABLES.items():
        assert f"\n{sign} {' '.join(map(str, table))}\n" in prompt
    assert "Start with 7" in prompt and "+ ( - * / )" in prompt
    assert CHAIN.solved(PROBLEM, "It is 18, then ... <answer>18 19 17 1 13 7</answer>")
    assert CHAIN.solved(PROBLEM, "<answer>0 0 0 0 0 7</answer>")
    for wrong in (
        "18 19 17 1 13 7",
        "<answer>18 19 17 1 13 8</answer>",
        "<answer>7</answer>",
        "<answer>18 19 17 1 13 8 or 7</answer>",
        "<answer>18 19 17 1 or 7</answer>",
        "<answer>1 18 19 17 1 13 7</answer>",
    ):
        assert not CHAIN.solved(PROBLEM, wrong), wrong


def test_no_two_splits_share_a_sequence_of_signs():
    signs = {
        split: {problem["signs"] for problem in CHAIN.problems(split, 400, 0)} for split in SPLITS
    }
    assert not signs["train"] & (signs["validation"] | signs["test"])
    assert not signs["validation"] & signs["test"]
    problems = CHAIN.problems("test", 400, 0)
    assert len({(problem["start"], problem["signs"]) for problem in problems}) == 400


def test_a_careless_number_is_one_too_many_and_the_next_one_follows_it():
    task = Chain(is_compact=True, steps=8)
    errors = Counter()
    for problem, text in task.demonstrations(2000, "0", careless=0.4):
        number = problem["start"]
        numbers = list(map(int, text.split()))
        assert len(numbers) == task.length - 1
        for place, (sign, written) in enumerate(zip(problem["signs"], numbers, strict=True)):
            excess = (written - TABLES[sign][number]) % NUMBERS
            assert excess in (0, 1)
            errors[place] += excess
            number = written
    assert errors[0] == 0
    for place in range(1, 8):
        assert abs(errors[place] / 2000 - 0.4) < 4 * (0.24 / 2000) ** 0.5
    careful = [text for _, text in task.demonstrations(20, "0", careless=0)]
    problems = [problem for problem, _ in task.demonstrations(20, "0", careless=0)]
    assert all(task.solved(*pair) for pair in zip(problems, careful, strict=True))


def test_a_file_of_problems_is_read_and_a_bad_row_is_named(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", PROBLEM, {"start": 0, "signs": "++++++"})
    assert CHAIN.load(path) == [PROBLEM, {"start": 0, "signs": "++++++"}]
    for bad in (
        {"start": 20, "signs": "++++++"},
        {"start": "7", "signs": "++++++"},
        {"start": 7, "signs": "+++"},
        {"start": 7, "signs": "+++++x"},
        {"start": 7},
    ):
        path = write_rows(tmp_path / "bad.jsonl", PROBLEM, bad)
        with pytest.raises(ValueError, match="line 2: expected"):
            CHAIN.load(path)


# ---- the base as shipped -------------------------------------------------------------------------


def test_the_shipped_base_is_small_and_knows_how_it_was_made():
    made = json.loads((BASE / "made.json").read_text())
    weights = (BASE / "model.safetensors").read_bytes()
    assert made["sha256"] == hashlib.sha256(weights).hexdigest()
    assert made["task"] == "chain"
    recipe = Recipe(**made["recipe"])
    log = (Path(__file__).parent.parent / "EXPERIMENTS.md").read_text(encoding="utf-8")
    assert (
        f"python -m models.make_base --task chain --layers {recipe.layers} --steps {recipe.steps} "
        f"--habit_steps {recipe.habit_steps} --careless {recipe.careless} --batch {recipe.batch} "
        f"--out bases/chain\n"
    ) in log
    assert sum(path.stat().st_size for path in BASE.iterdir()) < 2e6


@torch.no_grad()
def test_the_last_numbers_cannot_be_had_from_the_all_masked_state():
    """But beside the numbers before them each is known, and often one too many."""
    task = CHAIN.compact
    problems = task.problems("test", 200, 0)
    policy = load_policy(BASE)
    prompt_ids, _ = encode_prompts(policy, [task.prompt(problem) for problem in problems])
    texts = []
    for problem in problems:
        numbers = [problem["start"]]
        for sign in problem["signs"]:
            numbers.append(TABLES[sign][numbers[-1]])
        texts.append(" ".join(map(str, numbers[1:])))
    right = policy.tokenizer(texts, return_tensors="pt").input_ids  # (200, 6)
    all_masked = torch.full((len(problems), task.length), policy.mask_id)

    def probability_of_the_last(completion):
        logits = policy.denoiser(torch.cat([prompt_ids, completion], dim=1)).logits[:, -2]
        return logits.softmax(dim=-1).gather(1, right[:, 5:]).mean().item()

    beside_the_others = all_masked.clone()
    beside_the_others[:, :5] = right[:, :5]
    assert probability_of_the_last(all_masked) < 0.1  # 1 in 20 by chance
    assert 0.4 < probability_of_the_last(beside_the_others) < 0.9
