"""What objectives on single answers share, each of them known to be good or bad.

Shape letter: D documents, one answer each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from distft.core.types import LossTerms

if TYPE_CHECKING:
    from torch import Tensor

    from distft.core.types import Batch

DESIRABLE = "desirable_G"
"""The rows' label: 1 for a good answer, 0 for a bad one. A group is one document."""


FIGURES = {
    "reward_chosen": True,
    "reward_rejected": False,
    "reward_accuracy": True,
    "logprob_chosen": True,
    "logprob_rejected": False,
}
"""Figures of `answer_terms`, and whether more is better."""


def answer_terms(
    batch: Batch,
    loss_D: Tensor,
    reward_D: Tensor,
    logprob_D: Tensor,
    ahead_D: Tensor,
    *,
    more: Mapping[str, Tensor] | None = None,
) -> LossTerms:
    """Return the terms of an objective on single answers.

    Args:
        batch: the micro-batch.
        loss_D: with gradient.
        reward_D: beta times the log-ratio of policy to reference.
        logprob_D: log-probability of the answer.
        ahead_D: above 0 where the policy takes the answer for what it is.
        more: further figures, [D].
    """
    import torch

    good_D = batch.columns[DESIRABLE] > 0
    good, bad, count = float(good_D.sum()), float((~good_D).sum()), float(len(good_D))
    figures: dict[str, tuple[Tensor, float]] = {
        "reward_chosen": ((reward_D * good_D).sum(), good),
        "reward_rejected": ((reward_D * ~good_D).sum(), bad),
        "reward_accuracy": ((ahead_D > 0).sum(), count),
        "logprob_chosen": ((logprob_D * good_D).sum(), good),
        "logprob_rejected": ((logprob_D * ~good_D).sum(), bad),
    }
    figures |= {name: (value_D.sum(), count) for name, value_D in (more or {}).items()}
    ones_S = torch.ones(batch.num_supervised, device=batch.labels_T.device)
    by_group = {"reward": reward_D, "logprob": logprob_D, "ahead": ahead_D, "desirable": good_D}
    return LossTerms.of(loss_D.sum(), figures, by_group | {"tokens": batch.sum_by_document(ones_S)})


def count_answers(params: Any, micros: Sequence[Batch]) -> float:
    """Return the answers of some micro-batches: what the loss is divided by."""
    return float(sum(micro.num_documents for micro in micros))
