"""CPO: DPO's loss with a uniform reference, and supervised fine-tuning on the chosen answer.

Source: https://arxiv.org/abs/2401.08417, equations 4 and 5
"""

from __future__ import annotations

from pydantic import Field

from distft.core.registry import Params
from distft.core.types import Batch, LossTerms, Policy
from distft.objectives.pairs import FIGURES, Pair, count_pairs, logprobs, pair_terms
from distft.objectives.spec import ObjectiveSpec


class CpoParams(Params):
    """TRL's `cpo_alpha` is `sft_weight`."""

    beta: float = Field(default=0.1, gt=0)
    """Scale of the difference of both answers' log-probabilities, summed over tokens."""
    sft_weight: float = Field(default=1.0, ge=0)
    """Weight of the chosen answer's negative log-likelihood per token."""


def _terms(params: CpoParams, policy: Policy, batch: Batch) -> LossTerms:
    import torch

    logprob, length = logprobs(policy, batch)
    reward = Pair(params.beta * logprob.chosen_G, params.beta * logprob.rejected_G)
    preferred_G = -torch.nn.functional.logsigmoid(reward.gap_G)
    loss_G = preferred_G - params.sft_weight * logprob.chosen_G / length.chosen_G
    return pair_terms(batch, loss_G, reward, length, logprob=logprob)


SPEC = ObjectiveSpec(
    name="cpo",
    params=CpoParams,
    group_size=2,
    per_token=True,
    denominator=count_pairs,
    terms=_terms,
    figures=lambda params: FIGURES,
)
