"""Reward models: a scalar head that gives the chosen answer more than the rejected one (Bradley-Terry).

Sources: https://arxiv.org/abs/2203.02155 equation 1; margins: https://arxiv.org/abs/2307.09288 equation 2; centring:
https://arxiv.org/abs/2312.09244 equation 2
"""

from __future__ import annotations

from pydantic import Field

from distft.core.registry import Params
from distft.core.types import Batch, LossTerms, Policy
from distft.objectives.pairs import FIGURES, Pair, count_pairs, lengths_of, pair_terms
from distft.objectives.spec import ObjectiveSpec


class RewardParams(Params):
    """Names of this project; TRL's `center_rewards_coefficient` is `center`."""

    margin: bool = True
    """Take the rows' margins, where they have some, as what the chosen reward must be ahead by."""
    center: float = Field(default=0.0, ge=0)
    """Adds this times (reward_chosen + reward_rejected)^2, which keeps rewards around zero; 0.01 is usual."""


def _terms(params: RewardParams, policy: Policy, batch: Batch) -> LossTerms:
    import torch

    reward = Pair.of(policy.scores(batch))
    margin_G = batch.columns["margin_G"] if params.margin else torch.zeros_like(reward.chosen_G)
    loss_G = -torch.nn.functional.logsigmoid(reward.gap_G - margin_G)
    loss_G = loss_G + params.center * (reward.chosen_G + reward.rejected_G) ** 2
    return pair_terms(batch, loss_G, reward, lengths_of(batch))


SPEC = ObjectiveSpec(
    name="reward",
    params=RewardParams,
    head="scalar",
    group_size=2,
    denominator=count_pairs,
    terms=_terms,
    figures=lambda params: {name: FIGURES[name] for name in FIGURES if name.startswith("reward")},
)
