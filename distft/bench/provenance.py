"""On what and with what code a figure was measured: hardware, versions, commit. Nothing heavy is imported."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from distft.core.accelerators import GIB

PACKAGE = Path(__file__).resolve().parents[1]
SHOWING = ("command.py", "loss_agreement.py", "planned.py", "table.py", "plots.py")
"""Files of this room that no measurement passes through: a change in them makes no figure old."""
ASKING_S = 20.0


@functools.cache
def hardware() -> dict[str, Any]:
    """Return the CPU, memory and GPUs of this machine, without opening a context on any of them."""
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": _cpu_model(), "cores": cores, "memory_gib": round(pages / GIB, 1), "gpus": gpus()}


def gpus() -> list[str]:
    """Return product names of the GPUs that processes will see, by the driver's own tool; empty without a driver."""
    output = _output(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"])
    names = [line.strip() for line in output.splitlines() if line.strip()]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return names
    chosen = [word.strip() for word in visible.split(",") if word.strip()]
    return [names[int(word)] if word.isdecimal() and int(word) < len(names) else word for word in chosen if names]


@functools.cache
def code() -> dict[str, Any]:
    """Return this code's commit, whether it was changed since, and a hash of all that a measurement runs through."""
    git = ["git", "-C", str(PACKAGE)]
    commit = _output([*git, "rev-parse", "HEAD"]).strip() or None
    changed = _output([*git, "status", "--porcelain", "--", str(PACKAGE)]).strip()
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        if not (path.parent.name == "bench" and path.name in SHOWING):
            digest.update(str(path.relative_to(PACKAGE)).encode() + b"\0" + path.read_bytes() + b"\0")
    return {"commit": commit, "dirty": bool(changed) if commit else None, "source_sha256": digest.hexdigest()}


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _output(command: list[str]) -> str:
    """Return what a command prints; empty when it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ASKING_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
