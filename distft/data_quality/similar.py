"""Which rows are the same, or nearly: within training, and between training and evaluation.

Shape letters: N rows, P pairs, K minima of a signature.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from distft.data_quality.shingles import BANDS, band_keys, similarity

NEAR = 0.8
"""Estimated Jaccard similarity from which two rows are near."""
_PAIRS_AT_ONCE = 200_000
_PER_BUCKET = 8
"""Evaluation rows of one bucket that a training row is compared with."""


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Rows and what each is like."""

    row_P: np.ndarray
    """int64; each row at most once, ascending."""
    like_P: np.ndarray
    """int64; for `repeats` the earlier row, for overlap the training row."""
    similarity_P: np.ndarray
    """float64; 1.0 where equal."""


def repeats(hash_N: np.ndarray) -> Pairs:
    """Return rows whose hash an earlier row has; `like_P` is the first one. Hash 0: nothing to compare."""
    order = np.argsort(hash_N, kind="stable")
    ordered = hash_N[order]
    new = np.concatenate([[True], ordered[1:] != ordered[:-1]])[: len(ordered)]
    first_N = order[np.maximum.accumulate(np.where(new, np.arange(len(ordered)), 0))] if len(ordered) else order
    again = ~new & (ordered != 0)
    return _pairs(order[again], first_N[again], np.ones(int(again.sum())))


def near_repeats(minima_NK: np.ndarray) -> Pairs:
    """Return rows that an earlier row is near to; `like_P` is the nearest of those compared.

    A row is compared with the first and the previous row of each of its buckets, so the work stays linear also when a
    thousand rows are alike.
    """
    candidates: list[tuple[np.ndarray, np.ndarray]] = []
    for keys_N in band_keys(minima_NK):
        order = np.argsort(keys_N, kind="stable")
        ordered = keys_N[order]
        same = np.flatnonzero(ordered[1:] == ordered[:-1]) + 1
        if len(same):
            new = np.concatenate([[True], ordered[1:] != ordered[:-1]])
            first = np.maximum.accumulate(np.where(new, np.arange(len(ordered)), 0))
            candidates += [(order[same], order[first[same]]), (order[same], order[same - 1])]
    return _verified(candidates, minima_NK, minima_NK)


class EvalIndex:
    """Evaluation rows, to be asked which of them training rows are."""

    def __init__(self, minima_NK: np.ndarray) -> None:
        self._minima_NK = minima_NK
        keys = band_keys(minima_NK)
        self._order = [np.argsort(keys[band], kind="stable") for band in range(BANDS)]
        self._keys = [keys[band][self._order[band]] for band in range(BANDS)]

    def near(self, train_NK: np.ndarray) -> Pairs:
        """Return evaluation rows (`row_P`) near to some of these training rows, with the nearest one (`like_P`)."""
        candidates: list[tuple[np.ndarray, np.ndarray]] = []
        for band, keys_N in enumerate(band_keys(train_NK)):
            begin = np.searchsorted(self._keys[band], keys_N)
            for step in range(_PER_BUCKET):
                position = begin + step
                hit = np.flatnonzero(position < len(self._keys[band]))
                hit = hit[self._keys[band][position[hit]] == keys_N[hit]]
                if not len(hit):
                    break
                candidates.append((self._order[band][position[hit]], hit))
        return _verified(candidates, self._minima_NK, train_NK)


def nearest(parts: list[Pairs]) -> Pairs:
    """Return, of several finds for a row, the most similar."""
    if not parts:
        return _pairs(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))
    return _best(
        np.concatenate([part.row_P for part in parts]),
        np.concatenate([part.like_P for part in parts]),
        np.concatenate([part.similarity_P for part in parts]),
    )


def _verified(candidates: list[tuple[np.ndarray, np.ndarray]], rows_NK: np.ndarray, likes_NK: np.ndarray) -> Pairs:
    """Return the candidates whose signatures are near."""
    if not candidates:
        return nearest([])
    rows, likes = (np.concatenate(side) for side in zip(*candidates, strict=True))
    row_P, like_P = np.divmod(np.unique(rows * len(likes_NK) + likes), len(likes_NK))  # pairs as one number: fast
    near = np.concatenate(
        [
            similarity(rows_NK[row_P[start : start + _PAIRS_AT_ONCE]], likes_NK[like_P[start : start + _PAIRS_AT_ONCE]])
            for start in range(0, len(row_P), _PAIRS_AT_ONCE)
        ]
    )
    keep = near >= NEAR
    return _best(row_P[keep], like_P[keep], near[keep])


def _best(row_P: np.ndarray, like_P: np.ndarray, similarity_P: np.ndarray) -> Pairs:
    order = np.lexsort((like_P, -similarity_P, row_P))
    row_P, like_P, similarity_P = row_P[order], like_P[order], similarity_P[order]
    first = np.concatenate([[True], row_P[1:] != row_P[:-1]])[: len(row_P)]
    return Pairs(row_P=row_P[first], like_P=like_P[first], similarity_P=similarity_P[first])


def _pairs(row_P: np.ndarray, like_P: np.ndarray, similarity_P: np.ndarray) -> Pairs:
    order = np.argsort(row_P)
    return Pairs(row_P=row_P[order], like_P=like_P[order], similarity_P=similarity_P[order])
