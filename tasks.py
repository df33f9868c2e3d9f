"""Problems, prompts and verifiable rewards.

A task is an object with these methods; a problem is a plain dict that JSON can hold.

    problems(split, n, seed)  n problems of "train", "validation" or "test", which share nothing
                              that could leak. Held-out ones are distinct: all there are, if fewer.
    prompt(problem)           what the model reads
    reward(problem, text)     in [0, 1], for any text at all; never an exception
    solved(problem, text)     the strict yes or no that evaluations report
    key(problem)              optional: a string that near-duplicates share. They land in one split,
                              and are one cluster in an interval. Without it: the prompt.
    load(path)                optional: the problems of a file, for --data; ValueError for a bad one

The embedded model "tiny" is too small for instructions. A task that it can learn also has

    length                         tokens of a completion, its end token included
    demonstrations(n, seed, careless)  yields n pairs (problem, text) to imitate, a share `careless`
                                   of them worse: a base model that RL can improve
    compact                        or, in place of both, another such object: the task's small form

Your own task is an instance, or a class, in a file of yours: `--task my_tasks.py:Addition`.
"""

import contextlib
import importlib.util
import itertools
import json
import logging
import random
import re
import sys
import zlib
from pathlib import Path

import answers

SPLITS = ("train", "validation", "test")
INSTRUCTION = (
    "Think step by step inside <reasoning> and </reasoning>. "
    "Then give the final answer, and nothing else, inside <answer> and </answer>.\n\n"
)


def split_of(key):
    """Which split a key belongs to, by its checksum: 20% test, 10% validation, 70% train.

    It depends on no seed, order or number of draws. Settings are tuned on "validation".
    """
    bucket = zlib.crc32(key.encode(errors="surrogatepass")) % 10  # 0 to 9
    return "test" if bucket < 2 else "validation" if bucket == 2 else "train"


def check_split(split):
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")


def draw(pool, n, seed, split):
    """n problems of a pool, none twice; training goes round again when there are not as many."""
    rng, drawn = random.Random(seed), []
    while len(drawn) < n:
        drawn += rng.sample(pool, min(n - len(drawn), len(pool)))
        if split != "train":
            break
    return drawn


class Task:
    """What the built-in tasks share."""

    def solved(self, problem, text):
        return self.reward(problem, text) == 1.0

    def load(self, path):
        """The problems of a JSON-lines file. Raises ValueError that names the file and the line."""
        try:
            lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot read {str(path)!r}: {error}") from None
        problems = []
        for number, line in enumerate(lines, 1):
            try:
                problems += [self.problem(json.loads(line))] if line.strip() else []
            except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
                raise ValueError(f"{path}, line {number}: expected {self.example}") from None
        if not problems:
            raise ValueError(f"{path} holds no problems: one JSON object a line is expected")
        return problems


class Generated(Task):
    """A task with `_draw(split, rng)` -> (problem, its solution), `identity` and `_every`."""

    def problems(self, split, n, seed):
        check_split(split)
        rng = random.Random(f"{self.name} {split} {seed}")
        if split == "train":
            return [self._draw(split, rng)[0] for _ in range(n)]
        found, repeats = {}, 0
        while len(found) < n and repeats < 1000:  # in a row: few are left, if any
            problem, _ = self._draw(split, rng)
            repeats = repeats + 1 if self.identity(problem) in found else 0
            found.setdefault(self.identity(problem), problem)
        for problem in self._every(split) if len(found) < n else ():
            found.setdefault(self.identity(problem), problem)
        if len(found) < n:
            print(f"{self.name} has only {len(found)} {split} problems", file=sys.stderr)
        return list(found.values())[:n]


class FromFile:
    """A task whose problems come from a file, split by the checksums of their keys."""

    def __init__(self, task, path):
        if not hasattr(task, "load"):
            raise ValueError(f"--data {path}: this task has no load(path) to read a file with")
        self.task, self.path, self.pools = task, path, {split: [] for split in SPLITS}
        for problem in task.load(path):
            self.pools[split_of(getattr(task, "key", task.prompt)(problem))].append(problem)

    def __getattr__(self, name):  # all but the problems is the task's own
        return getattr(self.task, name)

    @property
    def compact(self):
        return FromFile(for_tiny(self.task), self.path)

    def problems(self, split, n, seed):
        check_split(split)
        if not self.pools[split]:
            total = sum(map(len, self.pools.values()))
            raise ValueError(
                f"{self.path} holds {total} problems, and by the checksums of their keys none of "
                f"them is for {split}: give more"
            )
        return draw(self.pools[split], n, f"{self.path} {split} {seed}", split)


