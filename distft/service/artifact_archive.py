"""A folder as one tar that is streamed: nothing of it is written to disk first, a chunk at a time is in memory."""

from __future__ import annotations

import os
import stat
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from distft.core.errors import FileSystemError

CHUNK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class ArchivedFile:
    """A file of the folder."""

    name: str
    """In the archive: below its top folder, with slashes."""
    path: Path
    size: int
    modified: int
    """Seconds since the epoch."""

    @property
    def head(self) -> bytes:
        """What stands before its content."""
        entry = tarfile.TarInfo(self.name)
        entry.size, entry.mtime, entry.mode = self.size, self.modified, 0o644
        return entry.tobuf(tarfile.PAX_FORMAT)


def plain_files(folder: Path, top: str) -> list[ArchivedFile]:
    """Return the files of a folder and of those below it, in a fixed order.

    Raises:
        FileSystemError: something there is neither a file nor a folder, such as a link, which could lead outside.
    """
    found: list[ArchivedFile] = []
    pending = [folder]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                name = str(Path(entry.path).relative_to(folder))
                if entry.is_dir(follow_symlinks=False):
                    pending.append(Path(entry.path))
                elif entry.is_file(follow_symlinks=False):
                    facts = entry.stat(follow_symlinks=False)
                    found.append(
                        ArchivedFile(
                            name=f"{top}/{name}", path=Path(entry.path), size=facts.st_size,
                            modified=int(facts.st_mtime),
                        )
                    )  # fmt: skip
                else:
                    raise FileSystemError(f"{name}: is neither a file nor a folder")
    return sorted(found, key=lambda file: file.name)


class FolderArchive:
    """The tar of a folder."""

    def __init__(self, folder: Path, top: str) -> None:
        """Look at the folder.

        Raises:
            FileSystemError: it holds what cannot be archived.
        """
        self._files = plain_files(folder, top)

    @property
    def num_bytes(self) -> int:
        """Of the whole tar: known before any file is read."""
        inside = sum(len(file.head) + _padded(file.size, tarfile.BLOCKSIZE) for file in self._files)
        return _padded(inside + 2 * tarfile.BLOCKSIZE, tarfile.RECORDSIZE)

    def chunks(self) -> Iterator[bytes]:
        """Yield the tar.

        Raises:
            OSError: a file is gone, or has another size than it had: what was yielded is then too short.
        """
        inside = 0
        for file in self._files:
            yield file.head
            yield from _content(file)
            padding = _padded(file.size, tarfile.BLOCKSIZE) - file.size
            yield bytes(padding)
            inside += len(file.head) + file.size + padding
        yield bytes(_padded(inside + 2 * tarfile.BLOCKSIZE, tarfile.RECORDSIZE) - inside)


def _content(file: ArchivedFile) -> Iterator[bytes]:
    opened = os.open(file.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with open(opened, "rb", buffering=0) as content:
        if not stat.S_ISREG(os.fstat(opened).st_mode):
            raise OSError(f"{file.name} is no file any more")
        left = file.size
        while left:
            chunk = content.read(min(CHUNK, left))
            if not chunk:
                raise OSError(f"{file.name} is shorter than it was")
            left -= len(chunk)
            yield chunk


def _padded(size: int, unit: int) -> int:
    return -(-size // unit) * unit
