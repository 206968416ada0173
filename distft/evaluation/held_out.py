"""Held-out loss: the training objective without gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from distft.core.phase import PHASE
from distft.core.types import Batch, Engine
from distft.objectives.spec import Objective

AGREE_EVERY = 16
"""Batches between two looks at whether somebody wants to stop: a stop must not wait for a long evaluation."""


def held_out_loss(
    engine: Engine, objective: Objective, batches: Sequence[Batch], *, stop: Callable[[], bool]
) -> dict[str, float] | None:
    """Return `eval_loss` over all ranks' batches, divided by the objective's denominator, and `eval_NAME` per figure.

    Every rank must bring the same number of batches; the accelerator is waited for once in all.

    Returns:
        None when some rank's `stop` said so before the end.
    """
    total = torch.zeros((), dtype=torch.float64, device=engine.device)
    figures: dict[str, Tensor] = {}
    denominator = tokens = 0.0
    with engine.evaluating():
        filled = objective.columns.begin(batches)
        for index, batch in enumerate(batches):
            PHASE.enter("eval")
            if index % AGREE_EVERY == 0 and any(engine.sum_over_ranks(stop())):
                return None
            terms = objective.terms(engine.place(filled(batch)))
            total += terms.loss_sum.double()
            for name, figure in terms.figures.items():
                figures[name] = figures[name] + figure.double() if name in figures else figure.double()
            denominator += objective.denominator([batch])
            tokens += batch.num_supervised
    names = sorted(figures)
    host_values: list[float] = torch.cat([total.reshape(1), *(figures[name] for name in names)]).tolist()  # type: ignore[reportUnknownMemberType]
    loss_sum, *sums, denominator, tokens = engine.sum_over_ranks(*host_values, denominator, tokens)
    result = {"eval_loss": loss_sum / denominator, "eval_tokens": tokens}
    for name, figure, count in zip(names, sums[::2], sums[1::2], strict=True):
        result[f"eval_{name}"] = figure / count if count else math.nan
    return result
