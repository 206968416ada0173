"""A JSON text too large to be held: its values one by one, in bounded memory."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distft.core.errors import DataError
from distft.data.compressed_files import MAX_ROW_BYTES, excerpt, opened
from distft.data.samples import JSON, RowError

_CHUNK_BYTES = 1 << 20


class JsonText:
    """A JSON text of which only the element being read is held."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.pieces = _decoded(path)
        self.text = ""
        self.position = 0
        self.line = 1  # of text[0]
        self.decode = json.JSONDecoder().raw_decode

    def peek(self) -> str:
        """Return the next character that is not white space, "" at the end of the file."""
        while True:
            while self.position < len(self.text) and self.text[self.position] in " \t\r\n":
                self.position += 1
            if self.position < len(self.text):
                return self.text[self.position]
            if not self._grow():
                return ""

    def take(self, char: str) -> None:
        """Pass over one character that must come next."""
        if self.peek() != char:
            raise self.fault(f"expected {char}" + ("" if self.peek() else ", but the file ends"))
        self.position += 1

    def value(self) -> Any:
        """Parse the JSON value that starts here; the window doubles until it holds the end: linear cost."""
        self.peek()
        while True:
            try:
                value, self.position = JSON.raw_decode(self.text, self.position)
                return value
            except RecursionError:
                raise self.fault("nested too deeply") from None
            except json.JSONDecodeError as error:
                into = error.pos - self.position
                if len(self.text) - self.position > MAX_ROW_BYTES or not self._grow():
                    raise self.fault(error.msg, into) from None
            except ValueError as error:
                raise self._row_or_file_fault(error) from None

    def _row_or_file_fault(self, error: ValueError) -> RowError | DataError:
        """Return the error of one row, after which reading can go on; of the file, where the row's end is not found."""
        shown = excerpt(self.text[self.position : self.position + 400])
        while True:
            try:
                _, self.position = self.decode(self.text, self.position)
                return RowError(f"invalid JSON: {error}: {shown}")
            except json.JSONDecodeError as next_error:
                if len(self.text) - self.position > MAX_ROW_BYTES or not self._grow():
                    return self.fault(next_error.msg, next_error.pos - self.position)
            except ValueError:
                return self.fault(str(error))

    def fault(self, message: str, into: int = 0) -> DataError:
        """Return what is wrong `into` characters behind the start of the value; shows the value from its start."""
        shown = excerpt(self.text[self.position : self.position + 400])
        line = self.line + self.text.count("\n", 0, self.position + into)
        return DataError(f"{self.path.name}:{line}: invalid JSON: {message}" + (f": {shown}" if shown else ""))

    def _grow(self) -> bool:
        """Drop what was consumed and at least double the rest; False at the end of the file."""
        self.line += self.text.count("\n", 0, self.position)
        self.text, self.position = self.text[self.position :], 0
        more: list[str] = []
        while sum(map(len, more)) <= len(self.text) and (piece := next(self.pieces, None)) is not None:
            more.append(piece)
        self.text = "".join([self.text, *more])
        return any(more)


def _decoded(path: Path) -> Iterator[str]:
    """Yield the file's text in pieces.

    Raises:
        DataError: bytes that are not UTF-8, with their offset.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    with opened(path) as file:
        start = 0
        while True:
            pending = len(decoder.getstate()[0])
            data = file.read(_CHUNK_BYTES)
            try:
                yield decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                offset = start - pending + error.start
                raise DataError(
                    f"{path.name}: invalid UTF-8 at byte offset {offset}  if the file is Latin-1, convert it: "
                    f"iconv -f LATIN1 -t UTF-8 {path.name}"
                ) from None
            start += len(data)
            if not data:
                return
