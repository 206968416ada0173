"""Best-fit-decreasing bin packing of documents into sequences.

Shape letters: N documents, S sequences (bins), C capacity of a sequence in tokens.
"""

from __future__ import annotations

import numpy as np


def pack(lengths_N: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Put documents into as few sequences of `capacity` tokens as best-fit-decreasing finds.

    Documents are placed from long to short, each into the fullest sequence that still has room. The number of
    sequences depends on the multiset of lengths only; among equal lengths the earlier document is placed first.
    O(N log N): all documents of one length go at once, and sequences are kept by the room they have left.

    Returns:
        offsets [S + 1] int64 and members [N] int64: sequence s holds documents members[offsets[s]:offsets[s + 1]], in
        ascending order.

    Raises:
        ValueError: a document is empty or longer than the capacity.
    """
    count = len(lengths_N)
    if count == 0:
        return np.zeros(1, np.int64), np.zeros(0, np.int64)
    if lengths_N.min() < 1 or lengths_N.max() > capacity:
        raise ValueError(f"lengths must be in 1..{capacity}, got {lengths_N.min()}..{lengths_N.max()}")
    by_length_N = np.argsort(-lengths_N.astype(np.int64), kind="stable")
    distinct, counts = np.unique(lengths_N, return_counts=True)
    bin_of_N = np.empty(count, np.int64)
    bins = _Bins(capacity)
    begin = 0
    for length, number in zip(distinct[::-1].tolist(), counts[::-1].tolist(), strict=True):
        bin_of_N[by_length_N[begin : begin + number]] = bins.place(length, number)
        begin += number
    members_N = np.argsort(bin_of_N, kind="stable")
    sizes_S = np.bincount(bin_of_N, minlength=bins.count)
    return np.concatenate([[0], np.cumsum(sizes_S)]), members_N


class _Bins:
    """Open sequences by the room left in them."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.count = 0
        self.by_room: list[list[np.ndarray]] = [[] for _ in range(capacity + 1)]  # room -> groups of bin numbers
        self.occupied = 0  # bit r is set when by_room[r] is not empty: the next fit is one shift away

    def place(self, length: int, number: int) -> np.ndarray:
        """Place `number` documents of `length` and return their bins, best fit first.

        A bin with the least sufficient room stays the best fit until the length no longer fits, so a group of bins
        with the same room takes `room // length` documents each.
        """
        bins: list[np.ndarray] = []
        while number:
            above = self.occupied >> length
            room = length + (above & -above).bit_length() - 1 if above else self.capacity
            each = room // length
            needed = -(-number // each)
            group = self._take(room, needed) if above else self._open(needed)
            full, rest = divmod(number, each) if len(group) == needed else (len(group), 0)
            bins.append(np.repeat(group[:full], each))
            self._put(room - each * length, group[:full])
            if rest:
                bins.append(np.repeat(group[full:], rest))
                self._put(room - rest * length, group[full:])
            number -= full * each + rest
        return np.concatenate(bins)

    def _open(self, number: int) -> np.ndarray:
        self.count += number
        return np.arange(self.count - number, self.count)

    def _take(self, room: int, at_most: int) -> np.ndarray:
        groups = self.by_room[room]
        group = groups.pop()
        if len(group) > at_most:
            groups.append(group[at_most:])
            group = group[:at_most]
        if not groups:
            self.occupied &= ~(1 << room)
        return group

    def _put(self, room: int, group: np.ndarray) -> None:
        if room and len(group):
            self.by_room[room].append(group)
            self.occupied |= 1 << room
