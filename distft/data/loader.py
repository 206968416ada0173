"""Optimizer steps of micro-batches, dealt out to ranks. Only here does the world size enter, and it changes no order.

The stream of sequences runs on over epochs. Global batch b is its next `global_batch_size` sequences; a rank takes a
fixed contiguous slice of it and cuts that into micro-batches. Only the last step of a run may be short.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, overload

import numpy as np

from distft.core.errors import DataError
from distft.data.order import SampleOrder, train_order
from distft.data.prefetch import prefetched
from distft.data.store import Prepared

if TYPE_CHECKING:
    from distft.core.types import Batch
    from distft.recipe.schema import DataTable


class Steps:
    """The training steps of one rank."""

    def __init__(
        self,
        prepared: Prepared,
        table: DataTable,
        *,
        seed: int,
        epochs: float | None,
        max_steps: int | None,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int = 0,
        world: int = 1,
        pad_to: int | None = None,
        single_documents: bool = False,
        prefetch: int = 2,
    ) -> None:
        """Cut the stream into steps and keep this rank's part of each.

        Args:
            prepared: the training rows.
            table: packing, shuffle, max_length, and the weights and shares of the sources.
            seed: of the order.
            epochs: passes over the data, may be fractional; None when `max_steps` decides. The sooner of both ends.
            max_steps: optimizer steps.
            global_batch_size: sequences per step on all ranks.
            micro_batch_size: sequences per micro-batch on one rank.
            rank: which slice of each global batch.
            world: number of ranks.
            pad_to: tokens of every micro-batch, see `build_batch`.
            single_documents: each document is a micro-batch of its own; steps hold the same rows as without.
            prefetch: steps built ahead by a thread; 0 builds each when it is asked for.

        Raises:
            ValueError: the micro-batches of all ranks do not divide the global batch.
            DataError: the whole run has fewer sequences than one global batch; shares that cannot be met.
        """
        if global_batch_size % (micro_batch_size * world):  # `recipe.check_world` tells the user before
            raise ValueError(f"{world} ranks x micro-batches of {micro_batch_size} do not divide {global_batch_size}")
        self.order: SampleOrder = train_order(prepared.lengths, prepared.source_rows(), table, seed=seed)
        self.global_batch_size = global_batch_size
        self._prepared = prepared
        self._max_length = table.max_length
        self._micro = micro_batch_size
        self._slice = global_batch_size // world
        self._rank = rank
        self._pad_to = pad_to
        self._world, self._single = world, single_documents
        self._prefetch = prefetch
        self.num_samples = self._sequences_of_run(epochs, max_steps)
        """Sequences of the whole run, on all ranks: what `TrainState.samples` counts up to."""
        if self.num_samples < global_batch_size:
            raise DataError(
                f"the run has {self.num_samples:,} sequences ({self.order.per_epoch:,} an epoch, from "
                f"{prepared.num_rows:,} rows), fewer than [train] global_batch_size = {global_batch_size}  "
                f"lower global_batch_size to {self.num_samples} or less, or train more epochs"
            )

    def _sequences_of_run(self, epochs: float | None, max_steps: int | None) -> int:
        assert epochs is not None or max_steps is not None
        ends = []
        if max_steps is not None:
            ends.append(max_steps * self.global_batch_size)
        if epochs is not None:
            whole = math.floor(epochs)
            start, end = self.order.start(whole), self.order.start(whole + 1)
            ends.append(start + math.ceil((epochs - whole) * (end - start)))
        return min(ends)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the run."""
        return math.ceil(self.num_samples / self.global_batch_size)

    @property
    def tokens_per_epoch(self) -> int:
        """Real tokens of the first epoch's rows (of every epoch, unless fractional weights make them differ)."""
        return int(self._prepared.lengths[self.order.rows(0)].sum(dtype=np.int64))

    @property
    def supervised_per_epoch(self) -> int:
        """Labels of the first epoch's rows."""
        return int(self._prepared.supervised[self.order.rows(0)].sum(dtype=np.int64))

    @property
    def fill(self) -> float:
        """Real tokens ÷ (sequences x max_length) in the first epoch."""
        return self.tokens_per_epoch / (self.order.per_epoch * self._max_length)

    def epoch_at(self, samples: int) -> float:
        """Return the epochs done once `samples` sequences are consumed."""
        epoch = self.order.epoch_of(samples)
        start = self.order.start(epoch)
        return epoch + (samples - start) / (self.order.start(epoch + 1) - start)

    def samples_in(self, step: int) -> int:
        """Return the sequences of a step (0-based) on all ranks: the global batch size, or less in the last step."""
        return min(self.global_batch_size, self.num_samples - step * self.global_batch_size)

    def from_step(self, step: int) -> Iterator[list[Batch]]:
        """Yield this rank's micro-batches of each step from `step` (0-based) on; seeking reads nothing."""
        steps = (self._step(index) for index in range(step, self.num_steps))
        return prefetched(steps, ahead=self._prefetch) if self._prefetch else steps

    @property
    def micro_batch_size(self) -> int:
        """Sequences of a micro-batch."""
        return self._micro

    def slice_of_rank(self, step: int) -> tuple[int, int]:
        """Return this rank's part of a full step: its first sequence, counted in the step, and how many."""
        return self._rank * self._slice, self._slice

    def sample_ids(self, step: int) -> tuple[str, ...]:
        """Return `file row N` of every document of a step, on all ranks, for messages."""
        return tuple(self._prepared.sample_id(row) for row in self.rows_in(step))

    def rows_in(self, step: int) -> np.ndarray:
        """Return the rows of a step (0-based) on all ranks, int64, in the order of the stream."""
        begin = step * self.global_batch_size
        return np.array(self._rows(begin, self.samples_in(step)), np.int64)

    def _step(self, step: int) -> list[Batch]:
        from distft.data.batch import build_batch

        if self._single:
            return self._single_step(step)
        begin = step * self.global_batch_size + self._rank * self._slice
        micros = []
        for position in range(begin, begin + self._slice, self._micro):
            rows = self._rows(position, self._micro)
            micros.append(
                build_batch(self._prepared, rows, position=position, pad_to=self._pad_to, max_length=self._max_length)
            )
        return micros

    def _rows(self, begin: int, count: int) -> list[int]:
        """Return the documents of some sequences of the stream; none behind the end of the run."""
        real = range(begin, min(begin + count, self.num_samples))
        return [int(row) for position in real for row in self.order.sequence(position)]

    def _single_step(self, step: int) -> list[Batch]:
        """Return one micro-batch a document; ranks with fewer end with empty ones, for all must run as many."""
        from distft.data.batch import build_batch

        begin = step * self.global_batch_size
        by_rank = [self._rows(begin + rank * self._slice, self._slice) for rank in range(self._world)]
        mine: list[list[int]] = [[row] for row in by_rank[self._rank]]
        mine += [[]] * (max(map(len, by_rank)) - len(mine))
        first = (begin + self._rank * self._slice) * self._max_length  # a sequence has at most as many documents
        return [
            build_batch(self._prepared, rows, position=first + number, max_length=self._max_length)
            for number, rows in enumerate(mine)
        ]


