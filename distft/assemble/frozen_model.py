"""Opens another model than the trained one, under an engine of its own, with everything frozen."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from distft.assemble.batch_layout import Layout
from distft.assemble.components import build_model, open_engine, set_up_engine
from distft.assemble.training_data import HeldOut
from distft.recipe import Recipe

if TYPE_CHECKING:
    from distft.core.types import Engine
    from distft.engine.processes import Processes
    from distft.model.load import MetaModel


@contextlib.contextmanager
def frozen_model(
    recipe: Recipe, processes: Processes, layout: Layout, rows: HeldOut
) -> Iterator[tuple[Engine, MetaModel]]:
    """Collective: load the model of a recipe, cut as the trained one is; close its engine at the end.

    Args:
        recipe: whose [model] and [method] say what is loaded.
        processes: that have joined, and stay.
        layout: of the run.
        rows: of all splits.

    Raises:
        RecipeError: the model's weights are missing or unusable.
    """
    engine = open_engine(recipe, replace(processes, joined=False), _quiet)
    try:
        built = build_model(recipe, processes, layout, rows, _quiet, trains=False)
        freeze(built)
        set_up_engine(recipe, engine, built, layout, num_steps=1)
        yield engine, built
    finally:
        engine.close()


def freeze(model: MetaModel) -> None:
    """Leave one small tensor trainable, because engines want one: no masters or moments of the rest are made."""
    trainable = [param for param in model.module.parameters() if param.requires_grad]
    for param in trainable:
        param.requires_grad_(False)
    min(trainable, key=lambda param: param.numel()).requires_grad_(True)


def _quiet(line: str) -> None:
    """Drop a line: the trained model says the same."""
