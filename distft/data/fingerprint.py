"""The key under which prepared rows are cached: everything that could change a token or a mask."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distft.core.file_lock import locked_once
from distft.core.files import replace_json
from distft.data.samples import FormatSpec
from distft.data.sources import RowSource, hub_dataset
from distft.data.templates import read_template

if TYPE_CHECKING:
    from distft.recipe.schema import DataTable

FORMAT_VERSION = 3
"""Raise it when the stored arrays, or what rendering makes of a row, change."""


def cache_key(
    table: DataTable,
    sources: Sequence[RowSource],
    specs: Sequence[FormatSpec],
    tokenizer_files: Sequence[Path],
    memory: Path,
    waiting: Callable[[], None] = lambda: None,
    *,
    virtual_tokens: int = 0,
) -> str:
    """Return sha256 hex over file contents, tokenizer, template, settings and versions.

    `memory` is a folder of known file hashes, so that an unchanged big file is not read at every start, nor by each of
    the processes that start together; `waiting` is called while another one reads it.
    """
    parts: dict[str, Any] = {
        "version": FORMAT_VERSION,
        "libraries": {name: version(name) for name in ("tokenizers", "transformers")},
        "settings": table.model_dump(include=_SETTINGS),
        "date": _date(table, tokenizer_files),
        "template": read_template(table.chat_template),
        "tokenizer": {path.name: file_hash(path, memory, waiting) for path in tokenizer_files},
        "sources": sources_key(sources, specs, memory, waiting),
    }
    if virtual_tokens:  # rows that were prepared before there were any keep their key
        parts["virtual_tokens"] = virtual_tokens
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


_SETTINGS = {"max_length", "loss_on", "long_rows", "bad_rows", "special_tokens_in_content"}


def _date(table: DataTable, tokenizer_files: Sequence[Path]) -> str | None:
    """Return the date that a chat template which writes it is given; None where none does."""
    template = read_template(table.chat_template)
    texts = (
        [template.encode()]
        if template is not None
        else [path.read_bytes() for path in tokenizer_files if _may_hold(path)]
    )
    return (table.date or today()) if any(b"strftime_now" in text for text in texts) else None


def _may_hold(path: Path) -> bool:
    return path.suffix == ".jinja" or path.name in ("chat_template.json", "tokenizer_config.json")


def today() -> str:
    """Return the date here as YYYY-MM-DD."""
    return datetime.date.today().isoformat()


def sources_key(
    sources: Sequence[RowSource],
    specs: Sequence[FormatSpec],
    memory: Path,
    waiting: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Return everything that could change a row as its format reads it, as plain values."""
    return [
        {
            "table": source.table.model_dump(include={"path", "split", "subset", "max_rows", "columns", "ignore"}),
            "merge_turns": source.merge_turns,
            "format": [spec.name, _code_hash(spec)],
            "files": [
                [
                    file.label,
                    file_hash(file.path, memory, waiting) if file.path else hub_dataset(source.table)._fingerprint,
                ]
                for file in source.files
            ],
        }
        for source, spec in zip(sources, specs, strict=True)
    ]


def file_hash(path: Path, memory: Path, waiting: Callable[[], None] = lambda: None) -> str:
    """Return the sha256 hex of a file's content; remembered in `memory` while size, mtime and inode stay the same.

    Of several processes that share `memory` one reads the file; the others call `waiting` meanwhile.
    """
    path = path.resolve()
    status = path.stat()
    state = [status.st_size, status.st_mtime_ns, status.st_ino]
    note = memory / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:32]}.json"
    if (remembered := _noted(note, state)) is not None:
        return remembered
    memory.mkdir(parents=True, exist_ok=True)
    with locked_once(note.with_suffix(".lock"), waiting, done=lambda: _noted(note, state) is not None):
        if (remembered := _noted(note, state)) is not None:
            return remembered
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        replace_json(note, {"path": str(path), "state": state, "sha256": digest})
        return digest


def _noted(note: Path, state: list[int]) -> str | None:
    """Return the remembered hash; None: not hashed yet, a torn note, or the file has changed since."""
    try:
        record = json.loads(note.read_text(encoding="utf-8"))
        return record["sha256"] if record["state"] == state else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _code_hash(spec: FormatSpec) -> str:
    """Hash a format's own code, so that editing one (also outside this package) prepares its rows anew."""
    code = getattr(sys.modules.get(spec.convert.__module__), "__file__", None)
    return hashlib.sha256(Path(code).read_bytes()).hexdigest() if code else ""
