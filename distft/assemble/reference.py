"""The reference of preference objectives: the rows and weights that its log-probabilities follow from.

Where another model is the reference, it is opened before the trained one, its log-probabilities of all rows are
written, and it is closed again: one model stands in memory at a time.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distft.assemble.batch_layout import Layout
from distft.assemble.checkpoints import weights_hash
from distft.assemble.components import torch_dtype
from distft.assemble.frozen_model import frozen_model
from distft.assemble.training_data import HeldOut, Say
from distft.recipe import Recipe

if TYPE_CHECKING:
    from distft.columns import ColumnSpec
    from distft.columns.stored_logprobs import RowPass
    from distft.core.types import Engine
    from distft.engine.processes import Processes


def other_model(recipe: Recipe) -> Recipe | None:
    """Return the recipe with the model that the objective names as its reference; None: it is the trained one."""
    chosen = recipe.objective
    path = chosen.spec.reference(chosen.params)
    if path is None:
        return None
    table = recipe.model.model_copy(update={"path": path, "revision": None, "init": "pretrained"})
    method = recipe.method
    params: Any = method.params
    if method.spec.reads_rows(params):  # what is found in the rows is of the trained model
        from distft.model.adapters.lora_params import without_rows

        method = replace(method, params=without_rows(params))
    return replace(recipe, model=table, method=method)


def column_specs(recipe: Recipe) -> dict[str, ColumnSpec]:
    """Return the columns that the objective reads."""
    from distft.columns import COLUMNS

    chosen = recipe.objective
    return {name: COLUMNS[name] for name in chosen.spec.columns(chosen.params)}


def reads_reference(specs: Mapping[str, ColumnSpec]) -> bool:
    """Return whether one of the columns follows from a reference."""
    return any(spec.reads_reference for spec in specs.values())


def rows_to_pass(specs: Mapping[str, ColumnSpec], rows: HeldOut) -> tuple[list[RowPass], dict[str, RowPass]]:
    """Return all rows whose log-probabilities are read, and those that columns derive, by what they are made of."""
    row_passes, derived = list(rows.row_passes), dict[str, "RowPass"]()
    for spec in specs.values():
        if spec.derive is not None:
            made = {rows_of.prepared.fingerprint: spec.derive(rows_of) for rows_of in rows.row_passes}
            row_passes, derived = [*row_passes, *made.values()], derived | made
    return row_passes, derived


def logprobs_folder(recipe: Recipe, engine: Engine, layout: Layout) -> Callable[[str], Path]:
    """Return where log-probabilities under the recipe's model are kept, by the fingerprint of prepared rows."""
    from distft.data.prepared_folder import cache_folder

    kept, weights = cache_folder(recipe.data) / "logprobs", functools.cache(lambda: weights_hash(recipe, engine))
    return lambda rows_sha256: kept / _logprobs_key(recipe, engine, layout, weights(), rows_sha256)


def compute_other_reference(
    recipe: Recipe, processes: Processes, engine: Engine, layout: Layout, rows: HeldOut, say: Say
) -> None:
    """Collective: write the log-probabilities of another model, where the objective names one and they are not there.

    Args:
        recipe: of the run.
        processes: that have joined.
        engine: of the run, without a model as yet.
        layout: of the run.
        rows: of all splits.
        say: takes a line for the user.

    Raises:
        RecipeError: the model's weights are missing or unusable.
        NumericError: the log-probabilities that were kept are not those of the model.
        MachineError, FileSystemError, Preempted: see `stored_logprobs`.
    """
    import numpy as np

    from distft.columns.reference import ReferenceModel
    from distft.columns.stored_logprobs import are_stored
    from distft.identity_gate import refuse_other_policy
    from distft.model.policy import ModelPolicy

    other, specs = other_model(recipe), column_specs(recipe)
    if other is None or not reads_reference(specs):
        return
    row_passes, _ = rows_to_pass(specs, rows)
    folder_of = logprobs_folder(other, engine, layout)
    if are_stored([(folder_of(of.prepared.fingerprint), of.prepared) for of in row_passes], engine):
        return
    say(f"reference: {other.model.path} is loaded first, and closed before training")
    with frozen_model(other, processes, layout, rows) as (alone, _):
        policy = ModelPolicy(alone.model)
        before = ReferenceModel(
            policy=policy,
            engine=alone,
            base_alone=None,
            row_passes=tuple(row_passes),
            folder_of=folder_of,
            is_trained=False,
            say=say,
        )
        micros = row_passes[0].steps(np.arange(min(len(row_passes[0].prepared.supervised), processes.world)))
        refuse_other_policy(alone, policy, before.open(), micros[0], torch_dtype(other))
    del policy, before, alone
    gc.collect()


def _start_hash(recipe: Recipe) -> str:
    """Return the hash of the adapter that training goes on from; empty where it begins one."""
    start = getattr(recipe.method.params, "start", None)
    if start is None:
        return ""
    from distft.data.fingerprint import file_hash
    from distft.data.prepared_folder import cache_folder
    from distft.model.adapters.trained import WEIGHTS, start_folder

    return file_hash(start_folder(start) / WEIGHTS, cache_folder(recipe.data) / "hashes")


def _logprobs_key(recipe: Recipe, engine: Engine, layout: Layout, weights: str, rows_sha256: str) -> str:
    """Return a key of everything that log-probabilities of the model before training depend on.

    Engine, ranks and micro-batches are not of it: they change the order of sums, and other runs may share the values.
    """
    import hashlib
    import json

    import torch

    from distft.core.environment import versions

    device = torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else "cpu"
    facts = {
        "weights": weights,
        "rows": rows_sha256,
        "head": recipe.objective.spec.head_of(recipe.objective.params),
        "method": [recipe.method.name, recipe.method.params.model_dump(mode="json")],
        "start": _start_hash(recipe),
        "dtype": recipe.model.dtype,
        "path": layout.path.to_json(),
        "packing": [recipe.data.packing, recipe.data.max_length],
        "device": device,
        "versions": versions(),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:40]
