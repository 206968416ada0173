"""Prepared rows on disk: flat arrays appended row by row, memory-mapped by every rank.

Shape letters: N rows, T tokens of one row; the flat files hold all rows' tokens end to end.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np

from distft.core.virtual_tokens import VIRTUAL_ID
from distft.data.preparation_report import PrepareReport

_ARRAYS = {
    "ids": np.int32,  # flat
    "trained": np.uint8,  # flat
    "lengths": np.int32,  # [N]
    "supervised": np.int32,  # [N]
    "offsets": np.int64,  # [N + 1] into the flat arrays
    "files": np.int32,  # [N] index into report.files
    "rows": np.int64,  # [N] 1-based line or row in that file
}
_DOCUMENTS = "documents"
"""int32 [N · group size]: tokens of each document of each row; there only where rows are groups of several."""
_VALUES = "values"
"""float32 [N · numbers of a row]; there only where rows have some."""
_TYPES = {**_ARRAYS, _DOCUMENTS: np.int32, _VALUES: np.float32}


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Some prepared rows in memory, in order."""

    ids: np.ndarray
    """int32, flat."""
    trained: np.ndarray
    """uint8, flat; 1 = to be predicted."""
    lengths_N: np.ndarray
    """int32; tokens."""
    supervised_N: np.ndarray
    """int32; labels: trained tokens that have a token before them."""
    rows_N: np.ndarray
    """int64; 1-based line or row in the file."""
    stops_N: np.ndarray
    """int32; the trained token that ends the row's answer, -1: none, or it was cut off."""
    documents: np.ndarray | None = None
    """int32, flat; tokens of each document, where rows are groups of several."""
    values: np.ndarray | None = None
    """float32, flat; the numbers of each row, where its format has some."""


