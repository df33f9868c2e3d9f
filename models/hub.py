"""Which names of models are looked up on the hub, and which are paths.

Only the standard library is imported here, so that names are checked before torch is loaded.
"""

import re
from pathlib import Path


def is_hub_name(name):
    """Whether a name that is not a local folder can be a model or adapter on the hub: OWNER/NAME.

    The hub is never asked for what looks like a path (runs/NAME, or a name inside a local folder),
    since a stranger could own that name.
    """
    match = re.fullmatch(r"(\w[\w.-]*)/\w[\w.-]*", str(name), re.ASCII)
    return match is not None and match[1] != "runs" and not Path(match[1]).is_dir()
