"""A file or folder that appears whole or not at all, and takes no other's name meanwhile."""

import tempfile
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def beside(path):
    """Yields a path to write to, in a private folder beside `path`, which it then replaces.

    If the block raises, what it wrote is removed, and `path` stays as it was. A folder cannot
    replace one that holds anything.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=path.parent) as private:
        temporary = Path(private) / path.name
        yield temporary
        temporary.replace(path)
