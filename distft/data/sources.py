"""A source table -> files -> rows with their locations, and the decision which format they are in."""

from __future__ import annotations

import functools
import glob
import importlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distft.core import hub
from distft.core.errors import DataError
from distft.core.registry import nearest
from distft.data.chat import merge_turns, message_list
from distft.data.compressed_files import PACKED
from distft.data.dataset_folders import data_files
from distft.data.formats import FORMATS
from distft.data.readers import READERS, Payload, file_type, parse_line, without_nulls
from distft.data.samples import FormatSpec, Row, RowError, columns_of

if TYPE_CHECKING:
    from distft.recipe.schema import SourceTable

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_ROWS_TO_DECIDE = 20
_POINTER = b"version https://git-lfs"
_STARTS = {
    b"\x1f\x8b": ".gz",
    b"BZh91AY&SY": ".bz2",
    b"\xfd7zXZ\x00": ".xz",
    b"\x28\xb5\x2f\xfd": ".zst",
    b"PAR1": ".parquet",
    b"PK\x03\x04": ".zip",
}
"""First bytes of files that are not text, and the suffix that says so."""


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """One file of a source, or the whole of a hub dataset."""

    label: str
    """What messages call it: its name, with its folder's when the source is a folder."""
    path: Path | None
    """None for a hub dataset."""


@dataclass(frozen=True, kw_only=True)
class RowSource:
    """A source whose files were found."""

    table: SourceTable
    files: tuple[SourceFile, ...]
    merge_turns: bool = False
    """Neighbouring turns of one role are joined."""

    def rows(self, file: SourceFile) -> Iterator[tuple[int, Payload]]:
        """Yield (1-based line or row, payload) of one file; `max_rows` is the caller's to count, over all files."""
        if file.path is None:
            return _hub_rows(self.table)
        return READERS[file_type(file.path) or ""](file.path)

    def renamed(self, payload: Payload) -> Row:
        """Return the payload as a row under the names its format expects (`columns = {theirs = "ours"}`).

        Its messages are without the keys that `ignore` names, and merged where neighbouring turns are to be joined.

        Raises:
            RowError: the payload is no row, or lacks a column that `columns` renames.
        """
        if isinstance(payload, RowError):
            raise payload
        row = parse_line(payload) if isinstance(payload, bytes) else payload
        renames = self.table.columns
        if not renames:
            return self._with_messages(row)
        for original in renames:
            if original not in row:
                meant = nearest(original, list(row))
                hint = f', did you mean "{meant}"?' if meant else ""
                raise RowError(f'no column "{original}" to rename{hint}  the row has {columns_of(row)}')
        return self._with_messages({renames.get(name, name): value for name, value in row.items()})

    def _with_messages(self, row: Row) -> Row:
        if not (self.table.ignore or self.merge_turns):
            return row
        changed: Row = {}
        for column in _OF_MESSAGES & row.keys():
            value: Any = row[column]
            if isinstance(value, str) and column in ("messages", "conversations"):
                value = message_list(value, column)
            value = _without_keys(value, self.table.ignore)
            changed[column] = merge_turns(value) if self.merge_turns else value
        return row | changed


_OF_MESSAGES = {"messages", "conversations", "prompt", "completion"}
"""Columns that hold messages, in one format or another."""


def _without_keys(messages: Any, keys: tuple[str, ...]) -> Any:
    """Return messages, and parts of their content, without these keys."""
    if not isinstance(messages, list) or not keys:
        return messages
    return [
        {
            key: _without_keys(value, keys) if key == "content" else value
            for key, value in message.items()
            if key not in keys
        }
        if isinstance(message, dict)
        else message
        for message in messages
    ]


def find(table: SourceTable, *, merge_turns: bool = False) -> RowSource:
    """Find the files of a source, by name; nothing is read yet.

    Args:
        table: the source.
        merge_turns: the recipe's [data] merge_turns.

    Raises:
        DataError: the path does not exist, is of a type we do not read, or is an empty file or folder.
    """
    path = Path(table.path).expanduser()
    if path.is_dir():
        return RowSource(table=table, files=_files_of(path, table), merge_turns=merge_turns)
    if path.is_file():
        _refuse_split(table, "a file")
        return RowSource(table=table, files=(_readable(path, path.name),), merge_turns=merge_turns)
    if glob.has_magic(table.path):
        _refuse_split(table, "a glob")
        paths = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
        files = tuple(_readable(file, file.name) for file in paths if file.is_file())
        if not files:
            raise DataError(f"{table.path}: no file matches{_relative_to(path)}")
        return RowSource(table=table, files=files, merge_turns=merge_turns)
    if _HUB_ID.fullmatch(table.path) and file_type(path) is None and not path.parent.is_dir():
        label = "/".join(filter(None, (table.path, table.subset, table.split or "train")))
        return RowSource(table=table, files=(SourceFile(label=label, path=None),), merge_turns=merge_turns)
    if "://" in table.path:
        raise DataError(f"{table.path}: rows are read from files here and from the hub (owner/name)  download it first")
    raise DataError(f"{path}: no such file or folder{_relative_to(path)}{_nearest_name(path)}")


