"""GSM8K: grade-school word problems whose answer is a number.

A problem        {"question": "Half of a 25 m rope is cut off. How long is it?", "answer": "12.5"}
A right answer   <reasoning>25 / 2 = 12.5</reasoning><answer>12.5 m</answer>

Only the number has to be right, however it is written (quantities.read_number). The reward follows
d1 (Zhao et al. 2025): most of it is for the right number, some for the form.
"""

import re

from tasks import answers
from tasks.quantities import read_number
from tasks.questions import Questions
from tasks.words import words_of

TAGS = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")


class GSM8K(Questions):
    """The task."""

    name = "gsm8k"
    example_row = '{"question": "text", "answer": "72"}'
    train_set = {"path": "openai/gsm8k", "name": "main", "split": "train"}
    test_set = {"path": "openai/gsm8k", "name": "main", "split": "test"}
    answer_format = "The answer is one number, without its unit."

    def problem_from_row(self, row):
        problem = super().problem_from_row(row)
        if read_number(problem["answer"]) is None:
            raise ValueError("the answer is not a number")
        return problem

    def stated_number(self, problem, text):
        """Returns the number that a completion states, or None."""
        question_words = words_of(problem.get("question", ""))
        return read_number(answers.final_answer(text), question_words)

    def solved(self, problem, text):
        return self.is_right(problem, self.stated_number(problem, text))

    def is_right(self, problem, number):
        return number is not None and number == read_number(problem["answer"])

    def reward(self, problem, text):
        """The sum of d1's partial rewards, at most 4, divided by 4.

        They are 2 for the right number, 1/2 for any whole number, 1/8 for each tag that occurs
        once, 1/2 for reasoning before the answer, and 1/2 if there is nothing else. Unlike d1's,
        the last two accept reasoning of several lines.
        """
        number = self.stated_number(problem, text)
        is_whole = number is not None and number.denominator == 1

        tags_once = [text.count(tag) == 1 for tag in TAGS]
        in_order = "<reasoning>.*</reasoning>.*<answer>.*</answer>"
        has_form = all(tags_once) and bool(re.search(in_order, text, re.DOTALL))
        alone = r"<reasoning>.*</reasoning>\s*<answer>.*</answer>"
        is_strict = has_form and bool(re.fullmatch(alone, text.strip(), re.DOTALL))

        total = (
            2.0 * self.is_right(problem, number)
            + 0.5 * is_whole
            + 0.125 * sum(tags_once)
            + 0.5 * has_form
            + 0.5 * is_strict
        )
        return total / 4
