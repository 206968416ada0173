"""A tiny model, filled, and batches for it: what tests of the model room share."""

import json
from pathlib import Path

import torch

from distft.core.types import IGNORE, Batch
from distft.model import load
from distft.model.adapters import METHODS
from distft.model.heads import HEADS
from distft.model.paths import ForwardPath
from distft.recipe import ModelTable

CPU = torch.device("cpu")


def build(
    folder: Path,
    method: str = "full",
    *,
    fill: bool = True,
    seed: int = 1,
    params: dict | None = None,
    device: torch.device = CPU,
    head: str = "lm",
    computed_by: ForwardPath | None = None,
    **model,
):
    table = ModelTable(path=str(folder), **({"init": "random", "dtype": "float32"} | model))
    spec = METHODS[method]
    chosen = spec.params.model_validate_json(json.dumps(params or {}))
    built = load.build(
        table, load.find_folder(table), spec, chosen, seed=seed, device=device, head=HEADS[head], path=computed_by
    )
    if fill:
        built.fill(built.module, device)
    return built


def batch(documents: list[list[int]], *, trained_from: int = 1) -> Batch:
    """Documents end to end; every token from index `trained_from` of each is trained."""
    labels, positions, bounds = [], [], [0]
    for ids in documents:
        labels += [ids[i + 1] if i + 1 >= trained_from else IGNORE for i in range(len(ids) - 1)] + [IGNORE]
        positions += list(range(len(ids)))
        bounds.append(bounds[-1] + len(ids))
    flat = torch.tensor([i for ids in documents for i in ids])
    return Batch(
        input_ids_T=flat,
        labels_T=torch.tensor(labels),
        position_ids_T=torch.tensor(positions),
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        max_seqlen=max(map(len, documents)),
        num_supervised=sum(label != IGNORE for label in labels),
        num_tokens=len(flat),
    )


def documents(lengths: list[int], *, seed: int = 0, vocabulary: int = 256) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocabulary, (n,), generator=generator).tolist() for n in lengths]
