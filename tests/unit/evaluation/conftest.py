from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from distft.data.render import Renderer


@pytest.fixture(scope="session")
def tiny_renderer(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    from data_kit import save_tokenizer

    from distft.data.render import load_renderer

    folder: Path = save_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return load_renderer(folder, chat_template="plain")
