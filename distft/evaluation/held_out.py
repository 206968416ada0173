"""Held-out loss: the training objective without gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from distft.core.phase import PHASE
from distft.core.step_figures import add_figures, addable, read_figures
from distft.core.types import Batch, Engine
from distft.objectives.spec import Objective

AGREE_EVERY = 16
"""Batches between two looks at whether somebody wants to stop: a stop must not wait for a long evaluation."""


@dataclass(frozen=True, kw_only=True)
class HeldOutResult:
    """What an evaluation of held-out rows has measured, equal on all ranks."""

    figures: dict[str, float]
    """`eval_loss`, `eval_tokens`, and `eval_NAME` of the objective's figures."""
    rows: list[dict[str, Any]]
    """Each row in the order of its file with the objective's figures of it (`LossTerms.by_group`), where it has some.
    """


def held_out_loss(
    engine: Engine, objective: Objective, batches: Sequence[Batch], *, stop: Callable[[], bool]
) -> HeldOutResult | None:
    """Measure the loss over all ranks' batches, divided by the objective's denominator, and its figures.

    Every rank must bring the same number of batches; the accelerator is waited for once in all.

    Returns:
        None when some rank's `stop` said so before the end.
    """
    objective = objective.measuring()
    total = torch.zeros((), dtype=torch.float64, device=engine.device)
    figures: dict[str, Tensor] = {}
    groups: list[tuple[Batch, Mapping[str, Tensor]]] = []
    denominator = tokens = 0.0
    with engine.evaluating():
        filled = objective.columns.begin(batches)
        for index, batch in enumerate(batches):
            PHASE.enter("eval")
            if index % AGREE_EVERY == 0 and any(engine.sum_over_ranks(stop())):
                return None
            terms = objective.terms(engine.place(filled(batch)))
            total += terms.loss_sum.double()
            add_figures(figures, terms.figures)
            if terms.by_group:
                groups.append((replace(batch, columns={}), terms.by_group))
            denominator += objective.denominator([batch])
            tokens += batch.num_supervised
    summable = addable(figures, rank=engine.rank, world=engine.world)
    host_values: list[float] = torch.cat([total.reshape(1), *summable]).tolist()  # type: ignore[reportUnknownMemberType]
    loss_sum, *sums, denominator, tokens = engine.sum_over_ranks(*host_values, denominator, tokens)
    result = {"eval_loss": loss_sum / denominator, "eval_tokens": tokens}
    for name, value in read_figures(figures, sums, world=engine.world).items():
        result[f"eval_{name}"] = value
    rows = engine.gather([row for batch, values in groups for row in _rows_of(batch, values)])
    in_order = sorted((row for of_rank in rows for row in of_rank), key=lambda row: row[0])
    return HeldOutResult(figures=result, rows=[values for _, values in in_order])


def _rows_of(batch: Batch, values: Mapping[str, Tensor]) -> list[tuple[int, dict[str, Any]]]:
    """Return index and figures of each group of a micro-batch."""
    columns: dict[str, list[float]] = {name: value.tolist() for name, value in values.items()}  # type: ignore[reportUnknownMemberType]
    return [
        (row, {"id": batch.sample_ids[group], **{name: column[group] for name, column in columns.items()}})
        for group, row in enumerate(batch.rows)
    ]
