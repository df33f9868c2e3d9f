"""One thread for every test: the models are tiny, and two threads that wait for each other are
slower than one.
"""

import pytest
import torch

from evaluation.traces import Trace

torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """The longest files first, so that two workers end together."""
    items.sort(key=lambda item: item.path.stem not in ("test_train", "test_readme"))


@pytest.fixture
def no_pictures(monkeypatch):
    """Runs draw no pictures, which take longer than all the rest of a small run."""
    monkeypatch.setattr("train.draw_pictures", lambda config, run_dir: [])


@pytest.fixture
def trace():
    """Two calls: gamma 0.1 allows 1, 3 and 0, since 0.02 + 0.05 come before 0. Then 2."""
    return Trace(
        prompt="3 4",
        tokens=["35", "(", "+", ")"],
        unmask_step=[1, 1, 2, 1],
        readings=[[0.5, 0.02, 0.9, 0.05], [None, None, 0.3, None]],
        rule="eb",
        level=0.1,
        text="35",
        solved=True,
    )
