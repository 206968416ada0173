"""Which process this is, and whether one that wrote its name somewhere is still there."""

from __future__ import annotations

import hashlib
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

JOB_START = "DISTFT_JOB_START"
"""Variable of a batch job's processes: when its script's process was started, by that node's clock (seconds)."""


def identity() -> dict[str, Any]:
    """Identify this process, so that another one of the machine can tell it from a later one with its number."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "process_start": start_of(os.getpid()),
        "boot_id": _text_of("/proc/sys/kernel/random/boot_id"),
        "pid_namespace": _link_of("/proc/self/ns/pid"),
        "start": _start(),
    }


def this_start(runs: int) -> dict[str, Any]:
    """Return `identity`, its `start` telling apart the `runs` that one process makes after another."""
    here = identity()
    return here | {"start": f"{here['start']}.{runs}"}


def slurm_job(env: Mapping[str, str]) -> str | None:
    """Return this process's batch job as Slurm's commands take it; None outside of any.

    One of an array's jobs is `ARRAY_TASK`: its SLURM_JOB_ID may be the array's, and then means all of them.
    """
    if "SLURM_ARRAY_JOB_ID" in env:
        return f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    return env.get("SLURM_JOB_ID")


def _start() -> str:
    """Return a name for this start of a run, shared by the processes that one launcher started on this machine.

    A process that no launcher started (a shell may start many) is a start of its own.
    """
    launched = "RANK" in os.environ or "SLURM_PROCID" in os.environ
    parent, variables = os.getppid() if launched else os.getpid(), ("MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")
    parts = [_text_of("/proc/sys/kernel/random/boot_id"), parent, start_of(parent), *map(os.environ.get, variables)]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def is_neighbour(owner: Mapping[str, Any]) -> bool:
    """Return whether `owner` (an `identity`) lives where process numbers mean the same as here."""
    here = identity()
    return bool(owner) and all(owner.get(key) == here[key] for key in ("host", "boot_id", "pid_namespace"))


def is_gone(owner: Mapping[str, Any]) -> bool:
    """Return whether a neighbour's process has ended."""
    pid, start = owner.get("pid"), owner.get("process_start")
    return not isinstance(pid, int) or start_of(pid) is None or start_of(pid) != start


def start_of(pid: int) -> int | None:
    """Return a process's start (clock ticks since boot; 0 where the system gives none); None when it is gone."""
    if pid <= 0:
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except (PermissionError, OverflowError):
        pass  # somebody else's: alive
    fields = _text_of(f"/proc/{pid}/stat").rpartition(")")[2].split()  # the name before it may hold spaces
    if len(fields) < 20:
        return 0
    return None if fields[0] in "ZX" else int(fields[19])


def age_s(pid: int | None = None) -> float | None:
    """Return the seconds since a process (None: this one) was started; None where the system does not say."""
    ticks = start_of(os.getpid() if pid is None else pid)
    if not ticks or not hasattr(time, "CLOCK_BOOTTIME"):
        return None
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def _text_of(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _link_of(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""
