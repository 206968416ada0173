"""Files as they come: byte-order marks, CRLF, every type, folders, hub rows, and lines that would fill the memory."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from data_kit import table_of
from hypothesis import given, settings
from hypothesis import strategies as st

from distft.core.errors import DataError
from distft.data import readers
from distft.data.readers import parse_line, read_csv, read_json, read_jsonl, read_parquet, read_txt
from distft.data.samples import RowError
from distft.data.sources import decide_format, find


@pytest.mark.row(26)
def test_jsonl_with_mark_crlf_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "\xc3\xa9"}\r\n')
    assert [(n, parse_line(line)) for n, line in read_jsonl(path)] == [(1, {"text": "a"}), (3, {"text": "é"})]


@pytest.mark.row(26)
def test_csv_with_mark_crlf_and_a_row_over_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'\xef\xbb\xbfprompt,completion\r\n"a\r\nb",c\r\n\r\nd,"e,f"\r\n')
    assert list(read_csv(path)) == [
        (2, {"prompt": "a\nb", "completion": "c"}),
        (5, {"prompt": "d", "completion": "e,f"}),
    ]


def test_txt_is_split_at_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\r\none\r\ntwo\r\n \r\n\r\nthree")
    assert list(read_txt(path)) == [(2, {"text": "one\ntwo"}), (6, {"text": "three"})]


def test_parquet_leaves_out_what_a_row_does_not_have(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"messages": [{"role": "user", "content": "a", "name": None}]}, {"messages": [{"role": "x", "name": "b"}]}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert list(read_parquet(tmp_path / "a.parquet")) == [
        (1, {"messages": [{"role": "user", "content": "a"}]}),
        (2, {"messages": [{"role": "x", "name": "b"}]}),
    ]


VALUES = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(st.dictionaries(st.text(max_size=5), VALUES, max_size=3), max_size=6),
    chunk=st.integers(1, 64),
    indent=st.none() | st.integers(0, 2),
    ascii_only=st.booleans(),
)
def test_a_json_list_is_read_as_json_reads_it(
    rows: list[dict[str, Any]],
    chunk: int,
    indent: int | None,
    ascii_only: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    path = tmp_path_factory.mktemp("json") / "a.json"
    path.write_text(json.dumps(rows, indent=indent, ensure_ascii=ascii_only), encoding="utf-8", errors="surrogatepass")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "_CHUNK_BYTES", chunk)
        assert [row for _, row in read_json(path)] == rows


def test_a_bad_row_of_a_json_list_is_that_row_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"text": "a"}, {"text": "b", "more": {"k": 1, "k": 2}}, {"text": "c"}]')
    rows = [row for _, row in read_json(path)]
    assert rows[::2] == [{"text": "a"}, {"text": "c"}]
    assert 'invalid JSON: an object has the key "k" twice: {"text": "b"' in str(rows[1])
    path.write_text('[{"text": "a"}, {"text": "b", "id": ' + "7" * 5000 + "}]")
    with pytest.raises(DataError, match=r"a\.json:1: invalid JSON: Exceeds the limit"):
        list(read_json(path))


def test_a_mark_in_front_of_a_later_line_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n\xef\xbb\xbf{"text": "b"}\n')
    assert [readers.parse_line(row) for _, row in readers.read_jsonl(path)] == [{"text": "a"}, {"text": "b"}]


def test_a_json_file_of_lines_is_read_as_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"text": "a"}\n{"text": "b"}\n')
    assert [number for number, _ in read_json(path)] == [1, 2]


@pytest.mark.row(26)
def test_a_huge_line_does_not_fill_the_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(b'{"text": "')
        file.seek(200 << 20)  # a hole of zeros: costs no disk
        file.write(b'"}\n{"text": "b"}\n')
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (number, fault), (last, line) = read_jsonl(path)
    assert (number, last) == (1, 2)
    assert isinstance(fault, RowError)
    assert str(fault).startswith("the line is longer than 64 MiB (209,715,203 bytes)")
    assert parse_line(line) == {"text": "b"}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 160 << 10  # KiB


def test_streams(tmp_path: Path, write: Callable[..., Path]) -> None:
    path = write([{"text": str(n)} for n in range(50_000)])
    assert [number for number, _ in islice(read_jsonl(path), 2)] == [1, 2]


def test_a_folder_is_its_data_files_by_name(tmp_path: Path, write: Callable[..., Path]) -> None:
    folder = tmp_path / "rows"
    (folder / ".hidden").mkdir(parents=True)
    for name in ("b.jsonl", "a.jsonl", "README.md", ".hidden/c.jsonl"):
        write(f"rows/{name}", [{"text": name}])
    source = find(table_of(folder).train[0])
    assert [file.label for file in source.files] == ["rows/a.jsonl", "rows/b.jsonl"]
    assert decide_format(source).name == "text"


def test_rows_of_a_hub_dataset(tmp_path: Path, prepared: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked: list[Any] = []

    def load(*given: object, **named: object) -> Any:
        asked.append((given, named))
        return datasets.Dataset.from_list([{"text": "a", "extra": None}, {"text": "b", "extra": "c"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = prepared({"path": "someone/rows", "subset": "en", "split": "dev"})
    assert rows.sample_id(1) == "someone/rows/en/dev row 2"
    assert asked[0] == (("someone/rows", "en"), {"split": "dev"})


def test_max_rows_counts_over_the_files_of_a_folder(tmp_path: Path, write: Callable[..., Path], prepared: Any) -> None:
    (tmp_path / "rows").mkdir()
    for name in ("a", "b", "c"):
        write(f"rows/{name}.jsonl", [{"text": "x"}] * 4)
    report = prepared({"path": str(tmp_path / "rows"), "max_rows": 6}).report
    assert (report.sources[0].num_read, report.num_rows) == (6, 6)


def test_auto_decides_by_the_first_rows_it_can_read(write: Callable[..., Path]) -> None:
    path = write([{"instruction": "a", "output": "b"}])
    path.write_bytes(b"not json\n" + path.read_bytes())
    assert decide_format(find(table_of(path).train[0])).name == "alpaca"


@pytest.mark.row(24, 26)
def test_bad_rows_beyond_utf8_can_be_skipped_too(write: Callable[..., Path], prepared: Callable[..., Any]) -> None:
    path = write([{"text": "a"}])
    path.write_bytes(path.read_bytes() + b'{"text": "\xe9"}\n{"text": "b"}\n')
    assert prepared(path, bad_rows="skip").report.sources[0].dropped == {"bad row": 1}
    with pytest.raises(DataError, match="invalid UTF-8"):
        prepared(path)
