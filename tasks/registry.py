"""Problems, prompts and verifiable rewards.

A task is an object with these methods; a problem is a plain dict that JSON can hold.

    problems(split, n, seed)  n problems of "train", "validation" or "test", which share nothing
                              that could leak. Held-out ones are distinct, and fewer if the
                              task runs out of them.
    prompt(problem)           what the model reads
    reward(problem, text)     in [0, 1], for any text at all; never an exception
    solved(problem, text)     the strict yes or no that evaluations report
    key(problem)              optional: a string that near-duplicates share. They land in one split,
                              and are one cluster in an interval. Without it: the prompt.
    load(path)                optional: the problems of a file, for --data; ValueError for a bad one
    at_once                   optional: threads that may judge completions at the same time

The embedded model "tiny" is too small for instructions. A task that it can learn also has

    length                         tokens of a completion, its end token included
    demonstrations(n, seed, careless)  yields n pairs (problem, text) to imitate, a share `careless`
                                   of them worse: a base model that RL can improve
    compact                        or, in place of both, another such object: the task's small form

Your own task is an instance, or a class, in a file of yours: `--task my_tasks.py:Addition`.
"""

import collections
import itertools
import json
import logging
import random
import re
import runpy
import sys
from pathlib import Path

from tasks import answers
from tasks.splits import SPLITS, draw, rows_of, seeded, split_of

INSTRUCTION = (
    "Think step by step inside <reasoning> and </reasoning>. "
    "Then give the final answer, and nothing else, inside <answer> and </answer>.\n\n"
)


class Task:
    """What the built-in tasks share."""

    def solved(self, problem, text):
        return self.reward(problem, text) == 1.0

    def load(self, path):
        """The problems of a file (splits.rows_of). Raises ValueError that names file and line."""
        problems, line = [], 1
        try:
            for at, row in rows_of(path):
                line = at
                problems.append(self.problem(json.loads(row) if isinstance(row, str) else row))
        except Exception as error:  # a file that cannot be read, and all that a row can be
            why = f"expected {self.example} ({type(error).__name__})"
            raise ValueError(f"{path}, line {line}: {why}") from None
        if not problems:
            raise ValueError(f"{path} holds no problems: one JSON object a line is expected")
        return problems


class Generated(Task):
    """A task that makes its problems, and has a small form, `compact`, for the tiny model.

    A subclass has `draw(split, rng)` -> (problem, solution), `careless(problem, solution)` -> a
    worse one, and `asked`, the field in which problems of one key differ.
    """

    written = "<answer>{}</answer>".format  # a solution's whole text

    def __init__(self, small=False):
        self.small = small
        self.compact = self if small else type(self)(small=True)

    def problems(self, split, n, seed):
        """Held-out ones end after 2,000 repeats in a row: these are about all there are."""
        rng, found, repeats = seeded(self.name, split, seed), {}, 0
        if split == "train":
            return [self.draw(split, rng)[0] for _ in range(n)]
        while len(found) < n and repeats < 2000:
            problem, _ = self.draw(split, rng)
            identity = self.key(problem), problem[self.asked]
            repeats = repeats + 1 if identity in found else 0
            found.setdefault(identity, problem)
        if len(found) < n:
            print(f"{self.name} has only {len(found)} {split} problems", file=sys.stderr)
        return list(found.values())

    def demonstrations(self, n, seed, careless):
        rng = random.Random(f"{self.name} demonstrations {seed}")
        for _ in range(n):
            problem, solution = self.draw("train", rng)
            solution = self.careless(problem, solution) if rng.random() < careless else solution
            yield problem, self.written(solution)


