"""Which tensors an update takes together: fp32 copies of their gradients exist at the same time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

GROUP_ELEMENTS = 2**28
"""Elements of the fp32 gradients that an update holds at a time: 1 GiB, or one larger tensor."""


def update_groups(numels: Iterable[int], limit: int = GROUP_ELEMENTS) -> Iterator[range]:
    """Cut a list of tensors into neighbours of at most `limit` elements together; a larger tensor is alone."""
    start = filled = end = 0
    for end, numel in enumerate(numels, start=1):  # the end of the last group
        if filled and filled + numel > limit:
            yield range(start, end - 1)
            start, filled = end - 1, 0
        filled += numel
    if end > start:
        yield range(start, end)
