"""Where the host waits for the accelerator: reads of a tensor's value, counted on any device.

A read of a value (`.item()`, `if tensor`, `.tolist()`, boolean indexing, `.cpu()`) costs nothing on a CPU and stops the
queue of a GPU. Counted are calls from Python that read, and operations whose result's shape depends on values.
On a GPU `torch.cuda.set_sync_debug_mode` says the same of everything, libraries' own kernels included (tests/gpu).
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

READS = frozenset({"item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "nonzero"})
DATA_DEPENDENT = frozenset(
    {"aten._local_scalar_dense", "aten.nonzero", "aten.is_nonzero", "aten.masked_select", "aten._unique2", "aten.equal"}
)
CPU_ONLY = ("distft/model/attention.py", "distft/metrics/throughput.py")
"""Files whose reads are of tensors that lie on the host whatever the device, or that only the CPU's path makes."""


@dataclass(kw_only=True)
class Syncs:
    """Places that read a value: `file:line name`, in order."""

    places: list[str] = field(default_factory=list)


class _Reads(TorchFunctionMode):
    def __init__(self, counts: Syncs) -> None:
        super().__init__()
        self._counts = counts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in READS:
            _note(self._counts, name)
        return func(*args, **(kwargs or {}))


class _DataDependent(TorchDispatchMode):
    def __init__(self, counts: Syncs) -> None:
        super().__init__()
        self._counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).rsplit(".", 1)[0]
        if name in DATA_DEPENDENT:
            _note(self._counts, name)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def counted() -> Iterator[Syncs]:
    """Count host-device synchronisations inside the context, on this thread and in the backward passes it starts."""
    counts = Syncs()
    with _Reads(counts), _DataDependent(counts):
        yield counts


def _note(counts: Syncs, name: str) -> None:
    frames = [
        f for f in traceback.extract_stack()[:-2] if "/torch/" not in f.filename and "bench/syncs" not in f.filename
    ]
    where = frames[-1] if frames else None
    if where is None or not where.filename.endswith(CPU_ONLY):
        counts.places.append(f"{where.filename}:{where.lineno} {name}" if where else name)
