"""Micro-batches of a proof's texts, as a run would have them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from distft.core.types import IGNORE


def probe_batch(documents: Sequence[Tensor]) -> dict[str, Any]:
    """Return `Batch.inputs()` of documents laid end to end, every token but each first one a label."""
    device = documents[0].device
    lengths = [len(ids) for ids in documents]
    labels = [torch.cat([ids[1:], ids.new_full((1,), IGNORE)]) for ids in documents]
    bounds = [0]
    for length in lengths:
        bounds.append(bounds[-1] + length)
    return {
        "input_ids_T": torch.cat(list(documents)),
        "labels_T": torch.cat(labels),
        "position_ids_T": torch.cat([torch.arange(length, device=device) for length in lengths]),
        "cu_seqlens": torch.tensor(bounds, dtype=torch.int32, device=device),
        "max_seqlen": max(lengths),
        "num_supervised": sum(lengths) - len(lengths),
    }


def in_two(batch: dict[str, Any]) -> dict[str, Any]:
    """Return the batch with each document cut into a prompt and what follows it, as under shared prefixes."""
    bounds = batch["cu_seqlens"].tolist()
    device = batch["cu_seqlens"].device
    cuts, keys, bounds_of_keys = [0], list[int](), [0]
    for begin, end in pairwise(bounds):
        middle = begin + (end - begin) // 2
        for cut, last in {middle: middle, end: end}.items():
            if last > begin:
                cuts.append(cut)
                keys += range(begin, last)
                bounds_of_keys.append(len(keys))
    return batch | {
        "cu_seqlens": torch.tensor(cuts, dtype=torch.int32, device=device),
        "max_seqlen": max(end - begin for begin, end in pairwise(cuts)),
        "keys_K": torch.tensor(keys, dtype=torch.int64, device=device),
        "cu_seqlens_k": torch.tensor(bounds_of_keys, dtype=torch.int32, device=device),
        "max_seqlen_k": max(end - begin for begin, end in pairwise(bounds_of_keys)),
    }
