"""Packages that are used where they work: found by importing them, as a wheel built for another torch is there too."""

from __future__ import annotations

import functools
import importlib


@functools.cache
def why_not(package: str) -> str:
    """Return why `package` cannot be imported in this process, in a line; "" if it can.

    A kernel package whose binary does not fit the installed torch raises ImportError ("undefined symbol") or OSError,
    some RuntimeError of their own checks: none of these may end a run that has another kernel.
    """
    try:
        importlib.import_module(package)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == package.partition(".")[0]
        return (
            f"{package} is not installed" if missing else f"{package} cannot be imported: {str(error).splitlines()[0]}"
        )
    return ""
