"""95% intervals: of bootstrap draws, and of a few runs' mean."""

from statistics import fmean, variance

import torch


def interval(draws):
    """[low, high] at 95%, of bootstrap draws.

    [None, None] if more than 2.5% of the draws are not finite: where noise hides a signal, the
    signal has no direction.
    """
    is_known = draws.isfinite()
    if is_known.double().mean() < 0.975:
        return [None, None]
    edges = torch.tensor([0.025, 0.975], dtype=draws.dtype)
    return torch.quantile(draws[is_known], edges).tolist()


# Student's t at 95%, of 1 to 10 degrees of freedom.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def students_t(degrees):
    """The half-width at 95%, in standard errors."""
    if degrees <= len(T95):
        return T95[degrees - 1]
    return 1.96 + 2.37 / degrees + 2.8 / degrees**2  # good to 0.2%


def spread(values, problem_variance=None):
    """The mean of some values, and its 95% half-width, None if nothing is known of it.

    problem_variance is what the choice of problems adds to the mean's variance; None: no such part.
    Returns {"mean", "half"}.
    """
    squares = []
    if len(values) > 1:
        squares.append(students_t(len(values) - 1) ** 2 * variance(values) / len(values))
    if problem_variance is not None:
        squares.append(1.96**2 * problem_variance)
    return {"mean": fmean(values), "half": sum(squares) ** 0.5 if squares else None}
