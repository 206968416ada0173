"""The load-balancing loss of a mixture of experts' router, where the model's config asks for one."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from distft.core.types import Batch, LossTerms, StepReport, TrainState


class RouterMetric:
    """`router_loss`: its part of `loss`, summed over all ranks and divided by the step's supervised tokens."""

    def __init__(self, sum_over_ranks: Callable[..., list[float]]) -> None:
        """Start at nothing.

        Args:
            sum_over_ranks: collective sum of host numbers.
        """
        self._sum_over_ranks = sum_over_ranks
        self._seen: list[Tensor] = []
        self._figures: dict[str, float | None] = {}

    def start(self) -> None:
        """No clock here."""

    def micro(self, batch: Batch, terms: LossTerms) -> None:
        """Keep the micro-batch's sum on its device."""
        if terms.values is not None:
            self._seen.append(terms.values["router_loss"])

    def step(self, state: TrainState, report: StepReport) -> None:
        """Collective: every rank trains the same model, so every rank is here."""
        [total] = self._sum_over_ranks(sum(value.item() for value in self._seen))
        self._seen.clear()
        self._figures = {"router_loss": total / report.weight}

    def read(self) -> dict[str, float | None]:
        """`router_loss` of the last step."""
        return dict(self._figures)
