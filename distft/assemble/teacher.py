"""Opens the teacher that an objective imitates: another model beside the trained one, under an engine of its own."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

from distft.assemble.batch_layout import Layout, forward_path
from distft.assemble.frozen_model import frozen_model
from distft.assemble.training_data import HeldOut, Say
from distft.catalog import REGISTRIES
from distft.core.errors import Problem, RecipeError
from distft.recipe import Recipe
from distft.recipe.schema import DEFAULT_PARTS, Choice

if TYPE_CHECKING:
    from distft.columns.teacher import Teacher
    from distft.engine.processes import Processes


def teacher_recipe(recipe: Recipe) -> Recipe | None:
    """Return the recipe with the teacher as its model, whole and by the default optimizer; None: it has none."""
    chosen = recipe.objective
    path = chosen.spec.teacher(chosen.params)
    if path is None:
        return None
    parts = {}
    for table in ("method", "optim"):
        spec = REGISTRIES.part(table)[DEFAULT_PARTS[table]]
        parts[table] = Choice(name=spec.name, params=spec.params(), spec=spec, line=None)
    model = recipe.model.model_copy(update={"path": path, "revision": None, "init": "pretrained"})
    return replace(recipe, model=model, **parts)


def open_teacher(
    recipe: Recipe, processes: Processes, layout: Layout, rows: HeldOut, resources: ExitStack, say: Say
) -> Teacher | None:
    """Collective: load the teacher, cut as the trained model is; None where the objective names none.

    `resources` closes it.

    Raises:
        RecipeError: its weights are missing or unusable, or its last hidden states cannot be had.
    """
    other = teacher_recipe(recipe)
    if other is None:
        return None
    from distft.columns.teacher import Teacher
    from distft.model.divergence import TeacherHead
    from distft.model.policy import ModelPolicy

    say(f"teacher: {other.model.path}")
    path = forward_path(other, say)
    if path.head != "chunked":
        message = f"{other.model.path} computes logits in a way of its own, and its last hidden states cannot be had"
        line = recipe.line_of("objective.teacher")
        raise RecipeError(recipe.source, [Problem(message=message, line=line, fix="take another teacher")])
    layout = replace(layout, path=replace(path, compiled=False))
    engine, _ = resources.enter_context(frozen_model(other, processes, layout, rows))
    policy = ModelPolicy(engine.model, teacher=TeacherHead())
    return Teacher(policy=policy, evaluating=engine.evaluating)
