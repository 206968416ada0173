"""One file on its way to a recipe: what the functions of importers work on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from distft.core.errors import Problem
from distft.core.nearest import nearest
from distft.importers.draft import Draft
from distft.importers.keys import KeyTable
from distft.importers.section import Reading, Section, dotted
from distft.importers.spec import ImporterSpec, ImportOptions, Remark
from distft.recipe.lines import KeyPath
from distft.recipe.origin import key_path
from distft.recipe.schema import Registries

NO_EFFECT = "had no effect with the rest of this file"


@dataclass(kw_only=True)
class Conversion:
    """A file, the recipe made of it so far, and what is to be said about both."""

    spec: ImporterSpec
    reading: Reading
    registries: Registries
    options: ImportOptions
    draft: Draft = field(default_factory=Draft)
    left: list[Remark] = field(default_factory=list)
    unknown: list[Remark] = field(default_factory=list)
    required: list[tuple[KeyPath, Problem]] = field(default_factory=list)
    """Keys of the recipe that `--set` must give."""

    def top(self) -> Section:
        """Return the top of the file."""
        return self.reading.top()

    def set(self, home: str, value: Any, origin: tuple[Section, str] | None = None, note: str = "") -> None:
        """Set `table.key` of the recipe from a key of the file; None sets nothing.

        Where the file has no value at that key, what is set is the tool's default, and the recipe says so.
        """
        if value is None:
            return
        default = origin is not None and not origin[0].has(origin[1])
        if default:
            text = f"{self.spec.title}'s default"
            note = f"{text}; {note}" if note else text
        self.draft.set(home, value, origin=origin[0].path(origin[1]) if origin and not default else (), note=note)

    def leave(self, section: Section, key: str, why: str) -> None:
        """Say that a key has no counterpart; nothing where the file does not have it."""
        section.reading.read.add(section.path(key))
        if section.has(key):
            self.left.append(self._remark(section.path(key), why))

    def require(self, home: str, section: Section, key: str, message: str, fix: str) -> None:
        """Ask for a key of the recipe that the file cannot give."""
        location = section.path(key)
        text = f"{self.reading.written(location)}  {message}" if section.has(key) else message
        problem = Problem(message=text, fix=fix, line=self.reading.file.line_of(location))
        self.required.append((key_path(home), problem))

    def part(self, table: str, name: str, section: Section, key: str, what: str) -> bool:
        """Whether a registry has a part; one that it has not is reported as a mistake at the key that wants it."""
        registry = self.registries.part(table)
        if name in registry:
            return True
        self.reading.problem(
            section.path(key) if section.has(key) else (),
            f"{what} is not trained here",
            f"{registry.noun}s here: {', '.join(registry)}",
        )
        return False

    def settle(self, section: Section, table: KeyTable) -> None:
        """Account for every key of a section: refuse, list as left, as unknown, or as read in vain."""
        for name, value in section.values.items():
            location = section.path(name)
            key = table.get(name)
            if key is None:
                if location in self.reading.read:
                    continue
                near = nearest(name, table)
                hint = f" (did you mean {near}?)" if near else ""
                self.unknown.append(self._remark(location, f"not known to this importer{hint}"))
            elif key.fate == "refused" and location not in self.reading.read and key.asks(value):
                self.reading.problem(location, key.text)
            elif key.fate == "left" and location not in self.reading.read and key.asks(value):
                self.left.append(self._remark(location, key.text))
            elif key.fate in ("carried", "changed") and location not in self.reading.read and key.asks(value):
                self.left.append(self._remark(location, NO_EFFECT))

    def _remark(self, location: KeyPath, text: str) -> Remark:
        return Remark(
            key=dotted(location),
            value=self.reading.value_text(location),
            line=self.reading.file.line_of(location),
            text=text,
        )
