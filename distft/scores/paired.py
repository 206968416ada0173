"""Two models on the same rows: what changed, whether that can be chance, and which rows got worse."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from distft.scores.confidence_intervals import CONFIDENCE, RESAMPLES, Interval, of_difference, of_mean, of_share
from distft.scores.spec import MetricInfo, ScoreResult


@dataclass(frozen=True, kw_only=True)
class McNemar:
    """McNemar's test of paired right and wrong answers."""

    gained: int
    """Rows wrong before and right after."""
    lost: int
    """Rows right before and wrong after."""
    p_value: float
    """Two-sided, exact: how likely a split at least this uneven is when gains and losses are equally likely."""


@dataclass(frozen=True, kw_only=True)
class Regression:
    """A row that got worse."""

    index: int
    """Index of the row in both lists."""
    before: float
    after: float
    worse_by: float
    """Positive, whichever direction is better."""


@dataclass(frozen=True, kw_only=True)
class PairedComparison:
    """One figure, before and after."""

    figure: MetricInfo
    before: Interval
    after: Interval
    difference: Interval
    """after - before, paired; without bounds for a figure that rows do not have."""
    mcnemar: McNemar | None
    """The test of binary figures."""
    regressions: tuple[Regression, ...]
    """Worst first."""

    @property
    def verdict(self) -> str:
        """What McNemar's test, else the interval, allows to say: "better", "worse" or "no clear change"."""
        shown = self.difference.excludes_zero
        if self.mcnemar is not None:
            shown = self.mcnemar.p_value < 1 - self.difference.confidence
        if not shown:
            return "no clear change"
        return "better" if (self.difference.value > 0) == self.figure.higher_is_better else "worse"

    def to_json(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "figure": vars(self.figure),
            "before": self.before.to_json(),
            "after": self.after.to_json(),
            "difference": self.difference.to_json(),
            "mcnemar": None if self.mcnemar is None else vars(self.mcnemar),
            "verdict": self.verdict,
            "regressions": [vars(regression) for regression in self.regressions],
        }


def compare(
    before: ScoreResult,
    after: ScoreResult,
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[PairedComparison, ...]:
    """Return every figure of one score, before and after, on the same rows in the same order.

    Raises:
        ValueError: the two are not of one score or not of the same number of rows.
    """
    if [figure.name for figure in before.figures] != [figure.name for figure in after.figures]:
        raise ValueError("the two hold different figures")
    return tuple(
        _change(figure, before, after, {"confidence": confidence, "resamples": resamples, "seed": seed})
        for figure in after.figures
    )


def interval(scored: ScoreResult, figure: MetricInfo, *, confidence: float = CONFIDENCE, **bootstrap: int) -> Interval:
    """Return a figure's interval: Wilson's where rows are right or wrong, else the bootstrap's; bare without rows."""
    if not figure.per_row:
        counted = max((len(values) for values in scored.rows.values()), default=0)
        return _bare(scored.totals[figure.name], counted, confidence)
    values = scored.rows[figure.name]
    if not figure.binary:
        return of_mean(values, confidence=confidence, **bootstrap)
    numbers = [value for value in values if not math.isnan(value)]
    return of_share(round(sum(numbers)), len(numbers), confidence=confidence)


def mcnemar(before: Sequence[float], after: Sequence[float]) -> McNemar:
    """Return the exact (binomial) test; rows without a score on either side do not count.

    Source: McNemar 1947, https://doi.org/10.1007/BF02295996; exact form as in Dietterich 1998 and statsmodels.
    """
    if len(before) != len(after):
        raise ValueError(f"{len(before)} rows before and {len(after)} after are no pairs")
    pairs = [(old, new) for old, new in zip(before, after, strict=True) if not (math.isnan(old) or math.isnan(new))]
    assert all(value in (0.0, 1.0) for pair in pairs for value in pair), "right or wrong"
    gained = sum(old < new for old, new in pairs)
    lost = sum(old > new for old, new in pairs)
    return McNemar(gained=gained, lost=lost, p_value=_two_sided_sign_test(gained, lost))


def regressions(
    before: Sequence[float], after: Sequence[float], *, higher_is_better: bool = True
) -> tuple[Regression, ...]:
    """Return the rows that got worse, worst first; of equals the earlier row comes first."""
    worse = []
    for index, (old, new) in enumerate(zip(before, after, strict=True)):
        worse_by = old - new if higher_is_better else new - old
        if worse_by > 0:  # False for NaN
            worse.append(Regression(index=index, before=old, after=new, worse_by=worse_by))
    return tuple(sorted(worse, key=lambda regression: (-regression.worse_by, regression.index)))


def _change(figure: MetricInfo, before: ScoreResult, after: ScoreResult, options: dict[str, Any]) -> PairedComparison:
    first, second = interval(before, figure, **options), interval(after, figure, **options)
    if not figure.per_row:
        gap = _bare(second.value - first.value, second.num_rows, options["confidence"])
        return PairedComparison(figure=figure, before=first, after=second, difference=gap, mcnemar=None, regressions=())
    old, new = before.rows[figure.name], after.rows[figure.name]
    return PairedComparison(
        figure=figure,
        before=first,
        after=second,
        difference=of_difference(old, new, **options),
        mcnemar=mcnemar(old, new) if figure.binary else None,
        regressions=regressions(old, new, higher_is_better=figure.higher_is_better),
    )


def _two_sided_sign_test(gained: int, lost: int) -> float:
    """Return twice the smaller tail of a fair coin, at most 1; in logarithms, as binomials of 1,000 overflow."""
    total, few = gained + lost, min(gained, lost)
    logs = [math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1) for k in range(few + 1)]
    return min(1.0, 2 * math.fsum(math.exp(log_binomial - total * math.log(2)) for log_binomial in logs))


def _bare(value: float, num_rows: int, confidence: float) -> Interval:
    return Interval(value=value, low=math.nan, high=math.nan, confidence=confidence, num_rows=num_rows, method="none")
