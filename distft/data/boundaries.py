"""Which token a character belongs to, from the lengths of tokens: a tokenizer that need not tell is a third faster.

Under byte-level BPE (GPT-2's alphabet) every character of a token's name stands for one byte, so lengths add up to the
place in the text. That they do add up to the whole of it is checked for each text; where they do not, and under other
tokenizers, the tokenizer is asked for its offsets.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np

from distft.data.drafts import Span

_PATIENCE = 16
"""Texts that may not add up, beyond those that did, before no more are tried."""


class ByteLengths:
    """Of every token of a byte-level tokenizer."""

    def __init__(self, backend: Any) -> None:
        vocabulary: dict[str, int] = backend.get_vocab(with_added_tokens=True)
        self._length_V = np.zeros(max(vocabulary.values(), default=0) + 1, np.int64)
        for name, token in vocabulary.items():
            self._length_V[token] = len(name)
        for token, added in backend.get_added_tokens_decoder().items():
            self._length_V[token] = len(added.content.encode())
        self._normalises = backend.normalizer is not None
        self._matched = self._missed = 0

    def can_tell(self, text: str, spans: Sequence[Span]) -> bool:
        """Return whether the result equals the tokenizer's offsets, which may leave out a space before a word."""
        if self._missed > self._matched + _PATIENCE:  # one that adds a space of its own, say
            return False
        if self._normalises and not text.isascii() and not unicodedata.is_normalized("NFC", text):
            return False
        return not any(position < len(text) and text[position] == " " for span in spans for position in span)

    def trained(self, ids_T: np.ndarray, text: str, spans: Sequence[Span]) -> np.ndarray | None:
        """Return a bool for each token: whether it lies in a span of characters.

        A span's tokens go from the one that holds its first character up to the one that holds what follows it. None:
        the tokens do not add up to the text, or one covers both a span's first character and what stands before it.
        """
        end_T = self._length_V[ids_T].cumsum()
        ascii_only = text.isascii()
        whole = end_T[-1] if len(end_T) else 0
        if whole != (len(text) if ascii_only else len(text.encode())):
            self._missed += 1
            return None
        self._matched += 1
        trained_T = np.zeros(len(ids_T), np.bool_)
        for span in spans:
            first, behind = (position if ascii_only else len(text[:position].encode()) for position in span)
            begin, end = np.searchsorted(end_T, (first, behind), side="right")
            if first and first < whole and end_T[begin - 1] != first:
                return None
            trained_T[begin:end] = True
        return trained_T


def byte_lengths(backend: Any) -> ByteLengths | None:
    """Return the byte lengths of a tokenizer's backend; None where it is of another kind."""
    from tokenizers import decoders, normalizers

    if not isinstance(backend.decoder, decoders.ByteLevel):
        return None
    if backend.normalizer is not None and not isinstance(backend.normalizer, normalizers.NFC):
        return None
    return ByteLengths(backend)
