"""Direct preference optimisation, with the losses that grew out of it.

Notation: beta is the strength of the pull towards the reference, s the log-ratio of policy to reference of an answer,
summed over its tokens, delta = s_chosen - s_rejected. The loss is a mean over the pairs of the global batch. Each is
that of its paper; where frameworks mean different things by one name, its function says which this is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from distft.core.types import Batch, LossTerms, Policy
from distft.objectives.pairs import FIGURES, Pair, count_pairs, lengths_of, pair_terms, tail_weights
from distft.objectives.spec import ObjectiveSpec, ReferenceModelParams

if TYPE_CHECKING:
    from torch import Tensor

Loss = Literal[
    "sigmoid", "hinge", "ipo", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down",
    "discopop", "sigmoid_norm",
]  # fmt: skip
_SMOOTHED = ("sigmoid", "robust", "exo_pair")
_DISCOPOP_TAU = 0.05
"""Source: https://arxiv.org/abs/2406.08414, section 4"""


class DpoParams(ReferenceModelParams):
    """TRL's names."""

    beta: float = Field(default=0.1, gt=0)
    """Strength of the pull towards the reference; the smaller, the further the policy may go."""
    loss: Loss = "sigmoid"
    """sigmoid is DPO; ipo is the mean per token (TRL, LLaMA-Factory), not the sum (OpenRLHF)."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of pairs whose sides are taken to be swapped: cDPO under sigmoid; robust and exo_pair as their papers."""
    sft_weight: float = Field(default=0.0, ge=0)
    """Adds this times the chosen answer's negative log-likelihood per token (RPO)."""
    ld_alpha: float = Field(default=1.0, ge=0, le=1)
    """Below 1: weight of the tokens by which one answer is longer, so that length counts for less (LD-DPO)."""

    @model_validator(mode="after")
    def _smoothing_fits(self) -> DpoParams:
        if self.label_smoothing and self.loss not in _SMOOTHED:
            raise ValueError(f"label_smoothing is used by loss = {', '.join(_SMOOTHED)} alone")
        if self.loss == "exo_pair" and not self.label_smoothing:
            raise ValueError("loss = exo_pair needs a label_smoothing above 0, such as 0.001")
        return self


def _sigmoid(p: DpoParams, s: Pair, length: Pair) -> Tensor:
    """DPO, https://arxiv.org/abs/2305.18290 equation 7; smoothed: cDPO, https://ericmitchell.ai/cdpo.pdf."""
    logit_G, eps = p.beta * s.gap_G, p.label_smoothing
    return -(1 - eps) * _log_sigmoid(logit_G) - (eps * _log_sigmoid(-logit_G) if eps else 0)


def _hinge(p: DpoParams, s: Pair, length: Pair) -> Tensor:
    """SLiC, https://arxiv.org/abs/2305.10425, as in https://arxiv.org/abs/2309.06657."""
    return (1 - p.beta * s.gap_G).clamp(min=0)


def _ipo(p: DpoParams, s: Pair, length: Pair) -> Tensor:
    """IPO, https://arxiv.org/abs/2310.12036 equation 17, with s per token; the sum of tokens is another loss."""
    return ((s / length).gap_G - 1 / (2 * p.beta)) ** 2


def _robust(p: DpoParams, s: Pair, length: Pair) -> Tensor:
    """Robust DPO, https://arxiv.org/abs/2403.00409 equation 13."""
    logit_G, eps = p.beta * s.gap_G, p.label_smoothing
    return (-(1 - eps) * _log_sigmoid(logit_G) + eps * _log_sigmoid(-logit_G)) / (1 - 2 * eps)


def _exo_pair(p: DpoParams, s: Pair, length: Pair) -> Tensor:
    """EXO, https://arxiv.org/abs/2402.00856 equation 16: reverse KL to the smoothed labels."""
    logit_G, eps = p.beta * s.gap_G, p.label_smoothing
    log_w, log_l = _log_sigmoid(logit_G), _log_sigmoid(-logit_G)
    return log_w.exp() * (log_w - math.log1p(-eps)) + log_l.exp() * (log_l - math.log(eps))


