"""Ends a command's process with its exit code without running C++ destructors."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import sys
from typing import NoReturn

from distft.core import launched

_kept: list[object] | None = None


def plan_hard_exit() -> None:
    """Plan to end this process by `hard_exit`: what is handed to `keep_alive` until then is not freed."""
    global _kept
    _kept = []


def keep_alive(thing: object) -> None:
    """Do not destroy `thing` before the process ends.

    For DDP's module and gloo's groups: one rank in eight did not come back from their destructors after the group was
    gone (torch 2.13, a loaded machine). Does nothing in a process that goes on, such as a notebook's.
    """
    if _kept is not None:
        _kept.append(thing)


def hard_exit(code: int) -> NoReturn:
    """End the process with `code`, whatever libraries would still do to it.

    A process that used FSDP2 over gloo dies of SIGABRT in about one of five ends (torch 2.13): parameters keep their
    process group alive past `destroy_process_group`, and its threads are destroyed unjoined while the interpreter
    shuts down. A finished run would be reported as failed. So: what programs have registered is run, what they have
    printed is written, and C++ destructors are not.
    """
    launched.tell(code)
    atexit._run_exitfuncs()  # pyright: ignore[reportPrivateUsage]  # the interpreter calls it too late for us
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
