"""The trained model as objectives see it: each call is one forward of the module that an engine has wrapped.

Shape letters: T tokens of one micro-batch, S of them supervised, D documents, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from distft.core.errors import MachineError
from distft.core.types import Batch, LossTerms
from distft.model.cross_entropy import AtTemperature, HeadLoss
from distft.model.divergence import Divergence, DivergenceKind, TeacherHead


@dataclass(frozen=True)
class ModelPolicy:
    """A `core.types.Policy` over a wrapped `distft.model.causal.CausalLM`."""

    model: nn.Module
    temperature: float = 1.0
    """What its log-probabilities of tokens are at: that of the draws, where answers are the model's own."""
    teacher: TeacherHead | None = None
    """Of a student and of its teacher, the same: where the teacher's forward leaves its head."""
    measures: bool = False
    """Whether `loss_sum` also counts the labels that are the likeliest token, which only evaluations ask."""

    def measuring(self) -> ModelPolicy:
        """Return the policy of an evaluation, whose `loss_sum` has the figure `token_accuracy`."""
        return replace(self, measures=True)

    def loss_sum(self, batch: Batch) -> LossTerms:
        """Return the cross-entropy summed over the supervised tokens, with a router's loss and a method's penalty.

        The figures `router_loss` and `penalty` are their parts of the loss, per supervised token.
        """
        asked = {"accuracy": True} if self.measures else {}
        output: Tensor | tuple[Tensor, ...] = self.model(**batch.inputs(), **asked)
        losses, *added = output if isinstance(output, tuple) else (output,)
        names = ("router_loss", "penalty")[: len(added)]
        figures = {name: (part.sum(), batch.num_supervised) for name, part in zip(names, added, strict=True)}
        if self.measures:
            figures["token_accuracy"] = (losses[:, 1].sum(), batch.num_supervised)
            losses = losses[:, 0].contiguous()  # the sum of a column may have another order
        total = losses.sum()
        for part in added:
            total = total + part.sum()
        return LossTerms.of(total, figures) if figures else LossTerms(loss_sum=total)

    def token_logprobs(self, batch: Batch) -> Tensor:
        """Return fp32 [S], the log-probability of every label at the policy's temperature, in order.

        The head runs in chunks of tokens, forward and backward, so that logits of [S, V] never exist. With nothing
        supervised the result is empty, and still has a gradient (zero) of every parameter.

        Raises:
            MachineError: the model's router has a loss of its own, which would be left out.
        """
        return -self._by_token(batch)[: batch.num_supervised]

    def token_logprobs_and_values(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return fp32 [S] twice: as `token_logprobs`, and what the head `lm_value` says of the position before it.

        Raises:
            MachineError: as `token_logprobs`.
        """
        output = self._by_token(batch, values=True)
        return -output[0, : batch.num_supervised], output[1, : batch.num_supervised]

    def divergence(
        self, batch: Batch, hidden_SE: Tensor, kind: DivergenceKind, mixture: float
    ) -> tuple[Tensor, Tensor]:
        """Return fp32 [S] twice: the divergence from the teacher's distribution, and as `token_logprobs`, no gradient.

        Args:
            batch: of the student.
            hidden_SE: the teacher's last hidden states at its supervised positions (`teacher_hidden`).
            kind: which divergence.
            mixture: of the kind "js".

        Raises:
            MachineError: as `token_logprobs`.
        """
        assert self.teacher is not None
        rows = (hidden_SE,) if batch.num_supervised else (hidden_SE.new_zeros(1, hidden_SE.shape[1]),)
        loss = Divergence(rows=rows, teacher=self.teacher, kind=kind, mixture=mixture, temperature=self.temperature)
        output_S2 = self._by_token(batch, loss=loss)[: batch.num_supervised]
        return output_S2[:, 0], output_S2[:, 1].detach()

    def teacher_hidden(self, batch: Batch) -> Tensor:
        """Return [S, E] in the model's type, its last hidden states before the labels; its head goes into `teacher`.

        Raises:
            MachineError: as `token_logprobs`; or the model's head is its own affair.
        """
        assert self.teacher is not None
        return self._by_token(batch, loss=self.teacher)[: batch.num_supervised]

    def _by_token(self, batch: Batch, *, loss: HeadLoss | None = None, values: bool = False) -> Tensor:
        if loss is None and self.temperature != 1.0:
            loss = AtTemperature(temperature=self.temperature)
        given: dict[str, Any] = {} if loss is None else {"loss": loss}
        output: Tensor | tuple[Tensor, ...] = self.model(**batch.inputs(), per_token=True, values=values, **given)
        if isinstance(output, tuple):
            raise _with_other_losses()
        return output

    def scores(self, batch: Batch) -> Tensor:
        """Return fp32 [D], the value of the scalar head at each document's last token, filler left out.

        Without documents the result is empty, and still has a gradient (zero) of every parameter.
        """
        score_D: Tensor = self.model(**batch.score_inputs())
        return score_D[: batch.num_documents]


def _with_other_losses() -> MachineError:
    return MachineError(
        "only the objective sft adds losses beside its own: this model's config asks for router losses "
        "(set output_router_logits to false in config.json), or its method has a penalty"
    )
