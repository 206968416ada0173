"""`ref_logprob_D`: the log-probability that the base model gives each document's supervised tokens.

The reference of preference objectives. Under a method that leaves the base as it is (LoRA, QLoRA) it is the trained
model with the adapters left out, so that no second model stands in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from distft.columns.spec import ColumnInputs, ColumnSpec
from distft.core.errors import MachineError
from distft.core.types import Batch

if TYPE_CHECKING:
    from torch import Tensor


def _open(inputs: ColumnInputs) -> Callable[[Batch], Tensor]:
    base_alone = inputs.base_alone
    if base_alone is None:
        raise MachineError(
            f'the objective compares with the base model, which method = "{inputs.method}" changes: '
            'train with method "lora" or "qlora", which keep it'
        )

    def column(batch: Batch) -> Tensor:
        with base_alone():
            return batch.sum_by_document(inputs.policy.token_logprobs(batch))

    return column


SPEC = ColumnSpec(name="ref_logprob_D", open=_open)
