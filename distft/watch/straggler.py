"""Which rank is slower than the others, when in a collective all of them take equally long.

Waiting hides who is waited for, so only what a rank does alone is timed: waiting for its own data, and a fixed matrix
product on its own device (a throttled or shared accelerator is slow at that too). Both are local under every engine.
"""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SIDE = {"cpu": 256, "cuda": 4096}
"""Of the square matrices: about a millisecond on either."""
ROUNDS = 5
LEAST_S = 0.02
"""Differences below this are noise, however large their ratio."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What one rank did alone since the last look."""

    who: str
    data_s: float
    probe_s: float
    """Fastest of ROUNDS products."""


class Pace:
    """This rank's."""

    def __init__(self) -> None:
        self._data_s = 0.0

    def read(self, data_s: float, device: torch.device) -> Timing:
        """Time the probe. `data_s`: seconds spent waiting for data since the run began."""
        since, self._data_s = max(0.0, data_s - self._data_s), data_s
        return Timing(who=f"{socket.gethostname()}, {device}", data_s=since, probe_s=_probe_s(device))


def slow_rank(timings: Sequence[Timing], factor: float) -> str | None:
    """The slowest rank, where and by how much; None when no rank is `factor` times slower than the median."""
    worst: tuple[float, str] | None = None
    for name, least, times in (
        ("waiting for its data", LEAST_S, [timing.data_s for timing in timings]),
        ("a fixed piece of arithmetic", 0.0, [timing.probe_s for timing in timings]),
    ):
        slowest = max(range(len(times)), key=times.__getitem__)
        others = statistics.median([seconds for rank, seconds in enumerate(times) if rank != slowest])
        ratio = times[slowest] / max(others, 1e-9)
        if ratio > factor and times[slowest] - others > least and (worst is None or ratio > worst[0]):
            took = f"{1000 * times[slowest]:.1f} ms for {name}, the others {1000 * others:.1f} ms"
            worst = (ratio, f"rank {slowest} ({timings[slowest].who}) took {took}")
    return None if worst is None else worst[1]


def _probe_s(device: torch.device) -> float:
    import torch

    side = SIDE.get(device.type, 1024)
    matrix = torch.ones(side, side, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    best = float("inf")
    for _ in range(ROUNDS):
        began = time.perf_counter()
        product = matrix @ matrix
        product[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - began)
    return best
