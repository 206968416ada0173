"""A folder of the doctor's own, beside what it examines, that is gone afterwards."""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path
from types import TracebackType


class Probe:
    """`with Probe(folder) as probe:`; several processes may share one by its name."""

    def __init__(self, folder: Path, name: str | None = None) -> None:
        """Nothing happens yet. The folder itself need not exist: the nearest one above it that does is used."""
        self.name = name or uuid.uuid4().hex[:12]
        above = folder.absolute()
        while not above.exists() and above != above.parent:
            above = above.parent
        self.parent = above
        self.path = above / f".distft-doctor-{self.name}"

    def __enter__(self) -> Probe:
        self.path.mkdir(exist_ok=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def write(self, name: str, data: bytes) -> None:
        """Write a file; it is durable once this returns."""
        with (self.path / name).open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def modified(self, name: str) -> float:
        """Return when the file was modified, by the file system's clock."""
        return (self.path / name).stat().st_mtime
