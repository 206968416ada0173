"""Counts what a forward keeps for its backward, for one engine: every checkpointing, compiled and not.

usage: python tests/dist/saved_worker.py FOLDER_OF_A_CONFIG ENGINE OUT.json
Compiled graphs are split into forward and backward by the partitioner that inductor uses, and run without it.
"""

import functools
import gc
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from tiny import batch, build, documents
from torch.profiler import ProfilerActivity, profile

from distft.core.hard_exit import hard_exit
from distft.core.types import LossTerms, UpdateRule
from distft.engine import ENGINES, processes
from distft.model import activation_checkpointing

RULE = UpdateRule(
    build=lambda groups: torch.optim.SGD(groups, lr=0.0), lr_at=lambda step: 0.0, weight_decay=0.0,
    decayed=frozenset(), max_grad_norm=None,
)  # fmt: skip


PASSES = {"zero3": 6}
"""In some passes DeepSpeed still holds up to 344 bytes of its own when the forward ends; in most it holds none."""


def measure(folder: Path, engine_name: str, mode: str, compiled: bool) -> dict[str, Any]:
    torch._dynamo.reset()
    placed = processes.join()
    spec = ENGINES[engine_name]
    engine = spec.open(spec.params(), placed)
    built = build(folder, fill=False)
    activation_checkpointing.checkpoint_blocks(built.module.transformer, mode)
    engine.setup(built, RULE, micros_per_step=1)
    arrived: list[str] = []
    for name, param in engine.model.named_parameters():
        param.register_post_accumulate_grad_hook(lambda _, name=name: arrived.append(name))
    if compiled:
        activation_checkpointing.compile_blocks(built.blocks)
    micro = batch(documents([40, 88, 64, 64], seed=1))
    gc.freeze()  # modules and libraries: collections look at what comes from here on
    kept, passes = [], PASSES.get(engine_name, 1)
    for measured in (False, *[True] * passes):  # the first forward compiles, and libraries allocate what they keep
        with engine.accumulating(last=True, seed=0):
            gc.collect()  # what earlier passes left in cycles is freed before, and what this one leaves within
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) if measured else nullcontext() as seen:
                loss = engine.model(**engine.place(micro).inputs()).sum()
                gc.collect()
            engine.backward(LossTerms(loss_sum=loss), divide_by=100.0, samples=micro.sample_ids)
        if seen is not None:
            # What was allocated and not freed: torch counts both at its allocator, whoever holds the tensors.
            kept.append(sum(event.self_cpu_memory_usage for event in seen.key_averages()))
    report = {"bytes": min(kept), "loss": loss.item()}
    report["arrived"] = arrived[: len(arrived) // (1 + passes)]
    engine.close()
    return report


if __name__ == "__main__":
    torch.compile = functools.partial(torch.compile, backend="aot_eager_decomp_partition")
    where, engine_name, out = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    found = {
        f"{mode}{'-compiled' if compiled else ''}": measure(where, engine_name, mode, compiled)
        for compiled in (False, True)
        for mode in ("off", "selective", "full")
    }
    out.write_text(json.dumps(found))
    hard_exit(0)
