"""The recipe's rows as they are prepared: what every objective trains on that makes no rows of its own."""

from __future__ import annotations

from distft.step_sources.spec import StepSourceSpec

SPEC = StepSourceSpec(name="rows", open=lambda inputs: inputs.steps)
