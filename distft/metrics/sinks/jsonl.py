"""metrics.jsonl: one line per optimizer step, one per evaluation; non-finite numbers are written as strings."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

from distft.core.files import parse_json_object, replace_file

log = logging.getLogger(__name__)


def _step(line: str) -> int | None:
    """Return the step of a record; None for a line that a crash cut short."""
    step = (parse_json_object(line) or {}).get("step")
    return step if isinstance(step, int) else None


def keep_until(path: Path, start: int) -> None:
    """Drop the lines of steps after `start`, which are made again, and whatever a crash cut short."""
    if path.exists():
        before = range(start + 1 if start else 0)
        lines = path.read_text(encoding="utf-8").splitlines()
        kept = "".join(f"{line}\n" for line in lines if _step(line) in before)
        replace_file(path, kept)  # a kill here must not cost the lines before


class JsonlSink:
    """Appends whole lines; a full disk costs lines, never the run."""

    every_step = True

    def __init__(self, path: Path, *, start: int = 0) -> None:
        """Keep what an earlier run wrote up to the step this one starts from, so that no step appears twice."""
        self._path = path
        keep_until(path, start)
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, record: dict[str, Any]) -> None:
        """Write a record; JSON has no NaN, so readers get the strings "nan", "inf", "-inf"."""
        safe = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        try:
            self._file.write(json.dumps(safe) + "\n")
        except OSError as error:
            log.warning("%s: a line was lost: %s", self._path, error)

    def close(self) -> None:
        """Close the file; what a full disk has not taken by now is lost."""
        try:
            self._file.close()
        except OSError as error:
            log.warning("%s: the last lines were lost: %s", self._path, error)
