"""MATH: competition problems with answers in LaTeX."""

from tasks import answers
from tasks.questions import Questions


class MATH(Questions):
    """Competition problems with answers in LaTeX."""

    name, example = "math", r'{"question": "text", "answer": "\\frac{1}{2}"}'
    train_set, test_set = ("ankner/math-500", "train"), ("HuggingFaceH4/MATH-500", "test")
    form = "Inside the answer tags, put the final answer into \\boxed{}."
    at_once = 4  # there may be as many workers (formulas.py)

    def solved(self, problem, text):
        return answers.equivalent(answers.final_answer(text), problem["answer"])

    def reward(self, problem, text):
        """d1's parts over their sum; d1's own looked for a box and never found it."""
        inside = answers.extract_answer(text)
        form = 0.5 if answers.boxed(text) else 0.25 if text.strip() else 0.0
        form = (1.0 if answers.boxed(inside) else 0.75) if inside else form
        return (2.0 * self.solved(problem, text) + form) / 3
