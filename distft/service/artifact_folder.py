"""An artifact's folder: what was asked, its files, and those by which the process that makes it is known."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distft.core import host
from distft.core.files import read_json_object, replace_json
from distft.service.alive_lock import hold_lock, is_held

REQUEST, MADE, LOG = "request.json", "made.json", "log.txt"
ALIVE, PROCESS = "alive.lock", "process.json"


@dataclass(frozen=True, kw_only=True)
class ArtifactFolder:
    """`DATA/artifacts/ID`."""

    path: Path

    @property
    def content(self) -> Path:
        """The artifact: a folder that appears whole or not at all."""
        return self.path / "content"

    @property
    def work(self) -> Path:
        """What is needed while it is made."""
        return self.path / "work"

    @property
    def log(self) -> Path:
        """What its processes printed."""
        return self.path / LOG

    def make_anew(self, request: dict[str, Any]) -> None:
        """Make the folder with what was asked, and without anything that an earlier try has left."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir(parents=True)
        replace_json(self.path / REQUEST, request, indent=1)

    def request(self) -> dict[str, Any]:
        """Return what was asked."""
        return read_json_object(self.path / REQUEST)

    def made(self) -> dict[str, Any]:
        """Return what its process said at its end: `proof` or `error`; empty while it has not."""
        return read_json_object(self.path / MADE)

    def write_made(self, made: dict[str, Any]) -> None:
        """Say how it ended."""
        replace_json(self.path / MADE, made, indent=1)

    def remove_rest(self, *, keep_content: bool) -> None:
        """Remove what only the making needed, and the artifact's files too where there are to be none."""
        for path in self.path.iterdir() if self.path.is_dir() else ():
            if path.is_dir() and not (keep_content and path == self.content):
                shutil.rmtree(path, ignore_errors=True)

    def hold(self) -> int | None:
        """Take the lock that the making process has; None: there is such a process."""
        return hold_lock(self.path / ALIVE)

    def is_alive(self) -> bool:
        """Return whether a process that makes it lives on this machine."""
        return is_held(self.path / ALIVE)

    def write_process(self, pid: int) -> None:
        """Write down the process group that makes it."""
        replace_json(self.path / PROCESS, host.identity() | {"pid": pid})

    def process_group(self) -> int | None:
        """Return the process group that was written down; None: there is none, or it is another machine's."""
        process = read_json_object(self.path / PROCESS)
        return int(process["pid"]) if host.is_neighbour(process) else None
