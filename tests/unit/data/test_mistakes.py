"""What a user reads when data is wrong: file, line or row, what is allowed, the fix; never a traceback."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from data_kit import table_of, texts

from distft.core.errors import DataError
from distft.data.prepare import prepare

GOOD = {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}
GOOD_LINE = json.dumps(GOOD).encode() + b"\n"


def chat(*turns: tuple[str, Any], **row: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns], **row}


def lines(*rows: Any) -> bytes:
    return GOOD_LINE + b"".join(json.dumps(row).encode() + b"\n" for row in rows)


@dataclass(frozen=True)
class Mistake:
    """A file's bytes and the message they must give."""

    content: bytes
    message: str
    name: str = "train.jsonl"
    source: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


PC = {"format": "prompt_completion"}
MISTAKES = {
    "invalid json": Mistake(
        GOOD_LINE + b'{"messages": [\n', r"train\.jsonl:2: invalid JSON: .* at column \d+: \{\"messages"
    ),
    "key twice": Mistake(
        GOOD_LINE + b'{"messages": [{"role": "user", "content": "a", "content": "b"}]}\n',
        r"train\.jsonl:2: invalid JSON: an object has the key \"content\" twice: \{\"messages\"",
    ),
    "number too long": Mistake(
        GOOD_LINE + b'{"messages": [], "id": ' + b"9" * 5000 + b"}\n",
        r"train\.jsonl:2: invalid JSON: Exceeds the limit \(4300 digits\)",
    ),
    "key twice in arguments": Mistake(
        lines(
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "tool_calls": [{"name": "f", "arguments": '{"x": 1, "x": 2}'}]},
                ]
            }
        ),
        r"jsonl:2: message 2: arguments of f are not valid JSON \(an object has the key \"x\" twice\)",
    ),
    "row is a list": Mistake(lines([1, 2]), r"train\.jsonl:2: the row is a list, expected an object: \[1, 2\]"),
    "missing key": Mistake(lines({"text": "x"}), r"train\.jsonl:2: \"messages\" is null, expected a list"),
    "messages is a string": Mistake(lines({"messages": "hi"}), r"jsonl:2: \"messages\" is a string, expected a list"),
    "no messages": Mistake(lines({"messages": []}), r"jsonl:2: the list of messages is empty"),
    "message is a string": Mistake(lines({"messages": ["hi"]}), r"jsonl:2: message 1 is a string, expected an object"),
    "role misspelt": Mistake(
        lines(chat(("usr", "x"))), r"message 1 has role \"usr\", did you mean \"user\"\?  allowed: sys"
    ),
    "content is a number": Mistake(
        lines(chat(("user", 3))), r"jsonl:2: message 1: content is a number, expected a string"
    ),
    "no content": Mistake(lines(chat(("user", None))), r"jsonl:2: message 1 has no content"),
    "an image": Mistake(
        lines(chat(("user", [{"type": "image"}]))), r"message 1 has a content part that is not text \(image\)"
    ),
    "two users": Mistake(
        lines(chat(("user", "a"), ("user", "b"))), r"jsonl:2: message 2 \(user\) follows a user message"
    ),
    "two assistants": Mistake(
        lines(chat(("user", "a"), ("assistant", "b"), ("assistant", "c"))),
        r"jsonl:2: message 3 \(assistant\) follows an assistant message",
    ),
    "assistant opens": Mistake(lines(chat(("assistant", "a"))), r"message 1 \(assistant\) opens the conversation"),
    "late system": Mistake(
        lines(chat(("user", "a"), ("system", "b"))), r"message 2 is a system message; only the first"
    ),
    "nobody answers": Mistake(lines(chat(("user", "a"))), r"jsonl:2: the last message is from user"),
    "tool without call": Mistake(
        lines(chat(("user", "a"), ("assistant", "b"), ("tool", "c"))),
        r"message 3 \(tool\) does not follow an assistant message with tool_calls",
    ),
    "call without name": Mistake(
        lines(
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [{"function": {}}]}]}
        ),
        r"jsonl:2: message 2: a tool call without a function name",
    ),
    "arguments are not json": Mistake(
        lines({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]}),
        r"jsonl:2: message 1: arguments of f are not valid JSON",
    ),
    "tools are not json": Mistake(lines({**GOOD, "tools": "[{"}), r"jsonl:2: \"tools\" is not valid JSON"),
    "tool without name": Mistake(
        lines({**GOOD, "tools": [{"description": "x"}]}), r"\"tools\": definition 1 has no function"
    ),
    "sharegpt speaker": Mistake(
        b'{"conversations": [{"from": "humann", "value": "x"}]}\n',
        r"train\.jsonl:1: turn 1 is from \"humann\", did you mean \"human\"\?",
    ),
    "sharegpt call": Mistake(
        b'{"conversations": [{"from": "human", "value": "x"}, {"from": "function_call", "value": "f()"}]}\n',
        r"train\.jsonl:1: turn 2: the function_call is not valid JSON",
    ),
    "alpaca output is a number": Mistake(
        b'{"instruction": "add", "output": 4}\n', r"train\.jsonl:1: \"output\" is a number, expected a string"
    ),
    "prompt and completion differ": Mistake(
        b'{"prompt": "a", "completion": []}\n', r"\"prompt\" is a string but \"completion\" is a list; both must be"
    ),
    "text is an object": Mistake(b'{"text": {}}\n', r"train\.jsonl:1: \"text\" is an object, expected a string"),
    "lone surrogate": Mistake(b'{"text": "\\ud800"}\n', r"train\.jsonl:1: not valid text: lone surrogate \\ud800"),
    "latin-1": Mistake(
        GOOD_LINE + b'{"text": "\xe9"}\n',
        rf"train\.jsonl:2: invalid UTF-8: byte 0xe9 at byte offset {len(GOOD_LINE) + 10}: .*iconv -f LATIN1",
    ),
    "utf-16": Mistake(
        GOOD_LINE.decode().encode("utf-16"), r"train\.jsonl: is UTF-16 \(byte offset 0\).*iconv -f UTF-16"
    ),
    "nul": Mistake(GOOD_LINE + b'{"text": "\0"}\n', rf"jsonl:2: NUL byte at byte offset {len(GOOD_LINE) + 10}"),
    "empty file": Mistake(b"", r"train\.jsonl: the file is empty"),
    "blank file": Mistake(b"\n\n", r"train\.jsonl: has no rows"),
    "fits no format": Mistake(
        b'{"q": "a", "a": "b"}\n', r"fit no format; they have \"q\", \"a\"\n  messages .*\n(.*\n)+.*columns"
    ),
    "fits two formats": Mistake(
        b'{"text": "a", "prompt": "b", "completion": "c"}\n',
        r"fit more than one format: prompt_completion, text  write format = \"prompt_completion\"",
    ),
    "renamed column is missing": Mistake(
        b'{"question": "a", "answer": "b"}\n',
        r"train\.jsonl:1: no column \"questions\" to rename, did you mean \"question\"\?  the row has \"question\"",
        source={"columns": {"questions": "prompt", "answer": "completion"}},
    ),
    "one json object": Mistake(
        b'{\n "a": 1\n}', r"train\.json: holds one JSON object, expected a list of rows", "train.json"
    ),
    "json list without end": Mistake(b'[{"text": "a"}', r"train\.json:1: invalid JSON: expected ,", "train.json"),
    "json list with a bad row": Mistake(
        b'[\n{"text": "a"},\n{"text": nope}\n]',
        r"train\.json:3: invalid JSON: Expecting value: \{\"text\": nope",
        "train.json",
    ),
    "json with latin-1": Mistake(b'[{"text": "\xe9"}]', r"train\.json: invalid UTF-8 at byte offset 11", "train.json"),
    "json list of strings": Mistake(b'["a"]', r"train\.json:1: the row is a string, expected an object", "train.json"),
    "csv row too short": Mistake(
        b"prompt,completion\na,b\nc\n", r"train\.csv:3: 1 cells, but the header has 2: c", "train.csv"
    ),
    "csv header twice": Mistake(b"text,text\na,b\n", r"train\.csv:1: the header names a column twice", "train.csv"),
    "csv latin-1": Mistake(b"text\n\xe9\n", r"train\.csv:2: invalid UTF-8: byte 0xe9 at byte offset 5", "train.csv"),
    "csv quote": Mistake(b'text\n"a', r"train\.csv:2: invalid CSV: ", "train.csv"),
    "not parquet": Mistake(b"hello", r"train\.parquet: not a readable Parquet file", "train.parquet"),
    "unknown type": Mistake(b"hello", r"files of type \.xlsx are not read  allowed: \.jsonl, \.json", "train.xlsx"),
    "too long": Mistake(
        json.dumps(texts([40])[0]).encode(),
        r"train\.jsonl:1: 40 tokens, longer than max_length = 16  raise max_length, or set long_rows",
        settings={"max_length": 16, "long_rows": "error"},
    ),
    "nothing is left": Mistake(
        b"".join(json.dumps(row).encode() + b"\n" for row in (*texts([40, 20]), {"text": ""})),
        r"\[\[data\.train\]\] .*none of its 3 rows can be trained: 2 too long, 1 empty \(max_length = 16, longest",
        settings={"max_length": 16},
    ),
    "truncation removes the completion": Mistake(
        json.dumps({"prompt": "\x01" * 40, "completion": "x"}).encode(),
        r"1 rows can be trained: 1 no trained token left after truncation",
        settings={"max_length": 16, "long_rows": "truncate"},
    ),
    "all bad, skipped": Mistake(
        b"nope\n", r"1 bad row .*\n  train\.jsonl:1: invalid JSON", settings={"bad_rows": "skip"}, source=PC
    ),
    "template": Mistake(
        GOOD_LINE, r"\"chatmll\": unknown template, did you mean \"chatml\"\?", settings={"chat_template": "chatmll"}
    ),
    "template file": Mistake(GOOD_LINE, r"\"x\.jinja\": cannot read it", settings={"chat_template": "x.jinja"}),
}