# ---- countdown ---------------------------------------------------------------------------------


class Countdown(Generated):
    """Reach the target with all the given numbers. Problem: {"numbers": [a, b, c], "target": t}.

    Splits share no multiset of numbers. Reward: 1 for the target, 0.1 for an expression of exactly
    the given numbers with another value, else 0.
    """

    name = "countdown"
    example = '{"numbers": [3, 4, 5], "target": 35} or {"input": "3,4,5", "output": "35"}'
    highest, highest_target = 99, 99  # as in d1's setting

    def key(self, problem):
        return "countdown " + " ".join(map(str, sorted(problem["numbers"])))

    def identity(self, problem):
        return f"{self.key(problem)} = {problem['target']}"

    def _draw(self, split, rng):
        """A problem, and the expression that made it."""
        while True:
            numbers = [rng.randint(1, self.highest) for _ in range(3)]
            if split_of(self.key({"numbers": numbers})) == split:
                expression, value = self._expression(numbers, rng)
                for problem in self._with_target(numbers, value):
                    return problem, expression

    @staticmethod
    def _expression(numbers, rng):
        """(text, value) of a random expression, written as a tidy person does.

        Where order is free, the larger number comes first and the parentheses in front.
        """
        while True:
            a, b, c = rng.sample(numbers, 3)
            inner, outer = rng.choice("+-*/"), rng.choice("+-*/")
            if inner in "+*":
                a, b = max(a, b), min(a, b)
            in_front = outer in "+*" or rng.random() < 0.5
            first, second = f"( {a} {inner} {b} )", str(c)
            text = f" {outer} ".join((first, second) if in_front else (second, first))
            try:
                return text, answers.arithmetic(text)
            except ZeroDivisionError:
                continue

    def _every(self, split):
        """Every problem of a split, whatever its chance to be drawn."""
        for numbers in itertools.combinations_with_replacement(range(1, self.highest + 1), 3):
            if split_of(self.key({"numbers": numbers})) == split:
                choices = itertools.product(itertools.permutations(numbers), "+-*/", "+-*/")
                for (a, b, c), inner, outer in choices:
                    for text in (f"({a}{inner}{b}){outer}{c}", f"{c}{outer}({a}{inner}{b})"):
                        with contextlib.suppress(ZeroDivisionError):
                            yield from self._with_target(numbers, answers.arithmetic(text))

    def _with_target(self, numbers, value):
        """A list of the problem, or an empty one where the value can be no target."""
        whole = value.denominator == 1 and 1 <= value <= self.highest_target
        return [{"numbers": list(numbers), "target": int(value)}] if whole else []

    def prompt(self, problem):
        numbers = ", ".join(map(str, problem["numbers"]))
        return (
            INSTRUCTION + f"Numbers: {numbers}\nTarget: {problem['target']}\n"
            "Write an arithmetic expression whose value is the target. Use every number exactly "
            "once, the operations + - * / and parentheses. The answer is the expression alone, "
            "without an equals sign."
        )

    def reward(self, problem, text):
        """Of `35 = (3 + 4) * 5` one side is the expression, and the other has to be its value."""
        text = answers.without_prose(answers.final_answer(text))
        sides = answers.plain(text, fraction=r"((\1)/(\2))").split("=")[:5]
        sides = [side for side in sides if not answers.is_name(side)]
        given, values = sorted(map(str, problem["numbers"])), set()
        expressions = [sorted(re.findall("[0-9]+", side)) == given for side in sides]
        if not any(expressions) or len(sides) > 4:
            return 0.0
        try:
            for side, is_expression in zip(sides, expressions, strict=True):
                if is_expression:
                    values.add(answers.arithmetic(side, problem["numbers"]))
                else:
                    values.add(answers.read_number(side) or answers.arithmetic(side))
        except (ValueError, ZeroDivisionError):
            return 0.0
        return 1.0 if values == {problem["target"]} else 0.1

    def problem(self, row):
        if "input" in row:
            row = {"numbers": row["input"].split(","), "target": row["output"]}
        if not isinstance(row["numbers"], list) or not row["numbers"]:
            raise ValueError("no numbers")
        for value in [*row["numbers"], row["target"]]:
            if not re.fullmatch(r"\s*[0-9]{1,9}\s*", str(value)):  # not 3.7, true or "1_0"
                raise ValueError("not a whole number")
        return {"numbers": [int(x) for x in row["numbers"]], "target": int(row["target"])}


