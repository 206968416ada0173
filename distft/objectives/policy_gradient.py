"""What objectives on a model's own answers share: clipped ratios, penalties, and how tokens become one loss.

Notation: r is the ratio of a token's probability now to what it was when its answer was written, A the advantage of its
answer. The reward is outside: `distft.step_sources.rollouts` writes answers, has them judged and gives columns.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from distft.core.registry import Params
from distft.core.types import Batch, LossTerms, Policy
from distft.objectives.spec import ObjectiveSpec

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

Figure = tuple["Tensor | float", ...]
"""Parts of a figure: sum and count, or those of another kind of `distft.core.step_figures`."""
EPSILON = 1e-4
"""Added to standard deviations of rewards, as in TRL."""


class RolloutParams(Params, ABC):
    """What every one of them is set by."""

    beta: float = Field(default=0.0, ge=0)
    """Weight of the KL divergence from the model before training (k3): adapters are left out for it, and other trained
    weights are kept as they were."""
    clip_low: float = Field(default=0.2, gt=0, lt=1)
    """A ratio below 1 - clip_low is not lowered further."""
    clip_high: float = Field(default=0.2, gt=0)
    """A ratio above 1 + clip_high is not raised further; 0.28 is DAPO's."""
    correction: Literal["none", "token", "sequence"] = "none"
    """Weighs tokens, or answers, by the ratio of the trainer's probability to the sampler's: for samplers that compute
    otherwise than the trainer."""
    correction_outside: Literal["truncate", "mask"] = "truncate"
    """What becomes of a weight outside of correction_floor to correction_cap: the nearer bound, or 0."""
    correction_cap: float = Field(default=2.0, ge=1)
    """Upper bound of the correction's weights."""
    correction_floor: float = Field(default=0.0, ge=0, le=1)
    """Lower bound of the correction's weights."""
    compares_answers: ClassVar[bool] = True
    """An answer counts only beside another to the same prompt."""
    equal_teaches_nothing: ClassVar[bool] = False
    """Answers to one prompt that are all worth the same have advantages of 0: `[rollout] refill` may replace them."""
    values_tokens: ClassVar[bool] = False
    """A critic's values give every token an advantage of its own: `token_targets` says how."""

    @abstractmethod
    def advantages(self, reward_PN: np.ndarray) -> np.ndarray:
        """Return float64 [P, N], the advantage of each of N answers to P prompts; NaN rewards are left out."""


class PenaltyParams(RolloutParams, ABC):
    """Of objectives whose penalty for leaving the model before training is part of the loss."""

    unbiased_kl: bool = True
    """Multiply the divergence by the ratio, so that its gradient is that of the divergence (DeepSeek-V3.2,
    https://arxiv.org/abs/2512.02556; TRL's use_bias_correction_kl). false: as in the first GRPO paper, with a gradient
    of another kind even where the ratio is 1."""


def mean_of_each(reward_PN: np.ndarray) -> np.ndarray:
    """Return [P, 1], the mean reward of each prompt's answers; NaN where none has one."""
    import numpy as np

    counted = ~np.isnan(reward_PN)
    number = counted.sum(1, keepdims=True)
    total = np.where(counted, reward_PN, 0.0).sum(1, keepdims=True)
    return np.where(number > 0, total / np.maximum(number, 1), np.nan)


def deviation(reward: np.ndarray, axis: int | None) -> np.ndarray:
    """Return the standard deviation with Bessel's correction, NaN left out, 0 of fewer than two values."""
    import numpy as np

    number = (~np.isnan(reward)).sum(axis, keepdims=True)
    mean = np.nansum(reward, axis, keepdims=True) / np.maximum(number, 1)
    return np.sqrt(np.nansum((reward - mean) ** 2, axis, keepdims=True) / np.maximum(number - 1, 1))


Loss = Literal["grpo", "dapo", "dr_grpo", "gspo", "cispo", "sequence", "sum"]


def policy_gradient_terms(params: RolloutParams, policy: Policy, batch: Batch, loss: Loss) -> LossTerms:
    """Return the loss summed as the denominator counts it, and what happened to the ratios.

    `dapo`, `cispo`: tokens of all answers alike. `grpo`, `gspo`: the mean of each answer's tokens. `dr_grpo`, `sum`:
    their sum, which is divided by the longest allowed length or by nothing. `sequence`: one ratio of the whole answer,
    the product of its tokens'.
    """
    return clipped_terms(params, policy.token_logprobs(batch), batch, loss)


