"""Named parts with typed parameters: name -> frozen Params -> build.

A room owns one `Registry`; a part is one file that defines its Params and its spec, and one line in the room's
`__init__`. The recipe loader is handed the registries, so a mistyped name or parameter is reported with its line and
what is allowed before anything heavy is imported. Specs therefore import torch and friends inside their functions.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any, Generic, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict

from distft.core.nearest import nearest as nearest


class Params(BaseModel):
    """Base of every recipe table: frozen, no unknown keys, no silent coercion, field docstrings become the schema."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    @classmethod
    def for_table(cls, raw: Mapping[str, Any]) -> type[Params]:
        """Return the class that a raw table is read as: itself, unless one of its keys says what the others are."""
        return cls


class NoParams(Params):
    """For a part that has nothing to set."""


class Spec(Protocol):
    """What every registered part has; rooms add traits of their own (dataclass fields)."""

    @property
    def name(self) -> str:
        """What a recipe calls it."""
        ...

    @property
    def params(self) -> type[Params]:
        """What a recipe may set on it."""
        ...


SpecT = TypeVar("SpecT", bound=Spec)


class Registry(Mapping[str, SpecT], Generic[SpecT]):
    """The parts one recipe table can choose from, in the order they were added."""

    def __init__(self, noun: str) -> None:
        self.noun = noun
        self._specs: dict[str, SpecT] = {}
        self._added_by: dict[str, str] = {}

    def add(self, spec: SpecT) -> SpecT:
        """Register `spec` under its name.

        Raises:
            ValueError: the name is taken; two parts of one name would make recipes mean two things.
        """
        caller = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]  # public, in spite of its name
        module = str(caller.f_globals.get("__name__", "unknown module"))
        if spec.name in self._specs:
            both = f"by {self._added_by[spec.name]} and by {module}"
            raise ValueError(f"{self.noun} {spec.name!r} is registered twice: {both}")
        self._specs[spec.name] = spec
        self._added_by[spec.name] = module
        return spec

    def added_by(self, name: str) -> str:
        """Return the name of the module that registered this part."""
        return self._added_by[name]

    def __getitem__(self, name: str) -> SpecT:
        return self._specs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)
