"""Problems, prompts and verifiable rewards.

A task is an object with

    problems(split, n, seed)   n problems, as plain dicts; the splits share nothing that could leak
    prompt(problem)            what the model reads
    reward(problem, text)      in [0, 1], from the last <answer>...</answer> of the text; never an exception
    solved(problem, text)      the strict yes or no that evaluations report
    load(path)                 problems from a file (JSON lines)

`compact=True` asks for the small form that the embedded "tiny" model can learn in a minute: smaller numbers, and a
prompt of a few tokens instead of a paragraph of instructions. The verifier is the same for both.

To add a task, write these five methods and put an instance into TASKS. countdown and sudoku are generated; gsm8k and math are
read from data sets, or like any other task from a file.
"""

import itertools
import json
import logging
import random
import re
import zlib
from fractions import Fraction

SPLITS = ("train", "validation", "test")

INSTRUCTION = (
    "Think step by step inside <reasoning> and </reasoning>. "
    "Then give the final answer, and nothing else, inside <answer> and </answer>.\n\n"
)


def extract_answer(text):
    """The inside of the last `<answer>...</answer>`, or "". An unclosed tag is no answer; of nested tags the innermost counts."""
    start = text.rfind("<answer>", 0, max(text.rfind("</answer>"), 0))  # the last opening with a closing behind it
    return text[start + len("<answer>") : text.find("</answer>", start)].strip() if start >= 0 else ""


def split_of(key):
    """Which split a key belongs to: 20% test, 10% validation, 70% train.

    Decided by a checksum of the key alone, so it never depends on a seed, on an order or on how many problems were drawn.
    Settings are tuned on "validation"; "test" is only ever reported.
    """
    bucket = zlib.crc32(key.encode()) % 10  # 0 to 9
    return "test" if bucket < 2 else "validation" if bucket == 2 else "train"


def check_split(split):
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")


