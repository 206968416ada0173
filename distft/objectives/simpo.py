"""SimPO: the log-likelihood per token as reward, with a target margin; no reference.

Source: https://arxiv.org/abs/2405.14734, equation 6
"""

from __future__ import annotations

from pydantic import Field

from distft.core.registry import Params
from distft.core.types import Batch, LossTerms, Policy
from distft.objectives.pairs import FIGURES, Pair, count_pairs, logprobs, pair_terms
from distft.objectives.spec import ObjectiveSpec


class SimpoParams(Params):
    """The paper's names and its values for Llama-3-Instruct."""

    beta: float = Field(default=2.5, gt=0)
    """Scale of the reward."""
    gamma: float = Field(default=1.375, ge=0)
    """Margin that the chosen reward is to have, as in the paper: not divided by beta."""
    sft_weight: float = Field(default=0.0, ge=0)
    """Adds this times the chosen answer's negative log-likelihood per token. TRL's `loss_type = "simpo"` has 1."""


def _terms(params: SimpoParams, policy: Policy, batch: Batch) -> LossTerms:
    import torch

    logprob, length = logprobs(policy, batch)
    mean = logprob / length
    reward = Pair(params.beta * mean.chosen_G, params.beta * mean.rejected_G)
    loss_G = -torch.nn.functional.logsigmoid(reward.gap_G - params.gamma) - params.sft_weight * mean.chosen_G
    return pair_terms(batch, loss_G, reward, length, logprob=logprob)


SPEC = ObjectiveSpec(
    name="simpo",
    params=SimpoParams,
    group_size=2,
    per_token=True,
    denominator=count_pairs,
    terms=_terms,
    figures=lambda params: FIGURES,
)
