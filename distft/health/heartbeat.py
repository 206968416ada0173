"""Reads and writes RUN/ranks/00003.json: a rank's heartbeat, padded to one size and overwritten in place.

A last line, through a memory map, says at every point of the loop where the main thread is: it costs a microsecond, and
what was written there outlives a process that is killed the next moment.

Files and not messages, because they are read when messages do not get through, and still say something of a rank that
is gone. Clocks of two machines are never compared: a rank lives if its number of beats grows while one looks.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distft.core import host

SIZE = 1024
"""Bytes of a record: one write, so a reader sees the old one or the new."""
PLACE = 128
"""Bytes of the line that follows it."""


@dataclass(frozen=True, kw_only=True)
class Heartbeat:
    """The state of one rank at one moment."""

    rank: int
    process: dict[str, Any]
    """See `host.identity`."""
    device: str = ""
    phase: str = ""
    """What its main thread came to last (see `core.phase`)."""
    step: int = 0
    """Optimizer step that is being made; 0 before the first."""
    passed: int = 0
    """Points its main thread has passed."""
    idle_s: float = 0.0
    """Seconds since the last of them, by its own clock."""
    at: str = ""
    """Innermost Python frame of the main thread: `file.py:12 function`."""
    waits: bool = False
    """That frame is inside a collective: it waits for others."""
    beats: int = 0
    """Grows as long as the process lives and its interpreter runs."""
    ended: int | None = None
    """Exit code, once it has one."""
    reason: str = ""

    @property
    def who(self) -> str:
        """`rank 3 (node2, process 4711, cuda:1)`."""
        on = f", {self.device}" if self.device and self.device != "cpu" else ""
        return f"rank {self.rank} ({self.process.get('host')}, process {self.process.get('pid')}{on})"

    @property
    def place(self) -> str:
        """`forward of step 5`."""
        return f"{self.phase} of step {self.step}" if self.step else self.phase


class HeartbeatFile:
    """Holds the heartbeat files of one run: writes this rank's, reads the others'."""

    def __init__(self, folder: Path, rank: int) -> None:
        """Nothing happens yet."""
        self.folder, self._rank = folder, rank
        self._descriptor: int | None = None
        self._map: mmap.mmap | None = None

    def open(self) -> None:
        """Make this rank's record.

        Raises:
            OSError: the folder cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(self._path(self._rank), os.O_RDWR | os.O_CREAT, 0o644)
        os.pwrite(self._descriptor, b"\n".rjust(PLACE), SIZE)
        with contextlib.suppress(OSError, ValueError):  # some network file systems map nothing
            self._map = mmap.mmap(self._descriptor, SIZE + PLACE)

    def write(self, record: Heartbeat) -> None:
        """Replace this rank's record."""
        assert self._descriptor is not None, "open() comes first"
        text = json.dumps(asdict(record))
        if len(text) >= SIZE:
            text = json.dumps(asdict(record) | {"at": record.at[:80], "reason": record.reason[:60]})[: SIZE - 1]
        os.pwrite(self._descriptor, text.ljust(SIZE - 1).encode() + b"\n", 0)

    def mark(self, phase: str, step: int, passed: int) -> None:
        """Say where the main thread is; called by it."""
        if self._map is not None:
            self._map[SIZE:] = f"{phase} {step} {passed}".encode()[: PLACE - 1].ljust(PLACE - 1) + b"\n"

    def flush(self) -> None:
        """Let other machines see the marks."""
        if self._map is not None:
            self._map.flush()

    def read(self, ranks: Iterable[int]) -> dict[int, Heartbeat]:
        """Read the records of these ranks; one that is missing or cannot be read is left out."""
        records: dict[int, Heartbeat] = {}
        for rank in ranks:
            with contextlib.suppress(OSError, ValueError, TypeError):
                text, _, mark = self._path(rank).read_bytes().rstrip().partition(b"\n")
                fields = json.loads(text)
                if mark.strip():
                    phase, step, passed = mark.split()
                    fields |= {"phase": phase.decode(), "step": int(step), "passed": int(passed)}
                records[rank] = Heartbeat(**fields)
        return records

    def stacks(self, rank: int) -> Path:
        """Return where a rank's stacks go."""
        return self.folder / f"{rank:05d}.stacks.txt"

    def close(self) -> None:
        """Leave the record as it is."""
        if self._map is not None:
            self._map.close()
            self._map = None
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _path(self, rank: int) -> Path:
        return self.folder / f"{rank:05d}.json"


def is_dead(record: Heartbeat) -> bool:
    """Return whether the record claims to live and its process, on this machine, does not."""
    return record.ended is None and host.is_neighbour(record.process) and host.is_gone(record.process)
