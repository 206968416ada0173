"""Rows made of others: a prompt with the answer of another row, by which KTO estimates how far the policy has gone.

Shape letters: N prepared rows, M pairs of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property

import numpy as np

from distft.data.store import Prepared


class MismatchedRows(Prepared):
    """The prompts of some prepared rows, each followed by the answer of the row before it in its batch.

    Each pair of rows that occurs is there once. The answer is cut where both are longer than a sequence.
    """

    def __init__(self, prepared: Prepared, batches: Iterable[np.ndarray], *, max_length: int) -> None:
        """Pair the rows of some batches.

        Args:
            prepared: rows of one document each.
            batches: the rows of each batch, in order; the first is paired with the last.
            max_length: tokens in a sequence.
        """
        assert prepared.group_size == 1
        self._prepared, self._max_length = prepared, max_length
        codes = [self._codes(rows) for rows in batches]
        self._codes_M = np.unique(np.concatenate(codes)) if codes else np.zeros(0, np.int64)
        self.folder, self.from_cache = prepared.folder, prepared.from_cache
        self.report = replace(prepared.report, values=(), fingerprint=self._fingerprint())

    def _codes(self, rows: np.ndarray) -> np.ndarray:
        rows = np.asarray(rows, np.int64)
        return rows * self._prepared.num_rows + np.roll(rows, 1)

    def _fingerprint(self) -> str:
        facts = f"{self._prepared.fingerprint} {self._max_length} ".encode()
        return hashlib.sha256(facts + self._codes_M.astype("<i8").tobytes()).hexdigest()

    def of_batch(self, rows: np.ndarray) -> np.ndarray:
        """Return the indices here of what is made of a batch's rows, which are given in order."""
        return np.searchsorted(self._codes_M, self._codes(rows))

    @cached_property
    def _starts_N(self) -> np.ndarray:
        """Tokens before the answer of each prepared row."""
        rows = range(self._prepared.num_rows)
        return np.array([int(np.argmax(self._prepared.row(row)[1])) for row in rows], np.int64)

    @cached_property
    def lengths(self) -> np.ndarray:
        """int32 [M]; tokens of each row."""
        prompt_M, answer_M = np.divmod(self._codes_M, self._prepared.num_rows)
        whole_M = self._starts_N[prompt_M] + (self._prepared.lengths - self._starts_N)[answer_M]
        return np.minimum(whole_M, self._max_length).astype(np.int32)

    @cached_property
    def supervised(self) -> np.ndarray:
        """int32 [M]; labels of each row."""
        return np.array([int(self.row(index)[1][1:].sum()) for index in range(len(self._codes_M))], np.int32)

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (ids_T int32, trained_T uint8) of a row."""
        prompt, answer = divmod(int(self._codes_M[index]), self._prepared.num_rows)
        ids_T, trained_T = self._prepared.row(prompt)
        end, begin = self._starts_N[prompt], self._starts_N[answer]
        more_T, judged_T = self._prepared.row(answer)
        ids_T = np.concatenate([ids_T[:end], more_T[begin:]])[: self._max_length]
        return ids_T, np.concatenate([trained_T[:end], judged_T[begin:]])[: self._max_length]

    def documents(self, index: int) -> list[int]:
        """Return the tokens of a row, which is one document."""
        return [int(self.lengths[index])]

    def sample_id(self, index: int) -> str:
        """Return where prompt and answer come from."""
        prompt, answer = divmod(int(self._codes_M[index]), self._prepared.num_rows)
        return f"{self._prepared.sample_id(prompt)} with the answer of {self._prepared.sample_id(answer)}"

    def source_rows(self) -> list[np.ndarray]:
        """Return all rows: they are of one source."""
        return [np.arange(self.num_rows)]
