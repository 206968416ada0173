"""The lock by which a process is known to live: the kernel gives it back when the last one that has it has ended."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


def hold_lock(path: Path) -> int | None:
    """Take the lock; return its file descriptor, which processes may inherit. None: another process has it."""
    held = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(held)
        return None
    return held


def is_held(path: Path) -> bool:
    """Return whether a process of this machine has the lock."""
    held = hold_lock(path) if path.exists() else -1
    if held is None:
        return True
    if held >= 0:
        os.close(held)
    return False
