"""How far a student's next-token distributions are from a teacher's, over the whole vocabulary.

S supervised tokens, C tokens of one chunk, E the teacher's hidden size, V vocabulary. Logits of [S, V] never exist, of
neither model: the teacher leaves its last hidden states and its head, and both products are made chunk by chunk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from distft.model.cross_entropy import ChunkLoss
from distft.model.logit_rule import PLAIN, LogitRule

DivergenceKind = Literal["forward", "reverse", "js"]


class TeacherHead:
    """A `HeadLoss` that gives the hidden states as they are, and keeps the head beside them.

    A head that an engine has cut is whole in its forward alone; what it needs there is copied once, whole on each rank.
    """

    def __init__(self) -> None:
        self.weight_VE: Tensor | None = None
        self.bias_V: Tensor | None = None
        self.rule = PLAIN

    def __call__(
        self, hidden_SE: Tensor, weight_VE: Tensor, bias_V: Tensor | None, labels_S: Tensor, rule: LogitRule = PLAIN
    ) -> Tensor:
        """Return `hidden_SE`."""
        if self.weight_VE is None:
            self.weight_VE, self.rule = weight_VE.detach().clone(), rule
            self.bias_V = None if bias_V is None else bias_V.detach().clone()
        return hidden_SE

    def log_probabilities(self, hidden_CE: Tensor, temperature: float, most: int) -> Tensor:
        """Return fp32 [C, v] of the teacher, over the first `most` of its vocabulary at most."""
        assert self.weight_VE is not None, "the teacher's forward comes first"
        rule = replace(self.rule, temperature=temperature)
        bias_V = None if self.bias_V is None else self.bias_V[:most]
        return F.log_softmax(rule.logits(hidden_CE, self.weight_VE[:most], bias_V), dim=1)


@dataclass(frozen=True, kw_only=True)
class Divergence(ChunkLoss):
    """A `HeadLoss` of [S, 2]: the divergence of each distribution, and the student's log-probability of the label.

    With p the student's and q the teacher's distribution: `forward` is KL(q ‖ p), `reverse` KL(p ‖ q), `js`
    β KL(q ‖ m) + (1 - β) KL(p ‖ m) of the mixture m = β q + (1 - β) p. Source: Agarwal et al.,
    https://arxiv.org/abs/2306.13649, section 3.
    """

    teacher: TeacherHead
    kind: DivergenceKind
    mixture: float
    """β of `js`."""
    temperature: float = 1.0
    rows: tuple[Tensor, ...] = field(default=(), repr=False)

    def of_chunk(self, logits_CV: Tensor, labels_C: Tensor, *rows: Tensor) -> Tensor:
        """Return both of each token.

        One model's vocabulary may be filled up further than the other's, for speed: ids that only one has are left out
        of both distributions.
        """
        (hidden_CE,) = rows
        with torch.no_grad():
            teacher_CV = self.teacher.log_probabilities(hidden_CE, self.temperature, logits_CV.shape[1])
        student_CV = F.log_softmax(logits_CV[:, : teacher_CV.shape[1]], dim=1)
        match self.kind:
            case "forward":
                divergence_C = _kl(teacher_CV, student_CV)
            case "reverse":
                divergence_C = _kl(student_CV, teacher_CV)
            case "js":
                beta = self.mixture
                mixed_CV = torch.logaddexp(teacher_CV + math.log(beta), student_CV + math.log1p(-beta))
                divergence_C = beta * _kl(teacher_CV, mixed_CV) + (1 - beta) * _kl(student_CV, mixed_CV)
        logprob_C = -F.cross_entropy(logits_CV.detach(), labels_C, reduction="none")
        return torch.stack([divergence_C, logprob_C], dim=1)


def _kl(log_p_CV: Tensor, log_q_CV: Tensor) -> Tensor:
    """Return KL(p ‖ q) of each row."""
    return (log_p_CV.exp() * (log_p_CV - log_q_CV)).sum(1)
