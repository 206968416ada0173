"""Speed: seconds per step, real tokens per second over all ranks, and model FLOPs utilisation.

mfu = FLOPs that the method's mathematics needs ÷ (seconds x ranks x the accelerator's dense bf16 peak). The FLOPs are
those of matrix products (see `distft.model.stats`) and of causal attention over each document's own length;
recomputation under activation checkpointing does not count.
Source: Chowdhery et al., PaLM, appendix B, https://arxiv.org/abs/2204.02311
"""

from __future__ import annotations

import time

from distft.core.accelerators import peak_flops
from distft.core.types import Batch, LossTerms, StepReport, TrainState
from distft.metrics.spec import MetricSpec, RunFacts


class ThroughputMetric:
    """Wall time from the end of one step to the end of the next: data, forward, backward, update."""

    def __init__(self, facts: RunFacts) -> None:
        self._facts = facts
        self._peak = peak_flops(facts.device_name)
        self._tokens = facts.start.tokens
        self._since = time.perf_counter()
        self._squares = 0.0
        self._figures: dict[str, float | None] = {}

    def start(self) -> None:
        """Start the clock."""
        self._since = time.perf_counter()

    def micro(self, batch: Batch, terms: LossTerms) -> None:
        """Add up squared document lengths (on the host: the batch was built there)."""
        self._squares += float(batch.squared_lengths)

    def step(self, state: TrainState, report: StepReport) -> None:
        """Count one step."""
        now = time.perf_counter()
        seconds, tokens = now - self._since, state.tokens - self._tokens
        facts = self._facts
        # This rank's documents stand for every rank's: gathering theirs would cost more than it says.
        flops = tokens * facts.flops_per_token + self._squares * facts.world * facts.flops_per_squared_length
        mfu = None if self._peak is None else flops / (seconds * facts.world * self._peak)
        self._figures = {"step_s": seconds, "tokens_per_s": tokens / seconds, "mfu": mfu}
        self._since, self._tokens, self._squares = now, state.tokens, 0.0

    def read(self) -> dict[str, float | None]:
        """Return the last step's figures."""
        return self._figures


SPEC = MetricSpec(name="throughput", build=ThroughputMetric)
