"""gsm8k and math: how answers are read, and what counts as the same. All problems here were written for this project."""

import json
import random
import time
from fractions import Fraction

import pytest

from tasks import TASKS, FromFile, boxed, equivalent, final_answer, read_number

GSM8K, MATH = TASKS["gsm8k"], TASKS["math"]

NUMBERS = {
    "72": 72, "1,234,567": 1234567, "$1,234.00": 1234, "1234 dollars": 1234, "$18.50": Fraction(37, 2), "5 apples": 5, "12 m²": 12,
    "3 km/h": 3, "45^\\circ": 45, "60 minutes": 60, "50%": 50, "50\\%": 50, "18.": 18, ".5": Fraction(1, 2), "3/4": Fraction(3, 4),
    "-3/4": Fraction(-3, 4), "\\frac{3}{4}": Fraction(3, 4), "\\dfrac34": Fraction(3, 4), "1 1/2": Fraction(3, 2), "$72$": 72,
    "\\boxed{72}": 72, "\\text{72 apples}": 72, "x = 5": 5, "3 + 4 = 7": 7, "1e3": 1000, "1.5 \\times 10^3": 1500, "−7": -7, "- 7": -7,
    "+4": 4, "-$5": -5, "$-5": -5, "1{,}234": 1234, "3\\frac{1}{2}": Fraction(7, 2), "\\$18": 18, "72\\text{ cm}^2": 72, "£3": 3, "€3": 3,
    "-1 1/2": Fraction(-3, 2), "10 \\,\\text{km}": 10, "-\\frac{1}{2}": Fraction(-1, 2), "\\frac{-1}{2}": Fraction(-1, 2), "\\(8\\)": 8,
    "12 m^2": 12,
}  # fmt: skip
NO_NUMBERS = [
    "", "abc", "1,2", "12,34", "1,23,4", "3 and 5", "10 or 12", "between 3 and 5", "1_000", "١٢", "１２", "5-3", "5 - 3", "2^3", "1/0",
    "\\sqrt{3}", "\\pi 3", "sqrt(3)", "x3", "0.5.5", "x-5", "3+4", "3:30", "2*3", "1234 or 1235", "1 2", "7" * 2000, "7²",
]  # fmt: skip


@pytest.mark.parametrize("text", NUMBERS)
def test_a_number_is_read_whatever_its_dress(text):
    assert read_number(text) == NUMBERS[text]


@pytest.mark.parametrize("text", NO_NUMBERS)
def test_what_is_not_one_number_is_none(text):
    assert read_number(text) is None


