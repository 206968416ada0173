"""One cache folder for all tests here that do not ask for an empty one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def demo_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keeps tests out of the user's cache."""
    base = tmp_path_factory.mktemp("distft-cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISTFT_CACHE", str(base))
        yield base
