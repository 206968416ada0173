"""What must hold for `[train] optimizer_in_backward`: rules as in `rules`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from distft.core.errors import RecipeError
from distft.recipe.origin import RecipeMistake
from distft.recipe.schema import Recipe, Registries

_KEY = ("train", "optimizer_in_backward")


def updates_need_no_other_gradient(recipe: Recipe, registries: Registries) -> Iterator[RecipeMistake]:
    """Check that nothing needs all gradients of a step before the first weight is updated."""
    if not recipe.train.optimizer_in_backward:
        return
    for other, why, fix in _in_the_way(recipe, registries):
        message = f"updates a weight before the other gradients are there: {why}"
        yield RecipeMistake(key=_KEY, message=message, fix=f"{fix}, or optimizer_in_backward = false", also=(other,))


def _in_the_way(recipe: Recipe, registries: Registries) -> Iterator[tuple[tuple[str, ...], str, str]]:
    """Yield (key, why it cannot be, fix) for all that stands in the way."""
    train, guard, engine = recipe.train, recipe.guard, recipe.engine
    params: Any = engine.params
    if train.max_grad_norm != "off":
        why = f"max_grad_norm = {train.max_grad_norm:g} scales them by the norm of all"
        yield ("train", "max_grad_norm"), why, 'max_grad_norm = "off"'
    if guard.loss_spike is not None:
        yield ("guard", "loss_spike"), "a step that spikes could not be left out", "no [guard] loss_spike"
    if train.rehearse:
        yield ("train", "rehearse"), "a rehearsal could not be thrown away", "rehearse = false"
    if recipe.objective.spec.writes:
        yield ("objective", "name"), "updates on rollouts take several micro-batches", "another objective"
    if not recipe.optim.spec.per_tensor or recipe.method.spec.optimizer is not None:
        why = f"{_named(recipe)} looks at all tensors at once"
        yield ("optim", "name"), why, 'name = "adamw"'
    if engine.name != "auto" and not registries.engine[engine.name].updates_in_backward:
        names = ", ".join(name for name, spec in registries.engine.items() if spec.updates_in_backward)
        why = f"engine {engine.name} adds them up over ranks in its own buffers"
        yield ("engine", "name"), why, f"one of the engines {names}"
    for key, plain in (("offload", "none"), ("shard_within", "world"), ("gather", "each_pass")):
        if getattr(params, key, plain) != plain:
            yield ("engine", key), f"[engine] {key} moves or keeps them in its own way", f'{key} = "{plain}"'
    if getattr(params, "grad_dtype", "auto") == "float32" and recipe.model.dtype != "float32":
        yield ("engine", "grad_dtype"), "sums in fp32 are kept until the update", 'grad_dtype = "auto"'


def _named(recipe: Recipe) -> str:
    special = recipe.method.spec.optimizer is not None
    return f'method "{recipe.method.name}"' if special else f'optimizer "{recipe.optim.name}"'


def refuse_sums(recipe: Recipe, micros_per_step: int) -> None:
    """Hold updates in the backward pass against the micro-batches of a step, once they are known.

    Raises:
        RecipeError: there are several.
    """
    if recipe.train.optimizer_in_backward and micros_per_step > 1:
        fault = RecipeMistake(
            key=_KEY,
            message=f"takes one micro-batch a step, and there are {micros_per_step}, whose gradients are added up",
            fix="a larger micro_batch_size, more processes, a smaller global_batch_size, or leave it out",
        )
        raise RecipeError(recipe.source, [recipe.origin.problem(fault)])


UPDATE_RULES = (updates_need_no_other_gradient,)
