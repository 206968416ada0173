"""What an export was asked for, as its certificate keeps it: enough to make it again."""

from __future__ import annotations

import argparse
import os
import tomllib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from distft.core.errors import Problem, RecipeError

if TYPE_CHECKING:
    from distft.export_formats.spec import ExportFormatSpec

FILE = "certificate.json"
_KEPT = ("level", "levels", "rows", "num_rows", "calibration", "num_calibration", "settings")
"""Flags that decide what is written or compared."""


def options_of(given: argparse.Namespace) -> dict[str, Any]:
    """Return the source and flags of a command, and the folder that its paths are read from."""
    flags = {name: getattr(given, name) for name in _KEPT}
    plain = {name: value if isinstance(value, int | list) else str(value) for name, value in flags.items() if value}
    return {"source": given.source, "cwd": os.getcwd(), **plain}


def given_of(options: Mapping[str, Any], spec: ExportFormatSpec) -> tuple[argparse.Namespace, Any]:
    """Return the flags that `options_of` noted, and the settings of the format."""
    flags = {name: options.get(name) for name in _KEPT} | {"source": options["source"]}
    return argparse.Namespace(**flags), params_of(options.get("settings") or [], spec)


def params_of(settings: list[str], spec: ExportFormatSpec) -> Any:
    """Return the settings of a format from KEY=VALUE texts.

    Raises:
        RecipeError: a key that it does not have, or a value that it does not take.
    """
    from pydantic import ValidationError

    values: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or key not in spec.params.model_fields:
            allowed = ", ".join(spec.params.model_fields) or "none"
            raise _mistake(f"--set {setting}  is no setting of {spec.name}", f"allowed: {allowed}")
        try:
            values[key] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            values[key] = value
    try:
        return spec.params(**values)
    except ValidationError as error:
        first = error.errors()[0]
        raise _mistake(f"--set {'.'.join(map(str, first['loc']))}: {first['msg']}", "see the guide, Export") from None


def _mistake(message: str, fix: str) -> RecipeError:
    return RecipeError("distft export", [Problem(message=message, fix=fix)])
