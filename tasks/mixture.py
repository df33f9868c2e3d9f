"""Several tasks in one run: `python train.py --task countdown,sudoku`.

One model and one threshold head learn all the tasks. The tasks take turns, one step each, because
all completions of a rollout have the same length: for the tiny model 10 tokens in countdown and 19
in sudoku. The functions below accept a single task as well, so that train.py and evaluate.py need
no special case for it.
"""

from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest


class TaskMixture:
    """Several tasks as one. Its problems are theirs, with the task's name added under "task"."""

    def __init__(self, tasks, compact):
        """tasks: {name: task}. compact: whether they are compact, each with its own length."""
        self.tasks = tasks
        self.lengths = {name: task.length for name, task in tasks.items()} if compact else {}
        self.length = max(self.lengths.values(), default=0)
        self.scoring_threads = min(num_scoring_threads(task) for task in tasks.values())

    def problems(self, split, n, seed):
        """Returns n problems, from the tasks in turn; the first tasks may contribute one more."""
        problems_by_task = []
        for index, (name, task) in enumerate(self.tasks.items()):
            share = n // len(self.tasks) + (index < n % len(self.tasks))
            problems = task.problems(split, share, seed)
            if any("task" in problem for problem in problems):
                raise ValueError(
                    f'{name}: its problems have a field "task", which TaskMixture needs for itself'
                )
            problems_by_task.append([problem | {"task": name} for problem in problems])
        rounds = zip_longest(*problems_by_task)  # None once a task has no more problems
        return [problem for round_ in rounds for problem in round_ if problem is not None]

    def prompt(self, problem):
        return self.tasks[problem["task"]].prompt(problem)

    def reward(self, problem, text):
        return self.tasks[problem["task"]].reward(problem, text)

    def solved(self, problem, text):
        return self.tasks[problem["task"]].solved(problem, text)

    def key(self, problem):
        task = self.tasks[problem["task"]]
        key = getattr(task, "key", task.prompt)
        return f"{problem['task']} {key(problem)}"


def num_scoring_threads(task):
    """How many threads may score the task's completions at the same time."""
    return getattr(task, "scoring_threads", 1)


def task_for_step(task, step, length):
    """Returns (task, completion length) for a training step; the tasks of a mixture take turns."""
    if not isinstance(task, TaskMixture):
        return task, length
    names = list(task.tasks)
    name = names[step % len(names)]
    task_of_step = TaskMixture({name: task.tasks[name]}, compact=bool(task.lengths))
    return task_of_step, task.lengths.get(name, length)


def indices_by_task(task, problems):
    """Returns {task name: indices of its problems}. A single task has the name ""."""
    indices = {}
    for i, problem in enumerate(problems):
        name = problem["task"] if isinstance(task, TaskMixture) else ""
        indices.setdefault(name, []).append(i)
    return indices


def score_completions(task, problems, texts):
    """Returns [(reward, solved)] of the completions, in order.

    Raises ValueError if there are not as many texts as problems.
    """
    pairs = list(zip(problems, texts, strict=True))

    def score(pair):
        problem, text = pair
        return task.reward(problem, text), task.solved(problem, text)

    num_threads = num_scoring_threads(task)
    if num_threads == 1:  # in this thread: a verifier may need it, to set an alarm for example
        return [score(pair) for pair in pairs]
    with ThreadPoolExecutor(num_threads) as pool:
        return list(pool.map(score, pairs))


def completion_length(task, problem, length):
    """Returns the length of a problem's completion: `length`, unless its task has its own."""
    if not isinstance(task, TaskMixture):
        return length
    return task.lengths.get(problem["task"], length)


def batches_by_task(task, problems, length, size):
    """Yields batches of at most `size` problems, each of one task: (their indices, length)."""
    for indices in indices_by_task(task, problems).values():
        batch_length = completion_length(task, problems[indices[0]], length)
        for start in range(0, len(indices), size):
            yield indices[start : start + size], batch_length
