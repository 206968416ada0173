"""Best-fit-decreasing against a slow reference, and fill on realistic lengths."""

from __future__ import annotations

import time
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distft.data.pack import pack


def slow_rooms(lengths: list[int], capacity: int) -> list[int]:
    """Room left in each bin by the textbook algorithm, sorted."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fits = [(room, at) for at, room in enumerate(rooms) if room >= length]
        if fits:
            rooms[min(fits)[1]] -= length
        else:
            rooms.append(capacity - length)
    return sorted(rooms)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 60), st.data())
def test_is_best_fit_decreasing(capacity: int, data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, capacity), min_size=1, max_size=80))
    offsets, members = pack(np.array(lengths), capacity)
    assert sorted(members.tolist()) == list(range(len(lengths)))
    used = np.add.reduceat(np.array(lengths)[members], offsets[:-1])
    assert sorted((capacity - used).tolist()) == slow_rooms(lengths, capacity)
    for begin, end in pairwise(offsets):
        assert members[begin:end].tolist() == sorted(members[begin:end].tolist())


def test_number_of_sequences_does_not_depend_on_the_order() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 513, 2000)
    counts = {len(pack(rng.permutation(lengths), 512)[0]) for _ in range(5)}
    assert len(counts) == 1


def test_nothing_to_pack() -> None:
    offsets, members = pack(np.zeros(0, np.int32), 8)
    assert (offsets.tolist(), members.tolist()) == ([0], [])


@pytest.mark.parametrize("lengths", [[9], [0, 3]])
def test_lengths_that_cannot_be(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match=r"lengths must be in 1\.\.8"):
        pack(np.array(lengths), 8)


def test_a_million_rows_take_seconds_and_fill_well() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(5.8, 0.9, 1_000_000), 1, 4096).astype(np.int32)
    start = time.monotonic()
    offsets, _ = pack(lengths, 4096)
    assert time.monotonic() - start < 5
    assert lengths.sum() / (4096 * (len(offsets) - 1)) > 0.999
