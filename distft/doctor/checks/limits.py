"""Limits of the shell or the batch system that a run meets late: locked memory, open files."""

from __future__ import annotations

import resource
from collections.abc import Iterator, Sequence
from pathlib import Path

from distft.doctor.finding import Check, DoctorOptions, Facts, Finding, Here, Seen, fail, names, ok, warn

FEW_FILES, LEAST_FILES = 4096, 512


def look(here: Here) -> Facts:
    """Return the soft limits, which count."""
    return {
        "memlock": resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        "nofile": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "fabric": here.env.get("NCCL_IB_DISABLE", "0") != "1" and any(Path("/sys/class/infiniband").glob("*")),
    }


def judge(seen: Sequence[Seen], options: DoctorOptions) -> Iterator[Finding]:
    """Judge the limits of locked memory, which RDMA adapters need, and of open files."""
    locked = [
        process for process in seen if process.facts["fabric"] and process.facts["memlock"] != resource.RLIM_INFINITY
    ]
    if locked:
        yield fail(
            f"at most {locked[0].facts['memlock'] // 1024} KiB may be locked on {names({o.host: 0 for o in locked})}, "
            "and InfiniBand locks all it sends (NCCL: ibv_reg_mr failed)",
            "ulimit -l unlimited; in Slurm PropagateResourceLimitsExcept=MEMLOCK, for containers --ulimit memlock=-1",
            (process.host for process in locked),
        )
    few = [process for process in seen if 0 <= process.facts["nofile"] < FEW_FILES]
    if few:
        least = min(process.facts["nofile"] for process in few)
        say = fail if least < LEAST_FILES else warn
        message = f"at most {least} open files on {names({process.host: 0 for process in few})}"
        yield say(message, "ulimit -n 65536", (process.host for process in few) if least < LEAST_FILES else ())
    if not locked and not few:
        files = seen[0].facts["nofile"]
        yield ok(f"open files {files if files >= 0 else 'unlimited'}")


CHECK = Check(name="limits", look=look, judge=judge)