WORD_PROBLEMS = [  # question, answer, the same answer otherwise, wrong ones that look right
    ("A mill grinds 617 sacks in a week. How many in two weeks?", "1234", ["1,234", "$1,234.00", "1234 sacks", "\\boxed{1234}", "1234.0"],
     ["12.34", "1,23,4", "1234 or 1235", "12345", "-1234", "1,2,3,4", "one thousand", "617*2", "1.234"]),
    ("Half of a 25 m rope is cut off. How long is it?", "12.5", ["12.5 m", "25/2", "12 1/2", "\\frac{25}{2}", "12.50 metres"],
     ["12", "13", "125", "12,5", "12.5.0", "25 / 2 = 12", "12 to 13"]),
    ("The lake was at 3 degrees and fell by 10. Now?", "-7",
     ["−7", "-7 degrees", "-7^\\circ", "x = -7", "- 7"], ["7", "3-10", "-70", "+7"]),
    ("What share of 80 eggs are 20 broken ones, in percent?", "25",
     ["25%", "25\\%", "25.0 %", "$25$"], ["0.25", "1/4", "75%", "25 or so 26"]),
    ("A stamp costs 75 cents. Twelve cost how many dollars?", "9",
     ["$9", "\\$9.00", "9 dollars", "9.", "+9"], ["900", "$0.9", "9 1/2", "nine"]),
]  # fmt: skip
EQUAL = [
    ("\\frac{1}{2}", ["0.5", "1/2", "\\dfrac{1}{2}", "\\frac12", " \\frac{1}{2} ", "$\\frac{1}{2}$"], ["\\frac{2}{1}", "2", "0.05", "1,2"]),
    ("2\\sqrt{3}", ["\\sqrt{12}", "2 \\sqrt{3}", "\\sqrt{3} \\cdot 2", "2\\sqrt3"], ["3\\sqrt{2}", "2\\sqrt{2}", "\\sqrt{6}", "3.46"]),
    ("(1,2)", ["(1, 2)", "\\left(1,2\\right)", "(1.0,2)"], ["(2,1)", "[1,2]", "(1,2,3)", "1"]),
    ("[1,2)", ["[1, 2)", "\\left[1,2\\right)"], ["(1,2]", "(1,2)", "[1,2]", "[1,3)"]),
    ("x^2+2x+1", ["(x+1)^2", "1+2x+x^2", "x^2 + 1 + 2x"], ["(x-1)^2", "x^2+2x", "x^2-2x+1", "x^3+2x+1"]),
    ("\\{1,2\\}", ["\\{2,1\\}", "\\{1, 2\\}"], ["\\{1,3\\}", "\\{1\\}"]),
    ("\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}",
     ["\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}"], ["\\begin{pmatrix}1&3\\\\2&4\\end{pmatrix}"]),
    ("90^\\circ", ["90", "90^{\\circ}"], ["9", "100", "90.5"]),
    ("\\text{Tuesday}", ["Tuesday", "\\text{ Tuesday }", "\\mathrm{Tuesday}"], ["Monday", "\\text{Thursday}", "\\text{Tue}"]),
    ("\\frac{\\pi}{2}", ["\\pi/2", "0.5\\pi", "\\frac{1}{2}\\pi"], ["\\pi", "\\frac{2}{\\pi}", "1.57"]),
    ("\\frac{\\sqrt{3}}{3}", ["\\frac{1}{\\sqrt{3}}", "\\frac{\\sqrt3}{3}"], ["\\sqrt{3}", "\\frac{\\sqrt{2}}{3}"]),
    ("(-\\infty, 3]", ["(-\\infty,3]"], ["(-\\infty,3)", "(3,\\infty)"]),
    ("5 \\text{ cm}", ["5", "5\\text{ cm}", "5.0"], ["5.1", "50"]),
    ("12", ["12.0", "\\frac{24}{2}", "12\\%"], ["1 2", "21", "-12", "5\\text{ or }12", "1.2"]),
    ("x^{-1}", ["\\frac{1}{x}"], ["-x", "x", "\\frac{1}{y}"]),
    ("(3,x)", ["(3, x)"], ["(3,y)", "3", "(x,3)"]),
    ("3x", ["x \\cdot 3", "3 x"], ["3y", "3", "x", "3x^2"]),
    ("y = 2x+1", ["y=1+2x"], ["y = 2x-1", "y = x+1"]),
]  # fmt: skip


def answered(text):
    return f"<reasoning>\nwell,\nso\n</reasoning>\n<answer>{text}</answer>"


@pytest.mark.parametrize(("question", "answer", "same", "wrong"), WORD_PROBLEMS)
def test_word_problems_are_solved_by_any_form_of_the_number_and_by_no_other(question, answer, same, wrong):
    problem = {"question": question, "answer": answer}
    assert [text for text in [answer, *same] if not GSM8K.solved(problem, answered(text))] == []
    assert [text for text in wrong if GSM8K.solved(problem, answered(text))] == []


@pytest.mark.parametrize(("gold", "same", "wrong"), EQUAL)
def test_equivalence_sees_through_form_and_not_through_mistakes(gold, same, wrong):
    assert [text for text in [gold, *same] if not equivalent(text, gold)] == []
    assert [text for text in wrong if equivalent(text, gold)] == []