class Countdown(Generated):
    """Reach the target with all the given numbers. Problem: {"numbers": [a, b, c], "target": t}.

    Splits share no multiset of numbers. Reward: 1 for the target, 0.1 for an expression of exactly
    the given numbers with another value, else 0.
    """

    name, asked = "countdown", "target"
    example = '{"numbers": [3, 4, 5], "target": 35} or {"input": "3,4,5", "output": "35"}'
    length = 10  # two tags, seven for ( a + b ) * c, [EOS]

    def key(self, problem):
        return "countdown " + " ".join(map(str, sorted(problem["numbers"])))

    def draw(self, split, rng):
        """Three numbers (small: of 1,540 multisets), and one of the targets that they reach."""
        while True:
            numbers = [rng.randint(1, 20 if self.small else 99) for _ in range(3)]
            if split_of(self.key({"numbers": numbers})) == split:
                reached = answers.solutions(*sorted(numbers, reverse=True))
                target = rng.choice(sorted(reached))
                return {"numbers": numbers, "target": target}, reached[target]

    def careless(self, problem, expression):
        """Forgets the inverse operations and writes + for - and * for /."""
        return expression.replace("-", "+").replace("/", "*")

    def prompt(self, problem):
        numbers, target = map(str, problem["numbers"]), problem["target"]
        if self.small:
            return f"{' '.join(sorted(numbers, key=int, reverse=True))} = {target}"
        return (
            INSTRUCTION + f"Numbers: {', '.join(numbers)}\nTarget: {target}\n"
            "Write an arithmetic expression whose value is the target. Use every number exactly "
            "once, the operations + - * / and parentheses. The answer is the expression alone, "
            "without an equals sign."
        )

    def reward(self, problem, text):
        """Of `35 = (3 + 4) * 5` one side is the expression, and the other has to be its value."""
        given, values, expressions = sorted(map(str, problem["numbers"])), set(), 0
        text = answers.without_prose(answers.final_answer(text))
        try:
            for side in answers.sides(answers.plain(text)):
                if sorted(re.findall("[0-9]+", side)) == given:
                    values.add(answers.arithmetic(side, problem["numbers"]))
                    expressions += 1
                else:
                    values.add(answers.read_number(side) or answers.arithmetic(side))
        except (ValueError, ZeroDivisionError):
            return 0.0
        return 0.0 if not expressions else 1.0 if values == {problem["target"]} else 0.1

    def problem(self, row):
        if "input" in row:  # d1's file; in Dream's the target is the last number of the input
            numbers, way = row["input"].split(","), row["output"]
            target = numbers.pop() if "=" in str(way) else way
        else:
            numbers, target = row["nums" if "nums" in row else "numbers"], row["target"]
        values = [*numbers, target]
        whole = [re.fullmatch(r"\s*[0-9]{1,9}\s*", str(x)) for x in values]  # not 3.7, true, "1_0"
        if not isinstance(numbers, list) or len(values) < 2 or not all(whole):
            raise ValueError
        *numbers, target = map(int, values)
        return {"numbers": numbers, "target": target}


# ---- sudoku 4x4 --------------------------------------------------------------------------------

ROWS = [range(row, row + 4) for row in (0, 4, 8, 12)]
COLUMNS = [range(column, 16, 4) for column in range(4)]
BOXES = [[corner, corner + 1, corner + 4, corner + 5] for corner in (0, 2, 8, 10)]
UNITS = [*ROWS, *COLUMNS, *BOXES]


def is_solution_grid(grid):
    """Whether 16 characters are a finished grid: 1 to 4 once in every row, column and box."""
    return len(grid) == 16 and all({grid[i] for i in unit} == {*"1234"} for unit in UNITS)


