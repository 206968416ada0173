from __future__ import annotations

from pathlib import Path

import pytest
from tiny import build


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_config: Path) -> Path:
    """A folder of the tiny model with weights, for what starts from pretrained ones."""
    folder = tmp_path_factory.mktemp("base")
    lm = build(tiny_config).module.transformer
    lm.set_attn_implementation("sdpa")
    lm.save_pretrained(folder)
    return folder
