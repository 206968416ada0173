"""Which rows each step has seen, one file per rank: `samples/00003.jsonl`; for audits, off unless the recipe asks."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from distft.core.types import Batch, LossTerms, StepReport, TrainState
from distft.metrics.sinks.jsonl import keep_until

log = logging.getLogger(__name__)


class SampleLog:
    """A metric without figures: it writes what its own rank has trained on."""

    def __init__(self, folder: Path, rank: int, world: int, *, start: int) -> None:
        """Keep what an earlier start wrote up to step `start`: a row that is trained again is listed once.

        Files of ranks that this start does not have are cut back by rank 0.
        """
        folder.mkdir(parents=True, exist_ok=True)
        own_path = folder / f"{rank:05d}.jsonl"
        others = [path for path in folder.glob("*.jsonl") if int(path.stem) >= world] if rank == 0 else []
        for path in (own_path, *others):
            keep_until(path, start)
        self._file = own_path.open("a", encoding="utf-8", buffering=1)
        self._ids: list[str] = []

    def start(self) -> None:
        """Do nothing: this metric has no clock."""

    def micro(self, batch: Batch, terms: LossTerms) -> None:
        """Remember the micro-batch's rows."""
        self._ids += batch.sample_ids

    def step(self, state: TrainState, report: StepReport) -> None:
        """Write the step's rows."""
        line = {"step": state.step, "updated": report.updated, "rows": self._ids}
        self._ids = []
        try:
            self._file.write(json.dumps(line) + "\n")
        except OSError as error:
            log.warning("%s: a line was lost: %s", self._file.name, error)

    def read(self) -> dict[str, float | None]:
        """Return no figures."""
        return {}
