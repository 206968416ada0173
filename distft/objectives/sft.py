"""Supervised fine-tuning: cross-entropy summed over supervised tokens."""

from __future__ import annotations

from collections.abc import Sequence

from distft.core.registry import NoParams
from distft.core.types import Batch, LossTerms, Policy
from distft.objectives.spec import ObjectiveSpec


def _denominator(params: NoParams, micros: Sequence[Batch]) -> float:
    return float(sum(micro.num_supervised for micro in micros))


def _terms(params: NoParams, policy: Policy, batch: Batch) -> LossTerms:
    return policy.loss_sum(batch)


SPEC = ObjectiveSpec(name="sft", params=NoParams, denominator=_denominator, terms=_terms, perplexity=True)
