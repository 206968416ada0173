"""Columns that objectives read beside the tokens: one file per supplier, one line here.

In: a step's micro-batches and the model as it is; out: the same micro-batches with named tensors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from distft.columns import batch_wide, reference, teacher
from distft.columns.spec import ColumnFiller, ColumnInputs, ColumnSpec, of_each
from distft.core.registry import Registry
from distft.model.adapters.spec import leaves_base_alone

if TYPE_CHECKING:
    from distft.recipe import Recipe

COLUMNS: Registry[ColumnSpec] = Registry("column")  # type: ignore[type-var]  # no params: objectives ask by name
COLUMNS.add(reference.BY_TOKEN)
COLUMNS.add(reference.BY_DOCUMENT)
COLUMNS.add(batch_wide.KL)
COLUMNS.add(batch_wide.SHIFT)
COLUMNS.add(teacher.HIDDEN)


def keeps_reference(recipe: Recipe) -> bool:
    """Return whether a run keeps the weights that its training starts from beside the trained ones.

    It does where its objective reads them, writes what it trains on, and its method cannot be left out of a forward
    (`distft.columns.reference`).
    """
    objective, method = recipe.objective, recipe.method
    reads = any(COLUMNS[name].reads_reference for name in objective.spec.columns(objective.params))
    whole = any(getattr(method.params, key, ()) for key in ("modules_to_save", "target_parameters"))
    return objective.spec.writes and reads and (whole or not leaves_base_alone(method.spec, method.params))


__all__ = ["COLUMNS", "ColumnFiller", "ColumnInputs", "ColumnSpec", "keeps_reference", "of_each"]
