"""Cores and memory that each process may use."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from distft.doctor.finding import Check, DoctorOptions, Facts, Finding, Here, Seen, by_host, fail, ok, warn

GIB = 2**30
LEAST_MEMORY = 1 * GIB
"""Per process: the libraries alone take most of it."""
LITTLE_MEMORY = 4 * GIB
LEAST_SHM, LITTLE_SHM = 48 * 2**20, GIB
"""NCCL's buffers between GPUs of a host take about 10 MiB a pair, data workers hand tensors over there."""


def look(here: Here) -> Facts:
    """Read cores, memory and limits of this process's host, as its container and batch job leave them."""
    shm = os.statvfs("/dev/shm") if os.path.isdir("/dev/shm") else None
    return {
        "cores": len(os.sched_getaffinity(0)),
        "affinity": sorted(os.sched_getaffinity(0)),
        "threads": here.env.get("OMP_NUM_THREADS", ""),
        "memory": _free_memory(),
        "shm": None if shm is None else shm.f_bavail * shm.f_frsize,
    }


def judge(seen: Sequence[Seen], options: DoctorOptions) -> Iterator[Finding]:
    """Judge whether cores, memory and shared memory suffice for every process of a host."""
    findings = list[Finding]()
    for first in by_host(seen):
        here = [process for process in seen if process.host == first.host]
        count = options.per_host or len(here)
        cores = len({core for process in here for core in process.facts["affinity"]})
        memory, shm = first.facts["memory"], first.facts["shm"]
        each = f"for each of {count} processes" if count > 1 else "for the process"
        if count > cores:
            findings.append(
                warn(
                    f"{cores} cores for {count} processes on {first.host}",
                    "ask for more (--cpus-per-task): data loading and launching kernels take one each, and more",
                    [first.host],
                )
            )
        if memory / count < LITTLE_MEMORY:
            say = fail if memory / count < LEAST_MEMORY else warn
            fix = "ask for more (--mem=0 is all of a node), or end what uses it"
            findings.append(say(f"{memory / count / GIB:.1f} GiB of memory {each} on {first.host}", fix, [first.host]))
        if shm is not None and shm < LITTLE_SHM:
            say = fail if shm < LEAST_SHM and count * len(by_host(seen)) > 1 else warn
            fix = "remove what is left there; in a container --shm-size=16g or --ipc=host"
            findings.append(say(f"{shm / 2**20:.0f} MiB free in /dev/shm of {first.host}", fix, [first.host]))
        threads = first.facts["threads"]
        if threads.isdecimal() and int(threads) * count > 2 * cores:
            findings.append(
                warn(
                    f"OMP_NUM_THREADS={threads} in {count} processes on {cores} cores of {first.host}",
                    f"OMP_NUM_THREADS={max(1, cores // count)}",
                )
            )
    yield from findings
    if not findings:
        least = min(seen, key=lambda process: process.facts["memory"])
        shm = least.facts["shm"]
        yield ok(
            f"{least.facts['cores']} cores, {least.facts['memory'] / GIB:.0f} GiB of memory free"
            + ("" if shm is None else f", {shm / GIB:.0f} GiB in /dev/shm")
        )


def _free_memory() -> int:
    """Return the bytes that this process may still take: of the machine, or of its control group where that is less."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            free = min(free, int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):  # "max": none
            continue
    return max(0, free)


CHECK = Check(name="host", look=look, judge=judge)
