"""Which names of models are asked of the hub, and which are paths.

Only the standard library is imported here: names are checked before torch is loaded.
"""

import re
from pathlib import Path


def is_hub_name(name):
    """Whether a name that is no folder here can be a model or an adapter on the hub: OWNER/NAME.

    The hub is never asked for what looks like a path, since a stranger could own that name: for
    runs/NAME, and for a name in a folder that is here.
    """
    match = re.fullmatch(r"(\w[\w.-]*)/\w[\w.-]*", str(name), re.ASCII)
    return match is not None and match[1] != "runs" and not Path(match[1]).is_dir()
