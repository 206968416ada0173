"""Numbers of a run: metrics see what happens, sinks write it down; one file each, one line here."""

from distft.core.registry import Registry
from distft.metrics import loss, memory, throughput
from distft.metrics.meters import Meters
from distft.metrics.spec import MetricSpec, RunFacts

METRICS: Registry[MetricSpec] = Registry("metric")  # type: ignore[type-var]  # no params: nothing to set in a recipe
METRICS.add(loss.SPEC)
METRICS.add(throughput.SPEC)
METRICS.add(memory.SPEC)

__all__ = ["METRICS", "Meters", "MetricSpec", "RunFacts"]
