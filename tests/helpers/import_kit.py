"""Configuration files of other tools, written by tests, and the recipes that they become."""

from __future__ import annotations

import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

from distft.catalog import REGISTRIES
from distft.core.registry import Registry
from distft.importers import IMPORTERS, Imported, ImportOptions, import_config
from distft.recipe import Recipe, Registries, parse_recipe


def made(
    folder: Path,
    text: str,
    *,
    name: str = "config.yaml",
    tool: str | None = None,
    registries: Registries = REGISTRIES,
    **options: Any,
) -> Imported:
    """Write the text to a file and import it."""
    path = folder / name
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    said = ImportOptions(**options)
    return import_config(path, importers=IMPORTERS, registries=registries, tool=tool, options=said)


def without(table: str, *names: str) -> Registries:
    """Return the registries without some parts of a table."""
    full = REGISTRIES.part(table)
    fewer: Registry[Any] = Registry(full.noun)
    for name in full:
        if name not in names:
            fewer.add(full[name])
    return replace(REGISTRIES, **{table: fewer})


def loaded(imported: Imported) -> Recipe:
    """Load what was made."""
    return parse_recipe(imported.toml, source="imported", registries=REGISTRIES)


def values(recipe: Recipe, expected: dict[str, Any]) -> dict[str, Any]:
    """Return what the recipe has at the keys of `expected`; None where it has nothing."""
    content = recipe.resolved()
    found: dict[str, Any] = {}
    for key in expected:
        value: Any = content
        for step in key.split("."):
            try:
                value = value[int(step) if step.isdecimal() else step]
            except (KeyError, IndexError):
                value = None
                break
        found[key] = value
    return found


def keys(remarks: Any) -> set[str]:
    """Return the keys that some remarks are about."""
    return {remark.key for remark in remarks}
