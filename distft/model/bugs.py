"""Telling a mistake in this project's own lines from a model that cannot run, where any error is an answer."""

from __future__ import annotations

import traceback
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
_MISTAKES = (NameError, AttributeError, TypeError, ImportError, AssertionError)


def raise_mistakes(error: Exception) -> None:
    """Raise `error` again if it is a mistake of programming whose innermost line is this project's own.

    Nothing that a model or its library says is one: those raise in their own lines.
    """
    innermost = list(traceback.walk_tb(error.__traceback__))[-1:]
    ours = any(Path(frame.f_code.co_filename).resolve().is_relative_to(_PACKAGE) for frame, _ in innermost)
    if ours and isinstance(error, _MISTAKES):
        raise error
