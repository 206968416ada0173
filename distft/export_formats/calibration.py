"""Rows that rounding is fitted to: those that the run trained on, or a file's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distft.core.errors import Problem, RecipeError
from distft.export_formats.source import ModelSource

NUM_ROWS = 128
MAX_TOKENS = 512
"""Of a row; longer ones lose their end."""
NONE = "none"


@dataclass(frozen=True, kw_only=True)
class CalibrationRows:
    """Token ids of rows, as the model reads them in training."""

    origin: str
    """Where they come from, in words."""
    rows: tuple[tuple[int, ...], ...]

    @property
    def num_tokens(self) -> int:
        """Of all rows."""
        return sum(map(len, self.rows))

    def to_json(self) -> dict[str, Any]:
        """Return what the certificate says of them."""
        digest = hashlib.sha256(json.dumps(self.rows).encode()).hexdigest()
        return {"from": self.origin, "rows": len(self.rows), "tokens": self.num_tokens, "sha256": digest}


def calibration(source: ModelSource, given: str | None, num_rows: int | None) -> CalibrationRows | None:
    """Return the rows to calibrate on: of the file `given`, else the run's training rows; None where there are none.

    Args:
        source: what is exported.
        given: `--calibration`: a file in any form that a recipe takes, or "none".
        num_rows: `--num-calibration`.

    Raises:
        RecipeError: the run's recipe cannot be read any more.
        DataError: the rows cannot be read.
    """
    if given == NONE or (given is None and source.run is None):
        return None
    from distft.adapter_sources import documents
    from distft.data.prepare import prepare
    from distft.data.prepared_folder import cache_folder
    from distft.recipe.evaluation import SourceTable
    from distft.recipe.schema import DataTable, TrainSourceTable

    most = num_rows or NUM_ROWS
    if given is None:
        table, sources, origin = *_of_run(source), "the run's training rows"
    else:
        one = TrainSourceTable(path=given)
        table, origin = DataTable(max_length=MAX_TOKENS, packing=False, loss_on="all", train=(one,)), f"rows of {given}"
        sources = (SourceTable(path=given),)
    limited = tuple(each.model_copy(update={"max_rows": min(each.max_rows or most, most)}) for each in sources)
    table = table.model_copy(update={"eval": ()})
    prepared = prepare(
        table, limited, split="eval", tokenizer=str(source.folder), cache_dir=cache_folder(table)
    )  # fmt: skip
    rows = [tuple(ids[:MAX_TOKENS]) for ids in documents(prepared) if len(ids) > 1]
    stride = max(1, len(rows) // most)  # of every source
    chosen = tuple(rows[::stride][:most])
    if not chosen:
        problem = Problem(message=f"{origin} hold no row to calibrate on", fix="--calibration FILE with rows of text")
        raise RecipeError(f"distft export {source.given}", [problem])
    return CalibrationRows(origin=origin, rows=chosen)


def _of_run(source: ModelSource) -> tuple[Any, Sequence[Any]]:
    from distft import assemble
    from distft.catalog import REGISTRIES
    from distft.recipe import load_recipe

    assert source.run is not None
    recipe = assemble.with_date(load_recipe(Path(source.run) / "recipe.toml", registries=REGISTRIES), source.run)
    return recipe.data, recipe.data.train
