"""What the links between the processes give, measured: collectives over all of them, and one pair at a time.

Bus bandwidth, so that figures of any number of ranks compare with one link's: what each rank sends and receives.
Source: https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from distft.core import faults
from distft.engine.process_ranks import ProcessRanks

PINGS = 8
ROUNDS = 5


@dataclass(frozen=True, kw_only=True)
class BusBandwidth:
    """Bus bandwidth in bytes per second, the best of ROUNDS."""

    all_reduce: float
    all_gather: float


class ProbeRanks(ProcessRanks):
    """Measures the links between the processes that have joined."""

    def rates(self, num_bytes: int) -> BusBandwidth:
        """Measure all-reduce and all-gather of `num_bytes` on the device."""
        world = self.world
        count = max(1, num_bytes // 4 // world) * world
        whole = torch.zeros(count, device=self.device)
        part = torch.zeros(count // world, device=self.device)
        reduce_s = self._best_s(lambda: dist.all_reduce(whole))
        gather_s = self._best_s(lambda: dist.all_gather_into_tensor(whole, part))
        share = (world - 1) / world
        return BusBandwidth(all_reduce=2 * share * 4 * count / reduce_s, all_gather=share * 4 * count / gather_s)

    def ring(self, num_bytes: int, ranks: Sequence[int]) -> dict[int, float]:
        """Measure bytes per second, both ways at once, between this rank and its two neighbours in the ring of `ranks`.

        One pair of neighbours never waits for another: even places first with the next one, then odd ones, so that
        a slow rank is slow with both its neighbours and nobody else is.
        """
        bytes_per_s: dict[int, float] = {}
        for first, second in pairs(ranks):
            if self.rank in (first, second):
                peer = second if self.rank == first else first
                bytes_per_s[peer] = num_bytes / self._exchange_s(peer, num_bytes)
        return bytes_per_s

    def clock_ahead_s(self, rank: int, tag: int = 7) -> float | None:
        """Measure how far `rank`'s clock is ahead of rank 0's, from the quickest of some round trips; known on rank 0.

        Only rank 0 and `rank` call it. The error is at most half the time of that round trip.
        """
        best, ahead = float("inf"), 0.0
        clock_s = torch.zeros(1, dtype=torch.float64)
        for _ in range(PINGS):
            if self.rank == rank:
                dist.recv(clock_s, 0, group=self._host_group, tag=tag)
                clock_s[0] = faults.now("clock", rank=rank)
                dist.send(clock_s, 0, group=self._host_group, tag=tag)
            else:
                sent_at, began = time.time(), time.monotonic()
                dist.send(clock_s, rank, group=self._host_group, tag=tag)
                dist.recv(clock_s, rank, group=self._host_group, tag=tag)
                took = time.monotonic() - began
                if took < best:
                    best, ahead = took, clock_s.item() - (sent_at + took / 2)
        return ahead if self.rank == 0 else None

    def _exchange_s(self, peer: int, num_bytes: int) -> float:
        out = torch.zeros(max(1, num_bytes // 4), device=self.device)
        back = torch.empty_like(out)

        def both() -> None:
            faults.inject("link", rank=self.rank)
            works = dist.batch_isend_irecv([dist.P2POp(dist.isend, out, peer), dist.P2POp(dist.irecv, back, peer)])
            for work in works:
                work.wait()

        return self._best_s(both, alone=True)

    def _best_s(self, act: Callable[[], object], *, alone: bool = False) -> float:
        """Return the fastest of ROUNDS, after one that makes connections. `alone`: only some ranks are here."""
        best = float("inf")
        for number in range(ROUNDS + 1):
            if not alone:
                self.gather(None)
            began = time.perf_counter()
            act()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            if number:
                best = min(best, time.perf_counter() - began)
        return best


def pairs(ranks: Sequence[int]) -> list[tuple[int, int]]:
    """Return the pairs of neighbours of a ring, ordered so that as many as possible are measured at the same time."""
    count = len(ranks)
    if count < 3:
        return [(ranks[0], ranks[1])] if count == 2 else []
    ring = [(ranks[index], ranks[(index + 1) % count]) for index in range(count)]
    odd_one = [ring.pop()] if count % 2 else []
    return ring[0::2] + ring[1::2] + odd_one