def test_the_answer_is_in_the_last_tags_or_without_tags_in_the_last_balanced_box():
    assert final_answer("<answer>1</answer> no, <answer>\\boxed{2}</answer> \\boxed{3}") == "2"
    assert final_answer("so \\boxed{1}, rather \\boxed{\\frac{1}{2}} I think 7") == "\\frac{1}{2}"
    assert final_answer("\\boxed{1} <answer>2") == "" and final_answer("just 7") == ""
    assert boxed("\\boxed{never {closed}") == "" and boxed("\\boxed{}") == ""


@pytest.mark.parametrize(
    ("text", "gsm8k", "math"),
    [
        ("<reasoning>a\nb</reasoning>\n<answer>72</answer>", 1.0, (2 + 0.75) / 3),
        ("<reasoning>a</reasoning><answer>\\boxed{72}</answer>", 1.0, 1.0),
        ("well <reasoning>a</reasoning> so <answer>72</answer>", (2 + 0.5 + 0.5 + 0.5) / 4, (2 + 0.75) / 3),
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
    assert GSM8K.reward(problem, text) == pytest.approx(gsm8k) and MATH.reward(problem, text) == pytest.approx(math)


HOSTILE = [
    "9^{9^{9^9}}", "99^{99^{99}}", "10^{10^{10}}!", "\\binom{10^9}{10^8}", "((9^{99})^{99})^{99}", "1" * 290, "\\sum_{n=1}^{\\infty} 1/n",
    "(" * 150 + "x" + ")" * 140, "\\frac{" * 80, "(x+y+z+w)^{99}(x+1)^{99}", "\\sqrt{" * 60 + "2" + "}" * 60, "9**9**9**9", "e^{e^x}",
    "__import__('os').abort()", "2^{9999}", "99999^9999", "9^9^9^9", "\ud800", "\x00", "\\", "{", "}" * 200, "x" * 280, "\\boxed{" * 30,
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_answer_costs_no_more_than_the_time_limit_and_earns_nothing(text):
    began = time.perf_counter()
    assert not equivalent(text, "x^2+1") and not MATH.solved({"question": "", "answer": "x^2+1"}, answered(text))
    assert time.perf_counter() - began < 20  # a hang, not a benchmark: twice parsing and comparing at 2 s each


@pytest.mark.parametrize("text", ["{" * 300_000, "\\boxed{" * 100_000, "<answer>" * 100_000, "1," * 300_000, "<reasoning>" * 100_000])
def test_megabytes_are_read_in_one_pass(text):
    began = time.perf_counter()
    for task in (GSM8K, MATH):
        for whole in (text, answered(text), text + answered("72")):
            assert 0 <= task.reward({"question": "", "answer": "72"}, whole) <= 1
    assert time.perf_counter() - began < 10


def test_rewards_of_random_text_never_fail_and_stay_between_0_and_1():
    rng = random.Random(0)
    pieces = [
        "<answer>",
        "</answer>",
        "<reasoning>",
        "</reasoning>",
        "\\boxed{",
        "}",
        "{",
        "72",
        "-",
        ",",
        "\\frac",
        "^",
        "$",
        " ",
        "x",
        "é",
        "\n",
    ]
    for _ in range(3000):
        text = "".join(rng.choices(pieces, k=rng.randint(0, 12)))
        assert 0 <= GSM8K.reward({"question": "", "answer": "72"}, text) <= 1
        assert read_number(text) is None or isinstance(read_number(text), Fraction)
        assert isinstance(final_answer(text), str)


# ---- where the problems come from --------------------------------------------------------------------------------------

ROWS = {
    ("openai/gsm8k", "main", "train"): [{"question": f"What is {i} + {i}?", "answer": f"thinking\n#### {2 * i:,}"} for i in range(400)],
    ("openai/gsm8k", "main", "test"): [{"question": f"What  is {i} + {i}?", "answer": f"#### {2 * i}"} for i in range(380, 420)],
    ("ankner/math-500", "train"): [{"problem": f"Halve {i}.", "solution": f"So \\boxed{{\\frac{{{i}}}{{2}}}}."} for i in range(100)],
    ("HuggingFaceH4/MATH-500", "test"): [{"problem": f"Halve {i}.", "answer": f"\\frac{{{i}}}{{2}}", "level": 3} for i in range(500, 520)],
}


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *path, split: ROWS[(*path, split)])
    for task in (GSM8K, MATH):
        monkeypatch.setattr(task, "pools", {})


def test_a_data_sets_splits_share_no_question(hub):
    for task, sizes in ((GSM8K, (40, 380)), (MATH, (20, 100))):
        sets = {split: {row["question"] for row in task.problems(split, 1000, 0)} for split in ("train", "validation", "test")}
        assert len(sets["test"]) == sizes[0] and len(sets["train"] | sets["validation"]) == sizes[1]  # 20 leaked questions are gone
        assert not sets["train"] & sets["validation"] and 0.03 < len(sets["validation"]) / sizes[1] < 0.2
    assert GSM8K.problems("test", 1, 3)[0]["answer"].isdigit()
    assert MATH.problems("train", 1, 0)[0]["answer"].startswith("\\frac")


def test_draws_repeat_themselves_and_only_training_goes_round_again(hub):
    assert GSM8K.problems("train", 20, "0 1") == GSM8K.problems("train", 20, "0 1") != GSM8K.problems("train", 20, "0 2")
    assert len(GSM8K.problems("train", 1000, 0)) == 1000 and len(GSM8K.problems("test", 1000, 0)) == 40
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


def test_the_tiny_model_is_sent_elsewhere():
    with pytest.raises(ValueError, match="LLaDA"):
        MATH.problems("train", 1, 0, compact=True)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_files_are_read_under_the_data_sets_own_names(tmp_path):
    rows = [{"question": "a?", "answer": "x\n#### 1,000"}, {"question": "b?", "answer": 7}]
    assert [row["answer"] for row in GSM8K.load(write(tmp_path / "a", rows))] == ["1,000", "7"]
    rows = [{"problem": "a?", "solution": "\\boxed{\\sqrt{2}}"}, {"question": "b?", "answer": "\\pi", "level": 1}]
    assert [row["answer"] for row in MATH.load(write(tmp_path / "b", rows))] == ["\\sqrt{2}", "\\pi"]


BAD_ROWS = [
    {"question": "a?"}, {"answer": "1"}, {"question": "", "answer": "1"}, {"question": "a?", "answer": None},
    {"question": "a?", "answer": True}, {"question": ["a"], "answer": "1"}, {"question": "a?", "answer": "many"},
]  # fmt: skip


@pytest.mark.parametrize("row", BAD_ROWS)
def test_a_bad_row_is_named_by_its_line(tmp_path, row):
    with pytest.raises(ValueError, match="line 2.*question"):
        GSM8K.load(write(tmp_path / "a", [{"question": "a?", "answer": "1"}, row]))


@pytest.mark.parametrize("name", TASKS)
def test_any_task_can_be_trained_from_a_file(tmp_path, name):
    task = TASKS[name]
    questions = [{"question": f"{i}?", "answer": str(i)} for i in range(100)]
    rows = questions if name in ("gsm8k", "math") else task.problems("train", 100, 0)
    source = FromFile(task, write(tmp_path / "a", rows * 2))
    splits = {split: source.problems(split, 10_000 if split != "train" else 50, 0) for split in ("train", "validation", "test")}
    keys = {split: {json.dumps(row) for row in drawn} for split, drawn in splits.items()}
    assert all(keys.values()) and not keys["train"] & keys["test"] and not keys["train"] & keys["validation"]
    assert source.prompt(splits["test"][0]) == task.prompt(splits["test"][0]) and source.solved(splits["test"][0], "") is False
    with pytest.raises(ValueError, match="1 problems"):
        one = FromFile(task, write(tmp_path / "b", rows[:1]))
        [one.problems(split, 1, 0) for split in ("train", "validation", "test")]
