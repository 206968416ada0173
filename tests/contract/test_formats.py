"""What every data format must do, also one registered from outside the package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from distft.core.errors import DataError
from distft.data.formats import FORMATS
from distft.data.rows import RowMaker
from distft.data.samples import FormatSpec, RowError, Text, text_column
from distft.data.sources import RowSource, decide_format, find
from distft.recipe.schema import DataTable, TrainSourceTable


def source_of(rows: list[Any], folder: Path, **table: Any) -> RowSource:
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return find(TrainSourceTable(path=str(path), **table))


def maker_of(source: RowSource, spec: FormatSpec) -> RowMaker:
    table = DataTable(train=(source.table,))  # pyright: ignore[reportArgumentType]
    return RowMaker(table, [source], [spec.convert], "no tokenizer is needed to refuse a row")


@pytest.mark.parametrize("name", FORMATS)
def test_its_own_example_is_recognised_and_converted(name: str, tmp_path: Path) -> None:
    spec = FORMATS[name]
    assert spec.name == name
    assert spec.needs
    assert decide_format(source_of([spec.example] * 3, tmp_path)) is spec
    spec.convert(dict(spec.example))


@pytest.mark.parametrize("name", FORMATS)
def test_no_other_format_takes_its_example(name: str) -> None:
    fitting = [other for other in FORMATS.values() if other.matches(dict(FORMATS[name].example))]
    judged = [other for other in fitting if other.values]  # a row that judges an answer is not one that just has it
    assert [other.name for other in judged or fitting] == [name]


@pytest.mark.parametrize("wrong", [None, 3, {}, [{}], [[]], ["x"]], ids=repr)
@pytest.mark.parametrize("name", FORMATS)
def test_a_broken_row_is_refused_with_its_number(name: str, wrong: object, tmp_path: Path) -> None:
    spec = FORMATS[name]
    broken = dict.fromkeys(spec.example, wrong)
    source = source_of([spec.example, broken], tmp_path)
    rows = list(source.rows(source.files[0]))[1:]
    with pytest.raises(DataError, match=r"^train\.jsonl:2: .+bad_rows = \"skip\""):
        maker_of(source, spec).make(0, source.files[0].label, rows)


@pytest.mark.parametrize("name", FORMATS)
def test_an_empty_row_is_refused_in_plain_words(name: str) -> None:
    with pytest.raises(RowError, match=r"missing|is null"):
        FORMATS[name].convert({})


def convert_haiku(row: dict[str, Any]) -> Text:
    return Text(text=text_column(row, "haiku"))


def test_a_format_from_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FORMATS, "_specs", dict(FORMATS))
    spec = FORMATS.add(
        FormatSpec(name="haiku", needs='"haiku": a string', matches=lambda row: "haiku" in row, convert=convert_haiku)
    )
    assert decide_format(source_of([{"haiku": "old pond"}], tmp_path)) is spec
    assert decide_format(source_of([{"haiku": "old pond"}], tmp_path, format="haiku")) is spec
    with pytest.raises(ValueError, match="'haiku' is registered twice"):
        FORMATS.add(spec)
