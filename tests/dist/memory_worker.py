"""Adopts a model under one engine and notes, after every fill, how many bytes of weights this rank holds.

Arguments: the engine, the model's folder, where to write, and how many ranks a node has.

`host_peak`: most anonymous memory of the process until the last fill is done, beyond what it had before; mapped files
are not in it. `read`: bytes of the tensors that this rank read from the files.
"""

import json
import os
import re
import sys
import threading
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from distft.core.hard_exit import hard_exit
from distft.core.types import UpdateRule
from distft.engine import ENGINES, processes
from distft.model import load
from distft.model.adapters import METHODS
from distft.model.tensor_files import TensorFiles
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


class HostPeak:
    """Looks at the process's anonymous memory every millisecond."""

    def __init__(self) -> None:
        self._before, self.peak = self._now(), 0
        self._over = threading.Event()
        threading.Thread(target=self._look, daemon=True).start()

    def _now(self) -> int:
        found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert found is not None
        return int(found[1]) * 1024

    def _look(self) -> None:
        while not self._over.wait(0.001):
            self.note()

    def note(self) -> int:
        self.peak = max(self.peak, self._now() - self._before)
        return self.peak


class BytesRead:
    """Counts what is read from weight files, where tensors leave their mapped file."""

    def __init__(self) -> None:
        self.total = 0
        read = TensorFiles.read

        def counting(files: TensorFiles, name: str) -> torch.Tensor:
            tensor = read(files, name)
            self.total += tensor.nbytes
            return tensor

        TensorFiles.read = counting  # type: ignore[method-assign]


def main() -> None:
    engine_name, model, out, node = sys.argv[1:]
    os.environ["LOCAL_WORLD_SIZE"] = node
    placed = processes.join()
    spec = ENGINES[engine_name]
    engine = spec.open(spec.params(), placed)
    method = METHODS["full"]
    read = BytesRead()
    table = ModelTable(path=model, dtype="float32")
    built = load.build(table, Path(model), method, method.params(), seed=0, device=placed.device)
    whole = sum(p.numel() * 4 for p in built.module.parameters())
    rest = whole - sum(p.numel() * 4 for block in built.blocks for p in block.parameters())
    largest = max(rest, *(sum(p.numel() * 4 for p in block.parameters()) for block in built.blocks))
    seen, host_peaks, host = [], [], HostPeak()
    fill = built.fill

    def noting(unit: torch.nn.Module, device: torch.device) -> None:
        fill(unit, device)
        seen.append(held(built.module))
        host_peaks.append(host.note())

    built.fill = noting  # type: ignore[method-assign]
    sgd = UpdateRule(
        build=lambda groups: torch.optim.SGD(groups, lr=0.1),
        lr_at=lambda step: 0.1,
        weight_decay=0.0,
        decayed=frozenset(),
        max_grad_norm=None,
    )
    engine.setup(built, sgd, micros_per_step=1)
    facts = {"whole": whole, "largest_unit": largest, "peak": max(seen), "after": held(built.module)}
    facts["host_peak"] = host_peaks[-1]
    facts["read"] = read.total
    Path(f"{out}.{placed.rank}").write_text(json.dumps(facts))
    engine.close()


if __name__ == "__main__":
    main()
    hard_exit(0)
