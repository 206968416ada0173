"""Adopts one model under many engines, methods and optimizers, takes a step, and notes what each rank holds.

usage: torchrun --nproc-per-node N tests/dist/held_worker.py CASES.json OUT
CASES: [{"name", "model", "engine", "method", "params", "optim", "dtype", "micros", "table", "head"}]
OUT.RANK gets name -> bytes.
"""

import gc
import json
import sys
import traceback
from pathlib import Path

import torch
from tiny import batch, documents

from distft.core.hard_exit import hard_exit
from distft.core.types import LossTerms, TrainState, UpdateRule
from distft.engine import ENGINES, processes, state_bytes
from distft.model import load
from distft.model.adapters import METHODS
from distft.model.adapters.spec import optimizer_of
from distft.model.blocks import block_matrices
from distft.model.heads import HEADS
from distft.optim import OPTIMIZERS
from distft.recipe import ModelTable


def measure(case: dict, placed: processes.Processes) -> dict[str, int]:
    """Bytes by component, in the words of `distft plan --json`."""
    spec, method = ENGINES[case["engine"]], METHODS[case["method"]]
    given = {"path": case["model"], "dtype": case["dtype"], "init": "random"} | case.get("table", {})
    table = ModelTable.model_validate_json(json.dumps(given))
    params = method.params.model_validate_json(json.dumps(case.get("params", {})))
    optim = optimizer_of(method, params, OPTIMIZERS[case["optim"]], num_steps=10)
    head = HEADS[case["head"]]
    built = load.build(table, Path(case["model"]), method, params, seed=0, device=placed.device, head=head)
    values = {"per_token": True, "values": True} if head.values else {}
    ratio = method.lr_ratio(params)
    rule = UpdateRule(
        build=lambda groups: optim.build(optim.params(), groups),
        lr_at=lambda step: 1e-4,
        weight_decay=0.1,
        decayed=frozenset(name for name, param in built.module.named_parameters() if param.ndim >= 2),
        max_grad_norm=1.0,
        matrices=frozenset(block_matrices(built.module, built.blocks)) if optim.matrix_state_bytes else None,
        per_tensor=optim.per_tensor,
        named=method.optimizer is not None,
        faster=frozenset(name for name, _ in built.module.named_parameters() if ratio != 1.0 and method.faster(name)),
        lr_ratio=ratio,
    )
    engine = spec.open(spec.params(), placed)
    try:
        micros = case["micros"]
        engine.setup(built, rule, micros_per_step=micros)
        rows = batch(documents([17, 9], seed=placed.rank))
        for micro in range(micros):
            accumulating = state_bytes.gradient_bytes(engine)
            with engine.accumulating(last=micro == micros - 1, seed=0):
                output = engine.model(**rows.inputs(), **values)
                losses = output if isinstance(output, tuple) else (output,)  # with a method's penalty
                loss = sum(part.sum() for part in losses)
                engine.backward(
                    LossTerms(loss_sum=loss), divide_by=float(rows.num_supervised * placed.world * micros), samples=()
                )
        gradients = state_bytes.gradient_bytes(engine)
        report = engine.step(TrainState(), float(rows.num_supervised * placed.world), lambda loss: True)
        assert report.updated
        after = state_bytes.measure(engine)
    finally:
        engine.close()
    return {
        "weights_bytes": after.weights,
        "quant_constants_bytes": after.quant_constants,
        "gradients_bytes": gradients,
        "accumulating_bytes": accumulating if micros > 1 else 0,
        "master_bytes": after.master,
        "optimizer_bytes": after.optimizer,
        "pageable_bytes": after.pageable,
    }


def main() -> None:
    cases, out = json.loads(Path(sys.argv[1]).read_text()), sys.argv[2]
    placed = processes.join()
    # The group outlives the cases: an engine leaves only what it joined itself.
    placed = type(placed)(**vars(placed) | {"joined": False})
    results = {}
    for case in cases:
        try:
            results[case["name"]] = measure(case, placed)
        except Exception as error:
            results[case["name"]] = {"error": f"{type(error).__name__}: {error}"}
            traceback.print_exc()
        gc.collect()
    Path(f"{out}.{placed.rank}").write_text(json.dumps(results))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
    hard_exit(0)