class EvalSteps(Sequence["Batch"]):
    """Held-out rows in a fixed order, each exactly once; as many micro-batches on every rank, the last may be empty."""

    def __init__(
        self,
        prepared: Prepared,
        table: DataTable,
        *,
        micro_batch_size: int,
        rank: int = 0,
        world: int = 1,
        pad_to: int | None = None,
        single_documents: bool = False,
        only: np.ndarray | None = None,
    ) -> None:
        """Arguments as for `Steps`; `only`: indices of the rows, all when None."""
        if single_documents:
            micro_batch_size = 1
        rows = np.arange(prepared.num_rows) if only is None else only
        order = SampleOrder(
            prepared.lengths,
            [rows],
            [len(rows)],
            seed=0,
            shuffle=False,
            packing=table.packing and not single_documents,
            max_length=table.max_length,
        )
        self._prepared = prepared
        self._epoch = order.epoch(0)
        self._micro, self._rank, self._world = micro_batch_size, rank, world
        self._pad_to, self._max_length = pad_to, table.max_length
        self.num_samples = len(self._epoch)
        """Sequences on all ranks."""

    def __len__(self) -> int:
        """Return the micro-batches of this rank, and of every other."""
        return math.ceil(self.num_samples / (self._micro * self._world))

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> list[Batch]: ...
    def __getitem__(self, index: int | slice) -> Batch | list[Batch]:
        """Build this rank's micro-batch `index`, anew each time."""
        from distft.data.batch import build_batch

        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        begin = (index % len(self) * self._world + self._rank) * self._micro
        real = range(begin, min(begin + self._micro, self.num_samples))
        rows = [row for sequence in real for row in self._epoch.sequence(sequence)]
        return build_batch(self._prepared, rows, position=begin, pad_to=self._pad_to, max_length=self._max_length)
