"""A recipe that is written from another tool's file: values, and comments above what means something else."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from distft.core.errors import Problem
from distft.recipe.lines import KeyPath
from distft.recipe.origin import key_path
from distft.recipe.overrides import apply_overrides
from distft.recipe.schema import all_tables
from distft.recipe.toml_text import is_array, is_table, toml_key, toml_value

_WIDTH = 118


@dataclass(kw_only=True)
class Draft:
    """Values by key of the recipe, in the order in which they were set."""

    content: dict[str, Any] = field(default_factory=dict)
    comments: dict[KeyPath, list[str]] = field(default_factory=dict)
    origins: dict[KeyPath, KeyPath] = field(default_factory=dict)
    """Key of the recipe -> key of the file that it came from."""

    def set(self, home: str, value: Any, *, origin: KeyPath = (), note: str = "") -> None:
        """Set `table.key`; `origin` is the key of the file it came from, `note` what differs."""
        key = key_path(home)
        inner: Any = self.content
        for step, following in itertools.pairwise(key):
            fresh: Any = [] if isinstance(following, int) else {}
            if isinstance(step, int):
                inner.extend({} for _ in range(step + 1 - len(inner)))
                inner = inner[step]
            else:
                inner = inner.setdefault(step, fresh)
        inner[key[-1]] = value
        if origin:
            self.origins[key] = origin
        if note:
            self.comment(home, note)

    def get(self, home: str) -> Any:
        """Return what was set there, None where nothing was."""
        value: Any = self.content
        for step in key_path(home):
            try:
                value = value[step]
            except (KeyError, IndexError, TypeError):
                return None
        return value

    def comment(self, home: str, text: str) -> None:
        """Add a comment above a key."""
        self.comments.setdefault(key_path(home), []).append(text)

    def override(self, overrides: Iterable[str]) -> tuple[set[KeyPath], list[Problem]]:
        """Change values as `--set` says; return the keys that it set, and what is wrong with the overrides."""
        overridden, problems = apply_overrides(self.content, overrides)
        for key in overridden:
            self.comments = {old: texts for old, texts in self.comments.items() if old[: len(key)] != key}
            self.origins = {old: location for old, location in self.origins.items() if old[: len(key)] != key}
            self.comments[key] = ["set by --set"]
        return set(overridden), problems

    def toml(self, head: Iterable[str], tail: Iterable[str]) -> str:
        """Return the recipe as TOML, with comment lines before and after it."""
        tables = [name for name in all_tables() if name in self.content]
        others = [name for name in self.content if name not in tables]
        top = {name: self.content[name] for name in others if not is_table(self.content[name])}
        blocks = ["\n".join(_comment(head))] if head else []
        blocks.append("\n".join(self._pairs(top, ())))
        for name in [*tables, *(name for name in others if name not in top)]:
            blocks += self._blocks(self.content[name], (name,))
        blocks.append("\n".join(_comment(tail)))
        return "\n\n".join(block for block in blocks if block) + "\n"

    def _blocks(self, table: Any, location: KeyPath) -> list[str]:
        if not is_table(table):
            return ["\n".join(self._pairs({str(location[-1]): table}, location[:-1]))]
        arrays = {key: rows for key, rows in table.items() if is_array(rows) and rows and all(map(is_table, rows))}
        plain = {key: value for key, value in table.items() if key not in arrays}
        name = ".".join(toml_key(str(step)) for step in location)
        blocks = ["\n".join([*_comment(self.comments.get(location, ())), f"[{name}]", *self._pairs(plain, location)])]
        if not plain and arrays and location not in self.comments:
            blocks = []
        for key, rows in arrays.items():
            for position, row in enumerate(rows):
                pairs = self._pairs(row, (*location, key, position))
                above = [*self.comments.get((*location, key), ())] if position == 0 else []
                above += self.comments.get((*location, key, position), ())
                blocks.append("\n".join([*_comment(above), f"[[{name}.{toml_key(key)}]]", *pairs]))
        return blocks

    def _pairs(self, values: Mapping[str, Any], location: KeyPath) -> list[str]:
        lines: list[str] = []
        for key, value in values.items():
            for path, texts in self.comments.items():  # of the key, and of what stands inline in its value
                if path[: len(location) + 1] == (*location, key):
                    lines += _comment(texts)
            lines.append(f"{toml_key(key)} = {toml_value(value)}")
        return lines


def _comment(texts: Iterable[str]) -> list[str]:
    """Texts as comment lines; one that begins with spaces keeps them, and is continued behind them."""
    lines: list[str] = []
    for text in texts:
        clean = "".join(char if char.isprintable() else " " for char in text)
        indent = " " * (len(clean) - len(clean.lstrip()))
        wrapped = textwrap.wrap(
            clean.strip(), _WIDTH - 2 - len(indent), break_long_words=False, break_on_hyphens=False,
            subsequent_indent="  " if indent else "",
        )  # fmt: skip
        lines += [f"# {indent}{line}" for line in wrapped] or ["#"]
    return lines
