"""REINFORCE with rewards that are normalised over the step's answers, without a critic.

Source: Hu et al., REINFORCE++, https://arxiv.org/abs/2501.03262; the loss of an answer is the sum over its tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from distft.core.types import Batch, LossTerms, Policy
from distft.objectives.policy_gradient import (
    EPSILON,
    RolloutParams,
    columns_of,
    denominator_of,
    deviation,
    figures_of,
    policy_gradient_terms,
)
from distft.objectives.spec import ObjectiveSpec

if TYPE_CHECKING:
    import numpy as np


class ReinforceParams(RolloutParams):
    """Nothing besides."""

    def advantages(self, reward_PN: np.ndarray) -> np.ndarray:
        """Return each reward less the mean of all, in standard deviations of all."""
        import numpy as np

        return (reward_PN - np.nanmean(reward_PN)) / (deviation(reward_PN, None) + EPSILON)


def _terms(params: ReinforceParams, policy: Policy, batch: Batch) -> LossTerms:
    return policy_gradient_terms(params, policy, batch, "sum")


SPEC = ObjectiveSpec(
    name="reinforce",
    params=ReinforceParams,
    source="rollouts",
    writes=True,
    per_token=True,
    denominator=denominator_of("sum"),
    terms=_terms,
    columns=columns_of,
    figures=figures_of,
)
