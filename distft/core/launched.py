"""Every process of one launch on this machine, found by a mark in its environment, and what each of them ended with.

A launcher starts each rank in a session of its own and outlives none of its children when it is killed, so neither a
process group nor the tree of parents leads to all of them. The mark is inherited by whatever they start.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

MARK = "DISTFT_LAUNCH"
"""Variable of every process below a supervised command: which launch it belongs to."""
CODES = "DISTFT_EXIT_CODES"
"""Variable: the file to which a process adds the code that it ends with; launchers make 1 of every code."""

UNKILLABLE_S = 5.0
"""After so long a killed process that is still there waits for a device or a file system."""


def marked(mark: str) -> list[int]:
    """Return the ids of the living processes that carry `mark`, in ascending order; empty where there is no /proc."""
    wanted = f"{MARK}={mark}".encode()
    pids: list[int] = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if wanted in (folder / "environ").read_bytes().split(b"\0") and not is_dead(folder):
                pids.append(int(folder.name))
    return sorted(pids)


def is_dead(folder: Path) -> bool:
    """Return whether the process of a folder in /proc has ended and only waits for its parent to look."""
    return (folder / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0] in "ZX"


def ranks(mark: str, launcher: int) -> list[int]:
    """Return the processes that a launcher has started: torchrun makes each of them the leader of a session."""
    pids: list[int] = []
    for pid in marked(mark):
        with contextlib.suppress(OSError):
            if pid != launcher and os.getsid(pid) == pid:
                pids.append(pid)
    return pids


def send(pids: list[int], number: int) -> None:
    """Send a signal to each of them that is still there."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def kill(mark: str) -> None:
    """End whatever carries the mark, also what is started meanwhile; gives up on what the kernel cannot end."""
    until = time.monotonic() + UNKILLABLE_S
    while (pids := marked(mark)) and time.monotonic() < until:
        send(pids, signal.SIGKILL)
        time.sleep(0.02)


def tell(code: int) -> None:
    """Let the supervisor of this launch, if there is one, know the code that this process ends with."""
    if path := os.environ.get(CODES):
        with contextlib.suppress(OSError), open(path, "a", encoding="ascii") as file:
            file.write(f"{code}\n")


def first_failing_code(path: Path) -> int | None:
    """Return the first exit code that is not 0, else 0; None when no process has written one."""
    try:
        codes = [int(line) for line in path.read_text(encoding="ascii").split()]
    except (OSError, ValueError):
        return None
    return next((code for code in codes if code), codes[0] if codes else None)
