"""What held-out rows that judge answers tell of a model: accuracy, calibration, and how much of it is length."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

SIDES = {"pairs": ("chosen", "rejected"), "answers": ("good", "bad")}
"""What the two kinds of answers are called, by the kind of rows."""
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
        `accuracy` with its interval, where a tie counts half (a policy that is its reference prefers nothing);
        `calibration`: of each bin mean confidence, accuracy and rows, and `error`, their mean distance
        (https://arxiv.org/abs/1706.04599, equation 3); `groups`: accuracy by length, margin or label; by side (`SIDES`)
        `tokens` of an answer on average and, where it was measured, `logprob_per_token`. Of pairs also `margin`, the
        mean reward of the chosen answer less that of the rejected one, and `length_correlation`, its Pearson
        correlation with the difference of their lengths; of single answers `reward` by side.
    """
    from distft.scores.confidence_intervals import of_mean, of_share  # numpy, which the report does without

    kind = "pairs" if "reward_chosen" in rows[0] else "answers"
    gaps = [row["reward_chosen"] - row["reward_rejected"] if kind == "pairs" else row["ahead"] for row in rows]
    right = [1.0 if gap > 0 else 0.5 if gap == 0 else 0.0 for gap in gaps]
    sides = _sides(rows, kind)
    made: dict[str, Any] = {
        "kind": kind,
        "rows": len(rows),
        "accuracy": of_share(sum(right), len(right)).to_json(),
        "calibration": _calibration(gaps, right),
        "groups": {
            name: {
                key: of_share(sum(right[index] for index in members), len(members)).to_json()
                for key, members in groups.items()
            }
            for name, groups in _groups(rows, kind).items()
        },
        "tokens": {side: _mean([one["tokens"] for one in answers]) for side, answers in sides.items()},
    }
    if all("logprob" in one for answers in sides.values() for one in answers):
        made["logprob_per_token"] = {
            side: sum(one["logprob"] for one in answers) / max(1.0, sum(one["tokens"] for one in answers))
            for side, answers in sides.items()
        }
    if kind == "pairs":
        made["margin"] = of_mean(gaps).to_json()
        made["length_correlation"] = _correlation(gaps, [row["tokens_chosen"] - row["tokens_rejected"] for row in rows])
    else:
        made["reward"] = {side: _mean([one["reward"] for one in answers]) for side, answers in sides.items()}
    return made


def judged_warnings(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> list[str]:
    """Return what is wrong with a gain in accuracy, as sentences.

    Args:
        before: `judged_figures` of the base model.
        after: of the trained one, on the same rows.
    """
    if before is None or after is None or before["kind"] != after["kind"]:
        return []
    said = (_gained_length(before, after), _unlikelier(before, after))
    return [sentence for sentence in said if sentence]


def _gained_length(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Warn where accuracy has risen for longer chosen answers, by more than chance, and for shorter ones not at all."""
    was, now = (figures["groups"].get("length", {}) for figures in (before, after))
    if not all({"longer", "shorter"} <= groups.keys() for groups in (was, now)):
        return ""
    longer, shorter = (now[key]["value"] - was[key]["value"] for key in ("longer", "shorter"))
    if now["longer"]["low"] <= was["longer"]["value"] or shorter > 0:
        return ""
    return (
        f"all of the gain in accuracy is length: {longer:+.3f} where the chosen answer is the longer one, "
        f'{shorter:+.3f} where it is the shorter one  use loss = "sigmoid_norm", ld_alpha or simpo, or match lengths'
    )


def _unlikelier(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Warn where answers that are to become likelier have become much unlikelier."""
    side = SIDES[after["kind"]][0]
    was, now = (figures.get("logprob_per_token", {}).get(side) for figures in (before, after))
    if was is None or now is None or now >= was - FALLS_FAR:
        return ""
    change = "add sft_weight, raise beta" if after["kind"] == "pairs" else "raise beta or desirable_weight"
    return (
        f"{side} answers have become unlikelier: {was:.3f} to {now:.3f} nats per token  {change} or lower the "
        "learning rate"
    )


def _sides(rows: Sequence[Row], kind: str) -> dict[str, list[Row]]:
    """Return side -> its answers, each with `tokens` and what else was measured of it."""
    if kind == "answers":
        good, bad = ([row for row in rows if bool(row["desirable"]) == is_good] for is_good in (True, False))
        return {side: answers for side, answers in zip(SIDES[kind], (good, bad), strict=True) if answers}
    return {
        side: [
            {name: row[f"{name}_{side}"] for name in ("tokens", "reward", "logprob") if f"{name}_{side}" in row}
            for row in rows
        ]
        for side in SIDES[kind]
    }


def _groups(rows: Sequence[Row], kind: str) -> dict[str, dict[str, list[int]]]:
    """Indices of rows by what may explain their accuracy."""
    if kind == "answers":
        return {"label": _split(rows, lambda row: "good" if row["desirable"] else "bad")}
    found = {"length": _split(rows, _length)}
    margins = sorted(row["margin"] for row in rows if row.get("margin"))
    if margins:
        low, high = margins[len(margins) // 3], margins[2 * len(margins) // 3]
        found["margin"] = _split(
            rows, lambda row: "small" if row["margin"] < low else "middle" if row["margin"] < high else "large"
        )
    return found


def _length(row: Row) -> str:
    gap = row["tokens_chosen"] - row["tokens_rejected"]
    return "longer" if gap > 0 else "shorter" if gap < 0 else "equal"


def _split(rows: Sequence[Row], key: Callable[[Row], str]) -> dict[str, list[int]]:
    made: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        made.setdefault(key(row), []).append(index)
    return made


def _calibration(gaps: Sequence[float], right: Sequence[float]) -> dict[str, Any]:
    """Compare sigmoid(|gap|), the confidence in the likelier order, with how often that order is right."""
    bins: list[list[tuple[float, float]]] = [[] for _ in range(BINS)]
    for gap, hit in zip(gaps, right, strict=True):
        confidence = 1 / (1 + math.exp(-min(abs(gap), 700.0)))
        bins[min(BINS - 1, int((confidence - 0.5) * 2 * BINS))].append((confidence, hit))
    listed = [
        {"confidence": _mean([one for one, _ in members]), "accuracy": _mean([one for _, one in members]),
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
