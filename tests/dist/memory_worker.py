"""Adopts a model under one engine and notes, after every fill, how many bytes of weights this rank holds."""

import json
import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from distft.core.leave import leave
from distft.core.types import UpdateRule
from distft.engine import ENGINES, processes
from distft.model import load
from distft.model.adapters import METHODS
from distft.recipe import ModelTable


def held(module: torch.nn.Module) -> int:
    total = 0
    for param in module.parameters():
        local = param.to_local() if isinstance(param, DTensor) else param
        if not local.is_meta:
            total += local.numel() * local.element_size()
        if getattr(param, "ds_tensor", None) is not None:
            total += param.ds_tensor.numel() * param.ds_tensor.element_size()
    return total


def main() -> None:
    engine_name, model, out = sys.argv[1:]
    placed = processes.join()
    spec = ENGINES[engine_name]
    engine = spec.open(spec.params(), placed)
    method = METHODS["full"]
    table = ModelTable(path=model, dtype="float32")
    built = load.build(table, Path(model), method, method.params(), seed=0, device=placed.device)
    whole = sum(p.numel() * 4 for p in built.module.parameters())
    rest = whole - sum(p.numel() * 4 for block in built.blocks for p in block.parameters())
    largest = max(rest, *(sum(p.numel() * 4 for p in block.parameters()) for block in built.blocks))
    seen = []
    fill = built.fill

    def noting(unit: torch.nn.Module, device: torch.device) -> None:
        fill(unit, device)
        seen.append(held(built.module))

    built.fill = noting  # type: ignore[method-assign]
    sgd = UpdateRule(
        build=lambda groups: torch.optim.SGD(groups, lr=0.1),
        lr_at=lambda step: 0.1,
        weight_decay=0.0,
        decayed=frozenset(),
        max_grad_norm=None,
    )
    engine.adopt(built, sgd, micros_per_step=1)
    facts = {"whole": whole, "largest_unit": largest, "peak": max(seen), "after": held(built.module)}
    Path(f"{out}.{placed.rank}").write_text(json.dumps(facts))
    engine.close()


if __name__ == "__main__":
    main()
    leave(0)
