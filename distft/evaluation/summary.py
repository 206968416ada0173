"""`eval/summary.json`: every figure before, after and of the best state, what changed, and which rows got worse."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from distft.core.errors import FileSystemError
from distft.core.files import replace_json
from distft.evaluation.answer_records import HELD_OUT, AnswerRecords
from distft.scores import ScoreResult
from distft.scores.paired import PairedComparison, compare

LABELS = ("before", "after", "best")
SHOWN_REGRESSIONS = 100
"""Rows named in the summary; all of them follow from the files beside it."""


def summary(records: AnswerRecords) -> dict[str, Any]:
    """Build the summary from the kept answers alone, so that it can be built again at any time."""
    held_out = {label: records.about(label, HELD_OUT) for label in LABELS}
    shown = {
        label: {key: record[key] for key in ("loss", "perplexity", "step")}
        for label, record in held_out.items()
        if record
    }
    return {"sets": [entry for name in _names(records) for entry in _entries(records, name)], "held_out": shown}


def write_summary(records: AnswerRecords) -> dict[str, Any]:
    """Write it, whole or not at all; returns it.

    Raises:
        FileSystemError: the folder cannot be written.
    """
    made = summary(records)
    path = records.folder / "summary.json"
    try:
        records.folder.mkdir(parents=True, exist_ok=True)
        replace_json(path, made, indent=1, ensure_ascii=False)
    except OSError as error:
        raise FileSystemError(f"{path}: cannot be written: {error.strerror or error}") from None
    return made


def _names(records: AnswerRecords) -> list[str]:
    names: dict[str, None] = {}
    for label in LABELS:
        for path in sorted((records.folder / label).glob("*.json")):
            if path.stem != HELD_OUT:
                names[path.stem] = None
    return list(names)


def _entries(records: AnswerRecords, name: str) -> Iterator[dict[str, Any]]:
    by_label = {label: records.about(label, name) for label in LABELS}
    newest = next(record for label in ("after", "best", "before") if (record := by_label[label]) is not None)
    ids = records.row_ids(newest["label"], name)
    for score in newest["scores"]:
        of = {label: _score(record, score["score"], newest["rows_sha256"]) for label, record in by_label.items()}
        changes = {label: _changes(of["before"], of[label]) for label in ("after", "best")}
        for figure in ScoreResult.from_json(score["scored"]).figures:
            change, best = changes["after"].get(figure.name), changes["best"].get(figure.name)
            yield {
                "name": name,
                "score": score["score"],
                "figure": figure.name,
                "higher_is_better": figure.higher_is_better,
                "binary": figure.binary,
                **{label: _interval(of[label], figure.name) for label in LABELS},
                "change": None if change is None else change.to_json(),
                "change_best": None if best is None else best.to_json(),
                "regressions": _worse(change, ids),
                "regressions_best": _worse(best, ids),
            }


def _worse(change: PairedComparison | None, ids: list[str]) -> list[str]:
    worst = () if change is None else change.regressions[:SHOWN_REGRESSIONS]
    return [ids[regression.index] for regression in worst if regression.index < len(ids)]


def _score(record: dict[str, Any] | None, score: str, rows_sha256: str) -> dict[str, Any] | None:
    """Return a score's entry with its step, if it is of the same rows."""
    if record is None or record["rows_sha256"] != rows_sha256:
        return None
    match = next((entry for entry in record["scores"] if entry["score"] == score), None)
    return None if match is None else {**match, "step": record["step"]}


def _changes(before: dict[str, Any] | None, after: dict[str, Any] | None) -> dict[str, PairedComparison]:
    if before is None or after is None:
        return {}
    with contextlib.suppress(ValueError):  # the recipe's figures have changed in between
        made = compare(ScoreResult.from_json(before["scored"]), ScoreResult.from_json(after["scored"]))
        return {change.figure.name: change for change in made}
    return {}


def _interval(entry: dict[str, Any] | None, figure: str) -> dict[str, Any] | None:
    if entry is None or figure not in entry["intervals"]:
        return None
    return {**entry["intervals"][figure], "step": entry["step"]}
