"""Where the micro-batches of a step come from: one file per source, one line here.

In: the recipe's rows cut into steps, and the model as it is; out: a step's micro-batches, as many on every rank.
"""

from distft.core.registry import Registry
from distft.step_sources import rollouts, rows
from distft.step_sources.spec import StepSourceInputs, StepSourceSpec

STEP_SOURCES: Registry[StepSourceSpec] = Registry("step source")
STEP_SOURCES.add(rows.SPEC)
STEP_SOURCES.add(rollouts.SPEC)

__all__ = ["STEP_SOURCES", "StepSourceInputs", "StepSourceSpec"]
