"""Writing results: a program replaces files that it wrote itself, but no others of the same name.

Only the standard library is imported here, so that folders are checked before torch is loaded.
"""

import json
import os
from pathlib import Path

from models.beside import beside
from models.errors import as_value_error


def verify_replaceable(record, pictures, content):
    """Raises ValueError if a file to write exists but is not this program's, or cannot be written.

    A program that measures for hours calls this before it begins.

    record    the path of the text file to write
    pictures  the paths of the plots that go with it
    content   a text that every record of this program contains
    """
    record = Path(record)
    for file in (record, *map(Path, pictures)):
        if file.exists() and not has_content(record, content):
            raise ValueError(
                f"{file} already exists and was not written by this program: move it away, or "
                "write to another folder"
            )
        place = read_only_place(file)
        if place:
            raise ValueError(f"{place} is read-only, so {file} cannot be written")


def read_only_place(file):
    """The read-only path that keeps a file from being written: the file or its folder; else None.

    Writing replaces a file by one that is created beside it, so the folder has to be writable too,
    unless the path is not a regular file (/dev/stdout, say), which is written to directly.
    """
    folder = file.parent
    while not folder.exists():  # it will be created
        folder = folder.parent
    is_replaced = file.is_file() or not file.exists()
    places = [folder, file] if is_replaced else [file]
    for place in places:
        if place.exists() and not os.access(place, os.W_OK):
            return place
    return None


def has_content(record, content):
    """Whether a file exists and contains a text."""
    return record.is_file() and content in record.read_text(encoding="utf-8", errors="replace")


def write_rows(rows, path):
    """Writes rows as JSON lines. If the disk is full, an existing file stays as it was."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path = Path(path).resolve()  # replaces the target of a link, not the link
    with as_value_error(f"{path} cannot be written"):
        if path.exists() and not path.is_file():  # /dev/stdout, say
            path.write_text(text, encoding="utf-8")
            return
        with beside(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