def _nca_pair(p: DpoParams, s: Pair, length: Pair) -> Tensor:
    """NCA, https://arxiv.org/abs/2402.05369."""
    chosen_G, rejected_G = p.beta * s.chosen_G, p.beta * s.rejected_G
    return -_log_sigmoid(chosen_G) - 0.5 * _log_sigmoid(-chosen_G) - 0.5 * _log_sigmoid(-rejected_G)


def _bco_pair(p: DpoParams, s: Pair, length: Pair) -> Tensor:
    """BCO on pairs, https://arxiv.org/abs/2404.04656, without the shift by a running mean of rewards."""
    return -_log_sigmoid(p.beta * s.chosen_G) - _log_sigmoid(-p.beta * s.rejected_G)


def _sppo_hard(p: DpoParams, s: Pair, length: Pair) -> Tensor:
    """SPPO with hard labels, https://arxiv.org/abs/2405.00675."""
    return (s.chosen_G - 0.5 / p.beta) ** 2 + (s.rejected_G + 0.5 / p.beta) ** 2


def _apo_zero(p: DpoParams, s: Pair, length: Pair) -> Tensor:
    """APO-zero, https://arxiv.org/abs/2408.06266 equation 7: chosen up, rejected down."""
    return 1 - (p.beta * s.chosen_G).sigmoid() + (p.beta * s.rejected_G).sigmoid()


def _apo_down(p: DpoParams, s: Pair, length: Pair) -> Tensor:
    """APO-down, https://arxiv.org/abs/2408.06266 equation 8: both down, rejected more."""
    return (p.beta * s.chosen_G).sigmoid() + 1 - (p.beta * s.gap_G).sigmoid()


def _discopop(p: DpoParams, s: Pair, length: Pair) -> Tensor:
    """DiscoPOP, https://arxiv.org/abs/2406.08414 equation 5: log-ratio modulated loss."""
    logit_G = p.beta * s.gap_G
    exponential_G = (logit_G / _DISCOPOP_TAU).sigmoid()
    return -_log_sigmoid(logit_G) * (1 - exponential_G) + (-logit_G).exp() * exponential_G


def _sigmoid_norm(p: DpoParams, s: Pair, length: Pair) -> Tensor:
    """Length-normalised DPO, https://arxiv.org/abs/2411.15124 equation 6 (Tulu 3)."""
    return -_log_sigmoid(p.beta * (s / length).gap_G)


def _log_sigmoid(value: Tensor) -> Tensor:
    import torch

    return torch.nn.functional.logsigmoid(value)


LOSSES: dict[str, Callable[[DpoParams, Pair, Pair], Tensor]] = {
    "sigmoid": _sigmoid,
    "hinge": _hinge,
    "ipo": _ipo,
    "robust": _robust,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "bco_pair": _bco_pair,
    "sppo_hard": _sppo_hard,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "discopop": _discopop,
    "sigmoid_norm": _sigmoid_norm,
}
"""(params, log-ratios summed over tokens, numbers of tokens) -> loss of each pair, fp32 [G]."""


def _terms(params: DpoParams, policy: Policy, batch: Batch) -> LossTerms:
    logprob_S = policy.token_logprobs(batch)
    logprob, length = Pair.of(batch.sum_by_document(logprob_S)), lengths_of(batch)
    if params.ld_alpha < 1:
        gap_S = logprob_S - batch.columns["ref_logprob_S"]
        ratio = Pair.of(batch.sum_by_document(gap_S * tail_weights(length, params.ld_alpha)))
    else:
        ratio = logprob - Pair.of(batch.columns["ref_logprob_D"])
    loss_G = LOSSES[params.loss](params, ratio, length)
    if params.sft_weight:
        loss_G = loss_G - params.sft_weight * logprob.chosen_G / length.chosen_G
    reward = Pair(params.beta * ratio.chosen_G, params.beta * ratio.rejected_G)
    return pair_terms(batch, loss_G, reward, length, logprob=logprob)


SPEC = ObjectiveSpec(
    name="dpo",
    params=DpoParams,
    group_size=2,
    per_token=True,
    columns=lambda params: ("ref_logprob_S" if params.ld_alpha < 1 else "ref_logprob_D",),
    denominator=count_pairs,
    terms=_terms,
    figures=lambda params: FIGURES,
    reference=lambda params: params.reference,
)
