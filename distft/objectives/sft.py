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
    return LossTerms(loss_sum=model(**batch.inputs()).sum())


SPEC = ObjectiveSpec(name="sft", params=NoParams, weight=_weight, terms=_terms)
