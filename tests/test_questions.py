"""GSM8K and MATH: rewards, data sets and files. How answers are read: test_answers.py."""

import json

import datasets
import pytest
from task_examples import write_rows

from tasks.registry import TASKS

GSM8K = TASKS["gsm8k"]
MATH = TASKS["math"]

# ---- rewards -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "gsm8k", "math"),
    [
        ("<reasoning>a\nb</reasoning>\n<answer>72</answer>", 1.0, (2 + 0.75) / 3),
        ("<reasoning>a</reasoning><answer>\\boxed{72}</answer>", 1.0, 1.0),
        (
            "well <reasoning>a</reasoning> so <answer>72</answer>",
            (2 + 0.5 + 0.5 + 0.5) / 4,
            (2 + 0.75) / 3,
        ),
        ("<answer>72</answer><reasoning>a</reasoning>", (2 + 0.5 + 0.5) / 4, (2 + 0.75) / 3),
        ("<answer>72</answer>", (2 + 0.5 + 0.25) / 4, (2 + 0.75) / 3),
        ("\\boxed{72}", (2 + 0.5) / 4, (2 + 0.5) / 3),
        ("<reasoning>a</reasoning><answer>71</answer>", 0.5, 0.25),
        ("<reasoning>a</reasoning><answer>71.5</answer>", 1.5 / 4, 0.25),
        ("<answer></answer>" * 3, 0.0, 0.25 / 3),
        ("it is 72", 0.0, 0.25 / 3),
        ("  ", 0.0, 0.0),
    ],
)
def test_rewards_are_the_sum_of_their_parts(text, gsm8k, math):
    problem = {"question": "?", "answer": "72"}
    assert GSM8K.reward(problem, text) == pytest.approx(gsm8k)
    assert MATH.reward(problem, text) == pytest.approx(math)


# ---- data sets -----------------------------------------------------------------------------------

# Of each training set, 20 questions are in the test set too.
GSM8K_TRAIN = [
    {"question": f"What is {i} + {i}?", "answer": f"thinking\n#### {2 * i:,}"} for i in range(400)
]
GSM8K_TEST = [
    {"question": f"What  is {i} + {i}?", "answer": f"#### {2 * i}"} for i in range(380, 420)
]
MATH_TRAIN = [
    {"problem": f"Halve {i}.", "solution": f"So \\boxed{{\\frac{{{i}}}{{2}}}}."} for i in range(100)
]
MATH_TEST = [
    {"problem": f"Halve {i}.", "answer": f"\\frac{{{i}}}{{2}}", "level": 3} for i in range(500, 520)
]
DATA_SETS = {
    ("openai/gsm8k", "main", "train"): GSM8K_TRAIN,
    ("openai/gsm8k", "main", "test"): GSM8K_TEST,
    ("ankner/math-500", None, "train"): MATH_TRAIN,
    ("HuggingFaceH4/MATH-500", None, "test"): MATH_TEST,
}


@pytest.fixture
def hub(monkeypatch):
    """The data sets, without the network."""

    def load_dataset(path, split, name=None):
        return DATA_SETS[path, name, split]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    for task in (GSM8K, MATH):
        monkeypatch.setattr(task, "pools", {})


def test_a_data_sets_splits_share_no_question(hub):
    for task, num_test, num_train in ((GSM8K, 40, 380), (MATH, 20, 100)):
        sets = {
            split: {row["question"] for row in task.problems(split, 1000, 0)}
            for split in ("train", "validation", "test")
        }
        assert len(sets["test"]) == num_test
        assert len(sets["train"] | sets["validation"]) == num_train  # those of the test are gone
        assert not sets["train"] & sets["validation"]
        assert 0.03 < len(sets["validation"]) / num_train < 0.2
    assert GSM8K.problems("test", 1, 3)[0]["answer"].isdigit()
    assert MATH.problems("train", 1, 0)[0]["answer"].startswith("\\frac")


