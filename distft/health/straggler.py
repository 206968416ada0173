"""Finds the rank that is slower than the others, which a collective hides: there all take equally long.

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
"""Side of the square matrices: about a millisecond on either."""
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


class StragglerProbe:
    """Times what this rank does alone."""

    def __init__(self) -> None:
        self._data_s = 0.0

    def read(self, data_s: float, device: torch.device) -> Timing:
        """Time the probe. `data_s`: seconds spent waiting for data since the run began."""
        since, self._data_s = max(0.0, data_s - self._data_s), data_s
        return Timing(who=f"{socket.gethostname()}, {device}", data_s=since, probe_s=_probe_s(device))


@dataclass(frozen=True, kw_only=True)
class Slowest:
    """The slowest rank, however small its lag."""

    rank: int
    who: str
    """Host and device."""
    what: str
    took_s: float
    others_s: float
    """The median of the others."""

    @property
    def percent(self) -> float:
        """How much longer it took than they did."""
        return 100 * (self.took_s / max(self.others_s, 1e-9) - 1)

    def __str__(self) -> str:
        return (
            f"rank {self.rank} ({self.who}) took {1000 * self.took_s:.1f} ms for {self.what}, "
            f"the others {1000 * self.others_s:.1f} ms"
        )


def slowest(timings: Sequence[Timing]) -> Slowest:
    """Return the rank that is furthest behind the median of the others, at what and by how much.

    Waiting for data counts only where it is more than noise.
    """
    candidates = [
        worst
        for what, least, times in _measurements(timings)
        if (worst := _worst(timings, what, times)).took_s - worst.others_s > least or not least
    ]
    return max(candidates, key=lambda worst: worst.percent)


def _measurements(timings: Sequence[Timing]) -> list[tuple[str, float, list[float]]]:
    """Return (what was measured, differences that are noise, seconds by rank) of each measurement."""
    return [
        ("waiting for its data", LEAST_S, [timing.data_s for timing in timings]),
        ("a fixed piece of arithmetic", 0.0, [timing.probe_s for timing in timings]),
    ]


def _worst(timings: Sequence[Timing], what: str, times: list[float]) -> Slowest:
    rank = max(range(len(times)), key=times.__getitem__)
    others = statistics.median([seconds for index, seconds in enumerate(times) if index != rank])
    return Slowest(rank=rank, who=timings[rank].who, what=what, took_s=times[rank], others_s=others)


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