class Writer:
    """Appends rows to a new folder; memory does not grow with the number of rows."""

    def __init__(self, folder: Path, *, group_size: int = 1, num_values: int = 0) -> None:
        """Create `folder`, which must not exist, for rows of `group_size` documents and `num_values` numbers."""
        folder.mkdir(parents=True)
        self.folder = folder
        self.end = 0
        names = [*_ARRAYS, *([_DOCUMENTS] if group_size > 1 else []), *([_VALUES] if num_values else [])]
        self.files: dict[str, BinaryIO] = {name: (folder / f"{name}.bin").open("wb") for name in names}
        self.largest_id = -1
        self._ends: Counter[int] = Counter()
        self._num_rows = 0
        hashed = ("ids", "trained", "lengths", *names[len(_ARRAYS) :])
        self.hashes = {name: hashlib.sha256() for name in hashed}
        self._append("offsets", np.zeros(1, np.int64))

    def append(self, rows: Rows, *, file: int) -> None:
        """Append the rows of one file."""
        self._append("ids", rows.ids)
        self._append("trained", rows.trained)
        self._append("lengths", rows.lengths_N)
        self._append("supervised", rows.supervised_N)
        self._append("rows", rows.rows_N)
        self._append("files", np.full(len(rows.rows_N), file))
        self._append("offsets", self.end + np.cumsum(rows.lengths_N, dtype=np.int64))
        if rows.documents is not None:
            self._append(_DOCUMENTS, rows.documents)
        if rows.values is not None:
            self._append(_VALUES, rows.values)
        self.end += len(rows.ids)
        if len(rows.ids):
            real = rows.ids[rows.ids < VIRTUAL_ID]
            self.largest_id = max(self.largest_id, int(real.max(initial=-1)))
            self._ends.update(rows.stops_N[rows.stops_N >= 0].tolist())
        self._num_rows += len(rows.rows_N)

    def stop_ids(self) -> tuple[int, ...]:
        """Return what at least a tenth of the rows' answers end with."""
        return tuple(token for token, count in self._ends.most_common() if 10 * count >= self._num_rows)

    def fingerprint(self) -> str:
        """Return sha256 of the rows so far, whatever pieces they came in."""
        return hashlib.sha256(b"".join(part.digest() for part in self.hashes.values())).hexdigest()

    def lengths(self) -> np.ndarray:
        """Return int32 [N]; tokens of each row so far."""
        self.files["lengths"].flush()
        return np.fromfile(self.folder / "lengths.bin", np.int32)

    def commit(self, report: PrepareReport, target: Path) -> None:
        """Flush everything and let `target` appear whole."""
        with (self.folder / "report.json").open("w", encoding="utf-8") as file:
            json.dump(report.to_json(), file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        self.close(flush=True)
        self.folder.rename(target)

    def close(self, *, flush: bool = False) -> None:
        """Close the files; with `flush`, wait until the disk has them."""
        for file in self.files.values():
            if flush and not file.closed:
                file.flush()
                os.fsync(file.fileno())
            file.close()

    def _append(self, name: str, values: np.ndarray) -> None:
        data = values.astype(_TYPES[name], copy=False).tobytes()
        self.files[name].write(data)
        if name in self.hashes:
            self.hashes[name].update(data)


class Prepared:
    """Rows of a split as tokens, memory-mapped: opening costs nothing, ranks on a node share the pages."""

    def __init__(self, folder: Path, *, from_cache: bool = True) -> None:
        """Open a finished folder."""
        self.folder = folder
        self.from_cache = from_cache
        """Whether an earlier call (or another process) did the work."""
        self.report = PrepareReport.from_json(json.loads((folder / "report.json").read_text(encoding="utf-8")))

    def _array(self, name: str) -> np.ndarray:
        return np.memmap(self.folder / f"{name}.bin", dtype=_TYPES[name], mode="r")

    @cached_property
    def _flat(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self._array("ids"), self._array("trained"), self._array("offsets")

    @cached_property
    def lengths(self) -> np.ndarray:
        """int32 [N]; tokens of each row."""
        return self._array("lengths")

    @cached_property
    def supervised(self) -> np.ndarray:
        """int32 [N]; labels of each row."""
        return self._array("supervised")

    @cached_property
    def _locations(self) -> tuple[np.ndarray, np.ndarray]:
        return self._array("files"), self._array("rows")

    @property
    def num_rows(self) -> int:
        """Rows kept."""
        return len(self.lengths)

    @property
    def fingerprint(self) -> str:
        """sha256 of the content, in hex."""
        return self.report.fingerprint

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (ids_T int32, trained_T uint8) of a row; views of the files."""
        ids, trained, offsets = self._flat
        begin, end = offsets[index], offsets[index + 1]
        return ids[begin:end], trained[begin:end]

    @property
    def group_size(self) -> int:
        """Documents of each row."""
        return self.report.group_size

    @cached_property
    def _documents(self) -> np.ndarray:
        return self._array(_DOCUMENTS).reshape(-1, self.group_size)

    @property
    def longest_document(self) -> int:
        """Tokens of the longest document: what has to fit into the model's positions."""
        return int((self.lengths if self.group_size == 1 else self._documents).max())

    def documents(self, index: int) -> list[int]:
        """Return the tokens of each document of a row."""
        return [int(self.lengths[index])] if self.group_size == 1 else self._documents[index].tolist()

    @cached_property
    def _values(self) -> np.ndarray:
        return self._array(_VALUES).reshape(-1, len(self.report.values))

    def values(self, rows: Sequence[int]) -> dict[str, np.ndarray]:
        """Return the numbers of some rows by name: float32 [rows] each."""
        return {name: self._values[list(rows), column] for column, name in enumerate(self.report.values)}

    def sample_id(self, index: int) -> str:
        """Return `train.jsonl row 1812`."""
        files, rows = self._locations
        return f"{self.report.files[files[index]]} row {rows[index]}"

    def source_rows(self) -> list[np.ndarray]:
        """Return int64 [n]; for each source the indices of its rows, in file order."""
        source_N = np.asarray(self.report.file_sources)[self._locations[0]]
        return [np.flatnonzero(source_N == source) for source in range(len(self.report.sources))]
