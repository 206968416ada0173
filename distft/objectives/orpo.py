"""ORPO: supervised fine-tuning on the chosen answer and an odds ratio against the rejected one; no reference.

Source: https://arxiv.org/abs/2403.07691, equations 4 to 7
"""

from __future__ import annotations

from pydantic import Field

from distft.core.registry import Params
from distft.core.types import Batch, LossTerms, Policy
from distft.objectives.pairs import FIGURES, Pair, count_pairs, logprobs, pair_terms
from distft.objectives.spec import ObjectiveSpec


class OrpoParams(Params):
    """The paper's lambda is TRL's beta."""

    beta: float = Field(default=0.1, gt=0)
    """Weight of the odds ratio."""


def _terms(params: OrpoParams, policy: Policy, batch: Batch) -> LossTerms:
    """The loss of a pair: the chosen answer's negative log-likelihood per token, less beta log sigmoid(log odds ratio).

    The likelihood is that of the answer, as in the paper; TRL's takes the prompt's tokens too, and a mean over the
    tokens of a micro-batch.
    """
    import torch

    logprob, length = logprobs(policy, batch)
    mean = logprob / length
    odds = Pair(*(side - torch.log1p(-side.exp()) for side in (mean.chosen_G, mean.rejected_G)))
    ratio_G = torch.nn.functional.logsigmoid(odds.gap_G)
    reward = Pair(params.beta * mean.chosen_G, params.beta * mean.rejected_G)
    loss_G = -mean.chosen_G - params.beta * ratio_G
    return pair_terms(batch, loss_G, reward, length, logprob=logprob, more={"log_odds": odds.gap_G})


SPEC = ObjectiveSpec(
    name="orpo",
    params=OrpoParams,
    group_size=2,
    per_token=True,
    denominator=count_pairs,
    terms=_terms,
    figures=lambda params: FIGURES | {"log_odds": True},
)
