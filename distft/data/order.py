"""Which rows an epoch holds and in what sequences: a function of seed and epoch alone.

Shape letters: N rows of an epoch, S packed sequences of an epoch.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from distft.core.errors import DataError
from distft.data.pack import pack

if TYPE_CHECKING:
    from distft.recipe.schema import DataTable, TrainSourceTable

_ROWS, _CYCLE, _SEQUENCES = range(3)
"""What a random stream is for; keeps streams of one seed and epoch apart."""


@dataclass(frozen=True)
class Epoch:
    """The sequences of one epoch, in order."""

    offsets: np.ndarray
    """int64 [S + 1]."""
    rows_N: np.ndarray
    """int64; row numbers; sequence s holds rows_N[offsets[s]:offsets[s + 1]]."""

    def __len__(self) -> int:
        """Return the number of sequences."""
        return len(self.offsets) - 1

    def sequence(self, index: int) -> np.ndarray:
        """Return the rows of one sequence."""
        return self.rows_N[self.offsets[index] : self.offsets[index + 1]]


class SampleOrder:
    """The endless stream of sequences, epoch after epoch; world size, workers and restarts do not enter.

    Each source is an endless cycle of passes over its rows, each pass in an order of its own; an epoch takes the next
    `rows_per_epoch` of it. So a weight of 2 gives every row twice an epoch, 0.5 every row in two epochs, and a share
    goes through its source without repeating a row before all were seen.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        source_rows: Sequence[np.ndarray],
        rows_per_epoch: Sequence[int],
        *,
        seed: int,
        shuffle: bool,
        packing: bool,
        max_length: int,
    ) -> None:
        """A stream; see the class for what its parts mean.

        Args:
            lengths: int32; tokens of every row.
            source_rows: for each source the rows that are its own.
            rows_per_epoch: for each source how many an epoch takes.
            seed: of every random draw.
            shuffle: draw orders; else keep rows, and sequences by their first row, as they are.
            packing: pack rows into sequences of max_length; else each row is a sequence.
            max_length: tokens in a sequence.
        """
        self._lengths = lengths
        self._source_rows = source_rows
        self.rows_per_epoch = tuple(rows_per_epoch)
        self._seed = seed
        self._shuffle = shuffle
        self._packing = packing
        self._max_length = max_length
        self._starts = [0]
        """Sequences before each epoch; grows as later epochs are asked for."""
        self._counting = threading.Lock()  # a prefetching thread asks too
        self.epochs_alike = all(taken % len(rows) == 0 for taken, rows in zip(rows_per_epoch, source_rows, strict=True))
        """Whether every epoch holds the same rows, and so the same number of sequences."""
        self.epoch = lru_cache(maxsize=2)(self._epoch)  # two: a step may straddle the boundary

    def start(self, epoch: int) -> int:
        """Return the sequences in all epochs before this one: arithmetic, unless fractional weights differ by epoch."""
        if self.epochs_alike or not self._packing:
            return epoch * self.per_epoch
        with self._counting:
            while len(self._starts) <= epoch:
                self._starts.append(self._starts[-1] + len(self.epoch(len(self._starts) - 1)))
        return self._starts[epoch]

    @property
    def per_epoch(self) -> int:
        """Sequences in the first epoch."""
        if not self._packing:
            return sum(self.rows_per_epoch)
        with self._counting:
            if len(self._starts) == 1:
                self._starts.append(len(self.epoch(0)))
        return self._starts[1]

    def epoch_of(self, position: int) -> int:
        """Return the epoch that holds sequence `position` of the stream."""
        epoch = position // self.per_epoch if self.epochs_alike or not self._packing else 0
        while self.start(epoch + 1) <= position:
            epoch += 1
        return epoch

    def sequence(self, position: int) -> np.ndarray:
        """Return the rows of one sequence of the stream, in reading order."""
        epoch = self.epoch_of(position)
        return self.epoch(epoch).sequence(position - self.start(epoch))

    def rows(self, epoch: int) -> np.ndarray:
        """Return int64 [N]; the epoch's rows, source by source, before they are shuffled and packed."""
        return np.concatenate(
            [self._cycle(source, epoch * taken, taken) for source, taken in enumerate(self.rows_per_epoch)]
        )

    def _cycle(self, source: int, begin: int, count: int) -> np.ndarray:
        """Return entries begin..begin + count of a source's endless cycle."""
        rows = self._source_rows[source]
        parts = []
        while count:
            turn, offset = divmod(begin, len(rows))
            order = self._random(_CYCLE, turn, source).permutation(len(rows)) if self._shuffle else np.arange(len(rows))
            parts.append(rows[order[offset : offset + count]])
            begin, count = begin + len(parts[-1]), count - len(parts[-1])
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def _epoch(self, epoch: int) -> Epoch:
        rows_N = self.rows(epoch)
        if self._shuffle:
            rows_N = self._random(_ROWS, epoch).permutation(rows_N)
        if not self._packing:
            return Epoch(np.arange(len(rows_N) + 1), rows_N)
        offsets, members_N = pack(self._lengths[rows_N], self._max_length)
        sizes_S = np.diff(offsets)
        if self._shuffle:
            order_S = self._random(_SEQUENCES, epoch).permutation(len(sizes_S))
        else:
            order_S = np.argsort(members_N[offsets[:-1]], kind="stable")
        # the members of the reordered sequences, without a Python loop over them
        ordered_offsets = np.concatenate([[0], np.cumsum(sizes_S[order_S])])
        shift_S = offsets[:-1][order_S] - ordered_offsets[:-1]
        index_N = np.arange(len(members_N)) + np.repeat(shift_S, sizes_S[order_S])
        return Epoch(ordered_offsets, rows_N[members_N[index_N]])

    def _random(self, purpose: int, *of: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence((self._seed, purpose, *of))))


