"""On-policy distillation: the model writes answers, and each token's distribution is moved towards a teacher's.

Source: Agarwal et al., https://arxiv.org/abs/2306.13649 (GKD, with every answer the student's own), and Gu et al.,
https://arxiv.org/abs/2306.08543 (reverse KL). No gradient goes through the draws, as in GKD. Needs no rewards; those
that [rollout] names are measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from distft.core.registry import Params
from distft.core.types import Batch, LossTerms, Policy
from distft.objectives.spec import ObjectiveSpec

if TYPE_CHECKING:
    import numpy as np

TEACHER = "teacher_hidden_S"


class DistillParams(Params):
    """The teacher and what is minimised."""

    teacher: str = Field(min_length=1)
    """Model that is imitated, of the same tokenizer: a folder or a hub id. It stands beside the trained one, in its
    type, cut by the same engine, with its head whole on every rank."""
    divergence: Literal["forward", "reverse", "js"] = "reverse"
    """reverse = KL(model ‖ teacher), which leaves out what it cannot do; forward = KL(teacher ‖ model), which covers
    all that the teacher may say; js = their mixture."""
    mixture: float = Field(default=0.5, gt=0, lt=1)
    """Of `js`: the teacher's share of the mixture; towards 0 it is like forward, towards 1 like reverse."""
    beta: ClassVar[float] = 0.0
    compares_answers: ClassVar[bool] = False
    equal_teaches_nothing: ClassVar[bool] = False
    values_tokens: ClassVar[bool] = False

    def advantages(self, reward_PN: np.ndarray) -> np.ndarray:
        """Return zeros: rewards are measured, and teach nothing."""
        return reward_PN * 0.0


def _terms(params: DistillParams, policy: Policy, batch: Batch) -> LossTerms:
    import torch

    columns = batch.columns
    divergence_S, logprob_S = policy.divergence(batch, columns[TEACHER], params.divergence, params.mixture)
    counted_D = columns["counted_D"]
    gap_S = (logprob_S - columns["sampler_logprob_S"].to(logprob_S.dtype)).abs()
    tokens_D = batch.sum_by_document(torch.ones_like(logprob_S))
    figures = {
        "divergence": (divergence_S.detach().sum(), batch.num_supervised),
        "entropy": (-logprob_S.sum(), batch.num_supervised),
        "sampler_gap": (gap_S.sum(), batch.num_supervised),
        "answer_tokens": (tokens_D.sum(), counted_D.sum()),
    }
    for name, column_D in columns.items():
        if name.startswith("reward_"):
            figures[name.removesuffix("_D")] = ((column_D * counted_D).sum(), counted_D.sum())
    for name in ("truncated", "unscored"):
        figures[f"{name}_answers"] = (columns[f"{name}_D"].sum(), batch.num_documents)
    for name in ("writing_s", "judging_s"):
        figures[name] = (columns[f"{name}_D"].sum(), batch.num_documents)
    return LossTerms.of(divergence_S.sum(), figures)


def _denominator(params: DistillParams, micros: Sequence[Batch]) -> float:
    return float(sum(micro.num_supervised for micro in micros))


_LESS = ("divergence", "sampler_gap", "truncated_answers", "unscored_answers", "writing_s", "judging_s")
_MORE = ("reward_total", "entropy", "answer_tokens")
_FIGURES: dict[str, bool] = {name: name in _MORE for name in (*_LESS, *_MORE)}

SPEC = ObjectiveSpec(
    name="distill",
    params=DistillParams,
    source="rollouts",
    writes=True,
    rewarded=False,
    per_token=True,
    denominator=_denominator,
    terms=_terms,
    columns=lambda params: (TEACHER,),
    teacher=lambda params: params.teacher,
    figures=lambda params: _FIGURES,
)
