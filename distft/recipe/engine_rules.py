"""What an engine must be able to do for a recipe's method and updates: rules as in `rules`.

A recipe that names its engine is held against it when it is read; one that leaves it to `auto`, when it is chosen.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from distft.core.errors import RecipeError
from distft.core.registry import Registry
from distft.recipe.origin import RecipeMistake
from distft.recipe.schema import Recipe, Registries


def engine_trains_the_method(recipe: Recipe, registries: Registries) -> Iterator[RecipeMistake]:
    """Check that the engine that the recipe names can train its method."""
    spec = registries.engine.get(recipe.engine.name)  # an unknown one has been named
    if spec is not None and recipe.engine.name != "auto":
        yield from _of_method(recipe, spec, registries.engine)


def refuse_engine(recipe: Recipe, name: str, engines: Registry[Any]) -> None:
    """Hold a chosen engine against the recipe's method and updates.

    Raises:
        RecipeError: it cannot train them.
    """
    mistakes = [*_of_method(recipe, engines[name], engines), *_of_updates(recipe, engines[name], engines)]
    if mistakes:
        raise RecipeError(recipe.source, [recipe.origin.problem(mistake) for mistake in mistakes])


def _of_method(recipe: Recipe, spec: Any, engines: Registry[Any]) -> Iterator[RecipeMistake]:
    params: Any = recipe.method.params
    refuses = getattr(recipe.method.spec, "refuses", _never)
    if why := refuses(params, spec):
        able = [name for name, other in engines.items() if name != "auto" and not refuses(params, other)]
        yield RecipeMistake(
            key=("engine", "name"),
            message=f"[method] {why}",
            fix=f"engines that can: {', '.join(able)}" if able else "no engine can: change [method]",
            also=(("method", "name"),),
        )


def _never(params: Any, engine: Any) -> str:
    """Return what a method says that is no `MethodSpec`."""
    return ""


def _of_updates(recipe: Recipe, spec: Any, engines: Registry[Any]) -> Iterator[RecipeMistake]:
    if recipe.train.optimizer_in_backward and not spec.updates_in_backward:
        able = [name for name, other in engines.items() if other.updates_in_backward]
        yield RecipeMistake(
            key=("train", "optimizer_in_backward"),
            message=f"cannot be: engine {spec.name} adds gradients up over ranks in its own buffers",
            fix=f"engines that can: {', '.join(able)}",
            also=(("engine", "name"),),
        )


ENGINE_RULES = (engine_trains_the_method,)