def clipped_terms(params: RolloutParams, logprob_S: Tensor, batch: Batch, loss: Loss) -> LossTerms:
    """Return what `policy_gradient_terms` does, of log-probabilities [S] that have been computed."""
    import torch

    columns = batch.columns
    sampler_S = columns["sampler_logprob_S"].to(logprob_S.dtype)
    old_S = columns["old_logprob_S"].to(logprob_S.dtype) if "old_logprob_S" in columns else logprob_S.detach()
    if "advantage_S" in columns:
        advantage_S = columns["advantage_S"].to(logprob_S.dtype)
    else:
        advantage_S = batch.by_token(columns["advantage_D"].to(logprob_S.dtype))
    length_D = batch.sum_by_document(torch.ones_like(logprob_S)).clamp(min=1)
    log_ratio_S = logprob_S - old_S
    if loss in ("gspo", "sequence"):
        log_ratio_D = batch.sum_by_document(log_ratio_S) / (length_D if loss == "gspo" else 1.0)
        log_ratio_S = batch.by_token(log_ratio_D).to(logprob_S.dtype)
    ratio_S = log_ratio_S.exp()
    low, high = 1 - params.clip_low, 1 + params.clip_high
    if loss == "cispo":
        loss_S = -ratio_S.detach().clamp(max=high) * advantage_S * logprob_S
    else:
        loss_S = -torch.minimum(ratio_S * advantage_S, ratio_S.clamp(low, high) * advantage_S)
    weights = _weights(batch, old_S, sampler_S, by_answer=params.correction == "sequence")
    is_outside = (weights < params.correction_floor) | (weights > params.correction_cap)
    if params.correction != "none":
        bounded = (
            weights.clamp(params.correction_floor, params.correction_cap)
            if params.correction_outside == "truncate"
            else weights.masked_fill(is_outside, 0.0)
        )
        weight_S = batch.by_token(bounded) if params.correction == "sequence" else bounded
        loss_S = loss_S * weight_S.to(logprob_S.dtype)
    share_S = batch.by_token(1 / length_D).to(logprob_S.dtype)  # of its answer
    if loss in ("grpo", "gspo", "sequence"):
        loss_S = loss_S * share_S
    figures: dict[str, Figure] = {}
    if params.beta:
        gap_S = columns["ref_logprob_S"].to(logprob_S.dtype) - logprob_S
        divergence_S = gap_S.exp() - gap_S - 1
        if isinstance(params, PenaltyParams):
            weighted_S = divergence_S * ratio_S if params.unbiased_kl else divergence_S
            loss_S = loss_S + params.beta * weighted_S * (share_S if loss in ("grpo", "gspo") else 1.0)
        figures["kl"] = (divergence_S.sum(), batch.num_supervised)
    is_low_S = (ratio_S < low) & (advantage_S < 0)
    is_high_S = (ratio_S > high) & (advantage_S > 0)
    figures |= {
        "clipped_low": (is_low_S.sum(), batch.num_supervised),
        "clipped_high": (is_high_S.sum(), batch.num_supervised),
        "equal_answers": (columns["equal_D"].sum(), batch.num_documents),
        **figures_of_answers(batch, logprob_S.detach(), old_S),
    }
    if params.correction != "none":
        counts = columns["counted_D"] > 0 if params.correction == "sequence" else torch.ones_like(is_outside)
        figures["corrected_outside"] = ((is_outside & counts).sum(), counts.sum())
        if params.correction == "sequence":
            figures["sampler_ess"] = effective_sample_size(weights[counts])
    if "refilled_D" in columns:  # where the recipe asks for it
        figures["refilled_answers"] = (columns["refilled_D"].sum(), batch.num_documents)
        figures["written_per_answer"] = (columns["written_per_answer_D"].sum(), batch.num_documents)
    return LossTerms.of(loss_S.sum(), figures)


def _weights(batch: Batch, old_S: Tensor, sampler_S: Tensor, *, by_answer: bool) -> Tensor:
    """Return fp64 [S], or [D] by answer: the trainer's probability of what was drawn by the sampler's, no gradient."""
    log_weight_S = old_S.detach().double() - sampler_S.double()
    return (batch.sum_by_document(log_weight_S) if by_answer else log_weight_S).exp()


