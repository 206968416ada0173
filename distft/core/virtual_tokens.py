"""Ids of virtual tokens: positions before every document whose embeddings a method trains, and no tokenizer writes."""

from __future__ import annotations

VIRTUAL_ID = 1 << 30
"""The first of them; above every vocabulary, and an int32."""


def virtual_ids(count: int) -> tuple[int, ...]:
    """Return the ids of the first `count` virtual tokens."""
    return tuple(range(VIRTUAL_ID, VIRTUAL_ID + count))
