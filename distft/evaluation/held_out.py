"""Held-out loss: the training objective without gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from distft.core.phase import PHASE
from distft.core.types import Batch, Engine
from distft.objectives.spec import Objective

AGREE_EVERY = 16
"""Batches between two looks at whether somebody wants to stop: a stop must not wait for a long evaluation."""


def held_out_loss(
    engine: Engine, objective: Objective, batches: Iterable[Batch], *, stop: Callable[[], bool]
) -> dict[str, float] | None:
    """`eval_loss` over all ranks' batches: the sum over supervised tokens divided by their count.

    Every rank must bring the same number of batches; the accelerator is waited for once in all.

    Returns:
        None when some rank's `stop` said so before the end.
    """
    total = torch.zeros((), dtype=torch.float64, device=engine.device)
    weight = 0.0
    with engine.evaluating():
        for index, batch in enumerate(batches):
            PHASE.enter("eval")
            if index % AGREE_EVERY == 0 and any(engine.sum_over_ranks(stop())):
                return None
            total += objective.terms(engine.model, engine.place(batch)).loss_sum.double()
            weight += objective.weight([batch])
    loss_sum, weight = engine.sum_over_ranks(total.item(), weight)
    return {"eval_loss": loss_sum / weight, "eval_tokens": weight}
