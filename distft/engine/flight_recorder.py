"""The flight recorder: every rank's last collectives, kept in memory by torch and written when the run hangs.

`python -m torch.distributed.flight_recorder.fr_trace RUN/ranks --prefix collectives-` reads the files of all ranks and
says which collective somebody did not come to. Torch writes them itself when one times out; a run's watch is earlier
than that and writes them before it ends a process.
Source: https://docs.pytorch.org/tutorials/unstable/flight_recorder_tutorial.html
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

PREFIX = "collectives-"
ENTRIES = 2000
"""Some steps' worth; a few MiB of host memory."""
_SIZE = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")
_FILE = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")
"""The name that torch 2.11 to 2.13 read, and an older one that they still take, with a warning."""
_ON_TIMEOUT = ("TORCH_NCCL_DUMP_ON_TIMEOUT",)


def variables(folder: Path, env: Mapping[str, str]) -> dict[str, str]:
    """Return what must be in the environment before the process group is made; what is there already counts more."""
    wanted = ((_SIZE, str(ENTRIES)), (_FILE, str(folder.absolute() / PREFIX)), (_ON_TIMEOUT, "1"))
    return {names[0]: value for names, value in wanted if not any(name in env for name in names)}


def write(folder: Path, rank: int) -> None:
    """Write this rank's record as it is now, where torch would write it.

    Raises:
        OSError: the folder cannot be written.
    """
    import torch

    door = torch._C._distributed_c10d  # pyright: ignore[reportAttributeAccessIssue]
    read = getattr(door, "_dump_nccl_trace", None) if torch.cuda.is_available() else None
    read = read or getattr(door, "_dump_fr_trace", None)  # of gloo, where there is no NCCL
    if read is not None:
        # With stack traces it takes seconds, in which this process shows no sign of life; the watch has them anyway.
        (folder / f"{PREFIX}{rank}").write_bytes(read(includeStackTraces=False))
