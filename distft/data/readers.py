"""One generator per file type: (row number, payload), streamed in bounded memory.

A payload is the row as a dict, the bytes of one JSON line (parsed later, where the cores are), or the RowError that
this row turned out to be. What spoils a whole file raises DataError.
"""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

from distft.core.errors import DataError
from distft.data.compressed_files import MAX_ROW_BYTES, bare, excerpt, opened
from distft.data.json_text import JsonText
from distft.data.samples import Row, RowError, kind_of, parse_json

Payload: TypeAlias = Row | bytes | RowError
Reader: TypeAlias = Callable[[Path], Iterator[tuple[int, Payload]]]

_CHUNK_BYTES = 1 << 20
_OTHER_MARKS = (";", "\t", "|", ",")
"""Other characters that separate the cells of tables."""
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def parse_line(line: bytes) -> Row:
    """Parse one JSON line as a row.

    Raises:
        RowError: not JSON, or not an object.
    """
    if line.strip() in (b"{", b"["):
        raise RowError("invalid JSON: a row is spread over several lines  write each row on a line of its own")
    try:
        row = parse_json(line.removeprefix(codecs.BOM_UTF8).decode())
    except json.JSONDecodeError as error:
        raise RowError(f"invalid JSON: {error.msg} at column {error.colno}: {excerpt(line)}") from None
    except ValueError as error:
        raise RowError(f"invalid JSON: {error}: {excerpt(line)}") from None
    return as_row(row)


def as_row(value: Any) -> Row:
    """Return `value` if it is an object.

    Raises:
        RowError: it is something else.
    """
    if isinstance(value, list) and value and all(isinstance(item, dict) and "role" in item for item in value):
        raise RowError('the row is a list of messages, expected an object  write {"messages": [...]}')
    if not isinstance(value, dict):
        raise RowError(f"the row is {kind_of(value)}, expected an object: {excerpt(json.dumps(value))}")
    return value


def read_jsonl(path: Path) -> Iterator[tuple[int, Payload]]:
    """Read one JSON object per line; blank lines are skipped. A file that is one JSON list is read as such."""
    if _is_one_list(path):
        yield from enumerate(_array_elements(path), 1)
        return
    for number, line in _lines(path):
        if isinstance(line, RowError) or line.strip():
            yield number, line


def read_json(path: Path) -> Iterator[tuple[int, Payload]]:
    """Read a list of objects, streamed element by element; a file that starts with `{` is read as JSON lines."""
    if not _starts_with_list(path):
        if _is_one_object(path):
            raise DataError(f"{path.name}: holds one JSON object, expected a list of rows  write [{{...}}, {{...}}]")
        yield from read_jsonl(path)
        return
    yield from enumerate(_array_elements(path), 1)


def _starts_with_list(path: Path) -> bool:
    with opened(path) as file:
        start = file.read(4096)
    return start.lstrip(codecs.BOM_UTF8 + b" \t\r\n").startswith(b"[")


def _is_one_list(path: Path) -> bool:
    """Return whether the file is one JSON list, and not a list on each line."""
    if not _starts_with_list(path):
        return False
    lines = (line for _, line in _lines(path) if isinstance(line, RowError) or line.strip())
    first, second = next(lines, b""), next(lines, None)
    if isinstance(first, RowError):  # a line that is longer than any row
        return True
    try:
        whole = isinstance(json.loads(first), list)
    except (ValueError, RecursionError):
        return True  # it goes on over the next lines
    return whole and second is None


def _is_one_object(path: Path) -> bool:
    """Return whether an object is spread over several lines, which JSON lines never are."""
    first = next((line for _, line in _lines(path) if not isinstance(line, RowError) and line.strip()), b"")
    return first.strip() == b"{"


def _array_elements(path: Path) -> Iterator[Payload]:
    """Yield the elements of a JSON list, in order."""
    window = JsonText(path)
    window.take("[")
    if window.peek() != "]":
        while True:
            try:
                yield as_row(window.value())
            except RowError as error:
                yield error
            if window.peek() == "]":
                break
            window.take(",")
    window.take("]")
    if window.peek():
        raise window.fault("text after the list of rows")


def read_tsv(path: Path) -> Iterator[tuple[int, Payload]]:
    """Read rows like those of CSV, separated by tabs."""
    yield from read_csv(path, delimiter="\t")


def read_csv(path: Path, *, delimiter: str = ",") -> Iterator[tuple[int, Payload]]:
    """Read rows of comma-separated cells below a header line; a row's number is the line it starts on.

    A first column without a name is pandas' index, and called as pandas does.
    """
    csv.field_size_limit(MAX_ROW_BYTES)
    rows = csv.reader(_text_lines(path), strict=True, delimiter=delimiter)
    try:
        header = next(rows, [])
        if len(header) > 1 and not header[0]:
            header[0] = "Unnamed: 0"
        if len(set(header)) != len(header) or not all(header):
            raise DataError(
                f"{path.name}:1: the header names a column twice or not at all: {excerpt(','.join(header))}"
            )
        if len(header) == 1 and (separator := next((mark for mark in _OTHER_MARKS if mark in header[0]), "")):
            raise DataError(
                f"{path.name}:1: the header is one column, {excerpt(header[0])!r}, separated by {separator!r}?  "
                "write the file with commas, or with tabs as .tsv"
            )
        line = rows.line_num + 1
        for cells in rows:
            if len(cells) == len(header):
                yield line, dict(zip(header, cells, strict=True))
            elif cells:
                yield (
                    line,
                    RowError(f"{len(cells)} cells, but the header has {len(header)}: {excerpt(','.join(cells))}"),
                )
            line = rows.line_num + 1
    except csv.Error as error:
        kind = "CSV" if delimiter == "," else "TSV"
        raise DataError(
            f"{path.name}:{rows.line_num}: invalid {kind}: {error}  a cell that begins with a quotation mark ends with "
            "one, and those inside it are doubled"
        ) from None


