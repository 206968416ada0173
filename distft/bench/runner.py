"""Runs cases one after another and keeps one record of each, so that a benchmark that was killed goes on."""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from distft.bench import provenance
from distft.bench.cases import BenchCase
from distft.core.duration import duration
from distft.core.environment import versions
from distft.core.files import replace_json

SCHEMA = 1
"""Version of a record; raised when a field changes its meaning."""
FINAL = ("measured", "memory", "refused")
"""Outcomes that another run would repeat; a case that failed otherwise is tried again."""

Run = Callable[[BenchCase, Path], dict[str, Any]]
"""Runs a case whose files go to a folder; see `launch.run_case`."""
Say = Callable[[str], None]


class Runner:
    """Cases of one folder."""

    def __init__(self, folder: Path, run: Run, say: Say) -> None:
        """`folder` is made; `run` starts a case, `say` tells how far it is."""
        self.folder = folder / "cases"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._run, self._say = run, say

    def all(self, cases: Sequence[BenchCase]) -> list[dict[str, Any]]:
        """Return the records of `cases`, measured now or before."""
        kept = {case.key: record for case in cases if (record := self.kept(case)) is not None}
        if kept:
            self._say(f"{len(kept)} of {len(cases)} cases are measured already, in {self.folder}")
        seconds = [record["wall_s"] for record in kept.values() if record["wall_s"]]
        open_ = sum(case.key not in kept and not case.refused for case in cases)
        records = []
        for number, case in enumerate(cases, start=1):
            record = kept.get(case.key)
            if record is None:
                left = f"; about {duration(open_ * sum(seconds) / len(seconds))} left" if seconds and open_ else ""
                self._say(f"[{number}/{len(cases)}] {case} …{left}")
                record = self.record(case)
                seconds += [record["wall_s"]] if not case.refused else []
                open_ -= not case.refused
                self._say(f"[{number}/{len(cases)}] {_result(record)}")
            records.append(record)
        return records

    def kept(self, case: BenchCase) -> dict[str, Any] | None:
        """Return the record of an earlier run, if it is one to keep."""
        try:
            record = json.loads(self._path(case).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return record if record.get("schema") == SCHEMA and record.get("outcome") in FINAL else None

    def record(self, case: BenchCase) -> dict[str, Any]:
        """Return a kept record, or measure it now and write it in one piece."""
        if (kept := self.kept(case)) is not None:
            return kept
        began = time.monotonic()
        became = {"outcome": "refused", "reason": case.refused} if case.refused else self._run(case, self.folder)
        record = {
            "schema": SCHEMA,
            "key": case.key,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "outcome": became["outcome"],
            "reason": became["reason"],
            "wall_s": round(time.monotonic() - began, 2),
            "case": case.facts(),
            "hardware": provenance.hardware(),
            "versions": versions(),
            "code": provenance.code(),
            **became,
        }
        replace_json(self._path(case), record, indent=1)
        return record

    def _path(self, case: BenchCase) -> Path:
        return self.folder / f"{case.key}.json"


def _result(record: dict[str, Any]) -> str:
    if record["outcome"] != "measured":
        return f"{OUTCOMES[record['outcome']]}: {record['reason']}"
    speed = record["speed"]
    return f"{speed['tokens_per_s']:,.0f} tokens/s, {speed['step_s']['median'] * 1000:,.1f} ms a step"


OUTCOMES = {"memory": "out of memory", "refused": "not possible", "failed": "FAILED"}
"""How a table says what was not measured."""
