"""Fresh processes for one case, and what became of them: no crash of the benchmark, no process left behind."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distft.bench.case import BenchCaseSpec
from distft.bench.cases import BenchCase
from distft.core import supervise
from distft.core.errors import Preempted

MEMORY_WORDS = (
    "can't allocate memory",
    "CUDA out of memory",
    "std::bad_alloc",
    "MemoryError",
    "cannot allocate memory",
)
"""What torch, the C++ library, Python, and the C library and the kernel say, in letters of either case."""
OWN_PREFIXES = ("ACCELERATE_", "TORCHELASTIC_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_", "GROUP_RANK")
"""Prefixes of environment variables: what a launcher of this command itself has left."""


MODULE = ("-m", "distft.bench.case")
"""What the processes of a case run."""


def run_case(case: BenchCase, folder: Path, *, timeout_s: float, module: Sequence[str] = MODULE) -> dict[str, Any]:
    """Run a case; return {outcome: measured | memory | refused | failed, reason} and, if measured, rank 0's record.

    Files go to `folder`, under the case's key: recipe, log. `module`: what is run, if not `distft.bench.case` itself.
    """
    stem = folder / case.key
    recipe, log = stem.with_name(f"{case.key}.toml"), stem.with_name(f"{case.key}.log")
    out, spec_path = stem.with_name(f".{case.key}.out"), stem.with_name(f".{case.key}.spec")
    recipe.write_text(case.text, encoding="utf-8")
    spec = BenchCaseSpec(
        recipe=str(recipe), out=str(out), rows=case.rows, warmup=case.warmup, steps=case.steps, profile=case.profile,
        limit_gib=case.limit_gib,
    )  # fmt: skip
    left = [spec_path, out, *map(spec.failure, range(case.world))]
    _remove(left)
    spec.write(spec_path)
    try:
        code = start(_command(case.world, spec_path, module), log, timeout_s=timeout_s)
        if code == 0 and out.is_file():
            return {"outcome": "measured", "reason": ""} | json.loads(out.read_text(encoding="utf-8"))
        return _became(code, [spec.failure(rank) for rank in range(case.world)], log, timeout_s)
    finally:
        _remove(left)


def start(command: list[str], log: Path, *, timeout_s: float) -> int | None:
    """Run a command; return its exit code, 128 + N after signal N, None when it took too long.

    Raises:
        Preempted: this process was asked to stop.
        KeyboardInterrupt: by a person at its terminal.
    """
    env = {key: value for key, value in os.environ.items() if not key.startswith(OWN_PREFIXES)}
    with log.open("w", encoding="utf-8") as output:
        ended = supervise.run(
            command, env=env, launcher=command[1:3] == ["-m", "torch.distributed.run"], saves=False, output=output,
            timeout_s=timeout_s,
        )  # fmt: skip
    if signal.SIGINT in ended.signals:
        raise KeyboardInterrupt
    if ended.signals and ended.code:
        name = signal.Signals(ended.signals[0]).name
        raise Preempted(f"stopped by {name}; the same command goes on where it was")
    return None if ended.timed_out else ended.code


def _command(world: int, spec_path: Path, module: Sequence[str]) -> list[str]:
    ran = [*module, str(spec_path)]
    if world == 1:
        return [sys.executable, *ran]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend", "c10d", "--rdzv-endpoint"]
    return [*torchrun, "localhost:0", "--nproc-per-node", str(world), *ran]


def _became(code: int | None, failures: list[Path], log: Path, timeout_s: float) -> dict[str, Any]:
    if code is None:
        return {"outcome": "failed", "reason": f"not done after {timeout_s:,.0f} s; see {log.name}"}
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in failures if path.is_file()]
    for kind in ("memory", "refused"):
        for report in reports:
            if report["kind"] == kind:
                return {"outcome": kind, "reason": report["reason"]}
    text = log.read_text(encoding="utf-8", errors="replace")
    for line in text.splitlines():
        if any(word.lower() in line.lower() for word in MEMORY_WORDS):
            return {"outcome": "memory", "reason": line.strip()}
    if code in (-signal.SIGKILL, 128 + signal.SIGKILL) or "signal 9 (SIGKILL)" in text or "Signal 9 (SIGKILL)" in text:
        return {"outcome": "memory", "reason": "killed (SIGKILL), as the kernel does when memory runs out"}
    if reports:
        return {"outcome": "failed", "reason": f"{reports[0]['reason']}; see {log.name}"}
    last = next((line for line in reversed(text.splitlines()) if line.strip()), "it printed nothing")
    return {"outcome": "failed", "reason": f"exit code {code}: {last.strip()}; see {log.name}"}


def _remove(paths: list[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