def effective_sample_size(weights: Tensor) -> Figure:
    """Return the figure of importance weights [any length], see `distft.core.step_figures`."""
    return weights.sum(), weights.square().sum(), float(weights.numel())


def figures_of_answers(batch: Batch, logprob_S: Tensor, written_S: Tensor) -> dict[str, Figure]:
    """Return the figures of what was written and what it was worth, whatever is learnt from it.

    Args:
        batch: with the columns of `distft.step_sources.rollout_batches`.
        logprob_S: of the policy as it is, without a gradient.
        written_S: of the policy that the answers were written with, as the trainer computes it.
    """
    import torch

    columns = batch.columns
    counted_D = columns["counted_D"]
    weights_S = _weights(batch, written_S, columns["sampler_logprob_S"], by_answer=False)
    gap_S = (written_S.detach() - columns["sampler_logprob_S"].to(logprob_S.dtype)).abs()
    figures: dict[str, Figure] = {
        "sampler_gap": (gap_S.sum(), batch.num_supervised),
        "sampler_gap_max": (gap_S.max() if batch.num_supervised else -math.inf,),
        "sampler_ess": effective_sample_size(weights_S),
        "entropy": (-logprob_S.sum(), batch.num_supervised),
        "answer_tokens": (batch.sum_by_document(torch.ones_like(logprob_S)).sum(), counted_D.sum()),
    }
    for name, column_D in columns.items():
        if name.startswith("reward_"):
            figures[name.removesuffix("_D")] = ((column_D * counted_D).sum(), counted_D.sum())
    for name in ("truncated", "unscored"):
        figures[f"{name}_answers"] = (columns[f"{name}_D"].sum(), batch.num_documents)
    for name in ("writing_s", "judging_s"):
        figures[name] = (columns[f"{name}_D"].sum(), batch.num_documents)
    return figures


OF_ANSWERS = {
    **dict.fromkeys(
        ("sampler_gap", "sampler_gap_max", "truncated_answers", "unscored_answers", "writing_s", "judging_s"), False
    ),
    **dict.fromkeys(("sampler_ess", "reward_total", "entropy", "answer_tokens"), True),
}
"""Names of `figures_of_answers`, and whether more is better; each reward has one of its own besides."""

Terms = Callable[[Any, Policy, Batch], LossTerms]


def rollout_objective(
    name: str,
    params: type[RolloutParams],
    loss_of: Callable[[Any], Loss],
    *,
    terms: Terms | None = None,
    head: str = "lm",
    other_head: Callable[[Any], str | None] = lambda params: None,
    more_figures: Mapping[str, bool] | None = None,
) -> ObjectiveSpec:
    """Return an objective on the model's own answers; `loss_of` says, by its params, how tokens become one loss.

    `terms` stands in for `policy_gradient_terms`; `more_figures` are those that it has besides.
    """

    def usual(chosen: RolloutParams, policy: Policy, batch: Batch) -> LossTerms:
        return policy_gradient_terms(chosen, policy, batch, loss_of(chosen))

    def denominator(chosen: RolloutParams, micros: Sequence[Batch]) -> float:
        loss = loss_of(chosen)
        if loss in ("dapo", "cispo"):
            return float(sum(micro.num_supervised for micro in micros))
        column = "budget_D" if loss == "dr_grpo" else "counted_D"
        return float(sum(float(micro.columns[column].sum()) for micro in micros))

    return ObjectiveSpec(
        name=name,
        params=params,
        source="rollouts",
        writes=True,
        per_token=True,
        head=head,
        other_head=other_head,
        denominator=denominator,
        terms=terms or usual,
        columns=lambda chosen: ("ref_logprob_S",) if chosen.beta else (),  # the others come with the answers
        figures=lambda chosen: {**_figures(chosen), **(more_figures or {})},
    )


def _figures(params: RolloutParams) -> Mapping[str, bool]:
    """Return the figures and whether more is better; each reward has one of its own besides, and refilling has two."""
    known = OF_ANSWERS | dict.fromkeys(("clipped_low", "clipped_high", "equal_answers"), False)
    known |= {"kl": False} if params.beta else {}
    return known | ({"corrected_outside": False} if params.correction != "none" else {})
