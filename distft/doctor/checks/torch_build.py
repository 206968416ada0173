"""Whether torch can use the GPUs that the driver shows, and with which libraries."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence

from distft.doctor.finding import Check, DoctorOptions, Facts, Finding, Here, Seen, fail, names, odd_ones, ok


def look(here: Here) -> Facts:
    """Import torch and read its build."""
    import torch
    from torch.cuda import nccl

    gpus = torch.cuda.is_available()
    hidden = here.env.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1")
    return {
        "cuda": torch.version.cuda,
        "gpus": torch.cuda.device_count() if gpus else 0,
        "device": torch.cuda.get_device_name(0) if gpus else "cpu",
        "nccl": ".".join(map(str, nccl.version())) if gpus else None,
        "driver": not hidden and (os.path.exists("/dev/nvidia0") or shutil.which("nvidia-smi") is not None),
    }


def judge(seen: Sequence[Seen], options: DoctorOptions) -> Iterator[Finding]:
    """Judge whether the build is the same on every rank, and uses GPUs where there are some."""
    blind = [process for process in seen if process.facts["driver"] and not process.facts["gpus"]]
    if blind:
        cuda = blind[0].facts["cuda"]
        why = f"the driver is too old for its CUDA {cuda}" if cuda else "it is a build for CPUs"
        yield fail(
            f"torch uses no GPU on {names({process.host: 0 for process in blind})}, where a driver is: {why}",
            "install the torch build that fits the driver (pytorch.org), or hide the GPUs: CUDA_VISIBLE_DEVICES=",
            (process.host for process in blind) if len(blind) < len(seen) else (),
        )
    for what in ("cuda", "nccl"):
        usual, others = odd_ones(seen, lambda process, what=what: process.facts[what])
        if others:
            yield fail(
                f"{what} {others[0].facts[what]} on {names(process.who for process in others)}, {usual} on others",
                "the same environment on every host",
                (process.host for process in others),
            )
    if not blind:
        facts = seen[0].facts
        gpu = f"{facts['device']}, CUDA {facts['cuda']}, NCCL {facts['nccl']}"
        yield ok(gpu if facts["gpus"] else "no GPU: runs use the CPU and gloo")


CHECK = Check(name="torch", look=look, judge=judge, together=True)
