"""Where each value of a recipe came from, so that a mistake is reported at its line, or at its `--set`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from distft.core.errors import Problem
from distft.recipe.lines import KeyPath
from distft.recipe.toml_text import is_table, toml_key, toml_value

_WIDEST = 72
"""Characters of a value that a message shows."""


@dataclass(frozen=True, kw_only=True)
class RecipeMistake:
    """A mistake, by key; `Origin` knows its line."""

    key: KeyPath
    message: str
    fix: str = ""
    also: tuple[KeyPath, ...] = ()
    """Further keys it depends on: when one of them is faulty itself, this fault may be an echo of that one."""

    def touches(self, faulty: Iterable[KeyPath]) -> bool:
        """Return whether the mistake concerns one of these keys, or something inside or around one."""
        faulty_keys, mine = list(faulty), (self.key, *self.also)
        return any(a[: len(b)] == b or b[: len(a)] == a for a in mine for b in faulty_keys)


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What was written, and where."""

    raw: Mapping[str, Any]
    """The tables as read, overrides applied, no defaults."""
    lines: Mapping[KeyPath, int]
    """1-based line of what the file said and no override replaced."""
    overrides: Mapping[KeyPath, str]
    """`table.key=value` as the command line had it, for what it set."""

    def get(self, key: KeyPath) -> Any:
        """Return what was written there, None where nothing was."""
        value: Any = self.raw
        for step in key:
            try:
                value = value[step]
            except (KeyError, IndexError, TypeError):
                return None
        return value

    def problem(self, fault: RecipeMistake) -> Problem:
        """Return the fault with its place: the line of its key, else of the table around it, else none."""
        for depth in range(len(fault.key), -1, -1):
            place = fault.key[:depth]
            if place in self.overrides:
                inside = f": {shown(_dotted(fault.key[depth:]))}" if depth < len(fault.key) else ""
                return Problem(message=f"--set {shown(self.overrides[place])}{inside}  {fault.message}", fix=fault.fix)
            if place in self.lines:
                return Problem(
                    message=f"{self.label(fault.key)}  {fault.message}", fix=fault.fix, line=self.lines[place]
                )
        return Problem(message=f"{self.label(fault.key)}  {fault.message}", fix=fault.fix)

    def label(self, key: KeyPath) -> str:
        """Return the key as the recipe shows it: `[data] packing = 3`, `[[data.train]] path`, `seed = "x"`."""
        start = self._table_depth(key)
        header = ".".join(toml_key(step) for step in key[:start] if isinstance(step, str))
        in_array = start > 0 and isinstance(key[start - 1], int)
        label = f"[[{shown(header)}]]" if in_array else f"[{shown(header)}]" if header else ""
        if start == len(key):
            return label
        value = self.get(key)
        written = "" if value is None else f" = {shown(toml_value(value))}"
        return f"{label} {shown(_dotted(key[start:]))}{written}".strip()

    def _table_depth(self, key: KeyPath) -> int:
        """Return how many steps of `key` are its section header."""
        for depth in range(len(key), 0, -1):
            if isinstance(key[depth - 1], int) and is_table(self.get(key[:depth])):
                return depth
        is_top_level_key = len(key) == 1 and not is_table(self.get(key))
        return 0 if is_top_level_key else 1


def key_path(text: str) -> KeyPath:
    """Return the path that `data.train.0.path` means."""
    return tuple(int(step) if step.isdecimal() else step for step in text.split("."))


def _dotted(key: KeyPath) -> str:
    return ".".join(toml_key(str(step)) for step in key)


def shown(text: str) -> str:
    """Return what the user wrote as messages repeat it: on one line, not too long, printable in a terminal."""
    clipped = text if len(text) <= _WIDEST else f"{text[:_WIDEST]}..."
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in clipped)
