"""Columns that a format does not read are refused where they mean something, and listed where they do not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distft.core.errors import DataError
from distft.data.columns import MEANINGFUL
from distft.data.formats import FORMATS
from distft.data.store import Prepared

Write, Prepare = Callable[..., Path], Callable[..., Prepared]
ROWS: dict[str, dict[str, Any]] = {
    **{name: dict(FORMATS[name].example) for name in FORMATS},
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize(
    "column",
    ["label", "images", "rejected", "score", "weight", "chat_template_kwargs", "kto_tag", "completion_mask", "Label"],
)
def test_a_column_that_means_something_is_refused(name: str, column: str, write: Write, prepared: Prepare) -> None:
    if column in (FORMATS[name].reads or ()):
        pytest.skip("this format reads it")
    path = write([{**ROWS[name], column: [1] if column == "images" else 1}])
    with pytest.raises(DataError, match=rf'train\.jsonl:1: the column "{column}" .*, and this format does not read it'):
        prepared({"path": str(path), "format": name})
    kept = prepared({"path": str(path), "format": name, "ignore": (column,)})
    assert kept.report.sources[0].unread == {column: 1}


@pytest.mark.parametrize("column", sorted(MEANINGFUL))
def test_an_empty_one_means_nothing(column: str, write: Write, prepared: Prepare) -> None:
    rows = [{"text": "The weather", column: empty} for empty in (None, [], "")]
    assert prepared(write(rows)).num_rows == 3


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"instruction": "a", "inputs": "b", "output": "c"},
            r'the column "inputs" is not read, did you mean "input"\?',
        ),
        ({"messages": [], "tool": [1]}, r'the column "tool" is not read, did you mean "tools"\?'),
        ({"conversations": [], "System": "x"}, r'the column "System" is not read, did you mean "system"\?'),
        ({"prompt": "a", "completion": "b", "tools": [{"name": "f"}]}, '"tools" need a chat'),
        ({"instruction": "a", "output": "b", "context": "c"}, 'the column "context" is what the answer refers to'),
        ({"text": "a", "tools": "[]"}, 'the column "tools" says what the model may call'),
    ],
)
def test_a_misspelt_column_is_refused(row: dict[str, Any], message: str, write: Write, prepared: Prepare) -> None:
    with pytest.raises(DataError, match=message):
        prepared(write([row]))


def test_the_others_are_counted(write: Write, prepared: Prepare) -> None:
    rows = [{"text": "a", "id": 1, "source": "x", "Unnamed: 0": 3}, {"text": "b", "id": 2}]
    source = prepared(write(rows)).report.sources[0]
    assert source.unread == {"id": 2, "source": 1}
    assert list(source.messages()) == ['columns not read: "id" (2), "source" (1)']


def test_a_renamed_column_is_read(write: Write, prepared: Prepare) -> None:
    path = write([{"label": "a", "score": "b"}])
    assert prepared({"path": str(path), "columns": {"label": "prompt", "score": "completion"}}).num_rows == 1
