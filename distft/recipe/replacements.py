"""Values that stand for what a recipe says, and how they are written back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from distft.recipe.lines import KeyPath


@dataclass(frozen=True, kw_only=True)
class Replacement:
    """A value that stands for what the recipe says on this machine or in this run: a real path, a date."""

    key: KeyPath
    value: Any
    written: Any
    """What the recipe says there; None: nothing."""


def with_value(table: Any, key: Sequence[str | int], value: Any) -> Any:
    """Return a copy of a table, or of a tuple of tables, with another value at `key`."""
    if not key:
        return value
    step, *rest = key
    if isinstance(step, int):
        return (*table[:step], with_value(table[step], rest, value), *table[step + 1 :])
    return table.model_copy(update={step: with_value(getattr(table, step), rest, value)})


def write_back(content: Any, noted: Replacement) -> None:
    """Put what the recipe says in place of what stands for it, unless the value was changed since."""
    *steps, last = noted.key
    try:
        for step in steps:
            content = content[step]
        current = content[last]
    except (KeyError, IndexError):  # the table was changed since
        return
    if current == noted.value:
        if noted.written is None:
            del content[last]
        else:
            content[last] = noted.written
