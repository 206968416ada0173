"""The last hidden states of a teacher, another model that stands beside the trained one, before every label."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from distft.columns.spec import ColumnInputs, ColumnSpec, Supplier, of_each
from distft.core.errors import MachineError
from distft.core.types import Batch

if TYPE_CHECKING:
    from torch import Tensor


class TeacherPolicy(Protocol):
    """What gives a teacher's hidden states (`distft.model.policy.ModelPolicy`)."""

    @property
    def teacher(self) -> Any:
        """Where its forward leaves its head."""
        ...

    def teacher_hidden(self, batch: Batch) -> Tensor:
        """Return [S, E]."""
        ...


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A model under an engine of its own."""

    policy: TeacherPolicy
    evaluating: Callable[[], AbstractContextManager[None]]
    """Its engine's."""

    def __call__(self, batch: Batch) -> Tensor:
        """Collective: return [S, E] of a micro-batch on the device."""
        with self.evaluating():
            return self.policy.teacher_hidden(batch)


def _open(inputs: ColumnInputs) -> Supplier:
    if inputs.teacher is None:
        raise MachineError("the objective reads a teacher, and none was opened")
    return of_each(inputs.teacher)


HIDDEN = ColumnSpec(name="teacher_hidden_S", open=_open, teacher_forwards=1)
