"""How far a figure over N rows may be off: bootstrap intervals of means and of paired differences, Wilson's for shares.

Rows are taken as a sample of the rows that could have been asked: an interval says nothing about another kind of row,
about another training seed, or about sampling answers anew.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 10_000
_CHUNK = 4_000_000
"""Indices drawn at a time: 32 MB."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A figure and where it may lie. NaN bounds: too few rows to say."""

    value: float
    low: float
    high: float
    confidence: float
    num_rows: int
    """Rows that counted; those without a score do not."""
    method: str
    """"bca", "wilson" or "none"."""

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval of a difference lies on one side of zero."""
        return self.low > 0 or self.high < 0

    def to_json(self) -> dict[str, Any]:
        """Return plain values for JSON; NaN becomes null."""
        return {
            key: None if isinstance(value, float) and math.isnan(value) else value
            for key, value in asdict(self).items()
        }


def of_mean(
    values: Sequence[float], *, confidence: float = CONFIDENCE, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Return the bootstrap interval of the mean (BCa: bias-corrected and accelerated). NaN values are left out.

    Equal for equal arguments. Fewer than two rows have no interval; rows that are all equal have one of no width,
    which is what the bootstrap can say, and for a share less than Wilson's says (`of_share`).

    Source: Efron 1987, Better Bootstrap Confidence Intervals, https://doi.org/10.1080/01621459.1987.10478410;
    for the mean the jackknife's acceleration is a sixth of the skewness over sqrt(N) (Efron and Tibshirani 1993, 14.3).
    """
    x_N = np.asarray(values, np.float64)
    x_N = x_N[~np.isnan(x_N)]
    if len(x_N) == 0:
        return _none(math.nan, 0, confidence)
    centre = math.fsum(x_N) / len(x_N)  # exact for rows that are all equal
    if len(x_N) == 1:
        return _none(centre, 1, confidence)
    off_N = x_N - centre
    spread = float(np.sum(off_N**2))
    if spread <= (1e-12 * max(1.0, abs(centre))) ** 2 * len(x_N):
        return Interval(value=centre, low=centre, high=centre, confidence=confidence, num_rows=len(x_N), method="bca")
    side = math.copysign(1.0, off_N[np.flatnonzero(off_N)[0]])  # the draws of x are those of -x, so swapping the two
    off_N = side * off_N  # models mirrors their difference exactly
    means = np.sort(_resampled_means(off_N, resamples, np.random.default_rng(seed)))
    below = (np.searchsorted(means, -_EPSILON) + np.searchsorted(means, _EPSILON, side="right")) / (2 * resamples)
    normal = NormalDist()
    bias = normal.inv_cdf(min(max(float(below), 1 / resamples), 1 - 1 / resamples))
    acceleration = float(np.sum(off_N**3)) / (6 * spread**1.5)

    def bound(tail: float) -> float:
        z = bias + normal.inv_cdf(tail)
        level = normal.cdf(bias + z / (1 - acceleration * z))
        return centre + side * float(np.quantile(means, level))

    tail = (1 - confidence) / 2
    low, high = sorted((bound(tail), bound(1 - tail)))
    return Interval(value=centre, low=low, high=high, confidence=confidence, num_rows=len(x_N), method="bca")


def of_difference(
    before: Sequence[float],
    after: Sequence[float],
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Return the paired bootstrap interval of mean(after - before), rows resampled together.

    Rows without a score on either side are left out.
    """
    if len(before) != len(after):
        raise ValueError(f"{len(before)} rows before and {len(after)} after are no pairs")
    differences = np.asarray(after, np.float64) - np.asarray(before, np.float64)
    return of_mean(differences.tolist(), confidence=confidence, resamples=resamples, seed=seed)


def of_share(successes: float, num_rows: int, *, confidence: float = CONFIDENCE) -> Interval:
    """Return Wilson's interval of a proportion: right for few rows and near 0 and 1, where the bootstrap is too narrow.

    A tie may count as half a success.

    Source: Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953; recommended by Brown, Cai and DasGupta 2001.
    """
    if not 0 <= successes <= num_rows:
        raise ValueError(f"{successes} of {num_rows}")
    if num_rows == 0:
        return _none(math.nan, 0, confidence)
    z2 = NormalDist().inv_cdf((1 + confidence) / 2) ** 2
    share = successes / num_rows
    middle = (share + z2 / (2 * num_rows)) / (1 + z2 / num_rows)
    half = math.sqrt(z2 * share * (1 - share) / num_rows + (z2 / (2 * num_rows)) ** 2) / (1 + z2 / num_rows)
    low = 0.0 if successes == 0 else max(0.0, middle - half)
    high = 1.0 if successes == num_rows else min(1.0, middle + half)
    return Interval(value=share, low=low, high=high, confidence=confidence, num_rows=num_rows, method="wilson")


_EPSILON = 1e-12


def _resampled_means(x_N: np.ndarray, resamples: int, random: np.random.Generator) -> np.ndarray:
    """Return [resamples]; means of N values drawn with replacement."""
    kinds, count = np.unique(x_N, return_counts=True)
    if len(kinds) <= 64:  # scores of rows are mostly 0 and 1: how often each is drawn is all that matters
        drawn = random.multinomial(len(x_N), count / len(x_N), size=resamples)
        return drawn @ kinds / len(x_N)
    at_once = max(1, _CHUNK // len(x_N))
    parts = [
        x_N[random.integers(0, len(x_N), size=(min(at_once, resamples - begin), len(x_N)))].mean(axis=1)
        for begin in range(0, resamples, at_once)
    ]
    return np.concatenate(parts)


def _none(value: float, num_rows: int, confidence: float) -> Interval:
    return Interval(value=value, low=math.nan, high=math.nan, confidence=confidence, num_rows=num_rows, method="none")