class CompactCountdown(Countdown):
    """For the tiny model: 364 multisets, and a prompt of a few tokens."""

    highest = 12
    length = 10  # two tags, seven for ( a + b ) * c, [EOS]

    def prompt(self, problem):
        return " ".join(map(str, problem["numbers"])) + f" = {problem['target']}"

    def demonstrations(self, n, seed, careless):
        """The careless forget the inverse operations and write + for - and * for /."""
        rng = random.Random(f"countdown demonstrations {seed}")
        for _ in range(n):
            problem, expression = self._draw("train", rng)
            if rng.random() < careless:
                expression = expression.replace("-", "+").replace("/", "*")
            yield problem, f"<answer>{expression}</answer>"


# ---- sudoku 4x4 --------------------------------------------------------------------------------

ROWS = [range(4 * r, 4 * r + 4) for r in range(4)]
COLUMNS = [range(c, 16, 4) for c in range(4)]
BOXES = [[8 * (b // 2) + 2 * (b % 2) + i for i in (0, 1, 4, 5)] for b in range(4)]


def is_solution_grid(grid):
    """Whether 16 characters are a finished grid: 1 to 4 once in every row, column and box."""
    units = (*ROWS, *COLUMNS, *BOXES)
    return len(grid) == 16 and all({grid[i] for i in unit} == set("1234") for unit in units)


class Sudoku(Generated):
    """Fill a 4x4 sudoku. Problem: {"puzzle": "16 characters, 0 is blank", "solution": the same}.

    There are only 288 finished grids, so whole grids are held out, and every puzzle has one
    solution. Reward: the share of blank cells that are right, and at least 0.1 for a whole grid
    that keeps every given and fills a blank. A changed given earns nothing.
    """

    name = "sudoku"
    example = '{"puzzle": "16 characters, 1 to 4, 0 for blank"}, and its "solution" or none'
    blanks = (6, 11)  # how many cells are taken away

    def __init__(self):
        rows = ["".join(p) for p in itertools.permutations("1234")]
        halves = [a + b for a in rows for b in rows if len({*a[:2], *b[:2]}) == 4]  # good boxes
        self.grids = [a + b for a in halves for b in halves if is_solution_grid(a + b)]  # 288
        self.grids_of = {split: [] for split in SPLITS}
        # Bit g of having[cell, digit] says that grid g has the digit there.
        self.having = dict.fromkeys(itertools.product(range(16), "1234"), 0)
        for g, grid in enumerate(self.grids):
            self.grids_of[split_of(self.key({"solution": grid}))].append(grid)
            for cell in enumerate(grid):
                self.having[cell] |= 1 << g

    def key(self, problem):
        return "sudoku " + problem["solution"]

    def identity(self, problem):
        return problem["puzzle"]

    def _completions(self, puzzle):
        """The finished grids that agree with the puzzle's givens."""
        agreeing = (1 << len(self.grids)) - 1
        for cell in enumerate(puzzle):
            agreeing &= self.having.get(cell, agreeing)
        return [self.grids[g] for g in range(agreeing.bit_length()) if agreeing >> g & 1]

    def _draw(self, split, rng):
        """Takes cells away in random order, each only while the solution stays the only one."""
        solution = rng.choice(self.grids_of[split])
        puzzle, wanted = list(solution), rng.randint(*self.blanks)
        for cell in rng.sample(range(16), 16):
            given, puzzle[cell] = puzzle[cell], "0"
            if len(self._completions(puzzle)) > 1:
                puzzle[cell] = given
            elif puzzle.count("0") == wanted:
                break
        return {"puzzle": "".join(puzzle), "solution": solution}, solution

    def _every(self, split):
        return ()  # about a million: nobody draws them all

    def prompt(self, problem):
        return (
            INSTRUCTION + f"Puzzle: {problem['puzzle']}\nThis is a 4x4 sudoku, written row by row "
            "as 16 characters; 0 stands for an empty cell. Fill the empty cells so that every row, "
            "every column and every 2x2 box holds 1, 2, 3 and 4. The answer is the complete grid "
            "as 16 digits."
        )

    def reward(self, problem, text):
        puzzle, solution = problem["puzzle"], problem["solution"]
        grid = re.sub(
            r"\\(?:begin|end)\{[a-z]*\}(?:\{[c|]*\})?|\\[a-z]+", "", answers.final_answer(text)
        )
        grid = re.sub(r"[][\s,|(){}&;\\*`$+=-]", "", answers.without_prose(grid))
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
        if not re.fullmatch("[0-4]{16}", row["puzzle"]):
            raise ValueError("no puzzle")
        solutions = self._completions(row["puzzle"])
        if row.get("solution", solutions and solutions[0]) not in solutions:
            raise ValueError("no such solution")
        return {"puzzle": row["puzzle"], "solution": row.get("solution", solutions[0])}


class CompactSudoku(Sudoku):
    """For the tiny model: a prompt of 16 tokens."""

    length = 19  # two tags, 16 digits, [EOS]

    def prompt(self, problem):
        return " ".join(problem["puzzle"])

    def demonstrations(self, n, seed, careless):
        """The careless fill each row in ascending order and look at neither columns nor boxes."""
        rng = random.Random(f"sudoku demonstrations {seed}")
        for _ in range(n):
            problem, solution = self._draw("train", rng)
            answer = list(solution)
            if rng.random() < careless:
                for row in ROWS:
                    blank = [i for i in row if problem["puzzle"][i] == "0"]
                    for i, digit in zip(blank, sorted(answer[j] for j in blank), strict=True):
                        answer[i] = digit
            yield problem, f"<answer>{' '.join(answer)}</answer>"


# ---- gsm8k and math ----------------------------------------------------------------------------


class Questions(Task):
    """Questions with short answers, from public data sets. Problem: {"question", "answer"}.

    "validation" is the tenth of the training set that the questions' checksums pick; a test
    question is never trained on.
    """

    name, train_set, test_set = None, (), ()  # arguments of datasets.load_dataset, split last

    def __init__(self):
        self.pools = {}

    def key(self, problem):
        return f"{self.name} {''.join(problem['question'].lower().split())}"

    def problems(self, split, n, seed):
        check_split(split)
        if not self.pools:
            pools = {split: [] for split in SPLITS} | {"test": self._fetch(self.test_set)}
            tested = {*map(self.key, pools["test"])}
            for row in self._fetch(self.train_set):
                if self.key(row) not in tested:
                    held = split_of(self.key(row)) == "validation"
                    pools["validation" if held else "train"].append(row)
            self.pools = pools
        return draw(self.pools[split], n, f"{self.name} {split} {seed}", split)

    def _fetch(self, where):
        import datasets

        *path, split = where
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # the line below says enough
        try:
            return [self.problem(row) for row in datasets.load_dataset(*path, split=split)]
        except Exception as error:  # hub, cache, network and file system each have their own
            why = " ".join(str(error).split())[:100]
            raise ValueError(
                f"the data set {path[0]} cannot be reached ({why}): "
                "give a JSON-lines file of problems by --data FILE"
            ) from None

    def _text(self, value):
        if isinstance(value, bool | list | dict | None) or not str(value).strip():
            raise ValueError("no text")
        return str(value).strip()


class GSM8K(Questions):
    """Grade-school word problems with a number as the answer."""

    name, example = "gsm8k", '{"question": "text", "answer": "72"}'
    train_set, test_set = ("openai/gsm8k", "main", "train"), ("openai/gsm8k", "main", "test")

    def problem(self, row):
        answer = self._text(row["answer"]).rpartition("####")[2].strip()
        if answers.read_number(answer) is None:
            raise ValueError("no number")
        return {"question": self._text(row["question"]), "answer": answer}

    def prompt(self, problem):
        return INSTRUCTION + problem["question"] + "\nThe answer is one number, without its unit."

    def solved(self, problem, text):
        number = answers.read_number(answers.final_answer(text))
        return number is not None and number == answers.read_number(problem["answer"])

    def reward(self, problem, text):
        """d1's parts over their sum, repaired: reasoning may have lines."""
        tags = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")
        once = [text.count(tag) == 1 for tag in tags]
        places = [text.find(tag) for tag in tags]
        soft = all(once) and places == sorted(places)  # something like the format
        tidy = text.strip()
        between = text[places[1] + len(tags[1]) : places[2]].strip()
        strict = soft and tidy.startswith(tags[0]) and tidy.endswith(tags[3]) and not between
        number = answers.read_number(answers.final_answer(text))
        whole = number is not None and number.denominator == 1
        form = 0.5 * whole + 0.5 * strict + 0.5 * soft + 0.125 * sum(once)
        return (2.0 * self.solved(problem, text) + form) / 4


class MATH(Questions):
    """Competition problems with answers in LaTeX."""

    name, example = "math", r'{"question": "text", "answer": "\\frac{1}{2}"}'
    train_set, test_set = ("ankner/math-500", "train"), ("HuggingFaceH4/MATH-500", "test")

    def problem(self, row):
        question = row["question"] if "question" in row else row["problem"]
        answer = row["answer"] if row.get("answer") is not None else answers.boxed(row["solution"])
        return {"question": self._text(question), "answer": self._text(answer)}

    def prompt(self, problem):
        form = "\nInside the answer tags, put the final answer into \\boxed{}."
        return INSTRUCTION + problem["question"] + form

    def solved(self, problem, text):
        return answers.equivalent(answers.final_answer(text), problem["answer"])

    def reward(self, problem, text):
        """d1's parts over their sum; d1's own looked for a box and never found it."""
        tags, box = bool(answers.extract_answer(text)), bool(answers.boxed(text))
        outside = 0.5 if box else 0.25 if text.strip() else 0.0
        form = (1.0 if answers.boxed(answers.extract_answer(text)) else 0.75) if tags else outside
        return (2.0 * self.solved(problem, text) + form) / 3


TASKS = {"countdown": Countdown(), "sudoku": Sudoku(), "gsm8k": GSM8K(), "math": MATH()}
TASKS["countdown"].compact, TASKS["sudoku"].compact = CompactCountdown(), CompactSudoku()


def for_tiny(task):
    """What the embedded model uses of a task. Raises ValueError where it has no such form."""
    task = getattr(task, "compact", task)
    missing = [name for name in ("length", "demonstrations") if not hasattr(task, name)]
    if missing:
        name = getattr(task, "name", type(task).__name__)
        raise ValueError(
            f"{name} has no {' and no '.join(missing)} for the tiny model: "
            "give --model a LLaDA-class checkpoint"
        )
    return task


def find_task(name):
    """The task of a name: one of TASKS, or FILE.py:NAME. Raises ValueError."""
    if name in TASKS:
        return TASKS[name]
    path, _, attribute = name.rpartition(":")
    if not path.endswith(".py") or not Path(path).is_file():
        known = f"choose one of {', '.join(TASKS)}, or a FILE.py:NAME that is there"
        raise ValueError(f"unknown task {name!r}: {known}")
    spec = importlib.util.spec_from_file_location(f"task_{Path(path).stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        task = getattr(module, attribute)
        task = task() if isinstance(task, type) else task
    except (Exception, SystemExit) as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(f"task {name!r} cannot be had from {path} ({why})") from None
    protocol = ("problems", "prompt", "reward", "solved")
    missing = [method for method in protocol if not callable(getattr(task, method, None))]
    if missing:
        raise ValueError(
            f"task {name!r} has no {', no '.join(missing)}: tasks.py says what a task has"
        )
    return task