def read_json_lines(path):
    """The rows of a JSON-lines file, each with its line number, for error messages. Raises ValueError on a bad or empty file."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            lines = [(number, line) for number, line in enumerate(file, 1) if line.strip()]
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {str(path)!r}: {error}") from None
    if not lines:
        raise ValueError(f"{path} holds no problems: one JSON object a line is expected")
    for number, line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: a JSON object is expected, not {line.strip()[:40]!r}")
        yield number, row


def draw(pool, n, seed, split):
    """n problems of a pool, none twice; in training, when there are not as many, round after round."""
    rng, drawn = random.Random(seed), []
    while len(drawn) < n:
        drawn += rng.sample(pool, min(n - len(drawn), len(pool)))
        if split != "train":
            break
    return drawn


class FromFile:
    """A task whose problems come from a file, split by a checksum of each: 70% train, 10% validation, 20% test."""

    def __init__(self, task, path):
        self.task, self.path = task, path
        rows = task.load(path)
        self.pools = {split: [row for row in rows if split_of(json.dumps(row, sort_keys=True)) == split] for split in SPLITS}

    def __getattr__(self, name):  # all but the problems is the task's own
        return getattr(self.task, name)

    def problems(self, split, n, seed, compact=False):
        check_split(split)
        if compact:
            self.task.problems(split, 0, seed, compact)  # raises where that is beyond the tiny model
        if not self.pools[split]:
            total = sum(map(len, self.pools.values()))
            raise ValueError(f"{self.path} holds {total} problems, and by their checksums none of them is for {split}: give more")
        return draw(self.pools[split], n, f"{self.path} {split} {seed}", split)


# ---- countdown ---------------------------------------------------------------------------------------------------------


def expression_value(text, numbers):
    """The exact value, a Fraction, of an arithmetic expression that uses exactly these integers, + - * / and parentheses.

    The numbers are compared before anything is computed, so no hostile text can make us work with numbers of its own. Then
    two stacks and one pass (Dijkstra's shunting yard): no recursion, so 10,000 nested parentheses cost only their length,
    and nothing is ever evaluated by Python itself.

    Raises ValueError on other numbers and on anything that is no such expression (signs, `**`, `//`, decimals, letters,
    other scripts' digits), ZeroDivisionError on a division by zero.
    """
    tokens = re.findall(r"[0-9]+|\S", text)
    if sorted(t for t in tokens if t[0] in "0123456789") != sorted(map(str, numbers)):
        raise ValueError("not exactly the given numbers")
    precedence = {"+": 1, "-": 1, "*": 2, "/": 2}
    values, operators = [], []

    def reduce_once():
        operator, right, left = operators.pop(), values.pop(), values.pop()
        values.append({"+": left.__add__, "-": left.__sub__, "*": left.__mul__, "/": left.__truediv__}[operator](right))

    expect_operand = True
    for token in tokens:
        if expect_operand:
            if token == "(":
                operators.append(token)
            elif token[0] in "0123456789":
                values.append(Fraction(int(token)))
                expect_operand = False
            else:
                raise ValueError(f"a number was expected, not {token}")
        elif token == ")":
            while operators and operators[-1] != "(":
                reduce_once()
            if not operators:
                raise ValueError("a parenthesis is closed that was not opened")
            operators.pop()
        elif token in precedence:  # first finish what binds at least as tightly, so that a - b - c is (a - b) - c
            while operators and operators[-1] != "(" and precedence[operators[-1]] >= precedence[token]:
                reduce_once()
            operators.append(token)
            expect_operand = True
        else:
            raise ValueError(f"an operator was expected, not {token}")
    if expect_operand or "(" in operators:
        raise ValueError("the expression breaks off")
    while operators:
        reduce_once()
    return values[0]


class Countdown:
    """Reach the target with all the given numbers, each used once. Problem: {"numbers": [a, b, c], "target": t}.

    Splits share no multiset of numbers. Reward: 1 for the target, 0.1 for a well-formed expression of exactly the given
    numbers with another value, else 0.
    """

    max_number = 99  # instruct models: three numbers of 1 to 99, as in d1's setting
    max_target = 99
    compact_max_number = 12  # the tiny model: 364 multisets
    compact_length = 10  # tokens of a compact completion: two tags, seven for ( a + b ) * c, [EOS]

    def _draw(self, split, rng, compact):
        """A random problem with the expression that made it, as (problem, expression)."""
        highest = self.compact_max_number if compact else self.max_number
        while True:
            numbers = [rng.randint(1, highest) for _ in range(3)]
            if split_of("countdown " + " ".join(map(str, sorted(numbers)))) != split:
                continue
            expression, value = self._expression(numbers, rng)
            if value.denominator == 1 and 1 <= value <= self.max_target:
                return {"numbers": numbers, "target": int(value)}, expression

    @staticmethod
    def _expression(numbers, rng):
        """(text, value) of a random expression, written as a tidy person does: where order is free, the larger number first
        and the parentheses in front.
        """
        while True:
            a, b, c = rng.sample(numbers, 3)
            inner, outer = rng.choice("+-*/"), rng.choice("+-*/")
            if inner in "+*":
                a, b = max(a, b), min(a, b)
            in_front = outer in "+*" or rng.random() < 0.5
            text = f"( {a} {inner} {b} ) {outer} {c}" if in_front else f"{c} {outer} ( {a} {inner} {b} )"
            try:
                return text, expression_value(text, numbers)
            except ZeroDivisionError:
                continue

    def problems(self, split, n, seed, compact=False):
        check_split(split)
        rng = random.Random(f"countdown {split} {seed}")
        return [self._draw(split, rng, compact)[0] for _ in range(n)]

    def demonstrations(self, n, seed, careless):
        """n pairs (problem, text) of compact demonstrations from the training split, for the tiny model's warm start.

        A share `careless` of them forgets the inverse operations and writes + for - and * for /: the right numbers in the
        right places, mostly with the wrong value.
        """
        rng = random.Random(f"countdown demonstrations {seed}")
        for _ in range(n):
            problem, expression = self._draw("train", rng, compact=True)
            if rng.random() < careless:
                expression = expression.replace("-", "+").replace("/", "*")
            yield problem, f"<answer>{expression}</answer>"

    def prompt(self, problem, compact=False):
        numbers = problem["numbers"]
        if compact:
            return " ".join(map(str, numbers)) + f" = {problem['target']}"
        return (
            INSTRUCTION
            + f"Numbers: {', '.join(map(str, numbers))}\nTarget: {problem['target']}\n"
            + "Write an arithmetic expression whose value is the target. Use every number exactly once, the operations + - * / "
            + "and parentheses. The answer is the expression alone, without an equals sign."
        )

    def reward(self, problem, text):
        try:
            value = expression_value(extract_answer(text), problem["numbers"])
        except (ValueError, ZeroDivisionError):
            return 0.0
        return 1.0 if value == problem["target"] else 0.1

    def solved(self, problem, text):
        return self.reward(problem, text) == 1.0

    def load(self, path):
        """Rows {"numbers": [..], "target": t}, or d1's {"input": "30,100,93", "output": "23"}."""
        problems = []
        for number, row in read_json_lines(path):
            try:
                numbers, target = (row["input"].split(","), row["output"]) if "input" in row else (row["numbers"], row["target"])
                whole = [re.fullmatch(r"\s*[0-9]{1,9}\s*", str(value)) for value in [*numbers, target]]  # not 3.7, true or "1_0"
                if not isinstance(numbers, list) or not numbers or not all(whole):
                    raise ValueError
                problem = {"numbers": [int(x) for x in numbers], "target": int(target)}
            except (KeyError, TypeError, ValueError, AttributeError):
                raise ValueError(
                    f'{path}, line {number}: expected {{"numbers": [3, 4, 5], "target": 35}} or {{"input": "3,4,5", "output": "35"}}'
                ) from None
            problems.append(problem)
        return problems


# ---- sudoku 4x4 --------------------------------------------------------------------------------------------------------

ROWS = [range(4 * r, 4 * r + 4) for r in range(4)]
COLUMNS = [range(c, 16, 4) for c in range(4)]
BOXES = [[8 * (b // 2) + 2 * (b % 2) + i for i in (0, 1, 4, 5)] for b in range(4)]


def is_solution_grid(grid):
    """Whether 16 characters are a finished grid: 1 to 4 once in every row, column and box."""
    return len(grid) == 16 and all({grid[i] for i in unit} == set("1234") for unit in (*ROWS, *COLUMNS, *BOXES))


class Sudoku:
    """Fill a 4x4 sudoku. Problem: {"puzzle": "16 characters, 0 is blank", "solution": "16 characters"}.

    There are only 288 finished grids, so whole grids are held out, and every puzzle has one solution. Reward: the share of
    blank cells that are right; a changed given earns nothing.
    """

    blanks = (6, 11)  # how many cells are taken away
    compact_length = 19  # tokens of a compact completion: two tags, 16 digits, [EOS]

    def __init__(self):
        rows = ["".join(p) for p in itertools.permutations("1234")]
        halves = [a + b for a in rows for b in rows if len({*a[:2], *b[:2]}) == 4]  # two rows with good boxes
        self.grids = [top + bottom for top in halves for bottom in halves if is_solution_grid(top + bottom)]  # 288
        # bit g of having[cell, digit] says that grid number g has the digit there: the grids that agree with a puzzle are an AND
        self.having = {(i, d): sum(1 << g for g, grid in enumerate(self.grids) if grid[i] == d) for i in range(16) for d in "1234"}
        self.grids_of = {split: [g for g in self.grids if split_of("sudoku " + g) == split] for split in SPLITS}

    def _completions(self, puzzle):
        """The finished grids that agree with the puzzle's givens."""
        agreeing = (1 << len(self.grids)) - 1
        for i, cell in enumerate(puzzle):
            agreeing &= self.having.get((i, cell), agreeing)
        return [self.grids[g] for g in range(agreeing.bit_length()) if agreeing >> g & 1]

    def _draw(self, split, rng):
        """Takes cells away from a finished grid in random order, each only while the solution stays the only one."""
        solution = rng.choice(self.grids_of[split])
        puzzle, wanted = list(solution), rng.randint(*self.blanks)
        for cell in rng.sample(range(16), 16):
            given, puzzle[cell] = puzzle[cell], "0"
            if len(self._completions(puzzle)) > 1:
                puzzle[cell] = given
            elif puzzle.count("0") == wanted:
                break
        return {"puzzle": "".join(puzzle), "solution": solution}

    def problems(self, split, n, seed, compact=False):
        check_split(split)
        rng = random.Random(f"sudoku {split} {seed}")
        return [self._draw(split, rng) for _ in range(n)]

    def demonstrations(self, n, seed, careless):
        """n pairs (problem, text), a share `careless` of them by someone who fills every row with the digits that it lacks, in
        ascending order, and looks at neither columns nor boxes.
        """
        rng = random.Random(f"sudoku demonstrations {seed}")
        for _ in range(n):
            problem = self._draw("train", rng)
            answer = list(problem["solution"])
            if rng.random() < careless:
                for row in ROWS:
                    blank = [i for i in row if problem["puzzle"][i] == "0"]
                    for i, digit in zip(blank, sorted(answer[j] for j in blank), strict=True):
                        answer[i] = digit
            yield problem, f"<answer>{' '.join(answer)}</answer>"

    def prompt(self, problem, compact=False):
        if compact:
            return " ".join(problem["puzzle"])
        return (
            INSTRUCTION
            + f"Puzzle: {problem['puzzle']}\nThis is a 4x4 sudoku, written row by row as 16 characters; 0 stands for an empty cell. "
            + "Fill the empty cells so that every row, every column and every 2x2 box holds 1, 2, 3 and 4. "
            + "The answer is the complete grid as 16 digits."
        )

    def reward(self, problem, text):
        puzzle, solution = problem["puzzle"], problem["solution"]
        grid = "".join((extract_answer(text)).split())
        if len(grid) != 16 or any(given not in ("0", cell) for given, cell in zip(puzzle, grid, strict=True)):
            return 0.0
        if is_solution_grid(grid):  # any valid completion, should a puzzle from a file have several
            return 1.0
        blank = [i for i in range(16) if puzzle[i] == "0"]
        return sum(grid[i] == solution[i] for i in blank) / len(blank) if blank else 0.0

    def solved(self, problem, text):
        return self.reward(problem, text) == 1.0

    def load(self, path):
        """Rows {"puzzle": "16 characters"} with an optional "solution"."""
        problems = []
        for number, row in read_json_lines(path):
            puzzle = row.get("puzzle")
            if not (isinstance(puzzle, str) and re.fullmatch("[0-4]{16}", puzzle)):
                raise ValueError(f'{path}, line {number}: expected {{"puzzle": "16 characters, 1 to 4, 0 for blank", "solution": ...}}')
            solutions = self._completions(puzzle)
            if not solutions or row.get("solution", solutions[0]) not in solutions:
                raise ValueError(f"{path}, line {number}: the puzzle has no solution, or not the one given")
            problems.append({"puzzle": puzzle, "solution": row.get("solution", solutions[0])})
        return problems


# ---- gsm8k and math ------------------------------------------------------------------------------------------------------

LONGEST = 1000  # characters: a longer answer is no answer


def boxed(text):
    """The inside of the last \boxed{...} whose braces are balanced, or ""."""
    start = text.rfind("\\boxed{")
    depth = 0
    for i in range(start + 6, min(len(text), start + LONGEST)) if start >= 0 else ():
        depth += (text[i] == "{") - (text[i] == "}")
        if not depth:
            return text[start + 7 : i].strip()
    return ""


def final_answer(text):
    """What a completion answers: what its last answer tags hold, or where it has no tags its last \\boxed{}."""
    inside = extract_answer(text) if "<answer>" in text else boxed(text)
    return boxed(inside) or inside


def read_number(text, units=True):
    """The one number that a short text states, exactly, as a Fraction; None where there is none or more than one.

    Understands thousands separators, signs, currencies, units, percent (50% is 50), decimals, fractions, mixed numbers, LaTeX, and
    what follows the last equals sign. Sums, roots and ranges are no number; without `units` no letter or bracket may be left over.
    """
    text = re.sub("(?<=[A-Za-z])[²³]", "", text[: LONGEST + 1])  # square and cubic metres
    if len(text) > LONGEST or any(c.isdigit() and c not in "0123456789" for c in text):
        return None
    text = text.replace("{,}", ",").replace("−", "-").rpartition("=")[2]
    text = re.sub(r"\\[dt]?frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r" \1/\2", text)
    text = re.sub(r"\^\s*\{?\\circ\}?", " ", text)
    text = re.sub(r"(?<=[A-Za-z}])\s*\^\s*\{?[0-9]\}?", " ", text)  # square metres
    text = re.sub(r"\s*(?:\\times|\\cdot|×|\*)\s*10\s*\^\s*\{?([-+]?[0-9]{1,3})\}?", r"e\1", text)
    text = re.sub(r"\\(?:[,;:! ()\[\]]|text|mathrm|mbox|left|right)", "", text)
    if re.search(r"\\(?!boxed)[A-Za-z]", text):  # a root, a function, a constant
        return None
    text = re.sub(r"boxed|[{}$£€\\~]", "", text).strip()
    if re.search(r"[A-Za-z]\(?[0-9]", re.sub(r"(?<=[0-9])e(?=[-+]?[0-9])", "", text)) or not units and re.search(r"[A-Za-z()\[\]]", text):
        return None
    if re.search(r"[0-9A-Za-z)]\s*[-+*×^]\s*[0-9(]", re.sub(r"(?<=[0-9])e[-+]?(?=[0-9])", "", text)):
        return None  # something to be worked out
    found = re.findall(r"((?:[-+]\s*)?)([0-9.,/]*[0-9][0-9.,/]*(?:e[-+]?[0-9]{1,3})?)", text)
    if len(found) == 2 and re.search(r"[0-9]\s+[0-9]+/[0-9]+", text) and "/" not in found[0][1]:  # a mixed number
        whole, part = (_plain_number(number) for _, number in found)
        value = None if whole is None or part is None or not 0 <= part < 1 or whole.denominator != 1 else whole + part
    else:
        value = _plain_number(found[0][1]) if len(found) == 1 else None
    return -value if value is not None and found[0][0].startswith("-") else value


def _plain_number(text):
    text = text.rstrip(".,")
    above, slash, below = text.partition("/")
    form = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?(?:\.[0-9]+)?(?:e[-+]?[0-9]{1,3})?"
    if not all(re.fullmatch(form, part) and re.search("[0-9]", part) for part in ([above, below] if slash else [above])):
        return None
    try:
        return Fraction(above.replace(",", "")) / (Fraction(below.replace(",", "")) if slash else 1)
    except (ValueError, ZeroDivisionError):
        return None


def equivalent(answer, gold):
    """Whether two mathematical answers in LaTeX are the same: as text, as numbers, or for math-verify (within its time limit).

    Only its LaTeX grammar is used: its other ways in lead to sympy's parse_expr, and so to Python's eval, on the model's text.
    """
    if not answer or len(answer) > LONGEST:
        return False
    if _tidy(answer) == _tidy(gold):
        return True
    numbers = [read_number(re.sub(r"\\text\s*\{[^{}]*\}", "", text), units=False) for text in (answer, gold)]
    if None not in numbers:
        return numbers[0] == numbers[1]
    if _hostile(answer) or _hostile(gold):
        return False
    from math_verify import LatexExtractionConfig, parse, verify
    from math_verify.errors import TimeoutException

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    try:
        gold, answer = (
            parse(f"\\boxed{{{_tidy(text, words=False)}}}", [LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=2)
            for text in (gold, answer)
        )
        return bool(gold and answer) and verify(gold, answer, timeout_seconds=2)
    except (Exception, TimeoutException):  # its alarm works in the main thread alone, and is no Exception
        return False


def _tidy(text, words=True):
    """A LaTeX answer without what does not change its meaning; with `words` also without \\text and without spaces but between digits."""
    text = re.sub(r"\\(?:left|right|!|,|;|:)", "", text.strip().strip("$").rstrip("."))
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = re.sub(r"\\(?:text|mathrm|textbf|mbox)\s*\{([^{}]*)\}", r"\1", text) if words else text
    return re.sub(r"(?<![0-9])\s+|\s+(?![0-9])", "", text.replace("\\ ", " ")) if words else text


def _hostile(text):
    """Whether computing it could take for ever: sympy's big integers do not hear a time limit's alarm."""
    size = 1
    for exponent in re.findall(r"\^\s*(\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\}|[0-9])", text):
        if "^" in exponent or "!" in exponent:
            return True
        for number in re.findall(r"[0-9]+", exponent):
            size *= max(1, int(number[:9]))
    deep = text.count("^") > 12 or re.search(r"\^\s*\{[^{}]*\{[^{}]*\{", text)
    return bool(len(text) > 300 or size > 10_000 or deep or re.search(r"[0-9]{40}|!|\\(?:binom|sum|prod|int|lim|uparrow)", text))


class Questions:
    """Questions with short answers, from public data sets or a file. Problem: {"question": "...", "answer": "..."}.

    "validation" is the tenth of the training set that the questions' checksums pick; a test question is never trained on.
    """

    name, train_set, test_set = None, (), ()  # the arguments of datasets.load_dataset, split included

    def __init__(self):
        self.pools = {}

    def problems(self, split, n, seed, compact=False):
        check_split(split)
        if compact:
            raise ValueError(f"{self.name} is beyond the tiny model: give --model a LLaDA-class checkpoint")
        if not self.pools:
            test, train = self._fetch(self.test_set), self._fetch(self.train_set)
            tested = {_tidy(row["question"]) for row in test}
            train = [row for row in train if _tidy(row["question"]) not in tested]
            held = [split_of(f"{self.name} {_tidy(row['question'])}") == "validation" for row in train]
            self.pools = {"test": test, "validation": [row for row, out in zip(train, held, strict=True) if out]}
            self.pools["train"] = [row for row, out in zip(train, held, strict=True) if not out]
        return draw(self.pools[split], n, f"{self.name} {split} {seed}", split)

    def _fetch(self, where):
        *path, split = where
        import datasets

        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries: the line below says what is the matter
        try:
            rows = list(datasets.load_dataset(*path, split=split))
        except Exception as error:  # hub, cache, network and file system each have their own
            why = " ".join(str(error).split())[:100]
            raise ValueError(
                f"the data set {path[0]} cannot be reached ({why}): give a JSON-lines file of problems by --data FILE"
            ) from None
        return [self.problem(row) for row in rows]

    def load(self, path):
        """Rows {"question": "...", "answer": "..."}; MATH's names "problem" and "solution", and GSM8K's "... #### 72", are read too."""
        problems = []
        for number, row in read_json_lines(path):
            try:
                problems.append(self.problem(row))
            except (KeyError, TypeError, ValueError, AttributeError):
                raise ValueError(f'{path}, line {number}: expected {{"question": "text", "answer": "{self.example}"}}') from None
        return problems

    def solved(self, problem, text):
        return self.right(final_answer(text), problem["answer"])

    def _text(self, value):
        if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
            raise ValueError("no text")
        return str(value).strip()


class GSM8K(Questions):
    """Grade-school word problems with a number as the answer. Reward: d1's parts over their sum, repaired (reasoning may have lines)."""

    name, example = "gsm8k", "72"
    train_set, test_set = ("openai/gsm8k", "main", "train"), ("openai/gsm8k", "main", "test")

    def problem(self, row):
        answer = self._text(row["answer"]).rpartition("####")[2].strip()
        if read_number(answer) is None:
            raise ValueError("no number")
        return {"question": self._text(row["question"]), "answer": answer}

    def prompt(self, problem, compact=False):
        return INSTRUCTION + problem["question"] + "\nThe answer is one number, without its unit."

    def right(self, answer, gold):
        return read_number(answer) is not None and read_number(answer) == read_number(gold)

    def reward(self, problem, text):
        tags = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")
        once = [text.count(tag) == 1 for tag in tags]
        places = [text.find(tag) for tag in tags]
        soft = all(once) and places == sorted(places)  # each tag once and in order: something like the format
        tidy = text.strip()
        strict = soft and tidy.startswith(tags[0]) and tidy.endswith(tags[3]) and not text[places[1] + len(tags[1]) : places[2]].strip()
        number = read_number(final_answer(text))
        whole = number is not None and number.denominator == 1
        return (2.0 * self.solved(problem, text) + 0.5 * whole + 0.5 * strict + 0.5 * soft + 0.125 * sum(once)) / 4


class MATH(Questions):
    """Competition problems with answers in LaTeX. Reward: d1's parts over their sum; d1's own looked for a box and never found it."""

    name, example = "math", "\\\\frac{1}{2}"
    train_set, test_set = ("ankner/math-500", "train"), ("HuggingFaceH4/MATH-500", "test")

    def problem(self, row):
        question = row["question"] if "question" in row else row["problem"]
        answer = row["answer"] if row.get("answer") is not None else boxed(row["solution"])
        return {"question": self._text(question), "answer": self._text(answer)}

    def prompt(self, problem, compact=False):
        return INSTRUCTION + problem["question"] + "\nInside the answer tags, put the final answer into \\boxed{}."

    def right(self, answer, gold):
        return equivalent(answer, gold)

    def reward(self, problem, text):
        tags, box = bool(extract_answer(text)), bool(boxed(text))
        form = (1.0 if boxed(extract_answer(text)) else 0.75) if tags else 0.5 if box else 0.25 if text.strip() else 0.0
        return (2.0 * self.solved(problem, text) + form) / 3


TASKS = {"countdown": Countdown(), "sudoku": Sudoku(), "gsm8k": GSM8K(), "math": MATH()}
