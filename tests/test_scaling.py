"""Scaling at sizes that take no time: what is measured, and the exponents."""

import pytest
import torch

from experiments import scaling
from experiments.scaling import Sizes

SMALL = Sizes(L=8, V=200, B=4, T=4, m=2)


def test_the_exponent_is_the_slope_of_the_last_two_points():
    assert scaling.exponent((1, 2, 4, 8), (9.0, 9.0, 3.0, 12.0)) == pytest.approx(2)
    assert scaling.exponent((10, 100), (0.5, 5.0)) == pytest.approx(1)


def test_a_random_rollout_takes_t_steps_of_equally_many_tokens():
    rollout = scaling.random_rollout(SMALL, torch.ones((4, 3), dtype=torch.long), None)
    for steps in rollout.unmask_step:
        assert steps.bincount().tolist() == [0, 2, 2, 2, 2]
    assert rollout.completion.max() < 200 and rollout.nfe.tolist() == [4] * 4


@pytest.mark.parametrize("part", scaling.PARTS)
def test_a_part_is_measured(part):
    seconds, gib = scaling.measure(SMALL, part)
    assert seconds > 0 and gib >= 0


def test_a_line_for_each_part_with_its_exponent(monkeypatch, capsys):
    monkeypatch.setattr(
        scaling, "measure_apart", lambda sizes, part: (sizes.V / 1000, 0.1 * sizes.V**2)
    )
    assert scaling.main(["--size", "V"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines] == ["1.00", "2.00"] * 2
    assert all(line.startswith("V = 1000, 8000, 32000, 126464") for line in lines)
