"""BCO: a classifier of good and bad answers by their reward, whose threshold is the middle of both kinds' means.

Source: https://arxiv.org/abs/2404.04656 equations 7 and 8. The threshold is that of the global batch; TRL's trainer
kept a running mean of the rewards that it had seen. The density ratio of both kinds' prompts is not estimated.
"""

from __future__ import annotations

from pydantic import Field

from distft.core.types import Batch, LossTerms, Policy
from distft.objectives.answers import DESIRABLE, FIGURES, answer_terms, count_answers
from distft.objectives.spec import ObjectiveSpec, ReferenceModelParams


class BcoParams(ReferenceModelParams):
    """TRL's name."""

    beta: float = Field(default=0.1, gt=0)
    """Strength of the pull towards the reference."""


def _terms(params: BcoParams, policy: Policy, batch: Batch) -> LossTerms:
    """Return the loss of an answer: -log sigmoid(reward - threshold), of a bad one -log sigmoid(threshold - reward)."""
    import torch

    logprob_D = batch.sum_by_document(policy.token_logprobs(batch))
    reward_D = params.beta * (logprob_D - batch.columns["ref_logprob_D"])
    shift_D, good_D = params.beta * batch.columns["shift_D"], batch.columns[DESIRABLE] > 0
    ahead_D = torch.where(good_D, reward_D - shift_D, shift_D - reward_D)
    loss_D = -torch.nn.functional.logsigmoid(ahead_D)
    return answer_terms(batch, loss_D, reward_D, logprob_D, ahead_D, more={"reward_threshold": shift_D})


SPEC = ObjectiveSpec(
    name="bco",
    params=BcoParams,
    per_token=True,
    decisive=(DESIRABLE,),
    columns=lambda params: ("ref_logprob_D", "shift_D"),
    denominator=count_answers,
    terms=_terms,
    figures=lambda params: FIGURES | {"reward_threshold": True},
    reference=lambda params: params.reference,
)
