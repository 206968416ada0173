"""Folders that hold a config.json and nothing else."""

from pathlib import Path

import pytest
from plan_kit import LLAMA_8B, LLAMA_70B, SMALL, write


@pytest.fixture(scope="session")
def llama8b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("8b"), LLAMA_8B)


@pytest.fixture(scope="session")
def llama70b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("70b"), LLAMA_70B)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("small"), SMALL)