def read_txt(path: Path) -> Iterator[tuple[int, Payload]]:
    """Read documents separated by blank lines, each a row with one column `text`, numbered by its first line."""
    document: list[str] = []
    size = first = number = 0
    for number, line in enumerate(_text_lines(path), 1):
        if line.strip():
            first = first if document else number
            document.append(line)
            size += len(line)
            if size > MAX_ROW_BYTES:
                raise DataError(
                    f"{path.name}:{first}: a document of more than {MAX_ROW_BYTES >> 20} MiB; "
                    "separate documents by blank lines"
                )
        elif document:
            yield first, {"text": "".join(document).rstrip("\n")}
            document, size = [], 0
    if document:
        yield first, {"text": "".join(document).rstrip("\n")}


def read_parquet(path: Path) -> Iterator[tuple[int, Payload]]:
    """Read rows of a Parquet file, a batch of row groups' rows at a time."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, without_nulls(row)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path.name}: not a readable Parquet file: {excerpt(str(error))}") from None


def read_arrow(path: Path) -> Iterator[tuple[int, Payload]]:
    """Read rows of an Arrow file, in its streaming form (as `datasets` saves them) or its file form."""
    import pyarrow
    import pyarrow.ipc

    try:
        with pyarrow.memory_map(str(path)) as source:
            try:
                batches: Any = pyarrow.ipc.open_stream(source)
            except pyarrow.ArrowInvalid:
                whole: Any = pyarrow.ipc.open_file(source)
                batches = (whole.get_batch(index) for index in range(whole.num_record_batches))
            number = 0
            for batch in batches:
                for row in batch.to_pylist():
                    number += 1
                    yield number, without_nulls(row)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path.name}: not a readable Arrow file: {excerpt(str(error))}") from None


def without_nulls(value: Any) -> Any:
    """Remove nulls: columnar rows carry every field of every row, and templates expect absent ones to be absent."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


READERS: dict[str, Reader] = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".ndjson": read_jsonl,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".txt": read_txt,
}
_MAPPED = (".parquet", ".arrow")
"""Read in place, so never packed."""


def file_type(path: Path) -> str | None:
    """Return the key in READERS of a file, packed or not; None: it is not read."""
    inner = bare(path)
    suffix = inner.suffix.lower()
    return suffix if suffix in READERS and (inner == path or suffix not in _MAPPED) else None


def _lines(path: Path) -> Iterator[tuple[int, bytes | RowError]]:
    """Yield (1-based number, line) with line ends kept; the byte-order mark is removed, bad bytes become a RowError.

    Raises:
        DataError: the file is UTF-16.
    """
    with opened(path) as file:
        number = offset = 0
        while line := file.readline(MAX_ROW_BYTES + 1):
            number += 1
            size = len(line)
            if number == 1:
                if line.startswith(_UTF16):
                    raise DataError(
                        f"{path.name}: is UTF-16 (byte offset 0), expected UTF-8  convert it: "
                        f"iconv -f UTF-16 -t UTF-8 {path.name}"
                    )
                line = line.removeprefix(codecs.BOM_UTF8)
            if size > MAX_ROW_BYTES:
                while rest := file.readline(_CHUNK_BYTES):
                    size += len(rest)
                    if rest.endswith(b"\n"):
                        break
                yield (
                    number,
                    RowError(f"the line is longer than {MAX_ROW_BYTES >> 20} MiB ({size:,} bytes): {excerpt(line)}"),
                )
            else:
                yield number, _fault(line, offset) or line
            offset += size


def _fault(line: bytes, offset: int) -> RowError | None:
    """Return what makes a line not UTF-8 text. `offset` is where it starts in the file."""
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as error:
        return RowError(
            f"invalid UTF-8: byte 0x{line[error.start]:02x} at byte offset {offset + error.start}: "
            f"{excerpt(line)}  if the file is Latin-1, convert it: iconv -f LATIN1 -t UTF-8"
        )
    nul = line.find(b"\0")
    if nul >= 0:
        return RowError(f"NUL byte at byte offset {offset + nul}: the file is damaged or not text")
    return None


def _text_lines(path: Path) -> Iterator[str]:
    """Yield the decoded lines, CRLF made LF, for formats where one bad line spoils the file."""
    for number, line in _lines(path):
        if isinstance(line, RowError):
            raise DataError(f"{path.name}:{number}: {line}")
        yield line.decode("utf-8").replace("\r\n", "\n")
