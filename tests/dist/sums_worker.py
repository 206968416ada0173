"""One optimizer step of many micro-batches under many engines, and how far its gradient is from an exact sum.

usage: torchrun --nproc-per-node N tests/dist/sums_worker.py CASES.json OUT
CASES: [{"name", "model", "engine", "engine_params", "method", "dtype", "micros"}]; OUT gets name -> figures.
"""

import gc
import json
import sys
import traceback
from functools import cache
from pathlib import Path

import torch
from tiny import batch, documents
from torch import Tensor

from distft.core.hard_exit import hard_exit
from distft.core.types import Batch, LossTerms, TrainState, UpdateRule
from distft.engine import ENGINES, processes
from distft.model import load
from distft.model.adapters import METHODS
from distft.model.load import MetaModel
from distft.recipe import ModelTable

WEIGHT = 24.0


def built(model: str, method: str, dtype: str, device: torch.device) -> MetaModel:
    params = METHODS[method].params(**({"r": 4} if method == "lora" else {}))
    table = ModelTable(path=model, dtype=dtype, init="random")
    return load.build(table, Path(model), METHODS[method], params, seed=0, device=device)


def rows_of(micro: int, rank: int, world: int) -> Batch:
    """Six micro-batches that come again and again: gradients agree in part, as those of real rows do."""
    return batch(documents([17, 9], seed=(micro * world + rank) % 6))


@cache
def exact(model: str, method: str, dtype: str, micros: int, world: int) -> dict[str, Tensor]:
    """The step's gradient by a plain loop: each micro-batch's, in the model's type, added in fp64."""
    whole = built(model, method, dtype, torch.device("cpu"))
    for unit in [*whole.blocks, whole.module]:
        whole.fill(unit, torch.device("cpu"))
    total: dict[str, Tensor] = {}
    for seed in range(6):
        times = sum((m * world + r) % 6 == seed for m in range(micros) for r in range(world))
        whole.module.zero_grad()
        loss = whole.module(**batch(documents([17, 9], seed=seed)).inputs()).sum()
        (loss / (WEIGHT * micros * world)).backward()
        for name, param in whole.module.named_parameters():
            if param.grad is not None:
                total[name] = total.get(name, 0) + times * param.grad.double().flatten()
    return total


def measure(case: dict, placed: processes.Processes) -> dict[str, float]:
    spec, micros = ENGINES[case["engine"]], case["micros"]
    whole = built(case["model"], case["method"], case["dtype"], placed.device)
    rule = UpdateRule(
        build=lambda groups: torch.optim.SGD(groups, lr=1.0),
        lr_at=lambda step: 1.0,
        weight_decay=0.0,
        decayed=frozenset(name for name, param in whole.module.named_parameters() if param.ndim >= 2),
        max_grad_norm=None,
        per_tensor=True,
    )
    engine = spec.open(spec.params.model_validate_json(json.dumps(case["engine_params"])), placed)
    try:
        engine.setup(whole, rule, micros_per_step=micros)
        before = {(piece.name, piece.start): piece.data.clone() for piece in engine.pieces()}
        weight = WEIGHT * micros * placed.world
        for micro in range(micros):
            with engine.accumulating(last=micro == micros - 1, seed=0):
                loss = engine.model(**rows_of(micro, placed.rank, placed.world).inputs()).sum()
                engine.backward(LossTerms(loss_sum=loss), divide_by=weight, samples=())
        report = engine.step(TrainState(), weight, lambda loss: True)
        assert report.updated
        found = {"grad_norm": report.grad_norm}
        for kind in (case["dtype"], "float32"):
            plain = exact(case["model"], case["method"], kind, micros, placed.world)
            squares = wrong = along = 0.0
            for piece in engine.pieces():
                if piece.name.startswith("param/"):
                    moved = (before[piece.name, piece.start] - piece.data).double()
                    theirs = plain[piece.name.removeprefix("param/")][piece.start : piece.start + len(moved)]
                    wrong += (moved - theirs).square().sum().item()
                    squares += theirs.square().sum().item()
                    along += (moved * theirs).sum().item()
            wrong, squares, along = engine.sum_over_ranks(wrong, squares, along)
            norm = sum(value.square().sum().item() for value in plain.values()) ** 0.5
            assert abs(squares / norm**2 - 1) < 1e-9, "every element is held once"
            found |= {f"error_{kind}": (wrong / squares) ** 0.5, f"size_{kind}": along / squares, f"norm_{kind}": norm}
    finally:
        engine.close()
    return found


def main() -> None:
    cases, out = json.loads(Path(sys.argv[1]).read_text()), sys.argv[2]
    placed = processes.join()
    placed = type(placed)(**vars(placed) | {"joined": False})  # the group outlives the cases
    results = {}
    for case in cases:
        try:
            results[case["name"]] = measure(case, placed)
        except Exception as error:
            results[case["name"]] = {"error": f"{type(error).__name__}: {error}"}
            traceback.print_exc()
        gc.collect()
    if placed.rank == 0:
        Path(out).write_text(json.dumps(results))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
    hard_exit(0)
