"""What can go wrong, one class per exit code, so that a launcher script can tell the causes apart.

torchrun flattens every code to 1; the run folder's `exit.json` keeps the true one (see `distft.train`).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePath

DONE = 0
PREEMPTED_AND_SAVED = 75


class DistftError(Exception):
    """A failure with a cause the user can act on: printed as text, never as a traceback."""

    exit_code = 1
    kind = "error"


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One mistake in a file: where, what, what is allowed, and the fix."""

    message: str
    """What is wrong, starting with the offending text."""
    line: int | None = None
    """1-based line in the file, None when it has none (a key that is missing, a command-line override)."""
    fix: str = ""
    """Allowed values, the nearest match, or a value to try."""

    def __str__(self) -> str:
        where = f"line {self.line}" if self.line is not None else "-"
        return f"  {where:<8} {self.message}" + (f"  {self.fix}" if self.fix else "")


class RecipeError(DistftError):
    """The recipe cannot run; carries every problem found, not just the first."""

    exit_code = 2
    kind = "recipe"

    def __init__(self, source: str, problems: Iterable[Problem]) -> None:
        self.source = source
        self.problems = tuple(sorted(problems, key=lambda p: (p.line is None, p.line or 0)))
        count = len(self.problems)
        head = f"{source}: {count} problem{'s' if count != 1 else ''}"
        super().__init__("\n".join([head, *map(str, self.problems)]))


class DataError(DistftError):
    """Rows that cannot become training samples; names file and row."""

    exit_code = 3
    kind = "data"


class CheckpointError(DistftError):
    """No checkpoint that may be trusted, or one that does not fit this run."""

    exit_code = 4
    kind = "checkpoint"


class NumericError(DistftError):
    """A loss or gradient norm that is not finite; names step, rank and samples."""

    exit_code = 5
    kind = "numeric"


class HangError(DistftError):
    """A rank that went silent; names it and its last phase."""

    exit_code = 6
    kind = "hang"


class PeerEnded(DistftError):
    """Another rank has ended the run; this one follows, with its code."""

    kind = "another rank"

    def __init__(self, exit_code: int, message: str) -> None:
        self.exit_code = exit_code
        super().__init__(message)


class BusyError(DistftError):
    """Another live run owns the output folder; names its host, process and job."""

    exit_code = 7
    kind = "output folder in use"


class FileSystemError(DistftError):
    """The output folder cannot be written."""

    exit_code = 8
    kind = "file system"


class Preempted(DistftError):
    """Asked to stop; the state is saved, and the same command continues."""

    exit_code = PREEMPTED_AND_SAVED
    kind = "preempted"


class MachineError(DistftError):
    """The machine or its packages cannot do what the recipe asks: missing library, wrong launch, no GPU."""

    exit_code = 9
    kind = "environment"


def explain(error: BaseException) -> str:
    """Return one line that says what went wrong, for another rank or a person to read."""
    if isinstance(error, OSError) and error.strerror:
        where = f" ({PurePath(os.fsdecode(error.filename)).name})" if error.filename else ""
        return f"{error.strerror}{where}"
    text = str(error)
    is_ours = type(error).__module__.startswith("distft.")
    return text if is_ours and text else f"{type(error).__name__}: {text}"
