"""The log-probability that the model gave each document's supervised tokens before it was trained.

The reference of preference objectives. Under a method that leaves the base as it is (LoRA, QLoRA) it is the trained
model with the adapters left out; else it is computed once, before the first update, and kept. No second model stands in
memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from distft.columns.spec import ColumnInputs, ColumnSpec
from distft.columns.stored_logprobs import stored_logprobs
from distft.core.errors import MachineError
from distft.core.types import Batch

if TYPE_CHECKING:
    from torch import Tensor


def token_logprobs(inputs: ColumnInputs) -> Callable[[Batch], Tensor]:
    """Return what computes [S], the reference's log-probability of every supervised token of a micro-batch.

    Raises:
        FileSystemError, Preempted: see `stored_logprobs`.
    """
    alone = inputs.base_alone
    if alone is not None and _can_leave_adapters_out(inputs):

        def by_leaving_out(batch: Batch) -> Tensor:
            with alone():
                return inputs.policy.token_logprobs(batch)

        return by_leaving_out
    folders = {rows.prepared.fingerprint: inputs.folder_of(rows.prepared.fingerprint) for rows in inputs.row_passes}
    given = {"engine": inputs.engine, "policy": inputs.policy, "is_trained": inputs.is_trained, "say": inputs.say}
    stored = {
        rows.prepared.fingerprint: stored_logprobs(folders[rows.prepared.fingerprint], rows, **given)
        for rows in inputs.row_passes
    }
    return lambda batch: stored[batch.rows_sha256].of(batch.rows).to(batch.labels_T.device)


def _can_leave_adapters_out(inputs: ColumnInputs) -> bool:
    """Whether every trained part is one that forwards can do without (`MethodSpec.base_alone`)."""
    assert inputs.base_alone is not None
    try:
        with inputs.base_alone():
            return True
    except MachineError:
        return False


def _by_document(inputs: ColumnInputs) -> Callable[[Batch], Tensor]:
    by_token = token_logprobs(inputs)
    return lambda batch: batch.sum_by_document(by_token(batch))


BY_TOKEN = ColumnSpec(name="ref_logprob_S", open=token_logprobs)
BY_DOCUMENT = ColumnSpec(name="ref_logprob_D", open=_by_document)
