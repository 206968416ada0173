"""Formats a duration for people."""

from __future__ import annotations


def duration(seconds: float, space: str = " ") -> str:
    """Return a duration with two units at most: `2 d 03 h`, `2 h 03 min`, `4 min 10 s`, `12 s`, `3.2 s`.

    Args:
        seconds: how long.
        space: what stands between a number and its unit; a page may not break there.
    """
    if seconds < 9.95:
        return f"{seconds:.1f}{space}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24}{space}d {hours % 24:02}{space}h"
    if hours:
        return f"{hours}{space}h {minutes:02}{space}min"
    return f"{minutes}{space}min {rest:02}{space}s" if minutes else f"{rest}{space}s"
