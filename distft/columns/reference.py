"""The log-probability that the model gave each document's supervised tokens before it was trained.

The reference of preference objectives and of KL penalties. Under a method that leaves the base as it is (LoRA, QLoRA)
it is the trained model with the adapters left out. Else it is computed once, before the first update, and kept; no
second model stands in memory. Where what is trained is written during training, nothing can be computed before: then
each rank keeps a copy of its part of the trained weights, which take their place for the reference's forwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distft.columns.spec import ColumnInputs, ColumnSpec, Supplier, of_each
from distft.core.errors import MachineError
from distft.core.types import Batch, Engine, Policy

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from distft.columns.stored_logprobs import RowPass


@dataclass(frozen=True, kw_only=True)
class ReferenceModel:
    """The model before training, and how to have its log-probabilities later."""

    policy: Policy
    engine: Engine
    """Holds the weights that training starts from, unless `is_trained`."""
    base_alone: Callable[[], AbstractContextManager[None]] | None
    """Context in which the policy is the base model; None where the method changes the base itself."""
    row_passes: tuple[RowPass, ...]
    """The prepared rows of every split."""
    folder_of: Callable[[str], Path]
    """Fingerprint of prepared rows -> where their log-probabilities are kept."""
    is_trained: bool
    """The engine's weights are trained ones: nothing can be computed from them."""
    say: Callable[[str], None]
    """Takes a line for the user."""
    written_meanwhile: bool = False
    """What is trained is written during training: nothing can be computed of it before."""

    def open(self) -> Callable[[Batch], Tensor]:
        """Collective: return what gives [S], the log-probability of every supervised token of a micro-batch.

        Raises:
            MachineError, FileSystemError, Preempted: see `stored_logprobs`.
        """
        alone = self.base_alone
        if alone is None or not _can_be_left(alone):
            if not self.written_meanwhile:
                return self._from_files()
            if self.is_trained:
                raise MachineError("the model before training is needed, and only the trained one is here")
            from distft.model.load import WRAPPER

            # A critic's weights are read by no reference.
            frozen = self.engine.frozen_weights(lambda name: name.startswith(WRAPPER))
            return FrozenReference(policy=self.policy, engine=self.engine, frozen=frozen)

        def by_leaving_out(batch: Batch) -> Tensor:
            with alone():
                return self.policy.token_logprobs(batch)

        return by_leaving_out

    def _from_files(self) -> Callable[[Batch], Tensor]:
        import torch

        from distft.columns.stored_logprobs import stored_logprobs

        stored = {
            rows.prepared.fingerprint: stored_logprobs(
                self.folder_of(rows.prepared.fingerprint),
                rows,
                engine=self.engine,
                policy=self.policy,
                is_trained=self.is_trained,
                say=self.say,
            )
            for rows in self.row_passes
        }

        def from_file(batch: Batch) -> Tensor:
            if not batch.rows_sha256:  # a rehearsal's, of tokens that no row has
                return torch.zeros(batch.num_supervised, device=batch.labels_T.device)
            return stored[batch.rows_sha256].of(batch.rows).to(batch.labels_T.device)

        return from_file


@dataclass(frozen=True, kw_only=True)
class FrozenReference:
    """Gives log-probabilities under weights that were copied before training."""

    policy: Policy
    engine: Engine
    frozen: Callable[[], AbstractContextManager[None]]
    """Context in which the engine's model has them (`Engine.frozen_weights`)."""

    def __call__(self, batch: Batch) -> Tensor:
        """Collective: return [S], those of a micro-batch on the device."""
        with self.frozen():
            return self.policy.token_logprobs(batch)

    def of_all(self, micros: Sequence[Batch]) -> Callable[[Batch], Tensor]:
        """Collective: compute those of all micro-batches, so that weights change places twice a step.

        Returns:
            What gives them, micro-batch by micro-batch in this order.
        """
        with self.frozen():
            computed = [self.policy.token_logprobs(self.engine.place(micro)) for micro in micros]
        values = zip(micros, computed, strict=True)

        def next_one(batch: Batch) -> Tensor:
            micro, logprobs_S = next(values)
            assert (micro.position, micro.num_supervised) == (batch.position, batch.num_supervised), "out of order"
            return logprobs_S

        return next_one


def _can_be_left(alone: Callable[[], AbstractContextManager[None]]) -> bool:
    """Return whether every trained part is one that forwards can do without (`MethodSpec.base_alone`)."""
    try:
        with alone():
            return True
    except MachineError:
        return False


def _by_token(inputs: ColumnInputs) -> Supplier:
    reference = inputs.reference()
    return reference.of_all if isinstance(reference, FrozenReference) else of_each(reference)


def _by_document(inputs: ColumnInputs) -> Supplier:
    by_token = inputs.reference()
    return of_each(lambda batch: batch.sum_by_document(by_token(batch)))


_READS: dict[str, Any] = {"reads_reference": True, "reference_forwards": 1}
BY_TOKEN = ColumnSpec(name="ref_logprob_S", open=_by_token, **_READS)
BY_DOCUMENT = ColumnSpec(name="ref_logprob_D", open=_by_document, **_READS)
