"""One thread for every test: the models are tiny, and two threads that wait for each other are
slower than one.
"""

import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """The longest files first, so that two workers end together."""
    items.sort(key=lambda item: item.path.stem not in ("test_train", "test_readme"))
