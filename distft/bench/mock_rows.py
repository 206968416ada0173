"""Full-length mock rows: every sequence one document of `max_length` random tokens, all supervised. The ceiling.

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
    ) -> None:
        self._seed, self._vocabulary, self._length = seed, vocabulary, max_length
        self.num_steps = num_steps
        self._batch, self._micro = global_batch_size, micro_batch_size
        self._rank, self._slice = rank, global_batch_size // world

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
        labels_T = ids_T.roll(-1)
        labels_T[self._length - 1 :: self._length] = IGNORE
        return Batch(
            input_ids_T=ids_T,
            labels_T=labels_T,
            position_ids_T=torch.arange(self._length).repeat(self._micro),
            cu_seqlens=torch.arange(0, len(ids_T) + 1, self._length, dtype=torch.int32),
            max_seqlen=self._length,
            num_supervised=self._micro * (self._length - 1),
            num_tokens=len(ids_T),
            sample_ids=tuple(f"mock row {position + offset}" for offset in range(self._micro)),
            position=position,
        )

    def _sequence(self, number: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed((self._seed << 32) + number)
        return torch.randint(self._vocabulary, (self._length,), generator=generator)
