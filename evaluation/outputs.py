"""Writing results: a program replaces what it wrote itself, and nothing else of the same name.

Only the standard library is imported here: folders are checked before torch is loaded.
"""

import json
import os
from pathlib import Path

from models.beside import beside
from models.errors import as_value_error


def verify_replaceable(record, pictures, content):
    """Raises ValueError if one of the files to write is there already, and is somebody else's, or
    if it cannot be written: a program that measures for hours asks before it begins.

    record    the path of the file to write that is text
    pictures  the paths of those that go with it
    content   a text that every record of this program has
    """
    record = Path(record)
    for file in (record, *map(Path, pictures)):
        if file.exists() and not has_content(record, content):
            raise ValueError(
                f"{file} is there already, and was not written by this program: move it away, or "
                "write to another folder"
            )
        place = read_only_place(file)
        if place:
            raise ValueError(f"{place} is read-only, so {file} cannot be written")


def read_only_place(file):
    """What keeps a file from being written: itself, or the folder that it is in or will be in.

    None: nothing does. Writing replaces a file by one that is made beside it; what is no file,
    /dev/stdout say, is written to as it is.
    """
    folder = file.parent
    while not folder.exists():  # it is going to be made
        folder = folder.parent
    is_replaced = file.is_file() or not file.exists()
    places = [folder, file] if is_replaced else [file]
    for place in places:
        if place.exists() and not os.access(place, os.W_OK):
            return place
    return None


def has_content(record, content):
    """Whether a file is there and holds a text."""
    return record.is_file() and content in record.read_text(encoding="utf-8", errors="replace")


def write_rows(rows, path):
    """Rows as JSON lines. On a full disk the rows that were there before stay there."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path = Path(path).resolve()  # what a link points to is replaced, and not the link
    with as_value_error(f"{path} cannot be written"):
        if path.exists() and not path.is_file():  # /dev/stdout, say
            path.write_text(text, encoding="utf-8")
            return
        with beside(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