class Sudoku(Generated):
    """Fill a 4x4 sudoku. Problem: {"puzzle": "16 characters, 0 is blank", "solution": the same}.

    There are only 288 finished grids, so whole grids are held out, and every puzzle has one
    solution. Reward: the share of blank cells that are right, and at least 0.1 for a whole grid
    that keeps every given and fills a blank. A changed given earns nothing.
    """

    name, asked = "sudoku", "puzzle"
    example = '{"puzzle": "16 characters, 1 to 4, 0 for blank"}, and its "solution" or none'
    length = 19  # two tags, 16 digits, [EOS]

    def __init__(self, small=False):
        super().__init__(small)
        rows = ["".join(p) for p in itertools.permutations("1234")]
        halves = [a + b for a in rows for b in rows if len({*a[:2], *b[:2]}) == 4]  # good boxes
        self.grids = [a + b for a in halves for b in halves if is_solution_grid(a + b)]  # 288
        self.grids_of = collections.defaultdict(list)
        self.having = collections.defaultdict(set)  # (cell, digit): the grids that have it there
        for grid in self.grids:
            self.grids_of[split_of(self.key({"solution": grid}))].append(grid)
            for cell in enumerate(grid):
                self.having[cell].add(grid)

    def key(self, problem):
        return "sudoku " + problem["solution"]

    def _completions(self, puzzle):
        """The finished grids that agree with the puzzle's givens."""
        givens = [cell for cell in enumerate(puzzle) if cell[1] != "0"]
        return set(self.grids).intersection(*(self.having.get(given, ()) for given in givens))

    def draw(self, split, rng):
        """Takes 6 to 11 cells away in random order, where the solution stays the only one."""
        solution = rng.choice(self.grids_of[split])
        puzzle, wanted = list(solution), rng.randint(6, 11)
        for cell in rng.sample(range(16), 16):
            puzzle[cell] = "0"
            if len(self._completions(puzzle)) > 1:
                puzzle[cell] = solution[cell]
            elif puzzle.count("0") == wanted:
                break
        return {"puzzle": "".join(puzzle), "solution": solution}, " ".join(solution)

    def careless(self, problem, solution):
        """Fills each row in ascending order and looks at neither columns nor boxes."""
        cells = list(problem["puzzle"])
        for row in ROWS:
            missing = iter(sorted({*"1234"} - {cells[i] for i in row}))
            for i in row:
                cells[i] = next(missing) if cells[i] == "0" else cells[i]
        return " ".join(cells)

    def prompt(self, problem):
        if self.small:
            return " ".join(problem["puzzle"])
        return (
            INSTRUCTION + f"Puzzle: {problem['puzzle']}\nThis is a 4x4 sudoku, written row by row "
            "as 16 characters; 0 stands for an empty cell. Fill the empty cells so that every row, "
            "every column and every 2x2 box holds 1, 2, 3 and 4. The answer is the complete grid "
            "as 16 digits."
        )

    def grid(self, text):
        """The characters of the answer without what one may set around them."""
        grid = answers.without_prose(answers.final_answer(text))
        latex = r"\\(?:begin|end)\{[a-z]*\}(?:\{[c|]*\})?|\\[a-z]+"
        return re.sub(latex + r"|[][\s,|(){}&;\\*`$+=-]", "", grid)

    def cells(self, problem, text):
        """d1's score: the share of blank cells that are right, givens changed or not."""
        cells = zip(problem["puzzle"], problem["solution"], self.grid(text).ljust(16), strict=False)
        blank = [cell == wanted for given, wanted, cell in cells if given == "0"]
        return sum(blank) / max(1, len(blank))

    def reward(self, problem, text):
        puzzle, solution, grid = problem["puzzle"], problem["solution"], self.grid(text)
        cells = list(zip(puzzle, solution, grid, strict=False))  # as many as there are
        if any(given not in ("0", cell) for given, _, cell in cells):
            return 0.0
        if is_solution_grid(grid):  # any valid completion, should a puzzle of a file have several
            return 1.0
        right = sum(given == "0" and cell == wanted for given, wanted, cell in cells)
        # A cell too many and a given that is missing count like one more blank that is wrong.
        lacking = max(len(grid) - 16, 0) + sum(given != "0" for given in puzzle[len(grid) :])
        tried = re.fullmatch("[0-4]{16}", grid) and grid != puzzle  # the first rung of the ladder
        return max(0.1 if tried else 0.0, right / max(1, puzzle.count("0") + lacking))

    def problem(self, row):
        blank = [row[name] for name in ("puzzle", "Puzzle", "input") if name in row]
        given = [row[name] for name in ("solution", "Solution", "output") if name in row]
        puzzle = "".join(blank[0].split())  # d1's, SPG's and Dream's files name it so
        solutions = self._completions(puzzle)
        solution = "".join(given[0].split()) if given else min(solutions, default=None)
        if not re.fullmatch("[0-4]{16}", puzzle) or solution not in solutions:
            raise ValueError
        return {"puzzle": puzzle, "solution": solution}


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


TASKS = {"countdown": Countdown(), "sudoku": Sudoku(), "gsm8k": GSM8K(), "math": MATH()}


def find_task(name):
    """The task of a name: one of TASKS, or FILE.py:NAME. Raises ValueError."""
    if name in TASKS:
        return TASKS[name]
    path, _, attribute = name.rpartition(":")
    if not path.endswith(".py") or not Path(path).is_file():
        known = f"choose one of {', '.join(TASKS)}, or a FILE.py:NAME that is there"
        raise ValueError(f"unknown task {name!r}: {known}")
    try:
        task = runpy.run_path(path)[attribute]
        task = task() if isinstance(task, type) else task
        parts = ("problems", "prompt", "reward", "solved")
        if missing := [f"no {part}" for part in parts if not callable(getattr(task, part, None))]:
            raise TypeError(", ".join(missing) + ": tasks.py says what a task has")
    except (Exception, SystemExit) as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(f"task {name!r} cannot be had from {path} ({why})") from None
    return task
