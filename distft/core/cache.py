"""Where what can be made again is kept between runs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """Return DISTFT_CACHE, or `distft` in the user's cache folder; it may not exist yet."""
    named = os.environ.get("DISTFT_CACHE")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distft"
