"""Held-out loss: the training objective without gradients."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from distft.core.types import Batch, Engine
from distft.objectives.spec import Objective


def evaluate(engine: Engine, objective: Objective, batches: Iterable[Batch]) -> dict[str, float]:
    """`eval_loss` over all ranks' batches: the sum over supervised tokens divided by their count.

    Every rank must bring the same number of batches; one host sync in all.
    """
    total = torch.zeros((), dtype=torch.float64, device=engine.device)
    weight = 0.0
    with engine.evaluating():
        for batch in batches:
            total += objective.terms(engine.model, engine.place(batch)).loss_sum.double()
            weight += objective.weight([batch])
    loss_sum, weight = engine.sum_over_ranks(total.item(), weight)
    return {"eval_loss": loss_sum / weight, "eval_tokens": weight}
