"""Opens what gives a run its micro-batches: the recipe's rows, or what the model writes to their prompts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from distft.assemble.batch_layout import Layout
from distft.assemble.training_data import Data
from distft.recipe import Recipe, listed_params

if TYPE_CHECKING:
    from distft.core.protocols import StepSource
    from distft.core.types import Engine
    from distft.generation import CompletionGenerator
    from distft.model.load import MetaModel
    from distft.objectives.spec import Objective
    from distft.run_folder import RunFolder


def num_steps(recipe: Recipe, rows: Data) -> int:
    """Return the run's optimizer steps, as the objective's step source counts them."""
    from distft.step_sources import STEP_SOURCES

    chosen = recipe.objective
    source = STEP_SOURCES[chosen.spec.source]
    updates = 1 if source.updates is None else source.updates(recipe.rollout)
    steps = source.num_steps(chosen.params, rows.steps.num_steps) * updates
    return steps if recipe.train.max_steps is None else min(steps, recipe.train.max_steps)


def open_step_source(
    recipe: Recipe,
    folder: RunFolder,
    layout: Layout,
    rows: Data,
    engine: Engine,
    built: MetaModel,
    objective: Objective,
    stop: Callable[[], bool],
    *,
    shapes: dict[str, Any],
) -> StepSource:
    """Return what gives the run's micro-batches; the engine has its weights by now.

    `shapes`: what `saved_shapes` gave before it had them.

    Raises:
        MachineError: the source, or a generator that it asks for, cannot run here.
    """
    from distft.assemble.evaluation import generator_inputs, load_row_renderer
    from distft.data.questions import questions
    from distft.generation import GENERATORS
    from distft.step_sources import STEP_SOURCES, StepSourceInputs

    def generator(name: str) -> CompletionGenerator:
        spec, chosen = GENERATORS[name], recipe.rollout.generator
        settings: dict[str, Any] = chosen if isinstance(chosen, dict) and chosen["name"] == name else {}
        given = generator_inputs(
            recipe, engine, built, rows.stop_ids, stop, folder=folder.path / "rollouts", shapes=shapes
        )
        return spec.open(listed_params(settings, spec.params), given)

    inputs = StepSourceInputs(
        steps=rows.steps,
        objective=recipe.objective.params,
        engine=engine,
        policy=objective.policy,
        fill=objective.fill,
        generator=generator,
        max_length=recipe.data.max_length,
        num_steps=num_steps(recipe, rows),
        rollout=recipe.rollout,
        questions=lambda: questions(
            recipe.data.train,
            load_row_renderer(recipe),
            columns=None,
            max_rows=None,
            skip_bad=recipe.data.bad_rows == "skip",
            progress=lambda count: None,
        ),
        folder=folder.path / "rollouts",
        single_documents=layout.path.documents == "single",
        stop=stop,
        seed=recipe.seed,
    )
    return STEP_SOURCES[recipe.objective.spec.source].open(inputs)
