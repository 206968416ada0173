"""What must hold for [rollout] and objectives that train on the model's own answers: rules as in `rules`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from distft.recipe.eval_rules import listed_params
from distft.recipe.origin import RecipeMistake
from distft.recipe.schema import Recipe, Registries


def rollouts_are_asked_for(recipe: Recipe, registries: Registries) -> Iterator[RecipeMistake]:
    """Check that [rollout] stands beside an objective that reads it, with something that rewards answers."""
    given = any(key[:1] == ("rollout",) for key in recipe.origin.lines) or bool(recipe.rollout.rewards)
    if not _writes(recipe.objective.spec):
        if given:
            names = ", ".join(name for name, spec in registries.objective.items() if _writes(spec))
            yield RecipeMistake(
                key=("rollout",),
                message=f'has no effect: objective "{recipe.objective.name}" trains on the answers of rows',
                fix=f"remove it, or take one of the objectives {names}",
                also=(("objective", "name"),),
            )
    elif not recipe.rollout.rewards and recipe.objective.spec.rewarded:
        yield RecipeMistake(
            key=("rollout", "rewards"),
            message=f'is required: objective "{recipe.objective.name}" learns from what answers are worth',
            fix=f'for example rewards = [{{ name = "exact_match" }}]  allowed: {", ".join(registries.scores)}',
            also=(("objective", "name"),),
        )


def rewards_judge_text(recipe: Recipe, registries: Registries) -> Iterator[RecipeMistake]:
    """Check that rewards are figures of rows, of scores that look at what was written."""
    for index, raw in enumerate(recipe.rollout.rewards):
        where = ("rollout", "rewards", index)
        spec = registries.scores.get(raw["name"]) if isinstance(raw["name"], str) else None
        if spec is None:
            continue
        if spec.choices is not None:
            yield RecipeMistake(
                key=(*where, "name"), message="weighs choices, and answers are texts", fix="take another score"
            )
            continue
        settings = {key: value for key, value in raw.items() if key not in ("weight", "figure")}
        try:
            params = listed_params(settings, spec.params)
        except ValidationError:  # what is wrong with it has been said
            continue
        figures = {figure.name: figure for figure in spec.figures(params)}
        wanted = raw.get("figure") or next(iter(figures))
        if wanted not in figures or not figures[wanted].per_row:
            per_row = [name for name, figure in figures.items() if figure.per_row]
            allowed = f"allowed: {', '.join(per_row)}" if per_row else "take another score"
            message = f'"{wanted}" is no figure of one answer'
            key = (*where, "figure") if "figure" in raw else (*where, "name")
            yield RecipeMistake(key=key, message=message, fix=allowed)


def rollouts_leave_rows_alone(recipe: Recipe, _: Registries) -> Iterator[RecipeMistake]:
    """Check what else a recipe says of rows, which are prompts here."""
    if not _writes(recipe.objective.spec):
        return
    also = (("objective", "name"),)
    if recipe.data.packing:
        message = "a step's sequences are prompts, one each, and are not packed"
        yield RecipeMistake(key=("data", "packing"), message=message, fix="packing = false", also=also)
    if recipe.data.eval:
        yield RecipeMistake(
            key=("data", "eval"),
            message="has no loss to be measured: its answers are not the model's own",
            fix="name its path in [[eval.answers]], and judge answers",
            also=also,
        )
    if recipe.train.rehearse:
        message = "rehearses rows, and answers have not been written yet"
        yield RecipeMistake(key=("train", "rehearse"), message=message, fix="remove it", also=also)
    if recipe.train.compile is True:
        message = "wants micro-batches of one length, and answers have many"
        yield RecipeMistake(key=("train", "compile"), message=message, fix='compile = "auto"', also=also)
    if getattr(recipe.method.params, "dropout", 0.0):
        message = "answers are written without it, and their probabilities would be others in training"
        yield RecipeMistake(key=("method", "dropout"), message=message, fix="dropout = 0.0", also=also)
    if recipe.rollout.answers_per_prompt < 2 and getattr(recipe.objective.params, "compares_answers", True):
        yield RecipeMistake(
            key=("rollout", "answers_per_prompt"),
            message=f'is 1, and objective "{recipe.objective.name}" compares answers to one prompt',
            fix="answers_per_prompt = 8, or objective ppo, which has a critic",
            also=also,
        )
    if recipe.rollout.refill and not getattr(recipe.objective.params, "equal_teaches_nothing", False):
        yield RecipeMistake(
            key=("rollout", "refill"),
            message=f'objective "{recipe.objective.name}" learns from prompts whose answers are all worth the same',
            fix="remove it, or take grpo or rloo, which compare answers to one prompt alone",
            also=also,
        )


def bounds_bound_something(recipe: Recipe, _: Registries) -> Iterator[RecipeMistake]:
    """Check that bounds of weights stand beside what weighs."""
    params = recipe.objective.params
    if getattr(params, "correction", None) != "none":
        return
    for key in ("correction_outside", "correction_cap", "correction_floor"):
        if getattr(params, key) != type(params).model_fields[key].default:
            yield RecipeMistake(
                key=("objective", key),
                message='has no effect: correction = "none" weighs nothing',
                fix='correction = "token" or "sequence", or remove it',
            )


def a_critic_of_its_own_suits(recipe: Recipe, _: Registries) -> Iterator[RecipeMistake]:
    """Check that a critic that is a model of its own reads what the trained model reads."""
    if getattr(recipe.objective.params, "critic", None) != "own":
        return
    if recipe.method.spec.virtual_tokens(recipe.method.params):
        yield RecipeMistake(
            key=("objective", "critic"),
            message=f'= "own": the virtual tokens of "{recipe.method.name}" have embeddings in the trained model alone',
            fix='critic = "trunk", or another method',
            also=(("method", "name"),),
        )


def the_generator_suits(recipe: Recipe, registries: Registries) -> Iterator[RecipeMistake]:
    """Check that what writes the answers can have what is trained, and that its settings have an effect."""
    chosen: Any = recipe.rollout.generator
    spec = registries.generators.get(chosen["name"])
    if spec is None or not _writes(recipe.objective.spec):
        return
    try:
        params = listed_params(chosen, spec.params)
    except ValidationError:  # what is wrong with it has been said
        return
    if why := spec.refuses(params, recipe.method.spec, recipe.method.params):
        yield RecipeMistake(key=("rollout", "generator"), message=why, fix="", also=(("method",),))
    if why := spec.refuses_draws(recipe.rollout.temperature, recipe.rollout.top_p):
        yield RecipeMistake(
            key=("rollout", "top_p"),
            message=why,
            fix="top_p = 1.0, or temperature = 1.0",
            also=(("rollout", "generator"),),
        )
    if not spec.on_this_machine and recipe.rollout.batch_size is not None:
        message = f'has no effect: generator "{chosen["name"]}" fills its batches by itself'
        yield RecipeMistake(
            key=("rollout", "batch_size"), message=message, fix="remove it", also=(("rollout", "generator"),)
        )


def _writes(objective: Any) -> bool:
    return getattr(objective, "writes", False)


ROLLOUT_RULES = (
    rollouts_are_asked_for,
    rewards_judge_text,
    rollouts_leave_rows_alone,
    bounds_bound_something,
    a_critic_of_its_own_suits,
    the_generator_suits,
)
