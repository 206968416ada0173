"""What a piece of work sends between processes: every collective, its elements and bytes, as torch's profiler saw it.

Counted where collectives are handed to a process group (`c10d::…`), so whichever library asked for them. The bytes are
those of the whole tensor that a collective puts together, reduces or takes apart; what a rank sends follows from them
(`Collective.wire_bytes`). Adds an untold overhead: for counting, never for timing.
"""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

KINDS = {
    "allreduce": "all_reduce",
    "allgather": "all_gather",
    "_allgather_base": "all_gather",
    "allgather_into_tensor": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "_reduce_scatter_base": "reduce_scatter",
    "broadcast": "broadcast",
    "reduce": "reduce",
    "alltoall": "all_to_all",
    "send": "send",
    "barrier": "barrier",
}
ITEM_BYTES = {
    "float": 4,
    "double": 8,
    "c10::BFloat16": 2,
    "c10::Half": 2,
    "int": 4,
    "long": 8,
    "long int": 8,
    "unsigned char": 1,
    "signed char": 1,
}
CONTROL_BYTES = 100
"""Smaller ones carry losses, counts and figures, not tensors of the model: the smallest norm has more."""


@dataclass(frozen=True, kw_only=True)
class Collective:
    """One call."""

    kind: str
    num_bytes: int
    """Bytes of the whole tensor: what all ranks' parts make together."""
    ranks: int | None = None
    """That take part, where the shapes tell: whole over part."""

    def wire_bytes(self, ranks: int) -> float:
        """Return what each rank sends in a ring: (n - 1) / n of the whole, twice for an all-reduce.

        `ranks`: that take part, where the shapes do not tell.
        """
        taking_part = self.ranks or ranks
        share = (taking_part - 1) / taking_part
        return self.num_bytes * (2 * share if self.kind == "all_reduce" else share)


@dataclass(kw_only=True)
class Traffic:
    """All collectives of a piece of work, in their order."""

    collectives: list[Collective] = field(default_factory=list)

    def num_bytes(self, kind: str) -> int:
        """Return the bytes of all collectives of this kind that carry tensors of the model."""
        return sum(collective.num_bytes for collective in self.tensors if collective.kind == kind)

    @property
    def tensors(self) -> list[Collective]:
        """Collectives that carry weights and gradients."""
        return [collective for collective in self.collectives if collective.num_bytes > CONTROL_BYTES]

    @property
    def control(self) -> list[Collective]:
        """Collectives that carry a few numbers."""
        return [collective for collective in self.collectives if collective.num_bytes <= CONTROL_BYTES]


@contextlib.contextmanager
def counted(world: int) -> Iterator[Traffic]:
    """Record the collectives inside the context; the result is filled in at its end."""
    from torch.profiler import ProfilerActivity, profile

    traffic = Traffic()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        yield traffic
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    traffic.collectives = _collectives(events, world)


def _collectives(events: list[dict[str, Any]], world: int) -> list[Collective]:
    """Return collectives in the order of their calls; bytes from the shapes that the profiler recorded."""
    named = [(str(event.get("name", "")), event) for event in events]
    # A list of tensors has a type only where it is carried out, not where it is asked for.
    types = {
        (_kind(name), _largest(event["args"])): ITEM_BYTES[event["args"]["Input type"][0]]
        for name, event in named
        if name.startswith(("gloo:", "nccl:")) and event.get("args", {}).get("Input type", [""])[0] in ITEM_BYTES
    }
    made = []
    for name, event in sorted(named, key=lambda item: item[1].get("ts", 0)):
        kind = _kind(name)
        if kind is None or not name.startswith("c10d::"):
            continue
        args = event["args"]
        largest = _largest(args)
        item_sizes = [ITEM_BYTES[word] for word in args.get("Input type", ()) if word in ITEM_BYTES]
        item = item_sizes[0] if item_sizes else types.get((kind, largest), 4)
        parts = world if not item_sizes and kind in ("all_gather", "reduce_scatter") else 1
        made.append(
            Collective(kind=kind, num_bytes=largest * item * parts, ranks=_ranks(kind, args) if item_sizes else None)
        )
    return made


def _kind(name: str) -> str | None:
    """Return the kind of a call by its name, such as "c10d::allreduce_" or "gloo:all_reduce"; None: no collective."""
    short = name.rpartition(":")[2].rstrip("_").removesuffix("_coalesced")
    return KINDS.get(short, short if short in KINDS.values() else None)


def _largest(args: dict[str, Any]) -> int:
    """Return the elements of the largest argument; a list of tensors counts as one."""
    return max((_elements(dims) for dims in args.get("Input Dims", ())), default=0)


def _ranks(kind: str, args: dict[str, Any]) -> int | None:
    """Return the ranks of a gather or scatter between one whole tensor and one part."""
    sizes = sorted(size for dims in args["Input Dims"] if (size := _elements(dims)))
    return sizes[-1] // sizes[-2] if kind in ("all_gather", "reduce_scatter") and len(sizes) == 2 else None


def _elements(dims: Any) -> int:
    if dims and isinstance(dims[0], list):
        return sum(math.prod(shape) for shape in dims)  # a list of tensors; a scalar's shape is empty
    return math.prod(dims) if dims else 0
