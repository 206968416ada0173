"""A model of the tiny kind in this process, as a generator."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from tiny import CPU, build

from distft.core.types import UpdateRule
from distft.engine.params import EngineParams
from distft.engine.processes import Processes
from distft.engine.solo import SoloEngine, open_engine
from distft.generation.generator import Generator

ALONE = Processes(rank=0, world=1, local_rank=0, device=CPU, launcher="plain", wants="", joined=False)
RULE = UpdateRule(
    build=lambda groups: torch.optim.SGD(groups, lr=0.1),
    lr_at=lambda step: 0.1,
    weight_decay=0.0,
    decayed=frozenset(),
    max_grad_norm=None,
)


def opened(
    folder: Path, method: str = "full", *, device: torch.device = CPU, dtype: str = "float32", **params
) -> tuple[SoloEngine, Generator]:
    """A model of random weights that a solo engine holds, and its generator."""
    built = build(folder, method, fill=False, params=params, device=device, dtype=dtype)
    engine = open_engine("solo", EngineParams(), replace(ALONE, device=device))
    engine.setup(built, RULE, micros_per_step=1)
    return engine, generator(engine, built.module)


def generator(engine: SoloEngine, module, stop_ids=(7,), stop=lambda: False) -> Generator:
    """Its text is its tokens."""
    return Generator(engine, module, decode=lambda ids: " ".join(map(str, ids)), stop_ids=stop_ids, stop=stop)
