"""`distft plan --max`: the longest sequence, the largest micro-batch or the largest model that fits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from distft.plan.case import PlanCase

MOST = 2**24
"""Where doubling stops: no model has sequences of more tokens, no micro-batch more rows."""


@dataclass(frozen=True, kw_only=True)
class Limit:
    """The largest value that fits, and what limits it."""

    what: str
    value: int
    case: PlanCase | None
    """Planned with that value; None when not even the smallest fits."""


def largest(what: str, planned: Callable[[int], PlanCase], *, step: int) -> Limit:
    """Return the largest multiple of `step` for which the case fits: doubled until it does not, then bisected.

    `planned` must not fit less for smaller values.
    """
    best: PlanCase | None = None
    low, high = 0, step
    while high <= MOST:
        case = planned(high)
        if not case.fits:
            break
        best, low, high = case, high, 2 * high
    while high - low > step:
        middle = (low + high) // 2 // step * step
        case = planned(middle)
        if case.fits:
            best, low = case, middle
        else:
            high = middle
    return Limit(what=what, value=low, case=best)
