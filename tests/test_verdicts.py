"""Every verdict right: wrong answers that look right, and right ones as people write them."""

import json
import random
from pathlib import Path

import pytest
import verdict_kinds

from tasks.registry import TASKS

CASES = Path(__file__).parents[2] / "shared" / "data" / "verdict_cases.jsonl"


@pytest.mark.parametrize(
    "maker",
    [
        verdict_kinds.boxes_in_formulas,
        verdict_kinds.altered_numbers,
        verdict_kinds.glued_digits,
    ],
)
def test_a_wrong_answer_that_looks_right_is_not_paid(maker):
    answers = list(maker())
    sample = random.Random(0).sample(answers, 3000)
    assert len(answers) > 5000
    assert verdict_kinds.solved_among(sample) == []


def test_answers_that_people_write_have_their_verdict():
    judged_wrongly = [
        (task, gold, text, is_right)
        for task, gold, text, is_right in verdict_kinds.hand_written()
        if TASKS[task].solved({"question": "", "answer": gold}, text) is not is_right
    ]
    assert judged_wrongly == []


def test_words_of_the_question_may_stand_beside_its_answer():
    question = "How many crayfish swim in the three ponds, and how many million scales have they?"
    for task in ("gsm8k", "math"):
        with_question = {"question": question, "answer": "12"}
        without = {"question": "", "answer": "12"}
        for text in ("12 crayfish", "12 \\text{ crayfish}", "12 crayfish in the ponds"):
            assert TASKS[task].solved(with_question, f"<answer>{text}</answer>"), text
            assert not TASKS[task].solved(without, f"<answer>{text}</answer>"), text
        for text in ("12 million", "12 million scales", "three 12", "12 lobsters", "12 and many"):
            assert not TASKS[task].solved(with_question, f"<answer>{text}</answer>"), text
    for text in ("crayfish 12", "ponds without 12", "lobsters have 12", "the crayfish lost are 12"):
        assert not TASKS["gsm8k"].solved(with_question, f"<answer>{text}</answer>"), text


def test_a_number_moved_by_one_is_another_number():
    moved = list(verdict_kinds.golds_moved_by_one())
    assert len(moved) > 100
    assert verdict_kinds.solved_among(moved) == []


@pytest.mark.skipif(not CASES.exists(), reason="needs the file of judged answers")
def test_judged_answers_have_their_verdict():
    cases = [json.loads(line) for line in CASES.read_text("utf-8").splitlines()]
    judged_wrongly = [
        case
        for case in cases
        if TASKS[case["task"]].solved(case["problem"], case["text"]) is not case["solved"]
    ]
    assert len(cases) >= 56
    assert judged_wrongly == []
