"""What objectives on single answers share, each of them known to be good or bad.

Shape letter: D documents, one answer each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from distft.core.types import Batch
    from distft.objectives.pairs import Figures

DESIRABLE = "desirable_G"
"""The rows' label: 1 for a good answer, 0 for a bad one. A group is one document."""


def figures_of(reward_D: Tensor, logprob_D: Tensor, good_D: Tensor, right_D: Tensor) -> Figures:
    """Return the figures: means over the good answers, over the bad ones, and the share that is told apart.

    Args:
        reward_D: beta times the log-ratio of policy to reference.
        logprob_D: log-probability of the answer.
        good_D: whether the answer is a good one.
        right_D: whether the policy takes it for what it is.
    """
    good, bad, count = float(good_D.sum()), float((~good_D).sum()), float(len(good_D))
    return {
        "reward_chosen": ((reward_D * good_D).sum(), good),
        "reward_rejected": ((reward_D * ~good_D).sum(), bad),
        "reward_accuracy": (right_D.sum(), count),
        "logprob_chosen": ((logprob_D * good_D).sum(), good),
        "logprob_rejected": ((logprob_D * ~good_D).sum(), bad),
    }


def count_answers(params: Any, micros: Sequence[Batch]) -> float:
    """Return the answers of some micro-batches: what the loss is divided by."""
    return float(sum(micro.num_documents for micro in micros))
