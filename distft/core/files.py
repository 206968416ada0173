"""Replaces files whole, appends lines of JSON, and reads both back where a kill may have cut them."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast
from uuid import uuid4


def replace_file(path: Path, content: str | bytes, *, durable: bool = False) -> None:
    """Replace a file so that a reader sees the old content or the new, never a part.

    The temporary name is unique, because hosts that share a folder share process ids too.

    Args:
        path: the file; its folder exists.
        content: text is written as UTF-8, with its line ends as they are.
        durable: also a power cut leaves the old content or the new one; costs two syncs of the disk.

    Raises:
        OSError: the folder cannot be written; the old content stays.
    """
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    try:
        write_file(temporary, content, durable=durable)
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    if durable:
        sync_folder(path.parent)


def replace_json(
    path: Path,
    content: Any,
    *,
    indent: int | None = None,
    ensure_ascii: bool = True,
    default: Callable[[Any], Any] | None = None,
) -> None:
    """Replace a file by `content` as JSON with a line end, see `replace_file`; the other arguments are `json.dumps`'s.

    Raises:
        OSError: the folder cannot be written; the old content stays.
        TypeError: `content` holds what is no JSON and `default` does not turn into it.
    """
    replace_file(path, json.dumps(content, indent=indent, ensure_ascii=ensure_ascii, default=default) + "\n")


def write_file(path: Path, content: str | bytes, *, durable: bool = False) -> None:
    """Create or overwrite a file in place; for folders that nobody reads yet.

    Args:
        path: the file; its folder exists.
        content: text is written as UTF-8.
        durable: return once its bytes are on the disk.

    Raises:
        OSError: it cannot be written.
    """
    with path.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        if durable:
            file.flush()
            os.fsync(file.fileno())


def append_json_line(
    path: Path, record: dict[str, Any], *, durable: bool = False, default: Callable[[Any], Any] | None = None
) -> None:
    """Append a record to a file of JSON lines, on a line of its own also behind one that a kill has cut short.

    Args:
        path: the file; made when it is missing.
        record: what the line says.
        durable: return once it is on the disk.
        default: `json.dumps`'s, for what is no JSON.

    Raises:
        OSError: the file cannot be written.
    """
    line = (json.dumps(record, default=default) + "\n").encode()
    with path.open("ab+") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else b"\n" + line
        file.write(line)
        file.flush()
        if durable:
            os.fsync(file.fileno())


def read_json_lines(path: Path, *, last_bytes: int | None = None) -> list[dict[str, Any]]:
    """Return the records of a file of JSON lines, oldest first; none where there is no such file.

    A line that is no JSON object is left out: it is being written, or a kill or a power cut has torn it.

    Args:
        path: the file.
        last_bytes: read only so much of its end; None: all of it.
    """
    try:
        with path.open("rb") as file:
            start = 0 if last_bytes is None else max(0, file.seek(0, os.SEEK_END) - last_bytes)
            file.seek(start)
            # Only b"\n" ends a line: JSON may hold U+2028 and its like as they are, which `str.splitlines` cuts at.
            lines = file.read().split(b"\n")[1 if start else 0 :]
    except OSError:
        return []
    return [record for line in lines if (record := parse_json_object(line)) is not None]


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object that a file holds; an empty one where there is none."""
    try:
        return parse_json_object(path.read_bytes()) or {}
    except OSError:
        return {}


def parse_json_object(text: str | bytes) -> dict[str, Any] | None:
    """Return the JSON object that `text` is; None where it is anything else."""
    try:
        value = json.loads(text.decode(errors="replace") if isinstance(text, bytes) else text)
    except (ValueError, RecursionError):
        return None
    return cast("dict[str, Any]", value) if isinstance(value, dict) else None


def sync_file(path: Path) -> None:
    """Return once the file's bytes are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Return once the folder's entries (creations, renames) are on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot, and need not
            raise
    finally:
        os.close(descriptor)
