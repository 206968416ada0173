"""What objectives on pairs of a chosen and a rejected answer share.

Shape letters: D documents, G pairs; documents come in pairs, the chosen one first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distft.core.types import LossTerms

if TYPE_CHECKING:
    from torch import Tensor

    from distft.core.types import Batch, Policy


@dataclass(frozen=True)
class Pair:
    """A quantity of both answers of each pair."""

    chosen_G: Tensor
    rejected_G: Tensor

    @classmethod
    def of(cls, value_D: Tensor) -> Pair:
        """Split the documents of a micro-batch into both sides."""
        return cls(value_D[0::2], value_D[1::2])

    def __sub__(self, other: Pair) -> Pair:
        return Pair(self.chosen_G - other.chosen_G, self.rejected_G - other.rejected_G)

    def __truediv__(self, other: Pair) -> Pair:
        return Pair(self.chosen_G / other.chosen_G, self.rejected_G / other.rejected_G)

    @property
    def gap_G(self) -> Tensor:
        """Chosen less rejected."""
        return self.chosen_G - self.rejected_G


def logprobs(policy: Policy, batch: Batch) -> tuple[Pair, Pair]:
    """Return the log-probability of each answer, summed over its tokens, and the number of those tokens."""
    logprob_S = policy.token_logprobs(batch)
    return Pair.of(batch.sum_by_document(logprob_S)), lengths_of(batch)


def lengths_of(batch: Batch) -> Pair:
    """Return the number of each answer's trained tokens."""
    import torch

    return Pair.of(batch.sum_by_document(torch.ones(batch.num_supervised, device=batch.labels_T.device)))


def tail_weights(length: Pair, alpha: float) -> Tensor:
    """Return [S], alpha for the tokens of an answer that lie beyond the length of the other one, and else 1.

    LD-DPO, https://arxiv.org/abs/2409.06411 equation 11.
    """
    import torch

    both_G = torch.minimum(length.chosen_G, length.rejected_G)
    length_D = torch.stack([length.chosen_G, length.rejected_G], 1).flatten().long()
    begin_D = length_D.cumsum(0) - length_D
    index_S = torch.arange(int(length_D.sum()), device=length_D.device) - begin_D.repeat_interleave(length_D)
    shared_S = index_S < both_G.repeat_interleave(2).repeat_interleave(length_D)
    return torch.where(shared_S, 1.0, alpha)


FIGURES = {
    "reward_chosen": True,
    "reward_rejected": False,
    "reward_margin": True,
    "reward_accuracy": True,
    "logprob_chosen": True,
    "logprob_rejected": False,
}
"""Figures of `pair_terms`, and whether more is better."""


def pair_terms(
    batch: Batch,
    loss_G: Tensor,
    reward: Pair,
    length: Pair,
    *,
    logprob: Pair | None = None,
    more: Mapping[str, Tensor] | None = None,
) -> LossTerms:
    """Return the terms of a preference objective.

    Args:
        batch: the micro-batch.
        loss_G: with gradient.
        reward: of each answer.
        length: trained tokens of each answer.
        logprob: of each answer, summed over its tokens; None where the head has none.
        more: further figures, [G].
    """
    by_group = {"reward_chosen": reward.chosen_G, "reward_rejected": reward.rejected_G}
    if logprob is not None:
        by_group |= {"logprob_chosen": logprob.chosen_G, "logprob_rejected": logprob.rejected_G}
    means = {**by_group, "reward_margin": reward.gap_G, "reward_accuracy": reward.gap_G > 0, **(more or {})}
    by_group |= {"tokens_chosen": length.chosen_G, "tokens_rejected": length.rejected_G}
    if "margin_G" in batch.columns:
        by_group["margin"] = batch.columns["margin_G"]
    count = float(len(loss_G))
    return LossTerms.of(loss_G.sum(), {name: (value.sum(), count) for name, value in means.items()}, by_group)


def count_pairs(params: Any, micros: Sequence[Batch]) -> float:
    """Return the pairs of some micro-batches: what losses and figures are divided by."""
    return float(sum(len(micro.group_sizes) for micro in micros))
