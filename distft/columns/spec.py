"""What a supplier of a column declares, and how micro-batches get their columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeAlias

from distft.core.types import Batch, Engine, Policy

if TYPE_CHECKING:
    from torch import Tensor

    from distft.columns.stored_logprobs import RowPass

TensorOf: TypeAlias = "Callable[[Batch], Tensor]"
"""Micro-batch on the device -> its column."""
Supplier: TypeAlias = Callable[[Sequence[Batch]], TensorOf]
"""This rank's micro-batches of a step, or of a whole evaluation -> what gives the column of each.

Both calls are made without gradients, in evaluation mode, on every rank as often as on the others."""


@dataclass(frozen=True, kw_only=True)
class ColumnInputs:
    """What a supplier may use."""

    policy: Policy
    engine: Engine
    """Holds the weights that training starts from."""
    reference: Callable[[], TensorOf]
    """Opens, once, what gives [S], the log-probabilities of the model before training (see `distft.columns.reference`).
    """
    teacher: TensorOf | None = None
    """Gives [S, E], a teacher's hidden states, where the objective names one (see `distft.columns.teacher`)."""
    derived: Mapping[str, RowPass] = field(default_factory=dict[str, "RowPass"])
    """Fingerprint of prepared rows -> the rows that `ColumnSpec.derive` has made of them."""


@dataclass(frozen=True, kw_only=True)
class ColumnSpec:
    """A named column; the last letter of its name is its axis: D documents, S supervised positions, G groups."""

    name: str
    open: Callable[[ColumnInputs], Supplier]
    """Once, before training.

    Raises:
        MachineError: the column cannot be had in this run; says why.
    """
    reads_reference: bool = False
    """It follows from the model before training: then the policy must be that model before the first update."""
    policy_forwards: int = 0
    """Forwards of the policy for each micro-batch of a step, beside the objective's own."""
    reference_forwards: int = 0
    """Forwards of the reference for each micro-batch; where they are computed before training, of all rows once."""
    teacher_forwards: int = 0
    """Forwards of a teacher for each micro-batch of a step."""
    derive: Callable[[RowPass], RowPass] | None = None
    """Makes further rows of the prepared ones, whose log-probabilities it needs as well."""


def of_each(tensor_of: TensorOf) -> Supplier:
    """Return the supplier of a column that depends on nothing but the micro-batch itself."""
    return lambda micros: tensor_of


@dataclass(frozen=True)
class ColumnFiller:
    """A `core.protocols.BatchColumns` of some suppliers."""

    engine: Engine
    suppliers: Mapping[str, Supplier]

    def begin(self, micros: Sequence[Batch]) -> Callable[[Batch], Batch]:
        """Collective, in evaluation mode: compute what is of all these micro-batches together.

        A column that a micro-batch brings is not computed again.

        Returns:
            What gives one of them its columns, which stay on the device; collective.
        """
        columns = {
            name: supplier(micros)
            for name, supplier in self.suppliers.items()
            if not all(name in micro.columns for micro in micros)
        }

        def filled(micro: Batch) -> Batch:
            on_device = self.engine.place(micro)
            computed = {name: of(on_device) for name, of in columns.items() if name not in micro.columns}
            return replace(micro, columns={**micro.columns, **computed})

        return filled

    def fill(self, micros: list[Batch]) -> list[Batch]:
        """Collective: return the micro-batches with their columns, which stay on the device."""
        with self.engine.evaluating():
            filled = self.begin(micros)
            return [filled(micro) for micro in micros]
