"""Which rows come when: a function of seed and epoch alone, exact over epochs for every weight and share."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distft.core.errors import DataError
from distft.data.order import SampleOrder, rows_per_epoch
from distft.recipe.schema import TrainSourceTable


def order_of(sizes: list[int], taken: list[int], **changed: Any) -> SampleOrder:
    """Sources of these sizes, each row with its own length."""
    starts = np.concatenate([[0], np.cumsum(sizes)])
    rows = [np.arange(begin, end) for begin, end in pairwise(starts)]
    lengths = np.random.default_rng(0).integers(1, 65, int(starts[-1])).astype(np.int32)
    settings = {"seed": 3, "shuffle": True, "packing": True, "max_length": 64} | changed
    return SampleOrder(lengths, rows, taken, **settings)


def stream(order: SampleOrder, begin: int, count: int) -> list[list[int]]:
    return [order.sequence(position).tolist() for position in range(begin, begin + count)]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_row_comes_exactly_once_per_epoch(packing: bool, shuffle: bool) -> None:
    order = order_of([70, 30], [70, 30], packing=packing, shuffle=shuffle)
    for epoch in range(3):
        begin, end = order.start(epoch), order.start(epoch + 1)
        assert sorted(row for rows in stream(order, begin, end - begin) for row in rows) == list(range(100))


def test_the_order_is_of_seed_and_epoch() -> None:
    first = order_of([50], [50])
    assert stream(first, 0, 40) == stream(order_of([50], [50]), 0, 40)
    assert first.epoch(0).rows_N.tolist() != first.epoch(1).rows_N.tolist()
    assert first.epoch(0).rows_N.tolist() != order_of([50], [50], seed=4).epoch(0).rows_N.tolist()


def test_packed_sequences_do_not_come_longest_document_first() -> None:
    order = order_of([200], [200])
    lengths = np.random.default_rng(0).integers(1, 65, 200)
    longest = [int(lengths[rows].max()) for rows in stream(order, 0, order.per_epoch)]
    half = len(longest) // 2
    assert longest != sorted(longest, reverse=True)
    assert abs(np.mean(longest[:half]) - np.mean(longest[half:])) < 8


def test_without_shuffle_rows_stay_in_order() -> None:
    assert stream(order_of([5], [5], shuffle=False, packing=False), 0, 7) == [[0], [1], [2], [3], [4], [0], [1]]
    packed = order_of([40], [40], shuffle=False)
    firsts = [rows[0] for rows in stream(packed, 0, packed.per_epoch)]
    assert firsts == sorted(firsts)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(1, 30)), min_size=1, max_size=3),
    st.booleans(),
    st.booleans(),
    st.integers(0, 60),
)
def test_seeking_equals_reading(sources: list[tuple[int, int]], packing: bool, shuffle: bool, begin: int) -> None:
    sizes, taken = [size for size, _ in sources], [count for _, count in sources]
    order = order_of(sizes, taken, packing=packing, shuffle=shuffle)
    assert (
        stream(order, begin, 5)
        == stream(order_of(sizes, taken, packing=packing, shuffle=shuffle), 0, begin + 5)[begin:]
    )


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 20), st.integers(1, 50), st.integers(1, 6))
def test_a_source_is_used_up_before_it_repeats(size: int, taken: int, epochs: int) -> None:
    order = order_of([size], [taken])
    seen = Counter(row for epoch in range(epochs) for row in order.rows(epoch).tolist())
    assert sum(seen.values()) == taken * epochs
    assert max(seen.values()) - min(seen[row] for row in range(size)) <= 1


def source(**keys: Any) -> TrainSourceTable:
    return TrainSourceTable(path="x", **keys)


@pytest.mark.parametrize(
    ("sources", "sizes", "expected"),
    [
        ([source()], [10], [10]),
        ([source(weight=2.0), source(weight=0.5)], [10, 10], [20, 5]),
        ([source(weight=0.25)], [10], [2]),
        ([source(), source(share=0.2)], [80, 1000], [80, 20]),
        ([source(weight=0.5), source(share=0.1), source(share=0.4)], [100, 3, 1000], [50, 10, 40]),
        ([source(share=0.75), source(share=0.25)], [90, 1000], [90, 30]),
    ],
)
def test_rows_per_epoch(sources: list[TrainSourceTable], sizes: list[int], expected: list[int]) -> None:
    assert rows_per_epoch(sources, sizes) == expected


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([source(), source(share=0.6), source(share=0.5)], "shares add up to 1.1, which leaves nothing"),
        ([source(share=0.6), source(share=0.5)], "every source has a share, and they add up to 1.1, not 1"),
        ([source(), source(weight=0.01)], r"weight = 0.01 of 10 rows takes no row at all"),
    ],
)
def test_shares_that_cannot_be_met(sources: list[TrainSourceTable], message: str) -> None:
    with pytest.raises(DataError, match=message):
        rows_per_epoch(sources, [10] * len(sources))


def test_alike_epochs_are_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    order = order_of([100], [200])
    assert order.epochs_alike
    packed: list[int] = []
    monkeypatch.setattr(SampleOrder, "_epoch", lambda self, epoch: packed.append(epoch))
    assert order.start(0) == 0
    assert not packed


def test_a_far_position_is_found_at_once() -> None:
    order = order_of([1000], [1000])
    position = 50_000 * 64
    epoch = order.epoch_of(position)
    assert order.start(epoch) <= position < order.start(epoch + 1)
    assert order.epoch.cache_info().misses == 1


def test_order_is_pinned() -> None:
    """A change here would silently change what a resumed run trains on."""
    order = order_of([6, 4], [6, 2], packing=False)
    assert [rows[0] for rows in stream(order, 0, 16)] == [9, 8, 0, 2, 5, 3, 4, 1, 5, 2, 3, 6, 4, 0, 1, 7]
