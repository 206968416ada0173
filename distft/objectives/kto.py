"""KTO: single answers, each known to be good or bad, against a reference; no pairs.

Sources: https://arxiv.org/abs/2402.01306 equations 7 and 8; apo_zero: https://arxiv.org/abs/2408.06266, on single
answers
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from distft.core.types import Batch, LossTerms, Policy
from distft.objectives.answers import DESIRABLE, FIGURES, answer_terms, count_answers
from distft.objectives.spec import ObjectiveSpec, ReferenceModelParams


class KtoParams(ReferenceModelParams):
    """TRL's names; `loss = "apo_zero"` is its apo_zero_unpaired."""

    beta: float = Field(default=0.1, gt=0)
    """Strength of the pull towards the reference; the smaller, the further the policy may go."""
    loss: Literal["kto", "apo_zero"] = "kto"
    """kto measures rewards against the KL of policy and reference over the global batch; apo_zero against 0."""
    desirable_weight: float = Field(default=1.0, ge=0)
    """Weight of good answers. The paper: weight x number of both kinds within 1 to 4/3 of each other."""
    undesirable_weight: float = Field(default=1.0, ge=0)
    """Weight of bad answers."""

    @model_validator(mode="after")
    def _some_weight(self) -> KtoParams:
        if not self.desirable_weight and not self.undesirable_weight:
            raise ValueError("desirable_weight and undesirable_weight are both 0: nothing is trained")
        return self


def _terms(params: KtoParams, policy: Policy, batch: Batch) -> LossTerms:
    """Return the loss of an answer: its weight times 1 - sigmoid(reward - beta KL), of a bad one the other way."""
    import torch

    logprob_D = batch.sum_by_document(policy.token_logprobs(batch))
    reward_D = params.beta * (logprob_D - batch.columns["ref_logprob_D"])
    good_D = batch.columns[DESIRABLE] > 0
    zero_D = params.beta * batch.columns["kl_D"] if params.loss == "kto" else torch.zeros_like(reward_D)
    ahead_D = torch.where(good_D, reward_D - zero_D, zero_D - reward_D)
    weight_D = torch.where(good_D, params.desirable_weight, params.undesirable_weight)
    more = {"kl": batch.columns["kl_D"]} if params.loss == "kto" else None
    return answer_terms(batch, weight_D * (1 - ahead_D.sigmoid()), reward_D, logprob_D, ahead_D, more=more)


SPEC = ObjectiveSpec(
    name="kto",
    params=KtoParams,
    per_token=True,
    decisive=(DESIRABLE,),
    columns=lambda params: ("ref_logprob_D", "kl_D") if params.loss == "kto" else ("ref_logprob_D",),
    denominator=count_answers,
    terms=_terms,
    figures=lambda params: FIGURES | ({"kl": False} if params.loss == "kto" else {}),
    reference=lambda params: params.reference,
)
