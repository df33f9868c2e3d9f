"""Writing a file or folder that appears whole or not at all."""

import tempfile
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def beside(path):
    """Yields a path in a private folder beside `path`; what is written there replaces `path`.

    If the block raises, what it wrote is removed, and `path` stays as it was. A folder can replace
    only an empty one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=path.parent) as private:
        temporary = Path(private) / path.name
        yield temporary
        temporary.replace(path)
