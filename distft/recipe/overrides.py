"""`--set table.key=value`: changes to a recipe from the command line."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from typing import Any

from distft.core.errors import Problem
from distft.recipe.lines import KeyPath
from distft.recipe.origin import shown
from distft.recipe.toml_text import is_array, is_table


def apply_overrides(raw: dict[str, Any], overrides: Iterable[str]) -> tuple[dict[KeyPath, str], list[Problem]]:
    """Change `raw` in place; the later of two overrides wins.

    A value is read as TOML (`3`, `"3"`, `[1, 2]`, `{name = "lora"}`), and as plain text where that fails. No value
    (`train.max_steps=`) removes the key, so that its default applies. A number in the key is a position in an array:
    `data.train.0.path=...`; the position after the last one appends.

    Returns:
        What each override set, by key; and what is wrong with those that set nothing.
    """
    overridden: dict[KeyPath, str] = {}
    problems: list[Problem] = []
    for text in overrides:
        try:
            key = _set(raw, text)
        except _OverrideError as error:
            problems.append(Problem(message=f"--set {shown(text)}  {error}", fix=error.fix))
        else:
            overridden = {old: earlier for old, earlier in overridden.items() if old[: len(key)] != key}
            overridden[key] = text
    return overridden, problems


class _OverrideError(Exception):
    def __init__(self, message: str, fix: str = "") -> None:
        super().__init__(message)
        self.fix = fix


def _set(raw: dict[str, Any], text: str) -> KeyPath:
    name, equals, written = text.partition("=")
    if not equals:
        raise _OverrideError("has no value", "write table.key=value")
    steps = _steps(name.strip())
    key: list[str | int] = []
    inner: Any = raw
    for step, following in zip(steps, [*steps[1:], None], strict=True):
        place = _place(inner, step, ".".join(map(str, key)))
        key.append(place)
        if following is None:
            _assign(inner, place, written.strip())
        else:
            inner = _descend(inner, place, following)
    return tuple(key)


def _steps(name: str) -> list[str]:
    try:
        table: Any = tomllib.loads(f"{name} = 0")
    except (ValueError, RecursionError):
        table = {}
    steps: list[str] = []
    while is_table(table) and len(table) == 1:
        step, table = next(iter(table.items()))
        steps.append(step)
    if table != 0 or not steps:
        raise _OverrideError("is not a key", "write table.key=value")
    return steps


def _place(inner: Any, step: str, so_far: str) -> str | int:
    """Return `step` as an index into `inner`."""
    if is_table(inner):
        return step
    if not is_array(inner):
        raise _OverrideError(f"{so_far} is not a table")
    count = len(inner)
    if not (step.isdecimal() and len(step) < 9 and int(step) <= count):
        raise _OverrideError(f"{so_far} has no position {step}", f"it has {count}, counted from 0; {count} appends")
    return int(step)


def _descend(inner: Any, place: str | int, following: str) -> Any:
    """Return the table or array at `place`, created where there is none."""
    fresh: Any = [] if following.isdecimal() else {}
    if isinstance(place, str):
        return inner.setdefault(place, fresh)
    if place == len(inner):
        inner.append(fresh)
    return inner[place]


def _assign(inner: Any, place: str | int, written: str) -> None:
    exists = place in inner if isinstance(place, str) else place < len(inner)
    if not written:
        if not exists:
            raise _OverrideError("has nothing to remove: the recipe does not set it", 'for empty text write key=""')
        del inner[place]
    elif isinstance(place, int) and not exists:
        inner.append(_parsed(written))
    else:
        inner[place] = _parsed(written)


def _parsed(written: str) -> Any:
    try:
        table = tomllib.loads(f"value = {written}")
    except (ValueError, RecursionError):
        return written
    return table["value"] if len(table) == 1 else written  # a line break could smuggle in further keys
