"""A sum of a few host numbers over all ranks in log2(world) messages one after another.

gloo's all-reduce passes them round a ring: 2 (world - 1) messages, 1,022 for 512 ranks, in every optimizer step.
Source: recursive doubling, Thakur, Rabenseifner, Gropp 2005, https://doi.org/10.1177/1094342005051521
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from torch import Tensor

RING_RANKS = 64
"""Up to so many the ring is as fast: on two crowded cores 14 ms against 20 for 32 ranks, but growing by 0.45 ms a rank
against 4 ms for twice as many (benchmarks/at_scale.py)."""


def summed(mine: Tensor, rank: int, world: int) -> Tensor:
    """Return the sum of a small host tensor over all ranks, bit by bit the same on every rank; collective.

    Partners add the same two sums, and a + b is b + a. Ranks beyond the largest power of two hand theirs to one below
    it and are told the result.
    """
    power = 1 << (world.bit_length() - 1)
    extra, total, received = world - power, mine.clone(), torch.empty_like(mine)
    if rank >= power:
        dist.send(total, rank - power)
        dist.recv(total, rank - power)
        return total
    if rank < extra:
        dist.recv(received, rank + power)
        total = total + received
    distance = 1
    while distance < power:
        sent = dist.isend(total, rank ^ distance)
        dist.recv(received, rank ^ distance)
        if sent is not None:
            sent.wait()
        total, distance = total + received, 2 * distance
    if rank < extra:
        dist.send(total, rank + power)
    return total
