"""Builds the evaluation sets, the generator and the evaluator of a run from its recipe."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from distft.assemble.training_data import HeldOut, Preparing, Say
from distft.compatibility import tokenizer_of
from distft.core.errors import Problem, RecipeError
from distft.recipe import Recipe
from distft.recipe.eval_rules import EVAL_LOSS

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from distft.best import BestTracker
    from distft.core.types import Engine
    from distft.data.render import Renderer
    from distft.evaluation.eval_sets import EvalSet
    from distft.evaluator import Evaluator
    from distft.generation import GeneratorInputs
    from distft.model.load import MetaModel
    from distft.objectives.spec import Objective
    from distft.run_folder import RunFolder


def build_eval_sets(recipe: Recipe, say: Say) -> list[EvalSet]:
    """Return the recipe's sets of questions, read before any process group exists.

    Raises:
        DataError: rows that cannot be asked. RecipeError, MachineError: a score that cannot work.
    """
    if not recipe.eval.answers:
        return []
    from distft.evaluation import build

    built = build.build_eval_sets(
        recipe.eval.answers, recipe.data, load_row_renderer(recipe), seed=recipe.seed, progress=Preparing(say)
    )
    for eval_set in built:
        figures = ", ".join(eval_set.figures())
        say(f"answers {eval_set.name}: {eval_set.rows:,} rows, {figures}")
    return built


def build_best_tracker(recipe: Recipe, eval_sets: list[EvalSet]) -> BestTracker:
    """Build the tracker of the best evaluation, by the figure that the recipe names.

    Raises:
        RecipeError: no set gives this figure.
    """
    from distft.best import BestTracker

    by, objective = recipe.eval.best_by, recipe.objective
    higher_is_better = {f"eval_{name}": more for name, more in objective.spec.figures(objective.params).items()}
    for eval_set in eval_sets:
        for name, figure in eval_set.figures().items():
            higher_is_better[f"{eval_set.name}.{name}"] = figure.higher_is_better
    if by not in higher_is_better and by != EVAL_LOSS:  # a task of lm-eval, whose figures nobody knew before
        key, allowed = recipe.line_of("eval.best_by"), ", ".join([EVAL_LOSS, *higher_is_better])
        problem = Problem(message=f'[eval] best_by = "{by}"  is measured nowhere', fix=f"allowed: {allowed}", line=key)
        raise RecipeError(recipe.source, [problem])
    higher = higher_is_better.get(by, False)
    return BestTracker(keep=recipe.checkpoint.best, patience=recipe.eval.early_stop, by=by, higher_is_better=higher)


def load_row_renderer(recipe: Recipe) -> Renderer:
    """Load the renderer of the rows that are trained, which also renders evaluation prompts."""
    from distft.data.render import load_renderer, settings_of

    tokenizer, revision = tokenizer_of(recipe)
    return load_renderer(
        tokenizer,
        revision=revision,
        virtual_tokens=recipe.method.spec.virtual_tokens(recipe.method.params),
        **settings_of(recipe.data),
    )


def generator_inputs(
    recipe: Recipe,
    engine: Engine,
    built: MetaModel,
    stop_ids: tuple[int, ...],
    stop: Callable[[], bool],
    *,
    folder: Path,
    shapes: dict[str, Any] | None = None,
) -> GeneratorInputs:
    """Return the model with its tokenizer; it stops at what trained rows end with, and at what the base stops at.

    `folder`: where a generator may keep files. `shapes`: of `saved_shapes`, for generators that want the adapter or
    the weights.
    """
    from distft.export import final
    from distft.generation import GeneratorInputs
    from distft.model.load import WRAPPER

    def write_adapter(target: Path) -> None:
        def save(aside: Path, tensors: dict[str, Tensor]) -> None:
            recipe.method.spec.save_adapter(built.module.lm, aside, tensors)

        final.write_adapter(
            target,
            engine,
            shapes or {},
            prefix=WRAPPER,
            starts_at_zero=recipe.method.spec.starts_at_zero,
            save_adapter=save,
            save_rest=lambda aside: None,
            is_trained=False,
        )

    def write_model(target: Path) -> None:
        final.write_model(
            target, engine, shapes or {}, prefix=WRAPPER, layout=built.layout, save_rest=lambda aside: None
        )

    is_adapter = recipe.method.spec.adapter
    renderer = load_row_renderer(recipe)
    config = getattr(built.module.transformer, "generation_config", None)
    ends = getattr(config, "eos_token_id", None)
    more = [] if ends is None else list(ends) if isinstance(ends, list | tuple) else [ends]
    all_stop_ids = dict.fromkeys([*stop_ids, *more, renderer.tokenizer.eos_token_id])
    return GeneratorInputs(
        engine=engine,
        module=built.module,
        decode=renderer.write,
        stop_ids=tuple(all_stop_ids),
        stop=stop,
        dtype=recipe.model.dtype,
        folder=folder,
        write_adapter=write_adapter if is_adapter and shapes else None,
        write_model=write_model if not is_adapter and shapes else None,
    )


def base_key(recipe: Recipe) -> str:
    """Return a name for the weights that training starts from, by the files' sizes and times: nothing is hashed."""
    from distft.evaluation.answer_records import model_key
    from distft.model.load import find_folder

    model, params = recipe.model, recipe.method.params
    quant = getattr(params, "quant", None)
    stored = None if quant is None else quant.model_dump(mode="json")
    if model.init == "random":
        return model_key(model.path, "random", recipe.seed, model.dtype, stored)
    files = sorted(find_folder(model).glob("*.safetensors"))
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return model_key(model.path, model.revision, stats, model.dtype, stored)


def build_evaluator(
    recipe: Recipe,
    folder: RunFolder,
    engine: Engine,
    built: MetaModel,
    rows: HeldOut,
    eval_sets: list[EvalSet],
    objective: Objective,
    *,
    num_steps: int,
    stop: Callable[[], bool],
    say: Say,
) -> Evaluator:
    """Build the evaluator, with its schedule."""
    from distft.evaluation.answer_records import AnswerRecords
    from distft.evaluator import EvalSchedule, Evaluator
    from distft.generation.engine_generator import engine_generator

    return Evaluator(
        engine=engine,
        objective=objective,
        held_out=rows.eval_steps or (),
        held_out_sha256=rows.fingerprint.get("eval", ""),
        eval_sets=eval_sets,
        generator=engine_generator(generator_inputs(recipe, engine, built, rows.stop_ids, stop, folder=folder.path)),
        records=AnswerRecords(folder.path / "eval"),
        base=base_key(recipe),
        schedule=EvalSchedule(every_steps=recipe.eval.every_steps, at_end=recipe.eval.at_end, num_steps=num_steps),
        stop=stop,
        say=say,
        warn=lambda sentence: warn(sentence, folder, say),
    )


def warn(sentence: str, folder: RunFolder, say: Say) -> None:
    """Say what is wrong with what a run has gained, and keep it among its events."""
    say(f"warning: {sentence}")
    folder.note("warned", why=sentence)