def rows_per_epoch(tables: Sequence[TrainSourceTable], num_rows: Sequence[int]) -> list[int]:
    """Return how many rows an epoch takes from each source: weight x its rows, and shares of the whole on top.

    When every source has a share an epoch ends with the first source that is used up.

    Raises:
        DataError: the shares leave no room for the other sources, or do not add up to 1 when there are no others, or a
            source would give no row at all.
    """
    total_share = sum(table.share or 0.0 for table in tables)
    base = [round((table.weight or 1.0) * rows) for table, rows in zip(tables, num_rows, strict=True)]
    weighted = sum(rows for rows, table in zip(base, tables, strict=True) if table.share is None)
    if all(table.share is not None for table in tables):
        if abs(total_share - 1) > 1e-6:
            raise DataError(f"[[data.train]]: every source has a share, and they add up to {total_share:g}, not 1")
        whole = min(rows / (table.share or 1.0) for table, rows in zip(tables, num_rows, strict=True))
    elif total_share >= 1:
        raise DataError(
            f"[[data.train]]: shares add up to {total_share:g}, which leaves nothing for the sources without"
        )
    else:
        whole = weighted / (1 - total_share)
    taken = [
        rows if table.share is None else round(table.share * whole) for rows, table in zip(base, tables, strict=True)
    ]
    for table, rows, count in zip(tables, num_rows, taken, strict=True):
        if count == 0:
            setting = f"weight = {table.weight:g}" if table.share is None else f"share = {table.share:g}"
            raise DataError(f"[[data.train]] {table.path}: {setting} of {rows:,} rows takes no row at all  raise it")
    return taken


def train_order(lengths: np.ndarray, source_rows: Sequence[np.ndarray], table: DataTable, *, seed: int) -> SampleOrder:
    """Return the stream that the recipe asks for.

    Raises:
        DataError: weights and shares that cannot be met.
    """
    return SampleOrder(
        lengths,
        source_rows,
        rows_per_epoch(table.train, [len(rows) for rows in source_rows]),
        seed=seed,
        shuffle=table.shuffle,
        packing=table.packing,
        max_length=table.max_length,
    )
