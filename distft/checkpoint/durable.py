"""Reads files without following links, and explains errors of the disk."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
from pathlib import Path

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def open_regular(path: Path) -> int:
    """Open a regular file for reading and return its descriptor; links, pipes and devices are refused.

    Raises:
        OSError: it is not there, not readable, or not a regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # O_NONBLOCK: a pipe must not hang us
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return descriptor


def read_regular(path: Path, *, limit: int) -> bytes:
    """Read the whole file.

    Args:
        path: a regular file, not a link.
        limit: most bytes it may have.

    Raises:
        OSError: unreadable, not regular, or longer than `limit`.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"longer than {limit} bytes", str(path))
    return data


def sha256_of(path: Path) -> str:
    """Return the hex digest of a regular file.

    Raises:
        OSError: see `open_regular`.
    """
    with os.fdopen(open_regular(path), "rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_tree(path: Path) -> None:
    """Delete a folder as far as possible; what stays is left for the next start."""
    shutil.rmtree(path, ignore_errors=True)


def is_disk_full(error: BaseException) -> bool:
    """Return whether a full disk or quota is behind an error; torch's archive writer wraps the OSError."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        if isinstance(current, OSError) and current.errno in DISK_FULL:
            return True
        seen.add(id(current))
        current = current.__cause__ or current.__context__
    return False


def size_text(num_bytes: float) -> str:
    """Return `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.1f} {unit}" if unit != "B" else f"{num_bytes:.0f} B"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"
