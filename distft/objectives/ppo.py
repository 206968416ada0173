"""PPO: a critic, on the model's own trunk or on a second one, says what each token of an answer was worth.

Source: Schulman et al., https://arxiv.org/abs/1707.06347; with a penalty for leaving the model before training as part
of each token's reward, Ziegler et al., https://arxiv.org/abs/1909.08593. Defaults are those of TRL's PPO, whose epochs
over the same answers are `[rollout] updates` here, each on all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from distft.core.types import Batch, LossTerms, Policy
from distft.objectives.policy_gradient import RolloutParams, clipped_terms, rollout_objective

if TYPE_CHECKING:
    import numpy as np


class PpoParams(RolloutParams):
    """TRL's names where it has them; `beta` is its kl_coef."""

    beta: float = Field(default=0.05, ge=0)
    """Weight of the KL divergence from the model before training in each token's reward: adapters are left out for it,
    and other trained weights are kept as they were."""
    kl: Literal["k1", "k3"] = "k1"
    """Estimator of that divergence: the difference of log-probabilities, or the one that is never negative."""
    gamma: float = Field(default=1.0, gt=0, le=1)
    """Discount of a reward per token."""
    lam: float = Field(default=0.95, ge=0, le=1)
    """Weight of longer looks ahead in an advantage (lambda of GAE): 1 takes the whole rest of the answer as it was."""
    vf_coef: float = Field(default=0.1, gt=0)
    """Weight of the critic's loss."""
    clip_value: float = Field(default=0.2, gt=0)
    """A value is not moved further than this from what it was when the answer was written."""
    critic: Literal["trunk", "own"] = "trunk"
    """What gives the values: a layer on the trained model's hidden states, or on those of a second model that starts as
    the first does, is trained whole under every method and is not saved in final/."""
    compares_answers: ClassVar[bool] = False
    values_tokens: ClassVar[bool] = True

    def advantages(self, reward_PN: np.ndarray) -> np.ndarray:
        """Return the rewards: what they are compared with is each token's value."""
        return reward_PN

    def token_targets(
        self,
        reward: Sequence[float],
        logprob: Sequence[np.ndarray],
        reference: Sequence[np.ndarray] | None,
        value: Sequence[np.ndarray],
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Return advantages, normalised over the step, and returns of every token of every answer.

        An answer's reward is its last token's; every token besides pays for its divergence. The value behind the last
        token is 0. Source of the advantage: Schulman et al., https://arxiv.org/abs/1506.02438, eq. 16.

        Args:
            reward: of each answer.
            logprob: of each answer, fp64 [L] of its tokens under the model that has written it.
            reference: under the model before training; None where `beta` is 0.
            value: the critic's, of the position before each token.
        """
        import numpy as np

        advantages: list[np.ndarray] = []
        for index, (total, logprob_L, value_L) in enumerate(zip(reward, logprob, value, strict=True)):
            reward_L = np.zeros_like(value_L)
            if reference is not None:
                gap_L = logprob_L - reference[index]
                reward_L -= self.beta * (gap_L if self.kl == "k1" else np.exp(-gap_L) - 1 + gap_L)
            reward_L[-1] += total
            error_L = reward_L + self.gamma * np.append(value_L[1:], 0.0) - value_L
            advantage_L, ahead = np.zeros_like(value_L), 0.0
            for place in range(len(value_L) - 1, -1, -1):
                ahead = error_L[place] + self.gamma * self.lam * ahead
                advantage_L[place] = ahead
            advantages.append(advantage_L)
        returns = [advantage_L + value_L for advantage_L, value_L in zip(advantages, value, strict=True)]
        whole = np.concatenate(advantages)
        scale = 1 / np.sqrt(np.var(whole, ddof=1) + 1e-8) if whole.size > 1 else 1.0
        return [(advantage_L - whole.mean()) * scale for advantage_L in advantages], returns


def _terms(params: PpoParams, policy: Policy, batch: Batch) -> LossTerms:
    import torch

    logprob_S, value_S = policy.token_logprobs_and_values(batch)
    terms = clipped_terms(params, logprob_S, batch, "dapo")
    columns = batch.columns
    return_S, old_S = columns["return_S"].to(value_S.dtype), columns["old_value_S"].to(value_S.dtype)
    kept_S = torch.clamp(value_S, old_S - params.clip_value, old_S + params.clip_value)
    error_S, kept_error_S = (value_S - return_S) ** 2, (kept_S - return_S) ** 2
    loss_S = 0.5 * torch.maximum(error_S, kept_error_S)
    more = LossTerms.of(
        params.vf_coef * loss_S.sum(),
        {
            "value_loss": (loss_S.sum(), batch.num_supervised),
            "value": (value_S.sum(), batch.num_supervised),
            "value_clipped": ((kept_error_S > error_S).sum(), batch.num_supervised),
        },
    )
    return replace(terms, loss_sum=terms.loss_sum + more.loss_sum, figures={**terms.figures, **more.figures})


SPEC = rollout_objective(
    "ppo",
    PpoParams,
    lambda params: "dapo",
    terms=_terms,
    head="lm_value",
    other_head=lambda params: "lm_critic" if params.critic == "own" else None,
    more_figures={"value_loss": False, "value": True, "value_clipped": False},
)
