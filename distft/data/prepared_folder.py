"""Where prepared rows live."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from distft.core.cache import cache_root
from distft.core.errors import DataError

if TYPE_CHECKING:
    from distft.recipe.schema import DataTable


def cache_folder(table: DataTable) -> Path:
    """Return where prepared rows live: the recipe's `cache_dir`, else `data` in the user's cache folder.

    A folder on a node's own disk ("$SLURM_TMPDIR/rows", "/tmp/rows") is prepared once on each node.

    Raises:
        DataError: `cache_dir` names a variable that is not set here.
    """
    if table.cache_dir is not None:
        return _expanded(table.cache_dir)
    return cache_root() / "data"


def _expanded(text: str) -> Path:
    path = os.path.expandvars(text)
    if unset := re.search(r"\$(\w+|\{[^}]*\})", path):
        raise DataError(f'[data] cache_dir = "{text}": {unset[0]} is not set on {socket.gethostname()}')
    return Path(path).expanduser()
