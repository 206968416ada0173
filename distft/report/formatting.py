"""Formats figures for people."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from distft.core import duration as durations
from distft.run_record import EvalFigure, number

NOTHING = "–"


def count(value: float | None) -> str:
    """Return 1,234,567."""
    return NOTHING if value is None else f"{value:,.0f}"


def figure(value: float | None) -> str:
    """Return four significant digits, without an exponent where one reads better without."""
    if value is None or math.isnan(value):
        return NOTHING
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.2e}".replace("e-0", "e-").replace("e+0", "e+")
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if not value:
        return "0"
    digits = 3 - math.floor(math.log10(abs(value))) - (abs(value) < 1)
    return f"{value:.{digits}f}"


def short(value: float) -> str:
    """Format a value for an axis, with no more digits than its ticks need."""
    if value and not 1e-3 <= abs(value) < 1e5:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:,.10f}".rstrip("0").rstrip(".")


def percent(share: float | None, digits: int = 1) -> str:
    """Return 88.1 %."""
    return NOTHING if share is None else f"{100 * share:.{digits}f}\u202f%"


def gib(value: float | None) -> str:
    """Return 12.3 GiB."""
    return NOTHING if value is None else f"{value:.2f}\u202fGiB" if value < 10 else f"{value:.1f}\u202fGiB"


def duration(seconds: float | None) -> str:
    """Return 2 h 03 min, 4 min 10 s, 12.3 s."""
    return NOTHING if seconds is None else durations.duration(seconds, space="\u202f")


def moment(seconds: float) -> str:
    """Return 2026-11-25 19:42:57 UTC."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def of(result: EvalFigure, value: Any) -> str:
    """Format a value of this figure: shares in percent."""
    return _of(number(value), result.binary)


def _of(value: float | None, is_share: bool) -> str:
    return percent(value) if is_share else figure(value)


def interval(result: EvalFigure, measured: Mapping[str, Any] | None, *, signed: bool = False) -> str:
    """Return `measured` as `with_bounds` does."""
    return with_bounds(measured, is_share=result.binary, signed=signed)


def with_bounds(measured: Mapping[str, Any] | None, *, is_share: bool, signed: bool = False) -> str:
    """Return `88.1 % [81.0, 93.0]`, which may be broken before its bounds alone; without bounds where it has none."""
    if measured is None:
        return NOTHING
    value, low, high = (number(measured.get(key)) for key in ("value", "low", "high"))
    if value is None:
        return NOTHING
    if signed and is_share:
        head = f"{100 * value:+.1f}\u202fpoints"
    else:
        head = f"+{_of(value, is_share)}" if signed and value > 0 else _of(value, is_share)
    head = head.replace("-", "\u2212") if signed else head
    if low is None or high is None:
        return head
    bounds = [f"{100 * bound:.1f}" if is_share else figure(bound) for bound in (low, high)]
    return f"{head} [{f',{NO_BREAK}'.join(bound.replace('-', MINUS) for bound in bounds)}]"


MINUS = "\u2212"
NO_BREAK = "\u00a0"


def noun(number_of: int, singular: str, plural: str = "") -> str:
    """Return `1 step`, `2 steps`."""
    return f"{number_of:,} {singular if number_of == 1 else plural or singular + 's'}"
