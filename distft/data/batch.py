"""Rows -> one micro-batch: documents end to end, labels shifted inside each. The only file of the room with torch.

Shape letters: T tokens of the micro-batch, D documents in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from distft.core.types import IGNORE, Batch
from distft.data.store import Prepared

TokenDocument = tuple[Sequence[int] | np.ndarray, Sequence[bool] | np.ndarray]
"""Token ids of a document, and whether each is supervised; both of its length."""

FILLER_ID = 0
"""Token of positions that only fill up: never a label, in documents of their own."""


def build_batch(
    prepared: Prepared, rows: Sequence[int], *, position: int, pad_to: int | None = None, max_length: int
) -> Batch:
    """Return the micro-batch of these rows, in this order.

    Args:
        prepared: where the rows are.
        rows: a document each, or a group of them; none gives one filler token, so that every rank runs the same number
            of micro-batches.
        position: see `Batch.position`.
        pad_to: fill up to this many tokens, in filler documents of at most `max_length`, for compiled graphs.
        max_length: tokens in a sequence.

    Raises:
        ValueError: the rows hold more than `pad_to` tokens.
    """
    import torch

    documents: list[TokenDocument] = []
    for row in rows:
        ids_T, trained_T = prepared.row(row)
        ends = np.cumsum(prepared.documents(row))[:-1]
        parts = zip(np.split(ids_T, ends), np.split(trained_T, ends), strict=True)
        documents += [(ids, trained) for ids, trained in parts]
    batch = pack_documents(
        documents,
        group_sizes=(prepared.group_size,) * len(rows),
        sample_ids=tuple(prepared.sample_id(row) for row in rows),
        position=position,
        pad_to=pad_to,
        max_length=max_length,
    )
    values = prepared.values(rows) if prepared.report.values else {}
    columns = {name: torch.from_numpy(column) for name, column in values.items()}
    return replace(batch, rows=tuple(rows), rows_sha256=prepared.fingerprint, columns=columns)


def pack_documents(
    documents: Sequence[TokenDocument],
    *,
    group_sizes: tuple[int, ...],
    sample_ids: tuple[str, ...],
    position: int,
    pad_to: int | None = None,
    max_length: int,
) -> Batch:
    """Return the micro-batch of these documents, in this order.

    Args:
        documents: token ids, and which of them are supervised; none gives one filler token.
        group_sizes: documents of each group, in order.
        sample_ids: names of the groups' rows, for messages.
        position: see `Batch.position`.
        pad_to: fill up to this many tokens, in filler documents of at most `max_length`.
        max_length: tokens in a sequence.

    Raises:
        ValueError: the documents hold more than `pad_to` tokens.
    """
    import torch

    ids, labels = [], []
    for tokens, supervised in documents:
        ids_T = np.asarray(tokens, np.int64)
        labels_T = np.full(len(ids_T), IGNORE, np.int64)  # nothing follows the last token of a document
        labels_T[:-1] = np.where(np.asarray(supervised, bool)[1:], ids_T[1:], IGNORE)
        ids.append(ids_T)
        labels.append(labels_T)
    lengths = [len(ids_T) for ids_T in ids]
    num_tokens = sum(lengths)
    filler = _filler(num_tokens, pad_to, max_length)
    ids.append(np.full(sum(filler), FILLER_ID))
    labels.append(np.full(sum(filler), IGNORE))
    lengths_D = np.array([*lengths, *filler], np.int64)
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths_D)])
    labels_T = np.concatenate(labels).astype(np.int64)
    positions_T = np.arange(cu_seqlens[-1]) - np.repeat(cu_seqlens[:-1], lengths_D)
    return Batch(
        input_ids_T=torch.from_numpy(np.concatenate(ids).astype(np.int64)),
        labels_T=torch.from_numpy(labels_T),
        position_ids_T=torch.from_numpy(positions_T),
        cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
        max_seqlen=int(lengths_D.max()),
        num_supervised=int((labels_T != IGNORE).sum()),
        num_tokens=num_tokens,
        sample_ids=sample_ids,
        position=position,
        group_sizes=group_sizes,
    )


def _filler(num_tokens: int, pad_to: int | None, max_length: int) -> list[int]:
    """Lengths of the filler documents."""
    if pad_to is None:
        return [] if num_tokens else [1]
    if num_tokens > pad_to:
        raise ValueError(f"{num_tokens} tokens do not fit into pad_to = {pad_to}")
    full, rest = divmod(pad_to - num_tokens, max_length)
    return [max_length] * full + [rest] * (rest > 0)
