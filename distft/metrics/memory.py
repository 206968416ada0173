"""Peak memory of this rank: allocated on the accelerator, or the process's resident set on a CPU."""

from __future__ import annotations

import resource
import sys

import torch

from distft.core.types import Batch, LossTerms, StepReport, TrainState
from distft.metrics.spec import MetricSpec, RunFacts

GIB = 2**30


class MemoryMetric:
    """`memory_gib` so far in the run, of rank 0 (the rank that writes)."""

    def __init__(self, facts: RunFacts) -> None:
        self._on_gpu = facts.device_name != "cpu"

    def start(self) -> None:
        """Do nothing: this metric has no clock."""

    def micro(self, batch: Batch, terms: LossTerms) -> None:
        """Do nothing: the allocator keeps peaks."""

    def step(self, state: TrainState, report: StepReport) -> None:
        """Do nothing: the allocator keeps peaks."""

    def read(self) -> dict[str, float | None]:
        """Read counters on the host; nothing waits."""
        if self._on_gpu:
            return {"memory_gib": torch.cuda.max_memory_allocated() / GIB}
        unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB elsewhere
        return {"memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB}


SPEC = MetricSpec(name="memory", build=MemoryMetric)
