r"""MATH: competition problems with answers in LaTeX.

A problem        {"question": "What is $\\frac13 + \\frac16$?", "answer": "\\frac{1}{2}"}
A right answer   <reasoning>2/6 + 1/6 = 3/6</reasoning><answer>\boxed{0.5}</answer>

Any form of the right value is accepted (latex.equivalent). The reward follows d1 (Zhao et al.
2025): most of it is for the right value, some for the form.
"""

from tasks import answers
from tasks.latex import equivalent
from tasks.questions import Questions
from tasks.words import words_of


class MATH(Questions):
    """The task. MATH-500 is the test set."""

    name = "math"
    example_row = r'{"question": "text", "answer": "\\frac{1}{2}"}'
    train_set = {"path": "ankner/math-500", "split": "train"}
    test_set = {"path": "HuggingFaceH4/MATH-500", "split": "test"}
    answer_format = "Inside the answer tags, put the final answer into \\boxed{}."
    scoring_threads = 4  # on four CPUs or more, formulas.py has as many worker processes

    def solved(self, problem, text):
        answer = answers.final_answer(text)
        return equivalent(answer, problem["answer"], words_of(problem.get("question", "")))

    def reward(self, problem, text):
        """The sum of d1's partial rewards, at most 3, divided by 3.

        They are 2 for the right value and up to 1 for the form: 1 for a box inside answer tags,
        3/4 for answer tags, 1/2 for a box, 1/4 for any text. (d1's own code looks for a box and
        never finds it.)
        """
        tagged_answer = answers.extract_answer(text)
        if tagged_answer:
            form = 1.0 if answers.boxed(tagged_answer) else 0.75
        elif answers.boxed(text):
            form = 0.5
        else:
            form = 0.25 if text.strip() else 0.0
        return (2.0 * self.solved(problem, text) + form) / 3
