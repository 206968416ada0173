"""Whether a key of a recipe may change between the starts of a run: said beside the key, read by `distft.resume`.

`Free[int]`, `Ask[int]` and `Fixed[int]` are `int` with that mark. A field of `Recipe` that is marked speaks for every
key of its table that has no mark of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar

Policy = Literal["free", "ask", "fixed"]

STRICTEST_FIRST: tuple[Policy, ...] = ("fixed", "ask", "free")

T = TypeVar("T")


@dataclass(frozen=True)
class ResumePolicy:
    """The mark of a key, or of a table."""

    policy: Policy
    """free = it changes nothing that is computed, or its effect is checked by hash (rows, base weights); ask = it may
    change in mid-run where the user says so (--allow-changes); fixed = a run with another value is another run."""
    ask: tuple[str, ...] = ()
    """Of a table whose keys its parts bring: keys that every part has, or may have, and that are "ask"."""


Free = Annotated[T, ResumePolicy("free")]
Ask = Annotated[T, ResumePolicy("ask")]
Fixed = Annotated[T, ResumePolicy("fixed")]