@pytest.mark.row(24, 25, 26, 27, 28)
@pytest.mark.parametrize("name", MISTAKES)
def test_the_message_says_where_and_what(name: str, tokenizer: Path, tmp_path: Path) -> None:
    mistake = MISTAKES[name]
    path = tmp_path / mistake.name
    path.write_bytes(mistake.content)
    table = table_of({"path": str(path), **mistake.source}, **mistake.settings)
    with pytest.raises(DataError, match=mistake.message) as raised:
        prepare(table, table.train, tokenizer=str(tokenizer), cache_dir=tmp_path / "cache")
    assert raised.value.exit_code == 3
    assert not list((tmp_path / "cache").glob(".tmp-*"))


def test_a_missing_path_names_the_nearest(tokenizer: Path, write: Callable[..., Path], tmp_path: Path) -> None:
    path = write([GOOD])
    for wrong, message in (
        (path.with_name("trains.jsonl"), r"no such file or folder, did you mean .*train\.jsonl"),
        (tmp_path / "no" / "train.jsonl", "the folder .* does not exist either"),
    ):
        table = table_of(wrong)
        with pytest.raises(DataError, match=message):
            prepare(table, table.train, tokenizer=str(tokenizer), cache_dir=tmp_path / "cache")


def test_a_folder_without_data_lists_what_is_read(tmp_path: Path, prepared: Callable[..., Any]) -> None:
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "README.md").write_text("x")
    with pytest.raises(DataError, match=r"the folder holds no data files  allowed: \.jsonl"):
        prepared(tmp_path / "rows")


def test_a_hub_id_that_cannot_be_loaded(prepared: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def load(*given: object, **named: object) -> None:
        raise ConnectionError("no route to host\nmany more lines")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match=r"someone/rows: neither a file or folder here nor .*: no route to host$"):
        prepared({"path": "someone/rows"})


@pytest.mark.row(24)
def test_skipping_counts_and_shows_bad_rows(write: Callable[..., Path], prepared: Callable[..., Any]) -> None:
    path = write([GOOD, {"messages": []}, GOOD, *[{"messages": "x"}] * 10])
    source = prepared(path, bad_rows="skip").report.sources[0]
    assert (source.num_read, source.num_kept, source.dropped) == (13, 2, {"bad row": 11})
    assert source.faults[0] == "train.jsonl:2: the list of messages is empty"
    assert len(source.faults) == 5