def _readable(path: Path, label: str) -> SourceFile:
    """Return a file that can be read, by its name.

    Raises:
        DataError: it is of a type that is not, or empty, or may not be read.
    """
    if file_type(path) is None:
        inside = f" inside {path.suffix}" if path.suffix.lower() in PACKED else ""
        suffix = Path(path.stem).suffix if inside else path.suffix
        raise DataError(
            f"{path}: files of type {suffix or 'no suffix'}{inside} are not read  allowed: {', '.join(READERS)}, "
            f"text also packed ({', '.join(PACKED)}), a folder of them, or a hub dataset"
        )
    _refuse_unreadable(path)
    return SourceFile(label=label, path=path)


def _refuse_split(table: SourceTable, what: str) -> None:
    for key in ("split", "subset"):
        if getattr(table, key) is not None:
            raise DataError(f'{table.path}: {key} = "{getattr(table, key)}" has no effect on {what}  remove it')


def _relative_to(path: Path) -> str:
    """Return where a relative path starts, for messages."""
    return "" if path.is_absolute() else f" (relative to {Path.cwd()}, the folder that the command runs in)"


def decide_format(source: RowSource) -> FormatSpec:
    """Return the source's format: as named, or, for `auto`, the one that its first rows fit.

    Raises:
        DataError: the source has no rows, or its first rows fit no format, or several.
    """
    if source.table.format != "auto":
        return FORMATS[source.table.format]
    rows: list[Row] = []
    faults: list[str] = []
    for file in source.files:
        for number, payload in islice(source.rows(file), _ROWS_TO_DECIDE):
            try:
                rows.append(source.renamed(payload))
            except RowError as error:
                faults.append(f"{file.label}:{number}: {error}")
        if rows:
            break
    if not rows:
        raise DataError(faults[0] if faults else f"{source.table.path}: has no rows")
    fits: list[FormatSpec] = []
    for row in rows:  # the first one that is of any format decides; later ones that differ are bad rows
        fits = fits or [spec for spec in FORMATS.values() if spec.matches(row)]
    # Answers to be compared stand beside the columns of other formats, which would have to leave them out.
    fits = [spec for spec in fits if spec.values] or fits
    if len(fits) == 1:
        return fits[0]
    if fits:
        names = ", ".join(spec.name for spec in fits)
        raise DataError(
            f"{source.table.path}: the first rows fit more than one format: {names}  "
            f'write format = "{fits[0].name}" (the rows have {columns_of(rows[0])})'
        )
    needs = "\n".join(f"  {spec.name:<18} {spec.needs}" for spec in FORMATS.values())
    raise DataError(
        f"{source.table.path}: the first rows fit no format; they have {columns_of(rows[0])}\n{needs}\n"
        '  rename columns with columns = { theirs = "ours" }'
    )


def _files_of(folder: Path, table: SourceTable) -> tuple[SourceFile, ...]:
    """Return every readable file below a folder, or those of the table's split, by name; no hidden ones."""
    paths = data_files(folder, table)
    if not paths:
        raise DataError(f"{folder}: the folder holds no data files  allowed: {', '.join(READERS)}")
    for path in paths:
        _refuse_unreadable(path)
    return tuple(SourceFile(label=f"{folder.name}/{path.relative_to(folder)}", path=path) for path in paths)


def _refuse_unreadable(path: Path) -> None:
    if not os.access(path, os.R_OK):
        raise DataError(f"{path}: may not be read (permission denied)")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty")
    with path.open("rb") as file:
        start = file.read(len(_POINTER))
    if start == _POINTER:
        raise DataError(f"{path}: is a Git LFS pointer, not the file itself  run git lfs pull in its folder")
    written = next((suffix for first, suffix in _STARTS.items() if start.startswith(first)), None)
    if written is not None and path.suffix.lower() not in (*PACKED, ".parquet", ".arrow"):
        fix = "unpack it" if written == ".zip" else f"rename it so that it ends with {written}"
        raise DataError(f"{path}: its content is that of a {written} file, which its name does not say  {fix}")


def _nearest_name(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"; the folder {folder} does not exist either"
    meant = nearest(path.name, [entry.name for entry in folder.iterdir()])
    return f", did you mean {folder / meant}?" if meant else ""


def hub_dataset(table: SourceTable):
    """Load the split of a hub dataset, downloaded or from the library's cache.

    Raises:
        DataError: the library is missing, or it cannot load the dataset.
    """
    try:
        importlib.import_module("datasets")
    except ImportError:
        raise DataError(f"{table.path}: hub datasets need the `datasets` package") from None
    try:
        return _loaded(table.path, table.subset, table.split or "train")
    except Exception as error:  # the library raises many kinds; all mean that there are no rows
        raise DataError(
            f"{table.path}: neither a file or folder here nor a dataset that the hub gives: "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from None


@functools.cache
def _loaded(path: str, subset: str | None, split: str):
    """Download and cache a split by one process for each cache folder; the others then map it."""
    datasets: Any = importlib.import_module("datasets")
    mine: list[Any] = []

    def load() -> str:
        mine.append(datasets.load_dataset(path, subset, split=split))
        return str(mine[0]._fingerprint)

    cache = Path(importlib.import_module("datasets.config").HF_DATASETS_CACHE)
    hub.once(cache, json.dumps([path, subset, split]), load, good=lambda _: True, lasting=False)
    return mine[0] if mine else datasets.load_dataset(path, subset, split=split)


def _hub_rows(table: SourceTable) -> Iterator[tuple[int, Payload]]:
    for number, row in enumerate(hub_dataset(table), 1):
        yield number, without_nulls(row)
