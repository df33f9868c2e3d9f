"""Questions with short answers from public data sets: what gsm8k.py and competition_math.py share.

A problem is {"question": text, "answer": text}. The test split is the data set's own test set. The
validation split is about a tenth of the training set, chosen by the checksums of the questions. A
training question that is also in the test set is dropped; two questions count as the same if they
differ only in case and white space.
"""

import logging

from tasks import answers
from tasks.splits import SPLITS, draw, split_of
from tasks.task import INSTRUCTION, Task


class Questions(Task):
    """Base class. A subclass has, besides Task's:

    train_set, test_set   arguments for datasets.load_dataset
    answer_format         the sentence of the prompt that says in what form to answer
    """

    pools = None  # {split: all its problems}, fetched when first needed

    def prompt(self, problem):
        return f"{INSTRUCTION}{problem['question']}\n{self.answer_format}"

    def key(self, problem):
        return f"{self.name} {''.join(problem['question'].lower().split())}"

    def problems(self, split, n, seed):
        self.pools = self.pools or self._fetch_pools()
        return draw(self.pools, split, n, seed, source=self.name)

    def _fetch_pools(self):
        """Returns {split: problems}. Raises ValueError if a data set is not available."""
        pools = {split: [] for split in SPLITS}
        pools["test"] = self._fetch(self.test_set)
        test_keys = {self.key(problem) for problem in pools["test"]}
        for problem in self._fetch(self.train_set):
            key = self.key(problem)
            if key not in test_keys:
                split = "validation" if split_of(key) == "validation" else "train"
                pools[split].append(problem)
        return pools

    def _fetch(self, data_set):
        import datasets

        # The hub's own warnings would bury the message below.
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
        try:
            rows = datasets.load_dataset(**data_set)
            return [self.problem_from_row(row) for row in rows]
        except Exception as error:  # hub, cache, network and file system all raise different errors
            reason = " ".join(str(error).split())[:100]
            raise ValueError(
                f"cannot get data set {data_set['path']} ({reason}): "
                "give a JSON-lines file of problems by --data FILE"
            ) from None

    def problem_from_row(self, row):
        """Reads our own rows and those of common data sets.

        MATH's training set has solutions with a box, other sets have a "ground_truth_answer", and
        files for chat models have a "prompt": a text, or a list with one user message.
        """
        question = first_field(row, "question", "problem", "prompt")
        if isinstance(question, list):
            [message] = question
            if message["role"] != "user":
                raise ValueError("a prompt has to be one message of the user")
            question = message["content"]
        answer = row.get("answer", row.get("ground_truth_answer"))
        if answer is None:
            answer = answers.last_box(row["solution"])
        if any(isinstance(value, bool | list | dict | None) for value in (question, answer)):
            raise ValueError("question and answer have to be texts or numbers")
        question = str(question).strip()
        answer = str(answer).rpartition("####")[2].strip()  # GSM8K: the reasoning, then "#### 72"
        if not question or not answer:
            raise ValueError("question and answer must not be empty")
        return {"question": question, "answer": answer}


def first_field(row, *names):
    """The value of the first of these fields that a row has. Raises KeyError if it has none."""
    for name in names:
        if name in row:
            return row[name]
    raise KeyError(names[0])
