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
from distft.objectives.policy_gradient import OF_ANSWERS, figures_of_answers
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
    divergence_S, logprob_S = policy.divergence(batch, batch.columns[TEACHER], params.divergence, params.mixture)
    figures = figures_of_answers(batch, logprob_S, batch.columns.get("old_logprob_S", logprob_S))
    figures["divergence"] = (divergence_S.detach().sum(), batch.num_supervised)
    return LossTerms.of(divergence_S.sum(), figures)


def _denominator(params: DistillParams, micros: Sequence[Batch]) -> float:
    return float(sum(micro.num_supervised for micro in micros))


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
    figures=lambda params: OF_ANSWERS | {"divergence": False},
)
