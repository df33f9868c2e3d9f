"""Several tasks in one run: `python train.py --task countdown,sudoku`.

One model and one threshold head learn them all. The tasks take turns, a step each, for a rollout
has one length: on the tiny model a completion of countdown has 10 tokens, one of sudoku 19.
"""

from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest


class TaskMixture:
    """Several tasks as one. A problem is its task's own, with that task's name under "task"."""

    def __init__(self, tasks, compact):
        """tasks: {name: task}; compact: they are the tiny model's, with a length each."""
        self.tasks = tasks
        self.lengths = {name: task.length for name, task in tasks.items()} if compact else {}
        self.length = max(self.lengths.values(), default=0)
        self.at_once = min(getattr(task, "at_once", 1) for task in tasks.values())  # threads

    def problems(self, split, n, seed):
        """n problems in turn, as many of each task; the first tasks have what is left over."""
        each, k = [], len(self.tasks)
        for i, (name, task) in enumerate(self.tasks.items()):
            own = task.problems(split, (n + k - 1 - i) // k, seed)
            if any("task" in problem for problem in own):
                raise ValueError(f'{name}: its problems have a field "task", which is taken here')
            each.append([problem | {"task": name} for problem in own])
        return [problem for turn in zip_longest(*each) for problem in turn if problem is not None]

    def prompt(self, problem):
        return self.tasks[problem["task"]].prompt(problem)

    def reward(self, problem, text):
        return self.tasks[problem["task"]].reward(problem, text)

    def solved(self, problem, text):
        return self.tasks[problem["task"]].solved(problem, text)

    def key(self, problem):
        own = self.tasks[problem["task"]]
        return f"{problem['task']} {getattr(own, 'key', own.prompt)(problem)}"


def task_for_step(task, step, length):
    """(task, length) of a step: of several tasks the one whose turn it is, with its own length."""
    if not isinstance(task, TaskMixture):
        return task, length
    name = list(task.tasks)[step % len(task.tasks)]
    return TaskMixture({name: task.tasks[name]}, bool(task.lengths)), task.lengths.get(name, length)


def places_by_task(task, problems):
    """{name: the places of its problems}; a task alone has all of them, and no name."""
    places = {}
    for place, problem in enumerate(problems):
        name = problem["task"] if isinstance(task, TaskMixture) else ""
        places.setdefault(name, []).append(place)
    return places


def score_completions(task, problems, texts):
    """[(reward, whether it is solved)] of the completions, as many at once as the task allows."""
    pairs, at_once = zip(problems, texts, strict=True), getattr(task, "at_once", 1)

    def judge(pair):
        return task.reward(*pair), task.solved(*pair)

    if at_once == 1:  # in this thread: what a verifier of one's own may need, an alarm say
        return [*map(judge, pairs)]
    with ThreadPoolExecutor(at_once) as pool:
        return [*pool.map(judge, pairs)]


def completion_length(task, problem, length):
    """Tokens of a problem's completion: `length`, but where several tasks have a length each."""
    return task.lengths.get(problem["task"], length) if isinstance(task, TaskMixture) else length


def batches_by_task(task, problems, length, size):
    """Yields (places, length) of batches of at most `size` problems, none of two tasks."""
    for places in places_by_task(task, problems).values():
        own = completion_length(task, problems[places[0]], length)
        for start in range(0, len(places), size):
            yield places[start : start + size], own
