"""RLOO: an answer's advantage is its reward against the mean of the other answers to its prompt.

Source: Ahmadian et al., https://arxiv.org/abs/2402.14740. An answer is one action: its ratio is that of the whole text,
clipped as in TRL. The KL divergence is part of the loss; TRL's RLOO takes it off the reward.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from distft.objectives.policy_gradient import PenaltyParams, mean_of_each, rollout_objective

if TYPE_CHECKING:
    import numpy as np


class RlooParams(PenaltyParams):
    """Nothing besides."""

    equal_teaches_nothing: ClassVar[bool] = True

    def advantages(self, reward_PN: np.ndarray) -> np.ndarray:
        """Return each reward less the mean of the others'; 0 where there are none."""
        import numpy as np

        number = (~np.isnan(reward_PN)).sum(1, keepdims=True)
        return (reward_PN - mean_of_each(reward_PN)) * number / np.maximum(number - 1, 1)


SPEC = rollout_objective("rloo", RlooParams, lambda params: "sequence")
