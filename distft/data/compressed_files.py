"""Opens files by what they are: plain, or compressed by gzip, bzip2, xz or zstd."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import importlib
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from distft.core.errors import DataError

PACKED = (".gz", ".bz2", ".xz", ".zst")
"""Suffixes of packed files; what is inside is said by the suffix before."""


def bare(path: Path) -> Path:
    """Return `rows.jsonl` for `rows.jsonl.gz`; other paths as they are."""
    return path.with_suffix("") if path.suffix.lower() in PACKED else path


@contextlib.contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """Open the file's bytes, unpacked.

    Raises:
        DataError: it is damaged, or needs a package that is not installed.
    """
    try:
        with _open(path) as file:
            yield file
    except (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError) as error:
        raise _damaged(path, error) from None
    except OSError as error:
        if path.suffix.lower() not in PACKED or error.errno is not None:
            raise
        raise _damaged(path, error) from None  # bz2's word for damage
    except Exception as error:
        if type(error).__name__ != "ZstdError":
            raise
        raise _damaged(path, error) from None


def _open(path: Path) -> Any:
    match path.suffix.lower():
        case ".gz":
            return gzip.open(path, "rb")
        case ".bz2":
            return bz2.open(path, "rb")
        case ".xz":
            return lzma.open(path, "rb")
        case ".zst":
            return _open_zstd(path)
        case _:
            return path.open("rb")


def _open_zstd(path: Path) -> Any:
    """Open the file with Python's own module (3.14), or with the package that does the same before."""
    for name in ("compression.zstd", "backports.zstd", "zstandard"):
        try:
            return importlib.import_module(name).open(path, "rb")
        except ImportError:
            continue
    raise DataError(
        f"{path.name}: reading zstd needs a package that is not installed  pip install zstandard, or unpack the file: "
        f"zstd -d {path.name}"
    )


def _damaged(path: Path, error: Exception) -> DataError:
    return DataError(f"{path.name}: the file is damaged or cut short: {error}")


MAX_ROW_BYTES = 64 << 20
"""No training row is this long; a file without line breaks is, and must not fill the memory."""


def excerpt(text: str | bytes, limit: int = 80) -> str:
    """Return the start of a row on one line, for messages."""
    if isinstance(text, bytes):
        text = text[: limit * 4].decode("utf-8", errors="replace")
    text = " ".join(text[: limit * 2].split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
