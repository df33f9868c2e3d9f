"""GSM8K: grade-school word problems."""

import re

from tasks import answers
from tasks.questions import Questions


class GSM8K(Questions):
    """Grade-school word problems with a number as the answer."""

    name, example = "gsm8k", '{"question": "text", "answer": "72"}'
    train_set, test_set = ("openai/gsm8k", "main", "train"), ("openai/gsm8k", "main", "test")
    form = "The answer is one number, without its unit."

    def problem(self, row):
        problem = super().problem(row)
        if answers.read_number(problem["answer"]) is None:
            raise ValueError
        return problem

    def solved(self, problem, text):
        number = answers.read_number(answers.final_answer(text))
        return number is not None and number == answers.read_number(problem["answer"])

    def reward(self, problem, text):
        """d1's parts over their sum, repaired: reasoning may have lines."""
        tags = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")
        once = [text.count(tag) == 1 for tag in tags]
        form = "<reasoning>.*</reasoning>{0}<answer>.*</answer>"
        soft = all(once) and re.search(form.format(".*"), text, re.DOTALL) is not None
        strict = soft and re.fullmatch(form.format(r"\s*"), text.strip(), re.DOTALL) is not None
        number = answers.read_number(answers.final_answer(text))
        whole = number is not None and number.denominator == 1
        earned = 2.0 * self.solved(problem, text) + 0.125 * sum(once)
        return (earned + 0.5 * whole + 0.5 * strict + 0.5 * soft) / 4
