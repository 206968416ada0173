"""What held-out rows that judge answers tell of a model: accuracy, calibration, and how much of it is length."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from distft.scores.confidence_intervals import of_mean, of_share

BINS = 5
"""Of equal width, of the confidence in the likelier order: 0.5 to 1."""
FALLS_FAR = 0.1
"""Nats per token by which chosen answers have become unlikelier from where a run is warned of."""
Row = dict[str, Any]


def judged_figures(rows: Sequence[Row]) -> dict[str, Any]:
    """Return figures over rows, as JSON values.

    Args:
        rows: `LossTerms.by_group` of each: of pairs `reward_chosen`, `reward_rejected`, `tokens_chosen`,
            `tokens_rejected`, where there are such `margin`, `logprob_chosen`, `logprob_rejected`; of single answers
            `ahead`, `desirable`, `tokens`, `reward`, `logprob`.

    Returns:
        `accuracy` with its interval; `calibration`: of each bin mean confidence, accuracy and rows, and `error`, their
        mean distance (https://arxiv.org/abs/1706.04599, equation 3); `groups`: accuracy by length, margin or label.
    """
    pairs = "reward_chosen" in rows[0]
    gaps = [row["reward_chosen"] - row["reward_rejected"] if pairs else row["ahead"] for row in rows]
    right = [gap > 0 for gap in gaps]
    made: dict[str, Any] = {
        "kind": "pairs" if pairs else "answers",
        "rows": len(rows),
        "accuracy": of_share(sum(right), len(right)).to_json(),
        "calibration": _calibration(gaps),
        "groups": {
            name: {
                key: of_share(sum(right[index] for index in members), len(members)).to_json()
                for key, members in groups.items()
            }
            for name, groups in _groups(rows, pairs).items()
        },
    }
    if pairs:
        longer = [row["tokens_chosen"] - row["tokens_rejected"] for row in rows]
        made["margin"] = of_mean(gaps).to_json()
        made["tokens"] = {side: _mean([row[f"tokens_{side}"] for row in rows]) for side in ("chosen", "rejected")}
        made["length_correlation"] = _correlation(gaps, longer)
        if "logprob_chosen" in rows[0]:
            sides = ("chosen", "rejected")
            tokens = {side: sum(row[f"tokens_{side}"] for row in rows) for side in sides}
            made["logprob_per_token"] = {
                side: sum(row[f"logprob_{side}"] for row in rows) / max(1, tokens[side]) for side in sides
            }
    return made


def judged_warnings(before: dict[str, Any] | None, after: dict[str, Any] | None) -> list[str]:
    """Return what is wrong with a gain in accuracy, as sentences.

    Args:
        before: `judged_figures` of the base model.
        after: of the trained one, on the same rows.
    """
    if before is None or after is None or after["kind"] != "pairs":
        return []
    warnings: list[str] = []
    by_length = [figures["groups"].get("length", {}) for figures in (before, after)]
    if all({"longer", "shorter"} <= groups.keys() for groups in by_length):
        longer, shorter = (by_length[1][key]["value"] - by_length[0][key]["value"] for key in ("longer", "shorter"))
        gain = after["accuracy"]["value"] - before["accuracy"]["value"]
        if gain > 0 and longer > 0 and shorter <= 0:
            warnings.append(
                f"all of the gain in accuracy is length: {longer:+.3f} where the chosen answer is the longer one, "
                f'{shorter:+.3f} where it is the shorter one  use loss = "sigmoid_norm", ld_alpha or simpo, or match '
                "lengths"
            )
    if "logprob_per_token" in before and "logprob_per_token" in after:
        was, now = (figures["logprob_per_token"]["chosen"] for figures in (before, after))
        if now < was - FALLS_FAR:
            warnings.append(
                f"chosen answers have become unlikelier: {was:.3f} to {now:.3f} nats per token  add sft_weight, raise "
                "beta or lower the learning rate"
            )
    return warnings


def _groups(rows: Sequence[Row], pairs: bool) -> dict[str, dict[str, list[int]]]:
    """Return indices of rows by what may explain their accuracy."""
    if not pairs:
        return {"label": _split(rows, lambda row: "good" if row["desirable"] else "bad")}
    groups = {"length": _split(rows, _length)}
    margins = sorted(row["margin"] for row in rows if row.get("margin"))
    if margins:
        low, high = margins[len(margins) // 3], margins[2 * len(margins) // 3]
        groups["margin"] = _split(
            rows, lambda row: "small" if row["margin"] < low else "middle" if row["margin"] < high else "large"
        )
    return groups


def _length(row: Row) -> str:
    gap = row["tokens_chosen"] - row["tokens_rejected"]
    return "longer" if gap > 0 else "shorter" if gap < 0 else "equal"


def _split(rows: Sequence[Row], key: Callable[[Row], str]) -> dict[str, list[int]]:
    made: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        made.setdefault(key(row), []).append(index)
    return made


def _calibration(gaps: Sequence[float]) -> dict[str, Any]:
    """Compare sigmoid(|gap|), the confidence in the likelier order, with how often that order is right."""
    bins: list[list[tuple[float, float]]] = [[] for _ in range(BINS)]
    for gap in gaps:
        confidence = 1 / (1 + math.exp(-min(abs(gap), 700.0)))
        bins[min(BINS - 1, int((confidence - 0.5) * 2 * BINS))].append((confidence, float(gap > 0)))
    listed = [
        {"confidence": _mean([confidence for confidence, _ in members]), "accuracy": _mean([hit for _, hit in members]),
         "rows": len(members)}
        for members in bins
        if members
    ]  # fmt: skip
    error = sum(each["rows"] * abs(each["confidence"] - each["accuracy"]) for each in listed) / len(gaps)
    return {"bins": listed, "error": error}


def _correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Pearson's; None where one of them does not vary."""
    means = _mean(first), _mean(second)
    product = sum((a - means[0]) * (b - means[1]) for a, b in zip(first, second, strict=True))
    squares = sum((a - means[0]) ** 2 for a in first) * sum((b - means[1]) ** 2 for b in second)
    return product / math.sqrt(squares) if squares > 0 else None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
