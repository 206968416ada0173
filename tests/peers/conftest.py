import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def assets() -> Path:
    """Real data sets and a real pretrained model, which the project does not ship."""
    folder = os.environ.get("DISTFT_ASSETS")
    if not folder:
        pytest.skip("set DISTFT_ASSETS to the folder with gsm8k, chat-glaive-toolcall and stories260k-hf")
    return Path(folder)
