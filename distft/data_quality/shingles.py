"""Texts -> MinHash signatures, for whole batches at once in numpy: some 10 MB of text a second and core.

Rows are near when their sets of word 5-grams are: Jaccard similarity, which MinHash estimates from 126 minima. 5-grams
and a similarity of 0.8 follow Lee et al. 2022, Deduplicating Training Data Makes Language Models Better,
https://arxiv.org/abs/2107.06499; MinHash: Broder 1997, https://doi.org/10.1109/SEQUEN.1997.666900.

Shape letters: B bytes, W words, S shingles, N rows, K minima. All arithmetic is modulo 2**64 (2**32 for minima).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

WORDS = 5
"""Words in a shingle; a shorter text is one shingle."""
BANDS, BAND_ROWS = 21, 6
"""Rows of similarity 0.8 share one of the bands' keys with probability 0.998, of 0.6 with 0.64, of 0.3 with 0.02."""
NUM_MINIMA = BANDS * BAND_ROWS
_BATCH_BYTES = 2 << 20
_BOILERPLATE = 0.2
_BOILERPLATE_FROM = 50
_FEWEST_LEFT = 3
_NO_SPACES = re.compile("([\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\u0e00-\u0e7f])")
"""Scripts written without spaces: each character counts as a word."""

_IS_WORD = np.zeros(256, bool)
_IS_WORD[[byte for byte in range(128) if chr(byte).isalnum()]] = True
_IS_WORD[128:] = True  # letters of every other script, in UTF-8
_ODD = 0x9E3779B97F4A7C15
_random = np.random.default_rng(0x5EED)
_FACTORS_K = _random.integers(0, 2**32, NUM_MINIMA, np.uint32) | np.uint32(1)
_OFFSETS_K = _random.integers(0, 2**32, NUM_MINIMA, np.uint32)


def mixed(values: np.ndarray) -> np.ndarray:
    """Mix uint64 one to one, every bit depending on all (splitmix64's finaliser)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def span_hashes(values: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Return uint64, one for each half-open span of `values`; equal spans give equal hashes wherever they are.

    A polynomial in an odd base: the prefix sums' difference, shifted back to where the span would start at 0.
    """
    powers = _powers(_ODD, len(values))
    sums = np.zeros(len(values) + 1, np.uint64)
    np.cumsum((values.astype(np.uint64) + np.uint64(1)) * powers[: len(values)], out=sums[1:])
    back = _powers(pow(_ODD, -1, 2**64), len(values))
    return mixed((sums[ends] - sums[begins]) * back[begins] + (ends - begins).astype(np.uint64))


_KNOWN_POWERS: dict[int, np.ndarray] = {}


def _powers(base: int, count: int) -> np.ndarray:
    powers = _KNOWN_POWERS.get(base)
    if powers is None or len(powers) < count:
        factors = np.full(max(count, _BATCH_BYTES), base, np.uint64)
        factors[0] = 1
        powers = _KNOWN_POWERS[base] = np.cumprod(factors)
    return powers


@dataclass(frozen=True, kw_only=True)
class Shingled:
    """Shingles of some rows, end to end."""

    hashes_S: np.ndarray
    """uint64."""
    counts_N: np.ndarray
    """int64; shingles of each row; 0 for a text without words."""


def shingle(texts: Sequence[str]) -> Shingled:
    """Return the word 5-grams of each text, without regard to case, punctuation and white space."""
    encoded = [_prepared(text).encode("utf-8", errors="replace") for text in texts]
    bytes_B = np.frombuffer(b"\n".join(encoded) + b"\n", np.uint8)
    row_begins_N = np.concatenate([[0], np.cumsum([len(prepared) + 1 for prepared in encoded])[:-1]])
    word_B = np.concatenate([[False], _IS_WORD[bytes_B], [False]])
    edges = np.flatnonzero(word_B[1:] != word_B[:-1])
    begins_W, ends_W = edges[::2], edges[1::2]
    words_W = span_hashes(bytes_B, begins_W, ends_W)
    words_N = np.bincount(np.searchsorted(row_begins_N, begins_W, side="right") - 1, minlength=len(texts))
    counts_N = np.where(words_N > 0, np.maximum(words_N - WORDS + 1, 1), 0)
    first_word_N = np.cumsum(words_N) - words_N
    begins_S = _ranges(first_word_N, counts_N)
    ends_S = begins_S + np.repeat(np.minimum(words_N, WORDS), counts_N)
    return Shingled(hashes_S=span_hashes(words_W, begins_S, ends_S), counts_N=counts_N)


