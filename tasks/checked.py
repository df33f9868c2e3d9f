"""Checks everything that a user's own task returns; each mistake gives a one-line error.

A reward outside [0, 1] would not fail but mislead. A reward that is not finite looks like a
learning rate that is too high. A negative one reverses the penalty on NFE: multiplied by 1 - lambda
* NFE / L, it grows with every call. So both are refused before training starts.
"""

import copy
import json
import math
from numbers import Real

ROUNDING = 1e-6  # a sum of partial rewards may differ from 1 by rounding


def short(value):
    """A value for a message: its repr on one line, of at most 80 characters."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:79]}…"


def is_json(value):
    """Whether JSON can represent a value: a run writes problems to its files."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


class CheckedTask:
    """A task whose methods return what tasks/task.py says, or raise a ValueError that names them.

    Errors raised by the task's methods become such ValueErrors too, even sys.exit, which would end
    a run with a success status. A method gets a copy of its problem, because all completions of a
    group share one problem: a change to it would affect everything asked and logged afterwards.
    Everything else is the task's own.
    """

    def __init__(self, task):
        self.task = task
        self.name = str(getattr(task, "name", type(task).__name__))
        for attribute in ("length", "scoring_threads"):
            value = getattr(task, attribute, 1)
            if type(value) is not int or value < 1:
                raise ValueError(
                    f"task {self.name}: {attribute} is {short(value)}: it has to be an int above 0"
                )

    def __getattr__(self, name):
        if name.startswith("__"):  # copy and pickle look these up before self.task exists
            raise AttributeError(name)
        value = getattr(self.task, name)
        checked = {"key": self._key, "load": self._load, "cells": self._cells}
        return checked.get(name, value)

    def _call(self, method, *arguments):
        try:
            return getattr(self.task, method)(*copy.deepcopy(arguments))
        except (Exception, SystemExit) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise ValueError(f"{self._describe(method, arguments)} raised {reason}") from None

    def _describe(self, method, arguments):
        return f"task {self.name}: {method}({', '.join(map(short, arguments))})"

    def _refuse(self, method, arguments, value, expected):
        described = f"{self._describe(method, arguments)} returned {short(value)}"
        raise ValueError(f"{' '.join(described.split())}: it has to be {expected}")

    def problems(self, split, n, seed):
        problems = self._call("problems", split, n, seed)
        arguments = (split, n, seed)
        if not isinstance(problems, list) or not all(isinstance(p, dict) for p in problems):
            self._refuse("problems", arguments, problems, "a list of dicts")
        if split == "train" and len(problems) != n:
            expected = f"a list of {n} problems, and not of {len(problems)}"
            self._refuse("problems", arguments, problems, expected)
        if not problems:
            self._refuse("problems", arguments, problems, "a list of at least one problem")
        for problem in problems:
            if not is_json(problem):
                expected = "dicts that JSON can hold: texts, finite numbers, lists, dicts"
                self._refuse("problems", arguments, problem, expected)
        if split != "train" and self._call("problems", split, n, seed) != problems:
            raise ValueError(
                f"{self._describe('problems', arguments)} returned other problems when it was "
                "called again: they have to depend on its arguments alone, or base and trained "
                "model are asked different problems after a --resume"
            )
        return problems

    def prompt(self, problem):
        prompt = self._call("prompt", problem)
        if not isinstance(prompt, str):
            self._refuse("prompt", (problem,), prompt, "a text")
        return prompt

    def _key(self, problem):
        key = self._call("key", problem)
        if not isinstance(key, str):
            self._refuse("key", (problem,), key, "a text")
        return key

    def _load(self, path):
        problems = self._call("load", path)
        if not isinstance(problems, list) or not all(isinstance(p, dict) for p in problems):
            self._refuse("load", (path,), problems, "a list of dicts")
        return problems

    def _cells(self, problem, text):
        return self._share("cells", problem, text)

    def reward(self, problem, text):
        return self._share("reward", problem, text)

    def _share(self, method, problem, text):
        share = self._call(method, problem, text)
        is_number = isinstance(share, Real) and math.isfinite(share)
        if not is_number or not -ROUNDING <= share <= 1 + ROUNDING:
            expected = "a number of 0 to 1"
            if not isinstance(share, Real):
                expected += f", and not of type {type(share).__name__}"
            self._refuse(method, (problem, text), share, expected)
        return min(max(float(share), 0.0), 1.0)

    def solved(self, problem, text):
        solved = self._call("solved", problem, text)
        is_bool = type(solved).__name__ in ("bool", "bool_")  # Python's, or numpy's
        if not is_bool and not (isinstance(solved, Real) and solved in (0, 1)):
            self._refuse("solved", (problem, text), solved, "True or False")
        return bool(solved)

    def demonstrations(self, n, seed, careless):
        demonstrations = iter(self._call("demonstrations", n, seed, careless))
        arguments = (n, seed, careless)
        while True:
            try:
                pair = next(demonstrations)
            except StopIteration:
                return
            except (Exception, SystemExit) as error:
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
                described = self._describe("demonstrations", arguments)
                raise ValueError(f"{described} raised {reason}") from None
            if not isinstance(pair, tuple) or len(pair) != 2 or not isinstance(pair[1], str):
                self._refuse("demonstrations", arguments, pair, "pairs of a problem and a text")
            yield pair
