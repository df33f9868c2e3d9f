"""95% intervals from bootstrap draws, and for the mean of a few runs."""

from statistics import NormalDist, fmean, variance

import torch

from evaluation.metrics import students_t


def interval(draws, number):
    """The 95% interval [low, high] from bootstrap draws.

    draws   (draws,) double
    number  how many items (groups, batches) each draw resampled

    A bootstrap's spread is too small by sqrt((number - 1) / number), and its percentiles correspond
    to a normal distribution instead of Student's t. So percentiles further out are used
    (Hesterberg's expanded percentiles). Returns [None, None] if more than 2.5% of the draws are not
    finite: if noise hides a signal, the signal has no direction.
    """
    is_known = draws.isfinite()
    if number < 2 or is_known.double().mean() < 0.975:
        return [None, None]
    standard_errors = students_t(number - 1) * (number / (number - 1)) ** 0.5
    low = NormalDist().cdf(-standard_errors)
    edges = torch.tensor([low, 1 - low], dtype=draws.dtype)
    return torch.quantile(draws[is_known], edges).tolist()


def problem_half_width(draws, clusters):
    """A mean's 95% half-width over problems alone, from its bootstrap draws over clusters."""
    variance_of_mean = draws.var().item() * clusters / max(1, clusters - 1)
    return students_t(max(1, clusters - 1)) * variance_of_mean**0.5


def spread(values, problem_half=None):
    """The mean of some values and its 95% half-width, as {"mean", "half"}; half is None if unknown.

    problem_half: the half-width due to the choice of problems alone; None if there is no such part.
    """
    squares = []
    if len(values) > 1:
        squares.append(students_t(len(values) - 1) ** 2 * variance(values) / len(values))
    if problem_half is not None:
        squares.append(problem_half**2)
    return {"mean": fmean(values), "half": sum(squares) ** 0.5 if squares else None}
