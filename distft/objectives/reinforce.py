"""REINFORCE with rewards that are normalised over the step's answers, without a critic.

Source: Hu et al., REINFORCE++, https://arxiv.org/abs/2501.03262; the loss of an answer is the sum over its tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from distft.objectives.policy_gradient import EPSILON, PenaltyParams, deviation, rollout_objective

if TYPE_CHECKING:
    import numpy as np


class ReinforceParams(PenaltyParams):
    """Nothing besides."""

    def advantages(self, reward_PN: np.ndarray) -> np.ndarray:
        """Return each reward less the mean of all, in standard deviations of all."""
        import numpy as np

        return (reward_PN - np.nanmean(reward_PN)) / (deviation(reward_PN, None) + EPSILON)


SPEC = rollout_objective("reinforce", ReinforceParams, lambda params: "sum")
