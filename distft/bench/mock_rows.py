"""Full-length mock rows: every sequence one row of `max_length` random tokens, all supervised. The ceiling.

A row is one document, or the documents that the objective trains together, which share its tokens.

Shape letters: T tokens of one micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from distft.core.types import IGNORE, Batch
from distft.data.prefetch import prefetched


class FullSteps:
    """Training steps of one rank; a sequence depends on the seed and its number only, not on who trains it."""

    def __init__(
        self,
        *,
        seed: int,
        vocabulary: int,
        max_length: int,
        num_steps: int,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world: int,
        group_size: int = 1,
        values: tuple[str, ...] = (),
    ) -> None:
        """As `distft.data.loader.Steps`; `values`: names of the rows' numbers, which are 0 and 1 in turns."""
        self._seed, self._vocabulary, self._length = seed, vocabulary, max_length
        self.num_steps = num_steps
        self._batch, self._micro = global_batch_size, micro_batch_size
        self._rank, self._slice = rank, global_batch_size // world
        self._group_size, self._values = group_size, values

    def samples_in(self, step: int) -> int:
        """Return the same number for every step."""
        return self._batch

    def epoch_at(self, samples: int) -> float:
        """Return 0: there are no epochs, as no row comes twice."""
        return 0.0

    def from_step(self, step: int) -> Iterator[list[Batch]]:
        """Yield the steps' micro-batches, built ahead by a thread, as real rows are."""
        return prefetched((self._step(index) for index in range(step, self.num_steps)), ahead=2)

    def _step(self, step: int) -> list[Batch]:
        begin = step * self._batch + self._rank * self._slice
        return [self._micro_batch(position) for position in range(begin, begin + self._slice, self._micro)]

    def _micro_batch(self, position: int) -> Batch:
        ids_T = torch.cat([self._sequence(position + offset) for offset in range(self._micro)])
        each, rest = divmod(self._length, self._group_size)
        lengths_D = torch.tensor([*[each] * (self._group_size - 1), each + rest] * self._micro)
        ends_D = lengths_D.cumsum(0)
        labels_T = ids_T.roll(-1)
        labels_T[ends_D - 1] = IGNORE
        numbers_G = (torch.arange(position, position + self._micro) % 2).float()
        return Batch(
            input_ids_T=ids_T,
            labels_T=labels_T,
            position_ids_T=torch.cat([torch.arange(int(length)) for length in lengths_D]),
            cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.int64), ends_D]).to(torch.int32),
            max_seqlen=int(lengths_D.max()),
            num_supervised=len(ids_T) - len(lengths_D),
            num_tokens=len(ids_T),
            sample_ids=tuple(f"mock row {position + offset}" for offset in range(self._micro)),
            position=position,
            group_sizes=(self._group_size,) * self._micro,
            columns=dict.fromkeys(self._values, numbers_G),
        )

    def _sequence(self, number: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed((self._seed << 32) + number)
        return torch.randint(self._vocabulary, (self._length,), generator=generator)
