"""metrics.jsonl: one line per optimizer step, one per evaluation; non-finite numbers are written as strings."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


class JsonlSink:
    """Appends whole lines; a full disk costs lines, never the run."""

    every_step = True

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, record: dict[str, Any]) -> None:
        """JSON has no NaN: readers get the strings "nan", "inf", "-inf"."""
        safe = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        try:
            self._file.write(json.dumps(safe) + "\n")
        except OSError as error:
            log.warning("%s: a line was lost: %s", self._path, error)

    def close(self) -> None:
        """Close the file."""
        self._file.close()
