"""Questions with short answers from public data sets: what GSM8K and MATH share."""

import logging

from tasks import answers
from tasks.splits import SPLITS, draw, split_of
from tasks.task import INSTRUCTION, Task


class Questions(Task):
    """Questions with short answers, from public data sets. Problem: {"question", "answer"}.

    "validation" is the tenth of the training set that the questions' checksums pick; a test
    question is never trained on.
    """

    pools = None  # a subclass has train_set and test_set, for datasets.load_dataset, split last

    def prompt(self, problem):
        return f"{INSTRUCTION}{problem['question']}\n{self.form}"

    def key(self, problem):
        return f"{self.name} {''.join(problem['question'].lower().split())}"

    def problems(self, split, n, seed):
        self.pools = self.pools or self._fetch()
        return draw(self.pools, split, n, seed, self.name)

    def _fetch(self):
        import datasets

        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # the line below says enough
        pools = {split: [] for split in SPLITS}
        for *path, part in (self.test_set, self.train_set):
            try:
                rows = datasets.load_dataset(*path, split=part)
                problems = [self.problem(row) for row in rows]
            except Exception as error:  # hub, cache, network and file system each have their own
                why = " ".join(str(error).split())[:100]
                way_out = "give a JSON-lines file of problems by --data FILE"
                raise ValueError(f"cannot get data set {path[0]} ({why}): {way_out}") from None
            tested = {*map(self.key, pools["test"])}
            for problem in problems:
                held_out = part == "train" and split_of(self.key(problem)) == "validation"
                if self.key(problem) not in tested:
                    pools["validation" if held_out else part].append(problem)
        return pools

    def problem(self, row):
        question = row["question"] if "question" in row else row["problem"]
        answer = row["answer"] if row.get("answer") is not None else answers.boxed(row["solution"])
        if any(isinstance(value, bool | list | dict | None) for value in (question, answer)):
            raise ValueError
        answer = str(answer).rpartition("####")[2]  # GSM8K's is the reasoning, then "#### 72"
        problem = {"question": str(question).strip(), "answer": answer.strip()}
        if not all(problem.values()):
            raise ValueError
        return problem
