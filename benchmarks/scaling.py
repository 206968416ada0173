"""What one optimizer step sends between processes and how often the host waits, counted against theory.

    python benchmarks/scaling.py [--worlds 1 2 4] [--dtypes float32 bfloat16] [--out FILE.json]

Every engine, with one and with several micro-batches a step, on CPU processes: counts, not times. The theory is the
planner's (`distft.plan.speed`), whose figures every prediction of speed rests on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import kit
import overhead

ONCE = 'engine.gather="once_a_step"'
HALVES = "engine.shard_within=2"
ENGINES: dict[int, list[tuple[str, ...]]] = {
    1: [("solo",)],
    2: [("ddp",), ("zero1",), ("zero2",), ("zero3",), ("fsdp2",), ("fsdp2", ONCE)],
    4: [("ddp",), ("zero1",), ("zero3",), ("fsdp2",), ("fsdp2", HALVES), ("zero3", HALVES)],
}
METHODS = {"full": [], "lora": ['method.name="lora"', "method.r=8"]}
MICROS = (1, 2)
BUCKET = 40_000
"""Elements of ZeRO's buckets: as much smaller than the model as they are for a large one, else it is kept gathered."""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 4])
    options.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    options.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32"])
    options.add_argument("--out")
    options.add_argument("--worker", help=argparse.SUPPRESS)
    asked = options.parse_args()
    if asked.worker:
        work(Path(asked.worker), asked.methods, asked.dtypes)
        return
    rows = [row for world in asked.worlds for row in launched(world, asked.methods, asked.dtypes)]
    kit.finish({"benchmark": "scaling", "rows": rows}, asked.out)


def launched(world: int, methods: list[str], dtypes: list[str]) -> list[dict[str, Any]]:
    """All cases of a world size in one launch."""
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        overhead.prepare(folder, overhead.SIZES["tiny"], 100)
        start = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend", "c10d"]
        start += ["--rdzv-endpoint", "localhost:0", "--nproc-per-node", str(world)]
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(kit.ROOT)}
        start += [__file__, "--worker", str(folder), "--methods", *methods, "--dtypes", *dtypes]
        subprocess.run(start, env=env, check=True)
        return json.loads((folder / "rows.json").read_text(encoding="utf-8"))


def work(folder: Path, methods: list[str], dtypes: list[str]) -> None:
    """One rank of a launch."""
    from distft.core.hard_exit import hard_exit
    from distft.engine import processes, zero_footprint

    zero_footprint.BUCKET_ELEMENTS = BUCKET
    placed = processes.join(timeout_s=120)  # the group outlives the cases
    rows = []
    for engine, *settings in ENGINES[placed.world]:
        for micros, method, dtype in itertools.product(MICROS, methods, dtypes):
            overrides = [f'name="{len(rows)}"', f'engine.name="{engine}"', *settings, *METHODS[method]]
            overrides.append(f"train.micro_batch_size={8 // placed.world // micros}")
            overrides.append(f'model.dtype="{dtype}"')
            about = {"world": placed.world, "engine": " ".join([engine, *settings]), "method": method, "dtype": dtype}
            run = kit.Run(recipe_file=folder / "recipe.toml", overrides=overrides)
            rows.append(about | {"micros": micros} | counts(run, placed.world, micros))
    if placed.rank == 0:
        (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    hard_exit(0)


def counts(run: kit.Run, world: int, micros: int) -> dict[str, Any]:
    """Of one steady step each."""
    from distft.bench import syncs, traffic

    run.go(2)
    with traffic.counted(world) as found:
        run.go(1)
    with syncs.counted() as waits:
        run.go(1)
    run.close()
    # What the shapes do not tell: fsdp2's all-reduces are those between its groups.
    over = (
        2 if getattr(run.recipe.engine.params, "shard_within", "world") == 2 and run.engine.name == "fsdp2" else world
    )
    names = {place.rsplit("/", 2)[-1] if kit.ROOT.name in place else place for place in waits.places}
    return {
        "sent_bytes": round(sum(one.wire_bytes(over) for one in found.tensors)),
        "theory_bytes": round(theory(run, world, micros, 8 // world // micros)),
        "tensor_collectives": len(found.tensors),
        "control_collectives": len(found.control),
        "host_waits": len(waits.places),
        "waits_at": sorted(names),
    }


def theory(run: kit.Run, world: int, micros: int, micro_batch_size: int) -> float:
    """What the planner says that a rank sends in a step."""
    from distft.model.load import find_folder
    from distft.plan import inventory, speed
    from distft.plan.machine import of_size
    from distft.plan.setup import Machine, Setup

    recipe = run.recipe
    setup = Setup(
        recipe=recipe,
        machine=Machine(gpu=of_size(80), gpus_per_node=world),
        engine=run.engine.name,
        micro_batch_size=micro_batch_size,
        micros_per_step=micros,
        checkpointing="off",
        loss="chunked",
    )
    read = inventory.read(recipe.model, find_folder(recipe.model), recipe.method.spec, recipe.method.params)
    return speed.sent(read, setup).of_step(micros)


if __name__ == "__main__":
    main()
