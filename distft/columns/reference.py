"""The log-probability that the model gave each document's supervised tokens before it was trained.

The reference of preference objectives. Under a method that leaves the base as it is (LoRA, QLoRA) it is the trained
model with the adapters left out; else it is computed once, before the first update, and kept. No second model stands in
memory.
"""

from __future__ import annotations

from collections.abc import Callable
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
            MachineError, FileSystemError, Preempted: see `stored_logprobs`; or the model before training is needed
                beside the trained one.
        """
        alone = self.base_alone
        if alone is None or not _can_be_left(alone):
            if self.written_meanwhile:
                raise MachineError(
                    "the model before training is not to be had beside this one: adapters that start from others, "
                    "change the base or train whole modules cannot be left out of a forward  [objective] beta = 0.0, "
                    "or plain adapters"
                )
            return self._from_files()

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


def _can_be_left(alone: Callable[[], AbstractContextManager[None]]) -> bool:
    """Return whether every trained part is one that forwards can do without (`MethodSpec.base_alone`)."""
    try:
        with alone():
            return True
    except MachineError:
        return False


def _by_document(inputs: ColumnInputs) -> Supplier:
    by_token = inputs.reference()
    return of_each(lambda batch: batch.sum_by_document(by_token(batch)))


_READS: dict[str, Any] = {"reads_reference": True, "reference_forwards": 1}
BY_TOKEN = ColumnSpec(name="ref_logprob_S", open=lambda inputs: of_each(inputs.reference()), **_READS)
BY_DOCUMENT = ColumnSpec(name="ref_logprob_D", open=_by_document, **_READS)
