"""Collects what a run's result depends on besides recipe, rows and weights: versions, hardware, code, variables.

Nothing here imports a heavy library; what torch alone knows is told only where torch is loaded already.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import platform
import re
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGES = (
    *("distft", "torch", "transformers", "tokenizers", "accelerate", "deepspeed", "peft", "bitsandbytes"),
    *("safetensors", "datasets", "pyarrow", "numpy", "triton", "flash-attn", "liger-kernel"),
)
COMPUTES = ("distft", "torch", "transformers", "tokenizers", "deepspeed", "peft", "bitsandbytes", "flash-attn",
            "liger-kernel", "triton", "cuda", "nccl")  # fmt: skip
"""Versions that can change a digit; a difference in the others cannot, as far as is known."""

_VARIABLES = re.compile(
    r"(CUDA|NCCL|GLOO|OMP|MKL|OPENBLAS|CUBLAS|TORCH|PYTORCH|TRITON|TRANSFORMERS|TOKENIZERS|HF|BNB|DS|FSDP|ACCELERATE|"
    r"DISTFT|SLURM_JOB|SLURM_N|SLURM_GPUS|UCX|FI|LD_LIBRARY|LD_PRELOAD|PYTHONHASHSEED|VIRTUAL_ENV|CONDA_DEFAULT_ENV)(_|$).*"
)
_SECRET = re.compile(r"TOKEN(?!IZERS)|KEY|SECRET|PASS|CREDENTIAL|AUTH|COOKIE|PRIVATE", re.IGNORECASE)
_LOGIN = re.compile(r"://[^/@\s]+@")
MAX_DIFF_BYTES = 4 * 2**20
"""A larger diff is data that somebody committed; its hash is kept, its text is not."""


@dataclass(frozen=True, kw_only=True)
class GitState:
    """The git repository around a folder."""

    commit: str
    diff: str
    """The diff of tracked files against the commit; empty when nothing was changed."""
    untracked: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the entry for manifest.json, where the diff is a hash: its text has a file of its own."""
        fields: dict[str, Any] = {"commit": self.commit, "dirty": bool(self.diff), "untracked": list(self.untracked)}
        return fields | {"diff_sha256": hashlib.sha256(self.diff.encode()).hexdigest() if self.diff else None}


def versions() -> dict[str, str | None]:
    """Return the versions of Python and of every package that computes; None for one that is not installed."""
    by_package: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            by_package[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            by_package[package] = None
    return by_package


def built_with() -> dict[str, str | None]:
    """Return the versions of CUDA and NCCL that this torch brings; nothing where torch is not loaded."""
    torch = sys.modules.get("torch")
    if torch is None:
        return {}
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else None
    return {"cuda": torch.version.cuda, "nccl": nccl}


def hardware() -> dict[str, Any]:
    """Describe this host: processor, cores, memory, driver."""
    return {
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "cpu": _after("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "memory_gib": _memory_gib(),
        "gpu_driver": _driver(),
    }


def library_variables(env: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that libraries read; none whose name or form looks like a secret."""
    return {
        name: _LOGIN.sub("://…@", value)
        for name, value in sorted(env.items())
        if _VARIABLES.fullmatch(name) and not _SECRET.search(name)
    }


def git_state(folder: Path) -> GitState | None:
    """Return the repository that `folder` is in; None outside of any, or where git is missing or slow."""
    commit = _git(folder, "rev-parse", "HEAD")
    if not commit:
        return None
    diff = _git(folder, "diff", "--no-ext-diff", "HEAD") or ""
    untracked = _git(folder, "ls-files", "--others", "--exclude-standard") or ""
    return GitState(
        commit=commit.strip(),
        diff=diff if len(diff) <= MAX_DIFF_BYTES else f"a diff of {len(diff)} bytes is not kept\n",
        untracked=tuple(untracked.splitlines()[:100]),
    )


def _git(folder: Path, *words: str) -> str | None:
    try:
        command = ["git", "-C", str(folder), *words]
        done = subprocess.run(command, capture_output=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode("utf-8", "replace") if done.returncode == 0 else None


def _after(path: str, key: str) -> str:
    with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            name, _, value = line.partition(":")
            if name.strip() == key:
                return value.strip()
    return ""


def _memory_gib() -> float | None:
    fields = _after("/proc/meminfo", "MemTotal").split()
    return round(int(fields[0]) / 2**20, 1) if fields else None


def _driver() -> str | None:
    with contextlib.suppress(OSError):
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
        if match := re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", text):
            return match[1]
    return None
