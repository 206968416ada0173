"""Columns that objectives read beside the tokens: one file per supplier, one line here.

In: a step's micro-batches and the model as it is; out: the same micro-batches with named tensors.
"""

from distft.columns import batch_wide, reference
from distft.columns.spec import ColumnFiller, ColumnInputs, ColumnSpec, of_each
from distft.core.registry import Registry

COLUMNS: Registry[ColumnSpec] = Registry("column")  # type: ignore[type-var]  # no params: objectives ask by name
COLUMNS.add(reference.BY_TOKEN)
COLUMNS.add(reference.BY_DOCUMENT)
COLUMNS.add(batch_wide.KL)
COLUMNS.add(batch_wide.SHIFT)

__all__ = ["COLUMNS", "ColumnFiller", "ColumnInputs", "ColumnSpec", "of_each"]
