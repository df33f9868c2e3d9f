"""File permissions: written weights are as readable as any other new file."""

import os
from pathlib import Path


def apply_umask(folder):
    """Gives the .safetensors files in a folder the mode of any other new file, such as 0644.

    The safetensors library creates a temporary file that only its owner may read (mode 0600), and
    renames it. With that mode, nobody else could use a checkpoint, an export or a base.
    """
    umask = os.umask(0o077)  # the umask can only be read by setting it
    os.umask(umask)
    for file in Path(folder).glob("*.safetensors"):
        file.chmod(0o666 & ~umask)