def test_draws_repeat_themselves_and_only_training_goes_round_again(hub):
    problems = GSM8K.problems("train", 20, "0 1")
    assert problems == GSM8K.problems("train", 20, "0 1")
    assert problems != GSM8K.problems("train", 20, "0 2")
    assert len(GSM8K.problems("train", 1000, 0)) == 1000
    assert len(GSM8K.problems("test", 1000, 0)) == 40
    drawn = GSM8K.problems("test", 30, 0)
    assert len({row["question"] for row in drawn}) == 30


def test_a_data_set_that_cannot_be_reached_names_the_way_out(monkeypatch):
    def fail(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("datasets.load_dataset", fail)
    monkeypatch.setattr(GSM8K, "pools", {})
    with pytest.raises(ValueError, match=r"openai/gsm8k.*--data FILE") as error:
        GSM8K.problems("test", 1, 0)
    assert "\n" not in str(error.value)


# ---- files ---------------------------------------------------------------------------------------


def test_files_are_read_under_the_data_sets_own_names(tmp_path):
    path = write_rows(
        tmp_path / "gsm8k.jsonl",
        {"question": "a?", "answer": "x\n#### 1,000"},
        {"question": "b?", "answer": 7},
    )
    assert [problem["answer"] for problem in GSM8K.load(path)] == ["1,000", "7"]
    path = write_rows(
        tmp_path / "math.jsonl",
        {"problem": "a?", "solution": "\\boxed{\\sqrt{2}}"},
        {"question": "b?", "answer": "\\pi", "level": 1},
    )
    assert [problem["answer"] for problem in MATH.load(path)] == ["\\sqrt{2}", "\\pi"]


CHAT = {"prompt": [{"role": "user", "content": "a?"}], "ground_truth_answer": "1"}
ROWS = [
    {"question": "a?", "answer": "1"},
    {"problem": "a?", "answer": 1},
    {"prompt": "a?", "ground_truth_answer": "1"},
    CHAT,
]


@pytest.mark.parametrize("row", ROWS)
def test_a_row_is_read_as_the_field_writes_it(tmp_path, row):
    lines = write_rows(tmp_path / "rows.jsonl", row)
    array = tmp_path / "rows.json"
    array.write_text(json.dumps([row, row], indent=1))
    parquet = tmp_path / "rows.parquet"
    datasets.Dataset.from_list([row]).to_parquet(str(parquet))
    problem = {"question": "a?", "answer": "1"}
    assert GSM8K.load(lines) == GSM8K.load(parquet) == [problem]
    assert GSM8K.load(array) == [problem, problem]
    array.write_text(json.dumps([row, {"question": "b?"}], indent=1))
    with pytest.raises(ValueError, match="rows.json, row 2: expected .*, and not question"):
        GSM8K.load(array)


def test_a_csv_keeps_a_fields_line_ends_and_names_the_files_lines(tmp_path):
    path = tmp_path / "rows.CSV"
    path.write_bytes(b'question,answer\r\n"How many are 12\n34 added?",46\r\nb?,1\r\n')
    assert GSM8K.load(path)[0]["question"] == "How many are 12\n34 added?"  # not 1234
    path.write_bytes(b'question,answer\n"a\nb\nc?",46\nb?,many\n')
    with pytest.raises(ValueError, match="line 5"):
        GSM8K.load(path)


BAD_QUESTIONS = [
    CHAT | {"prompt": [{"role": "system", "content": "a?"}]},
    CHAT | {"prompt": CHAT["prompt"] * 2},
    CHAT | {"prompt": []},
    CHAT | {"prompt": [{"role": "user", "content": ["a"]}]},
    {"question": "a?"},
    {"answer": "1"},
    {"question": "", "answer": "1"},
    {"question": "a?", "answer": None},
    {"question": "a?", "answer": True},
    {"question": ["a"], "answer": "1"},
    {"question": "a?", "answer": "many"},
]


@pytest.mark.parametrize("row", BAD_QUESTIONS)
def test_a_bad_question_is_named_by_its_line(tmp_path, row):
    path = write_rows(tmp_path / "rows.jsonl", {"question": "a?", "answer": "1"}, row)
    with pytest.raises(ValueError, match="line 2.*question"):
        GSM8K.load(path)
