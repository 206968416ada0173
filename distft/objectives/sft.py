"""Supervised fine-tuning: cross-entropy summed over supervised tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from distft.core.registry import NoParams
from distft.core.types import Batch, LossTerms
from distft.objectives.spec import ObjectiveSpec

if TYPE_CHECKING:
    from torch import Tensor, nn


def _weight(params: NoParams, micros: Sequence[Batch]) -> float:
    return float(sum(micro.num_supervised for micro in micros))


def _terms(params: NoParams, model: nn.Module, batch: Batch) -> LossTerms:
    found: Tensor | tuple[Tensor, Tensor] = model(**batch.inputs())
    if isinstance(found, tuple):  # a mixture of experts whose router has a loss
        losses, router_loss_1 = found
        return LossTerms(
            loss_sum=losses.sum() + router_loss_1.sum(), values={"router_loss": router_loss_1.detach().sum()}
        )
    return LossTerms(loss_sum=found.sum())


SPEC = ObjectiveSpec(name="sft", params=NoParams, weight=_weight, terms=_terms)