def boilerplate(texts: Sequence[str]) -> np.ndarray:
    """Return the shingles that a fifth of these rows share: uint64, sorted.

    An instruction that every prompt repeats would make all rows near. Empty for fewer than 50 rows, of which a fifth is
    no pattern.
    """
    if len(texts) < _BOILERPLATE_FROM:
        return np.zeros(0, np.uint64)
    seen = [np.unique(shingled.hashes_S[begin:end]) for shingled, begin, end in _rows_of(texts)]
    kinds, count = np.unique(np.concatenate(seen), return_counts=True)
    return kinds[count >= _BOILERPLATE * len(texts)]


def signatures(texts: Sequence[str], common: np.ndarray) -> np.ndarray:
    """Return uint32 [N, K]; minima of each row's shingles, `common` ones left out unless hardly any would be left.

    The share of equal minima of two rows estimates their similarity, with a standard error below 0.045. A text
    without words has the largest number everywhere.
    """
    parts = [np.zeros((0, NUM_MINIMA), np.uint32)]
    parts += [_signed(shingle(batch), common) for batch in batches(texts)]
    return np.concatenate(parts)


def _signed(made: Shingled, common: np.ndarray) -> np.ndarray:
    hashes_S, counts_N = made.hashes_S, made.counts_N
    if len(common):
        position = np.minimum(np.searchsorted(common, hashes_S), len(common) - 1)
        own_S = common[position] != hashes_S
        row_S = np.repeat(np.arange(len(counts_N)), counts_N)
        left_N = np.bincount(row_S[own_S], minlength=len(counts_N))
        own_S |= (left_N < _FEWEST_LEFT)[row_S]
        hashes_S = hashes_S[own_S]
        counts_N = np.where(left_N < _FEWEST_LEFT, counts_N, left_N)
    short_S = (hashes_S >> np.uint64(32)).astype(np.uint32)
    minima_NK = np.full((len(counts_N), NUM_MINIMA), np.iinfo(np.uint32).max, np.uint32)
    filled_N = np.flatnonzero(counts_N)
    if len(filled_N):
        begins = (np.cumsum(counts_N) - counts_N)[filled_N]
        permuted_S = np.empty_like(short_S)
        for k in range(NUM_MINIMA):
            np.multiply(short_S, _FACTORS_K[k], out=permuted_S)
            permuted_S += _OFFSETS_K[k]
            minima_NK[filled_N, k] = np.minimum.reduceat(permuted_S, begins)
    return minima_NK


def band_keys(minima_NK: np.ndarray) -> np.ndarray:
    """Return uint64 [BANDS, N]; rows that share a key in some band are compared. Rows without words share none."""
    keys = np.zeros((BANDS, len(minima_NK)), np.uint64)
    for band in range(BANDS):
        key = np.full(len(minima_NK), band + 1, np.uint64)
        for column in minima_NK[:, band * BAND_ROWS : (band + 1) * BAND_ROWS].T:
            key = mixed(key ^ column)
        keys[band] = key
    empty_N = np.flatnonzero((minima_NK == np.iinfo(np.uint32).max).all(axis=1))
    keys[:, empty_N] = mixed(empty_N.astype(np.uint64) + np.uint64(_ODD))
    return keys


def similarity(one_PK: np.ndarray, other_PK: np.ndarray) -> np.ndarray:
    """Return float64 [P]; estimated Jaccard similarity of pairs of rows."""
    return (one_PK == other_PK).mean(axis=1)


def batches(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """Yield runs of texts of about 2 MB; a longer text is a batch of its own."""
    begin = size = 0
    for index, text in enumerate(texts):
        size += len(text)
        if size > _BATCH_BYTES and index > begin:
            yield texts[begin:index]
            begin, size = index, len(text)
    if begin < len(texts):
        yield texts[begin:]


def _rows_of(texts: Sequence[str]) -> Iterator[tuple[Shingled, int, int]]:
    for batch in batches(texts):
        made = shingle(batch)
        ends = np.cumsum(made.counts_N)
        for count, end in zip(made.counts_N.tolist(), ends.tolist(), strict=True):
            yield made, end - count, end


def _prepared(text: str) -> str:
    text = text.lower()
    return text if text.isascii() else _NO_SPACES.sub(r" \1 ", text)


def _ranges(firsts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return `first, first + 1, …` for each row, `count` of them, end to end."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) - np.repeat(ends - counts - firsts, counts)
