"""Adopts a model under one engine and notes, after every fill, how many bytes of weights this rank holds.

`host_peak`: most anonymous memory of the process until the last fill is done, beyond what it had before; mapped files
are not in it.
"""

import json
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
    engine.adopt(built, sgd, micros_per_step=1)
    facts = {"whole": whole, "largest_unit": largest, "peak": max(seen), "after": held(built.module)}
    facts["host_peak"] = host_peaks[-1]
    Path(f"{out}.{placed.rank}").write_text(json.dumps(facts))
    engine.close()


if __name__ == "__main__":
    main()
    hard_exit(0)
