"""Whether a case's loss curve is that of the others: a run that learns something else has no speed to speak of.

Cases of one method, length, global batch and kind of rows see the same rows in the same order whatever their engine,
processes and micro-batch, so their losses are equal up to rounding. Rounding grows with every update, so the first
steps are held to what one step's arithmetic allows, and the whole curve to what is left of that after all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

EARLY = 6
"""Steps within which rounding has not grown: as many as the tests of equal losses take."""


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """Largest relative differences of losses, and the reason."""

    early: float
    """Tolerance of the first EARLY steps."""
    all: float
    """Tolerance of every step."""
    why: str


EXACT = Tolerance(early=1e-5, all=1e-4, why="fp32")
ROUNDED = Tolerance(early=1e-2, all=5e-2, why="bf16 (8 bits of mantissa) or an 8-bit optimizer (blocks differ)")


def tolerance(record: dict[str, Any]) -> Tolerance:
    """Return the tolerance for a case's type and optimizer."""
    case = record["case"]
    rounded = case["model"]["dtype"] != "float32" or "8bit" in case["optim"]["name"]
    return ROUNDED if rounded else EXACT


def judge(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the records with `loss_check`: {reference, early, all, tolerance…, equal}; unmeasured cases as is."""
    measured = [record for record in records if record["outcome"] == "measured"]
    references: dict[Any, dict[str, Any]] = {}
    for record in sorted(measured, key=lambda record: record["case"]["engine"] != "solo"):
        references.setdefault(_group(record), record)
    return [
        record | {"loss_check": _check(record, references[_group(record)])}
        if record["outcome"] == "measured"
        else record
        for record in records
    ]


def _group(record: dict[str, Any]) -> tuple[Any, ...]:
    """Return the cases that must agree; with dropout, which is drawn per micro-batch, those of one micro-batch."""
    case = record["case"]
    dropout = (case["method_params"] or {}).get("dropout")
    micro = record["ran"]["micro_batch_size"] if dropout else None
    return case["method"], case["max_length"], case["rows"], case["global_batch_size"], micro


def _check(record: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    allowed = tolerance(record)
    pairs = list(zip(record["loss"], reference["loss"], strict=False))
    apart = [abs(a - b) / max(abs(b), 1e-30) for a, b in pairs]
    early, all_ = max(apart[:EARLY]), max(apart)
    return {
        "reference": reference["key"],
        "early": early,
        "all": all_,
        "tolerance_early": allowed.early,
        "tolerance_all": allowed.all,
        "why": allowed.why,
        "equal": bool(early <= allowed.early and all_ <= allowed.all) and record["left_out"] == 0,
    }
