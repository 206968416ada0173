"""Fixtures over `data_kit`: one tiny tokenizer per session, files and a cache per test."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distft.data.prepare import prepare
from distft.data.store import Prepared


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny tokenizer: <s> and </s>, no chat template."""
    from data_kit import save_tokenizer

    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """`write(rows)` or `write("name", rows)`: a JSON lines file."""

    def write_rows(*given: Any) -> Path:
        name, rows = given if len(given) == 2 else ("train.jsonl", given[0])
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write_rows


@pytest.fixture
def prepared(tokenizer: Path, tmp_path: Path) -> Callable[..., Prepared]:
    """`prepared(source, ..., max_length=...)`: rows of these sources, prepared in this test's own cache."""
    from data_kit import table_of

    def run(*sources: Path | dict[str, Any], **settings: Any) -> Prepared:
        table = table_of(*sources, **settings)
        return prepare(table, table.train, tokenizer=str(tokenizer), cache_dir=tmp_path / "cache")

    return run
