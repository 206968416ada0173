"""A file is replaced whole or not at all, and what a kill has torn is left out by whoever reads it."""

import json
import os
from pathlib import Path

import pytest

from distft.core.files import (
    append_json_line,
    parse_json_object,
    read_json_lines,
    read_json_object,
    replace_file,
    replace_json,
    write_file,
)


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Files and folders whose bytes were sent to the disk, by the names they had then."""
    found: list[Path] = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        found.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    return found


def test_readers_see_the_old_content_or_the_new(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    replace_file(path, "old")
    with path.open() as reader:
        replace_file(path, b"new")
        assert reader.read() == "old"
    assert path.read_text() == "new"
    assert [found.name for found in tmp_path.iterdir()] == ["file.json"]


def test_text_is_written_as_it_is(tmp_path: Path) -> None:
    replace_file(tmp_path / "a", "Zürich\r\n\u2028")
    write_file(tmp_path / "b", "Zürich\r\n\u2028")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == "Zürich\r\n\u2028".encode()


def test_a_replacement_that_fails_leaves_the_old_content_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file.json"
    replace_file(path, "old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space"):
            replace_file(path, "new")
    with pytest.raises(TypeError):
        replace_json(path, {"a": object()})
    assert path.read_text() == "old"
    assert [found.name for found in tmp_path.iterdir()] == ["file.json"]


def test_only_a_durable_replacement_waits_for_the_disk(tmp_path: Path, synced: list[Path]) -> None:
    replace_file(tmp_path / "file", "text")
    write_file(tmp_path / "file", "text")
    assert synced == []
    replace_file(tmp_path / "file", "text", durable=True)
    temporary, folder = synced
    assert (temporary.parent, folder) == (tmp_path, tmp_path)
    assert (temporary.name[:6], temporary.suffix) == (".file.", ".tmp"), "the bytes come before the name"
    write_file(tmp_path / "other", "text", durable=True)
    append_json_line(tmp_path / "lines", {"a": 1}, durable=True)
    assert synced[2:] == [tmp_path / "other", tmp_path / "lines"]


def test_json_has_a_line_end_and_the_writers_own_form(tmp_path: Path) -> None:
    replace_json(tmp_path / "a", {"path": Path("x"), "name": "ü"}, indent=1, ensure_ascii=False, default=str)
    assert (tmp_path / "a").read_text(encoding="utf-8") == '{\n "path": "x",\n "name": "ü"\n}\n'
    replace_json(tmp_path / "a", [1])
    assert (tmp_path / "a").read_text() == "[1]\n"


def test_lines_come_back_in_order_and_torn_ones_do_not(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    append_json_line(path, {"event": "one", "where": Path("x")}, default=str)
    with path.open("a") as file:
        file.write('{"event": "to')  # a kill
    assert [record["event"] for record in read_json_lines(path)] == ["one"]
    append_json_line(path, {"event": "three"})
    append_json_line(path, {"event": "four"})
    assert [record["event"] for record in read_json_lines(path)] == ["one", "three", "four"]
    assert path.read_text().splitlines()[1] == '{"event": "to', "what is there stays"


def test_what_is_no_object_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"a": 1}\n\n3\n[{"a": 2}]\nnull\n{"a": "\xff"}\r\n' + b"[" * 100_000 + b'\n{"a": 4}')
    assert [record["a"] for record in read_json_lines(path)] == [1, "\ufffd", 4]
    assert read_json_lines(tmp_path / "missing.jsonl") == [] == read_json_lines(tmp_path)


def test_a_line_may_hold_what_ends_a_line_elsewhere(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    record = {"answer": "one\u2028two\x85three\r\n"}
    write_file(path, json.dumps(record, ensure_ascii=False) + "\n")
    assert read_json_lines(path) == [record]


def test_of_a_long_file_the_end_is_enough(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for step in range(100):
        append_json_line(path, {"step": step})
    size = path.stat().st_size
    assert [record["step"] for record in read_json_lines(path, last_bytes=38)] == [98, 99]
    assert len(read_json_lines(path, last_bytes=size)) == len(read_json_lines(path, last_bytes=2 * size)) == 100


def test_an_object_or_an_empty_one(tmp_path: Path) -> None:
    path = tmp_path / "exit.json"
    assert read_json_object(path) == {} == read_json_object(tmp_path)
    for torn in ('{"code": ', "[1]", "", "null"):
        path.write_text(torn)
        assert read_json_object(path) == {}
        assert parse_json_object(torn) is None
    replace_json(path, {"code": 0})
    assert read_json_object(path) == {"code": 0} == parse_json_object(b'{"code": 0}')
