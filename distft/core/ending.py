"""How a run's end is told: the exit code of what ended it, its reason in a line, and the message for people."""

from __future__ import annotations

import sys
import traceback

from distft.core.errors import DistftError


def exit_code(error: BaseException) -> int:
    """Return the process's exit code for what ended it."""
    if isinstance(error, DistftError):
        return error.exit_code
    return 130 if isinstance(error, KeyboardInterrupt) else 1


def reason(error: BaseException) -> str:
    """Return the error's kind and message, as exit.json has it."""
    kind = error.kind if isinstance(error, DistftError) else type(error).__name__
    return f"{kind}: {error}" if str(error) else kind


def report_error(error: BaseException, rank: int) -> None:
    """Print a user's mistake as text, our own as a traceback. Mistakes in files are printed on one rank."""
    if not isinstance(error, DistftError):
        traceback.print_exception(error)
    elif rank == 0 or error.exit_code not in (2, 3, 8):
        who = "" if rank == 0 else f"rank {rank}: "
        print(f"{who}{error}", file=sys.stderr, flush=True)
