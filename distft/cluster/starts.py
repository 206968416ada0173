"""`starts.jsonl` in the run folder: each start of the run by a batch job, what it began from and how it ended.

It outlives the jobs, so it tells a run that gets on from one that is started again and again and does not.
A start without an end is one that never came to say so: its node was lost, or it was killed.
"""

from __future__ import annotations

import contextlib
import datetime
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from distft.checkpoint.folders import Folders
from distft.core.files import append_json_line, read_json_lines

FILE = "starts.jsonl"


@dataclass(frozen=True, kw_only=True)
class JobStart:
    """One start."""

    job: str
    """The batch job's id; restarts keep it."""
    restart: int
    """0 for the job's first start."""
    nodes: list[str]
    processes: int
    checkpoint: int
    """Step of the newest checkpoint at that moment; 0: none."""
    began: str = field(default_factory=lambda: _now())


@dataclass(frozen=True, kw_only=True)
class End:
    """How it ended."""

    job: str
    restart: int
    code: int
    """The run's own exit code (see `distft.core.errors`)."""
    reason: str
    checkpoint: int
    then: str
    """What the job did next: requeue | end."""
    ended: str = field(default_factory=lambda: _now())


class Starts:
    """The file of one run folder."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._path = run_dir / FILE

    def checkpoint(self) -> int:
        """Step of the newest committed checkpoint; 0 when there is none."""
        try:
            return max(Folders(self._run_dir / "checkpoints").steps(), default=0)
        except OSError:
            return 0

    def add(self, event: JobStart | End) -> None:
        """Append it; safe from a power cut once this returns, and never a reason to fail: a full disk forgets it."""
        with contextlib.suppress(OSError):
            append_json_line(self._path, asdict(event), durable=True)

    def stalled(self, job: str) -> int:
        """Return how many starts of this job, counted from the last one back, began at the newest checkpoint of today.

        Another job's starts do not count: whoever submits anew has read why the last one stopped.
        """
        now = self.checkpoint()
        count = 0
        for start in reversed([record for record in self.records() if "began" in record and record.get("job") == job]):
            if start.get("checkpoint") != now:
                break
            count += 1
        return count

    def records(self) -> list[dict[str, Any]]:
        """Return the starts and ends as they were written, oldest first; a line that a power cut tore is left out."""
        return read_json_lines(self._path)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
