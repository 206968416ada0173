"""GRPO and the losses that grew out of it: an answer's advantage is its reward against those of its group.

Sources: grpo, Shao et al., https://arxiv.org/abs/2402.03300; dapo (tokens of all answers weigh alike), Yu et al.,
https://arxiv.org/abs/2503.14476; dr_grpo (divided by the longest allowed length), Liu et al.,
https://arxiv.org/abs/2503.20783; gspo (one ratio for an answer), Zheng et al., https://arxiv.org/abs/2507.18071; cispo
(the ratio is a weight, cut above only), MiniMax, https://arxiv.org/abs/2506.13585.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from distft.objectives.policy_gradient import EPSILON, PenaltyParams, deviation, mean_of_each, rollout_objective

if TYPE_CHECKING:
    import numpy as np


class GrpoParams(PenaltyParams):
    """TRL's names where it has them."""

    loss: Literal["grpo", "dapo", "dr_grpo", "gspo", "cispo"] = "dapo"
    """How tokens become one loss. gspo wants clips of about 0.0003, cispo one of about 4 above."""
    scale: Literal["group", "batch", "none"] = "group"
    """What an advantage is divided by: the standard deviation of its group's rewards, of the step's, or nothing
    (dr_grpo)."""

    equal_teaches_nothing: ClassVar[bool] = True

    def advantages(self, reward_PN: np.ndarray) -> np.ndarray:
        """Return each reward less its group's mean, scaled."""
        centred_PN = reward_PN - mean_of_each(reward_PN)
        if self.scale == "none":
            return centred_PN
        return centred_PN / (deviation(reward_PN, 1 if self.scale == "group" else None) + EPSILON)


SPEC = rollout_objective("grpo", GrpoParams, lambda params: params.loss)
