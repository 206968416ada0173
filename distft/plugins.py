"""Parts from other packages: each entry point of the group `distft.plugins` is loaded once, before a recipe is read.

An entry point names a module, which registers its parts while it is imported (`distft.optim.OPTIMIZERS.add(SPEC)`), or
a function without arguments, which registers them when it is called.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from distft.core.errors import Problem, RecipeError
from distft.core.registry import Registry

GROUP = "distft.plugins"
_LONGEST = 400
"""Characters of an error of somebody else's code."""


@dataclass(frozen=True, kw_only=True)
class Plugin:
    """One entry point that was loaded."""

    distribution: str
    version: str
    entry_point: str
    parts: tuple[str, ...]
    """What it has registered, as "optimizer muon"."""

    def to_json(self) -> dict[str, Any]:
        """Return the plugin's entry for manifest.json."""
        return vars(self) | {"parts": list(self.parts)}


class Plugins:
    """The plugins of one process; a failure is remembered, as half of a plugin may have been registered."""

    def __init__(
        self, registries: Callable[[], Sequence[Registry[Any]]], points: Callable[[], Iterable[EntryPoint]]
    ) -> None:
        self._registries = registries
        self._points = points
        self._loaded: tuple[Plugin, ...] | None = None
        self._failed: RecipeError | None = None

    def load(self) -> tuple[Plugin, ...]:
        """Load every entry point, the first time; return what was loaded, in an order that is equal on all machines.

        Raises:
            RecipeError: names each plugin that could not be loaded, and why.
        """
        if self._failed is not None:
            raise self._failed
        if self._loaded is None:
            loaded: list[Plugin] = []
            problems: list[Problem] = []
            for point in sorted(self._points(), key=lambda point: (_distribution(point), point.name, point.value)):
                try:
                    loaded.append(self._load(point))
                except (Exception, SystemExit) as error:  # somebody else's code, which may fail in any way
                    problems.append(_problem(point, error))
            if problems:
                self._failed = RecipeError(f"plugins ({GROUP})", problems)
                raise self._failed
            self._loaded = tuple(loaded)
        return self._loaded

    def _load(self, point: EntryPoint) -> Plugin:
        before = {registry.noun: set(registry) for registry in self._registries()}
        loaded = point.load()
        if inspect.isroutine(loaded):
            loaded()
        elif not inspect.ismodule(loaded):
            raise TypeError(f"{point.value} is a {type(loaded).__name__}; it must be a module or a function")
        parts = [
            f"{registry.noun} {name}"
            for registry in self._registries()
            for name in registry
            if _is_in(module := registry.added_by(name), point.module)
            or (name not in before.get(registry.noun, ()) and not _is_in(module, "distft"))
        ]
        name, version = _distribution(point)
        return Plugin(distribution=name, version=version, entry_point=point.name, parts=tuple(parts))


def installed() -> Iterable[EntryPoint]:
    """Return the entry points of the packages that this process can import."""
    return entry_points(group=GROUP)


def _distribution(point: EntryPoint) -> tuple[str, str]:
    return (point.dist.name, str(point.dist.version)) if point.dist is not None else ("unknown package", "")


def _is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def _problem(point: EntryPoint, error: BaseException) -> Problem:
    name, version = _distribution(point)
    text = " ".join(f"{type(error).__name__}: {error}".split())
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_of_the_plugin(frame.filename)]
    where = f"  ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    message = f"{name} {version}, entry point {point.name} = {point.value}  {text[:_LONGEST]}{where}"
    return Problem(message=message, fix=f"correct it, or: pip uninstall {name}")


def _is_of_the_plugin(filename: str) -> bool:
    """Return whether a line of a traceback is neither of this package nor of Python's import system."""
    inside = Path(__file__).parent in Path(filename).parents
    return not (inside or filename.startswith("<") or "importlib" in Path(filename).parts)
