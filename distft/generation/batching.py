"""Groups prompts of similar length into batches for the ranks, and pads a batch on the left as tensors.

Shape letters: B rows, L positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_ROWS = 128
PROMPT_TOKENS = 32_768
"""Most prompt tokens of one forward: more fills no accelerator better, and activations grow with them."""
CACHE_SHARE = 0.4
"""Share of the accelerator's free memory: activations and fragments want room too."""


@dataclass(frozen=True, kw_only=True)
class BatchLimits:
    """How large a batch may be."""

    rows: int
    prompt_tokens: int
    """Padding included: what one forward reads at once."""
    cache_tokens: int
    """Padding and room for the answers included: what the cache holds."""


def split_batches(lengths: Sequence[int], new_tokens: int, limits: BatchLimits, world: int) -> list[list[int]]:
    """Split the indices of the prompts, longest first, into batches; at least `world` of them where possible.

    The first batch is the largest that any rank will hold, so memory that does not suffice is missed at once.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    most = max(1, min(limits.rows, -(-len(order) // world)))
    batches: list[list[int]] = []
    start = 0
    while start < len(order):
        longest = max(1, lengths[order[start]])
        fits = min(limits.prompt_tokens // longest, limits.cache_tokens // (longest + new_tokens), most)
        batches.append(order[start : start + max(1, fits)])
        start += max(1, fits)
    return batches


@dataclass(frozen=True, kw_only=True)
class PaddedBatch:
    """Rows filled up on the left, so that all end at the same position."""

    ids_BL: Tensor
    mask_BL: Tensor | None
    """int64, 0 where it is filler; None when nothing is."""
    positions_BL: Tensor
    lengths_B: Tensor


def pad_left(rows: Sequence[Sequence[int]], device: torch.device, *, filler: int = 0, room: int = 0) -> PaddedBatch:
    """Return `rows` as tensors; the mask has `room` more positions, for what the model will write."""
    longest = max(len(row) for row in rows)
    ids_BL = torch.tensor([[filler] * (longest - len(row)) + list(row) for row in rows])
    lengths_B = torch.tensor([len(row) for row in rows])
    positions_BL = torch.arange(longest)[None] - (longest - lengths_B)[:, None]
    mask_BL = None
    if int(lengths_B.min()) < longest:
        mask_BL = torch.ones(len(rows), longest + room, dtype=torch.int64)
        mask_BL[:, :longest] = positions_BL >= 0
        mask_BL = mask_BL.to(device)
    return PaddedBatch(
        ids_BL=ids_BL.to(device),
        mask_BL=mask_BL,
        positions_BL=positions_BL.clamp(min=0).to(device),
        lengths_B=lengths_B.to(device),
    )
