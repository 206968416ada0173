"""What a step of eight ranks sends, counted in one process: every collective of every engine, with its bytes.

The libraries run as they do on eight ranks, over torch's fake process group, which carries nothing: values are not
those of a run, calls and their tensors are. Counted at two depths, so that what a block adds is known by itself.

    PYTHONPATH=tests/helpers python tests/helpers/collectives.py CASES.json-as-text OUT.json
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny import batch, build, documents
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WORLD = 8
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 512, "hidden_size": 64,
    "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "tie_word_embeddings": False,
}  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {"full": {}, "lora": {"r": 8}, "qlora": {"r": 8}}
BUCKET = 40_000
"""Elements of ZeRO's buckets: smaller than the model, as they are for a large one, else it is kept gathered."""
CONTROL_BYTES = 100
"""Losses, counts and norms; the smallest tensor of the model has more."""
KINDS = (
    ("reduce_scatter", "reduce_scatter"), ("allgather", "all_gather"), ("allreduce", "all_reduce"),
    ("broadcast", "broadcast"), ("reduce", "reduce"), ("alltoall", "all_to_all"), ("scatter", "scatter"),
)  # fmt: skip


class Collectives(TorchDispatchMode):
    """Notes every collective that is asked for inside: its kind, and the bytes that a rank sends for it in a ring.

    That is (n - 1) / n of the whole tensor, which all ranks' parts make together; twice for an all-reduce.
    """

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, float]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and (kind := kind_of(func._schema.name)) is not None:
            # An input and an output: the larger is what all ranks' parts make together.
            whole = max(_bytes(arg) for arg in args)
            ranks = next(size for arg in args if (size := _size(arg)) is not None)
            if whole > CONTROL_BYTES:
                self.made.append((kind, whole * (2 if kind == "all_reduce" else 1) * (ranks - 1) / ranks))
        return func(*args, **(kwargs or {}))


def kind_of(name: str) -> str | None:
    """The collective of a c10d operator."""
    short = name.partition("::")[2].strip("_")
    return next((kind for part, kind in KINDS if short.removeprefix("_").startswith(part)), None)


def _bytes(argument: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(argument) if isinstance(leaf, Tensor))


def _size(argument: Any) -> int | None:
    """Ranks of a process group as operators get it; None for another argument."""
    if not isinstance(argument, torch.ScriptObject):
        return None
    try:
        return dist.ProcessGroup.unbox(argument).size()
    except RuntimeError:  # the kind of a reduction is a script object too
        return None


def count(
    engine: str, method: str, layers: int, micros: int, settings: dict[str, Any], head: str = "lm"
) -> dict[str, Any]:
    """Collectives of one step, and what the planner says that a rank sends in it."""
    from distft.core.types import LossTerms, TrainState, UpdateRule
    from distft.engine import ENGINES, processes

    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))
        model = build(folder, method, fill=False, params=METHODS[method], dtype="bfloat16", head=head)
        planned = plan(folder, engine, method, micros, settings, head)
    values = {"per_token": True, "values": True} if head != "lm" else {}
    rule = UpdateRule(
        build=lambda groups: torch.optim.SGD(groups, lr=0.0),
        lr_at=lambda step: 0.0,
        weight_decay=0.0,
        decayed=frozenset(),
        max_grad_norm=None,
        per_tensor=True,
    )
    spec = ENGINES[engine]
    opened = spec.open(spec.params(**settings), processes.join())
    opened.setup(model, rule, micros_per_step=micros)
    found = Collectives()
    for step in range(3):  # what is allocated, cut and traced in the first steps is over in the third
        found.made.clear()
        with found:
            for micro in range(micros):
                with opened.accumulating(last=micro == micros - 1, seed=0):
                    rows = batch(documents([17, 9], vocabulary=512))
                    loss = opened.model(**rows.inputs(), **values).sum()
                    opened.backward(LossTerms(loss_sum=loss), divide_by=24.0, samples=())
            opened.step(TrainState(step=step), 24.0, lambda loss: True)
    opened.close()
    return {
        "sent": sum(sent for _, sent in found.made),
        "planned": planned,
        "kinds": dict(Counter(kind for kind, _ in found.made)),
    }


def plan(folder: Path, engine: str, method: str, micros: int, settings: dict[str, Any], head: str) -> float:
    """What the planner says that a rank sends in a step."""
    from distft.catalog import REGISTRIES
    from distft.plan import inventory, speed
    from distft.plan.machine import of_size
    from distft.plan.setup import Machine, Setup
    from distft.recipe import load_recipe

    recipe_file = folder / "recipe.toml"
    said = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
    recipe_file.write_text(
        "\n".join(
            [
                'name = "counted"\n[model]',
                f"path = {json.dumps(str(folder))}",
                'init = "random"\ndtype = "bfloat16"\n[method]',
                f'name = "{method}"',
                *(f"{key} = {value}" for key, value in METHODS[method].items()),
                '[data]\nmax_length = 64\n[[data.train]]\npath = "never read"\nformat = "text"',
                f'[train]\nmax_steps = 3\nglobal_batch_size = {WORLD * micros}\n[engine]\nname = "{engine}"',
                *said,
            ]
        )
    )
    recipe = load_recipe(str(recipe_file), registries=REGISTRIES)
    setup = Setup(
        recipe=recipe,
        machine=Machine(gpu=of_size(80), gpus_per_node=WORLD),
        engine=engine,
        micro_batch_size=1,
        micros_per_step=micros,
        checkpointing="off",
        loss="chunked",
    )
    read = inventory.read(recipe.model, folder, recipe.method.spec, recipe.method.params, head=head)
    return speed.sent(read, setup).of_step(micros)


def main() -> None:
    os.environ |= {"RANK": "0", "WORLD_SIZE": str(WORLD), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": str(WORLD)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=WORLD)
    from distft.engine import zero_footprint

    zero_footprint.BUCKET_ELEMENTS = BUCKET
    counted = [case | count(**case) for case in json.loads(sys.argv[1])]
    Path(sys.argv[2]).write_text(json.dumps(counted))


if __name__ == "__main__":
    main()
    os._exit(0)  # libraries would take leave of ranks that do not exist
