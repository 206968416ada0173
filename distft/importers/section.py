"""Typed access to a mapping of a configuration file; what was read is remembered, so that nothing is dropped unseen."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from distft.core.errors import Problem
from distft.core.nearest import nearest
from distft.importers.config_file import ConfigFile
from distft.recipe.lines import KeyPath
from distft.recipe.origin import shown

_SECRET = ("api_key", "hub_token", "auth_token", "access_token", "secret", "password")
"""Ends of keys whose values are never repeated."""


@dataclass(kw_only=True)
class Reading:
    """A file that is being converted: what of it was read, and what is wrong with it."""

    file: ConfigFile
    problems: list[Problem] = field(default_factory=list)
    read: set[KeyPath] = field(default_factory=set)

    def problem(self, location: KeyPath, message: str, fix: str = "") -> None:
        """Report a mistake at a key."""
        text = f"{self.written(location)}  {message}" if location else message
        self.problems.append(Problem(message=text, fix=fix, line=self.file.line_of(location)))

    def written(self, location: KeyPath) -> str:
        """Return a key and its value as the file has them, on one line; no secrets."""
        return f"{dotted(location)} = {self.value_text(location)}"

    def value_text(self, location: KeyPath) -> str:
        """Return the value at a key, shortened; no secrets."""
        value: Any = self.file.content
        for step in location:
            value = _inside(value, step)
        if str(location[-1]).lower().endswith(_SECRET):
            return "***"
        return shown(json.dumps(value, ensure_ascii=False, default=str))

    def top(self) -> Section:
        """Return the mapping at the top of the file."""
        return Section(reading=self, location=(), values=self.file.content)


@dataclass(frozen=True, kw_only=True)
class Section:
    """One mapping of the file. A value of the wrong kind is reported, and its default returned."""

    reading: Reading
    location: KeyPath
    values: dict[str, Any]

    def path(self, key: str) -> KeyPath:
        """Return the key's whole path."""
        return (*self.location, key)

    def has(self, key: str) -> bool:
        """Whether the key has a value; an empty one is none."""
        return self.values.get(key) is not None

    def raw(self, key: str) -> Any:
        """Return the value as it is, None where there is none."""
        self.reading.read.add(self.path(key))
        return self.values.get(key)

    def problem(self, key: str, message: str, fix: str = "") -> None:
        """Report a mistake at a key of this section."""
        self.reading.problem(self.path(key), message, fix)

    def number(self, key: str, default: float | None = None) -> float | None:
        """Return a number; "1e-5" is one, which YAML takes for text."""
        value = self.raw(key)
        if value is None:
            return default
        number = _number(value)
        if number is None:
            self.problem(key, "must be a number")
            return default
        return number

    def whole(self, key: str, default: int | None = None, *, least: int | None = None) -> int | None:
        """Return a whole number of at least `least`."""
        value = self.raw(key)
        if value is None:
            return default
        number = _number(value)
        if number is None or number != int(number) or (least is not None and number < least):
            self.problem(key, "must be a whole number" + (f" of at least {least}" if least is not None else ""))
            return default
        return int(number)

    def flag(self, key: str, default: bool = False) -> bool:
        """Return true or false."""
        value = self.raw(key)
        if value is None:
            return default
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
        if not isinstance(value, bool):
            self.problem(key, "must be true or false")
            return default
        return value

    def text(self, key: str, default: str | None = None, *, allowed: Sequence[str] = ()) -> str | None:
        """Return a text, one of `allowed` where there are some."""
        value = self.raw(key)
        if value is None or value == "":
            return default
        if not isinstance(value, str) or not value.strip():
            self.problem(key, "must be text" + (f", one of {', '.join(allowed)}" if allowed else ""))
            return default
        if allowed and value not in allowed:
            near = nearest(value, allowed)
            hint = f', did you mean "{near}"?' if near else ""
            self.problem(key, f"is none of the known values{hint}", f"known: {', '.join(allowed)}")
            return default
        return value.strip()

    def texts(self, key: str) -> list[str]:
        """Return a list of texts, written as a list or with commas between."""
        value = self.raw(key)
        if value is None:
            return []
        if isinstance(value, str):
            return [part.strip() for part in value.split(",") if part.strip()]
        if isinstance(value, list) and all(isinstance(part, str) for part in value):
            return [str(part) for part in value]
        self.problem(key, "must be a list of texts")
        return []

    def section(self, key: str) -> Section:
        """Return the mapping at a key; an empty one where there is none."""
        value = self.raw(key)
        if value is not None and not isinstance(value, dict):
            self.problem(key, "must be a mapping of keys to values")
        values = value if isinstance(value, dict) else {}
        named = {str(name): inner for name, inner in values.items()}
        return Section(reading=self.reading, location=self.path(key), values=named)

    def sections(self, key: str) -> list[Section]:
        """Return the mappings in the list at a key."""
        value = self.raw(key)
        if value is None:
            return []
        if not isinstance(value, list):
            self.problem(key, "must be a list: one entry, with a dash in front, for each")
            return []
        sections: list[Section] = []
        for position, inner in enumerate(value):
            if isinstance(inner, dict):
                location = (*self.path(key), position)
                sections.append(
                    Section(reading=self.reading, location=location, values={str(name): v for name, v in inner.items()})
                )
            else:
                self.reading.problem((*self.path(key), position), "must be a mapping of keys to values")
        return sections


def dotted(location: KeyPath) -> str:
    """Return a path as text: `datasets[0].path`."""
    text = ""
    for step in location:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return shown(text)


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _inside(values: Any, step: str | int) -> Any:
    """Return what is at a key or position; None where there is nothing, as in a file that the configuration names."""
    if isinstance(values, dict):
        return next((value for key, value in values.items() if str(key) == step), None)
    return values[step] if isinstance(values, list) and isinstance(step, int) and step < len(values) else None
