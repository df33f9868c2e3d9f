"""Who may read the weights that are written."""

import os
import stat

import pytest
import torch
from safetensors.torch import save_file

from models.permissions import apply_umask


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_weights_get_the_mode_that_the_umask_gives_to_any_new_file(tmp_path, umask, mode):
    file = tmp_path / "model.safetensors"
    umask_before = os.umask(umask)
    try:
        save_file({"weight": torch.zeros(1)}, file)
        apply_umask(tmp_path)
        umask_after = os.umask(umask)
    finally:
        os.umask(umask_before)
    assert stat.S_IMODE(file.stat().st_mode) == mode
    assert umask_after == umask  # it was only read
