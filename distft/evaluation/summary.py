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
    """Made of the kept answers alone, so it can be made again at any time."""
    held_out = {label: records.about(label, HELD_OUT) for label in LABELS}
    shown = {
        label: {key: said[key] for key in ("loss", "perplexity", "step")} for label, said in held_out.items() if said
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
    found: dict[str, None] = {}
    for label in LABELS:
        for path in sorted((records.folder / label).glob("*.json")):
            if path.stem != HELD_OUT:
                found[path.stem] = None
    return list(found)


def _entries(records: AnswerRecords, name: str) -> Iterator[dict[str, Any]]:
    said = {label: records.about(label, name) for label in LABELS}
    newest = next(one for label in ("after", "best", "before") if (one := said[label]) is not None)
    ids = records.row_ids(newest["label"], name)
    for score in newest["scores"]:
        of = {label: _score(one, score["score"], newest["rows_sha256"]) for label, one in said.items()}
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
    return [ids[one.index] for one in worst if one.index < len(ids)]


def _score(said: dict[str, Any] | None, score: str, rows_sha256: str) -> dict[str, Any] | None:
    """A score's entry, if it is of the same rows, with the step it was made at."""
    if said is None or said["rows_sha256"] != rows_sha256:
        return None
    found = next((one for one in said["scores"] if one["score"] == score), None)
    return None if found is None else {**found, "step": said["step"]}


def _changes(before: dict[str, Any] | None, after: dict[str, Any] | None) -> dict[str, PairedComparison]:
    if before is None or after is None:
        return {}
    with contextlib.suppress(ValueError):  # the recipe's figures have changed in between
        made = compare(ScoreResult.from_json(before["scored"]), ScoreResult.from_json(after["scored"]))
        return {change.figure.name: change for change in made}
    return {}


def _interval(said: dict[str, Any] | None, figure: str) -> dict[str, Any] | None:
    if said is None or figure not in said["intervals"]:
        return None
    return {**said["intervals"][figure], "step": said["step"]}
