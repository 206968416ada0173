"""What a supplier of a column declares, and how a step's micro-batches get their columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from distft.core.types import Batch, Engine, Policy

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from distft.columns.stored_logprobs import RowPass


@dataclass(frozen=True, kw_only=True)
class ColumnInputs:
    """What a supplier may use."""

    policy: Policy
    method: str
    """Name of the recipe's method, for messages."""
    base_alone: Callable[[], AbstractContextManager[None]] | None
    """Context in which the policy is the base model; None where the method changes the base itself."""
    engine: Engine
    """Holds the weights that training starts from."""
    row_passes: tuple[RowPass, ...] = ()
    """The prepared rows of every split."""
    folder_of: Callable[[str], Path]
    """Fingerprint of prepared rows -> where values of them are kept that follow from the weights before training."""
    is_trained: bool = False
    """The engine's weights are trained ones: what needs those before training is not computed from them."""
    say: Callable[[str], None]
    """Takes a line for the user."""


@dataclass(frozen=True, kw_only=True)
class ColumnSpec:
    """A named column; the last letter of its name is its axis: D documents, S supervised positions, G groups."""

    name: str
    open: Callable[[ColumnInputs], Callable[[Batch], Tensor]]
    """Once, before training -> the function that computes the column of a micro-batch on the device. It is called
    without gradients, in evaluation mode, on every rank as often as on the others.

    Raises:
        MachineError: the column cannot be had in this run; says why.
    """


@dataclass(frozen=True)
class ColumnFiller:
    """A `core.protocols.BatchColumns` of some suppliers."""

    engine: Engine
    suppliers: Mapping[str, Callable[[Batch], Tensor]]

    def fill(self, micros: list[Batch]) -> list[Batch]:
        """Collective: return the micro-batches with their columns, which stay on the device."""
        with self.engine.evaluating():
            return [self._filled(micro) for micro in micros]

    def _filled(self, micro: Batch) -> Batch:
        placed = self.engine.place(micro)
        return replace(micro, columns={**micro.columns, **{name: of(placed) for name, of in self.suppliers.items()}})
