"""Groups of documents with one prompt -> segments: the prompt once, and what follows it in each document.

The last token of the prompt stays with every answer, because its label is that answer's first token.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from distft.core.types import IGNORE

Labelled = tuple[np.ndarray, np.ndarray]
"""Token ids of a document and its labels, both of its length."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A piece of a micro-batch whose tokens attend to themselves and to a prompt before them."""

    ids_T: np.ndarray
    labels_T: np.ndarray
    prompt: int | None = None
    """Index of the segment whose tokens its document begins with; None: it begins by itself."""
    is_document: bool = True
    """A document ends with it; a shared prompt is none."""
    start: int = 0
    """Position of its first token in the document."""


def segments_of(documents: Sequence[Labelled], group_sizes: Sequence[int]) -> list[Segment]:
    """Return the segments of documents in their order, a group's prompt before its answers."""
    segments: list[Segment] = []
    left = iter(documents)
    for size in group_sizes:
        group = [next(left) for _ in range(size)]
        length = _shared_length(group)
        prompt = len(segments) if length else None
        if length:
            ids_T, labels_T = group[0]
            segments.append(Segment(ids_T=ids_T[:length], labels_T=labels_T[:length], is_document=False))
        for ids_T, labels_T in group:
            segments.append(Segment(ids_T=ids_T[length:], labels_T=labels_T[length:], prompt=prompt, start=length))
    return segments


def _shared_length(group: Sequence[Labelled]) -> int:
    """Return how many tokens all documents begin with, before the first one that has a label in any of them."""
    if len(group) < 2:
        return 0
    length = min(int(np.argmax(labels_T != IGNORE)) for _, labels_T in group)
    first = group[0][0]
    for ids_T, _ in group[1:]:
        differs = first[:length] != ids_T[:length]
        length = int(np.argmax(differs)) if differs.any() else length
    return length


def keys_of(segments: Sequence[Segment], bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions that each segment attends to, int64 [K], and where each one's begin, int32 [segments + 1].

    Args:
        segments: of a micro-batch; what lies behind them attends to itself.
        bounds: [segments + 1], where they begin, and the end; with filler behind them, further ends.
    """
    places = [np.arange(begin, end) for begin, end in itertools.pairwise(bounds)]
    prompts = [segment.prompt for segment in segments] + [None] * (len(places) - len(segments))
    keys = [
        own if prompt is None else np.concatenate([places[prompt], own])
        for own, prompt in zip(places, prompts, strict=True)
    ]
    return np.concatenate(keys), np.cumsum([0, *map(len, keys)]).astype(np.int32)
