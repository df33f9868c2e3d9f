"""Intervals of bootstrap draws, by simulation of a known truth."""

import pytest
import torch

from evaluation.metrics import bootstrap_weights
from experiments.intervals import interval, problem_half_width


@pytest.mark.parametrize("number", [8, 24, 51])
def test_the_interval_of_bootstrap_draws_covers_a_known_mean_as_often_as_it_says(number):
    """With plain percentiles 8 things would give 89%, and 24 give 93%."""
    generator = torch.Generator().manual_seed(1)
    weights = bootstrap_weights(number, draws=1000)
    repeats = 1000
    hits = 0
    plain_hits = 0
    hits_of_half_width = 0
    for _ in range(repeats):
        values = torch.randn(number, generator=generator, dtype=torch.double) + 3
        draws = weights @ values / number
        low, high = interval(draws, number)
        hits += low <= 3 <= high
        plain_low, plain_high = torch.quantile(draws, torch.tensor([0.025, 0.975]).double())
        plain_hits += plain_low <= 3 <= plain_high
        hits_of_half_width += abs(values.mean() - 3) <= problem_half_width(draws, number)
    for covered in (hits, hits_of_half_width):
        assert 0.935 - 0.014 <= covered / repeats <= 0.965 + 0.014
    assert plain_hits < hits


def test_one_thing_has_no_interval():
    assert interval(torch.ones(100, dtype=torch.double), 1) == [None, None]
