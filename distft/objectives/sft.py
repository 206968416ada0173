"""Supervised fine-tuning: cross-entropy summed over supervised tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from distft.core.registry import NoParams
from distft.core.types import Batch, LossTerms
from distft.objectives.spec import ObjectiveSpec

if TYPE_CHECKING:
    from torch import nn


def _weight(params: NoParams, micros: Sequence[Batch]) -> float:
    return float(sum(micro.num_supervised for micro in micros))


def _terms(params: NoParams, model: nn.Module, batch: Batch) -> LossTerms:
    losses = model(**batch.inputs())
    if isinstance(losses, tuple):  # a mixture of experts whose router has a loss
        tokens, router = (part.sum() for part in losses)
        return LossTerms(loss_sum=tokens + router, values={"router_loss": router.detach()})
    return LossTerms(loss_sum=losses.sum())


SPEC = ObjectiveSpec(name="sft", params=NoParams, weight=_weight, terms=_terms)
