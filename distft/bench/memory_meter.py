"""Memory of this process as it is: the accelerator's counters, the host's resident set, tensors on a CPU, a limit."""

from __future__ import annotations

import contextlib
import gc
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distft.core.accelerators import GIB


def set_limit(gib: float) -> None:
    """Limit this process's private writable memory to `gib`: an allocation beyond it fails.

    RLIMIT_DATA counts heap and anonymous maps, Python and the libraries' own included; files that are mapped and
    memory shared between processes are not in it. (RLIMIT_AS would count address space that nothing ever touches.)
    """
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (int(gib * GIB), hard))


def lift_limit() -> None:
    """Take `set_limit` back: what follows is ours and not the case's."""
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))


def die_with_parent() -> None:
    """Have the kernel end this process when its parent ends, however that happens (Linux; elsewhere a wish)."""
    if sys.platform != "linux":
        return
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def host() -> dict[str, int]:
    """Return the peak resident set, and private writable memory now, which `set_limit` limits.

    The peak is the address space's own (VmHWM): getrusage's begins with the parent's, which started us by vfork.
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return {"rss_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "data_bytes": 0}
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    kib = {key: int(fields[key].split()[0]) for key in ("VmHWM", "VmData")}
    return {"rss_peak_bytes": kib["VmHWM"] * 1024, "data_bytes": kib["VmData"] * 1024}


class Device:
    """Counters of an accelerator; on a CPU everything is zero or None."""

    def __init__(self, device: Any) -> None:
        self._device, self._on_gpu = device, device.type == "cuda"
        self._reserved = 0
        self.peaks: dict[str, int] = {}
        """Most bytes allocated, by phase."""

    def sync(self) -> None:
        """Wait for it."""
        if self._on_gpu:
            import torch

            torch.cuda.synchronize(self._device)

    def phase(self, name: str) -> None:
        """End the phase called `name`; the next one's peak begins at what is allocated now."""
        if self._on_gpu:
            import torch

            self.peaks[name] = torch.cuda.max_memory_allocated(self._device)
            self._reserved = max(self._reserved, torch.cuda.max_memory_reserved(self._device))
            torch.cuda.reset_peak_memory_stats(self._device)

    def read(self) -> dict[str, Any]:
        """Read, at the end, the peaks of all phases together, the device's own count, and the allocator's retries."""
        if not self._on_gpu:
            return {"allocated_bytes": None, "reserved_bytes": None, "used_bytes": None, "alloc_retries": None}
        import torch

        stats = torch.cuda.memory_stats(self._device)
        return {
            "allocated_bytes": max(self.peaks.values()),
            "reserved_bytes": self._reserved,
            "used_bytes": self._used(),
            "alloc_retries": stats.get("num_alloc_retries", 0),
        }

    def _used(self) -> int:
        """Return the device's used bytes by NVML, managed pages included; by the driver where NVML has no binding."""
        import torch

        try:
            return torch.cuda.device_memory_used(self._device)
        except (ImportError, ModuleNotFoundError, RuntimeError):
            free, total = torch.cuda.mem_get_info(self._device)
            return total - free


def cpu_tensors() -> int:
    """Return the bytes of all CPU tensors that Python can reach, each storage once: state, buffers, libraries' own."""
    import torch

    gc.collect()
    sizes: dict[int, int] = {}
    for item in gc.get_objects():
        if issubclass(type(item), torch.Tensor) and item.device.type == "cpu":
            storage = item.untyped_storage()
            with contextlib.suppress(RuntimeError):  # a wrapper around another tensor (DTensor): it has no bytes itself
                sizes[storage.data_ptr()] = storage.nbytes()
    sizes.pop(0, None)
    return sum(sizes.values())


def cpu_growth(work: Callable[[], None]) -> int:
    """Return the most bytes of CPU tensors that existed during `work` beyond those before it.

    Counted by torch's own CPU allocator, as its profiler reports every allocation and release.
    """
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    results: Any = profile.profiler.kineto_results  # type: ignore[union-attr]  # there once the profile has ended
    events = [event for event in results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def matmul_rate(device: Any) -> float | None:
    """Return bf16 FLOP/s of a large product on this GPU, now; None on a CPU and on a GPU without room for it."""
    if device.type != "cuda":
        return None
    import torch

    size, rounds = 8192, 20
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info(device)[0] < 4 * 2 * size**2:
        return None
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(5):
        torch.matmul(a, b)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(rounds):
        torch.matmul(a, b)
    end.record()
    end.synchronize()
    return rounds * 2.0 * size**3 / (begin.elapsed_time(end) / 1000)
