"""What must hold between keys: one function per rule, each naming the keys it is about."""

from __future__ import annotations

import datetime
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from distft.core.errors import RecipeError
from distft.recipe.engine_rules import ENGINE_RULES
from distft.recipe.eval_rules import ANSWER_RULES, has_own_rows
from distft.recipe.explain import did_you_mean
from distft.recipe.origin import RecipeMistake
from distft.recipe.rollout_rules import ROLLOUT_RULES
from distft.recipe.schema import Recipe, Registries, SourceTable
from distft.recipe.token_rules import TOKEN_RULES
from distft.recipe.toml_text import toml_value
from distft.recipe.update_rules import UPDATE_RULES

Rule = Callable[[Recipe, Registries], Iterator[RecipeMistake]]
_FOLDER_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")


def broken_rules(recipe: Recipe, registries: Registries) -> Iterator[RecipeMistake]:
    """Yield every fault that any rule finds."""
    for rule in RULES:
        yield from rule(recipe, registries)


def check_world(recipe: Recipe, world: int, micro_batch_size: int | None = None) -> int:
    """Return how many micro-batches each of `world` ranks runs per optimizer step.

    `micro_batch_size` is what "auto" was resolved to; None takes the recipe's, and 1 where that is "auto".

    Raises:
        RecipeError: the global batch does not split evenly; lists the world and micro batch sizes that do.
    """
    total = recipe.train.global_batch_size
    configured = recipe.train.micro_batch_size
    micro = micro_batch_size or (1 if configured == "auto" else configured)
    if total % (world * micro) == 0:
        return total // (world * micro)
    worlds = _divisors(total // micro) if total % micro == 0 else []
    micros = _divisors(total // world) if total % world == 0 else []
    batches = [count for count in (total // (world * micro) * world * micro, _round_up(total, world * micro)) if count]
    by_micro = f" x micro_batch_size {micro}" if micro > 1 else ""
    fault = RecipeMistake(
        key=("train", "global_batch_size"),
        message=f"{total} sequences do not split evenly over {world} processes{by_micro}",
        fix=f"numbers of processes that fit{by_micro}: {_listed(worlds)}; "
        f"micro batch sizes that fit {world}: {_listed(micros)}; "
        f"or global_batch_size = {' or '.join(map(str, batches))}",
    )
    raise RecipeError(recipe.source, [recipe.origin.problem(fault)])


def check_steps(recipe: Recipe, num_steps: int) -> None:
    """Hold what is counted in steps against the steps that the run will have, once its rows are known.

    Raises:
        RecipeError: a warm-up that does not end, or that runs into the decay; a best state that no evaluation finds.
    """
    faults = list(_steps_have_room(recipe, num_steps))
    if faults:
        raise RecipeError(recipe.source, [recipe.origin.problem(fault) for fault in faults])


def _steps_have_room(recipe: Recipe, num_steps: int) -> Iterator[RecipeMistake]:
    params: Any = recipe.schedule.params
    how = "max_steps" if recipe.train.max_steps is not None else "epochs"
    run_length = f"{how} = {getattr(recipe.train, how):g}"
    if how == "epochs":
        run_length += f", which is {num_steps:,} step{'s' if num_steps != 1 else ''} of these rows"
    key = "warmup_steps" if getattr(params, "warmup_steps", None) is not None else "warmup_ratio"
    warmup: int = params.num_warmup(num_steps) if hasattr(params, "num_warmup") else 0
    one_of_one = key == "warmup_ratio" and num_steps == 1  # a share of one step is none or all of it
    if warmup >= max(1, num_steps) and not one_of_one:
        yield RecipeMistake(
            key=("schedule", key),
            message=f"is not shorter than the run: {run_length}",
            fix="3 % to 10 % of the steps is usual",
            also=(("train", how),),
        )
    decay = round(getattr(params, "decay_ratio", 0.0) * num_steps)
    if decay < num_steps and warmup < num_steps < warmup + decay:
        yield RecipeMistake(
            key=("schedule", key),
            message=f"is {warmup:,} steps, and the decay of {decay:,} does not fit behind it: {run_length}",
            fix="lower one of the two",
            also=(("schedule", "decay_ratio"),),
        )
    every, wanted = recipe.eval.every_steps, recipe.checkpoint.best or recipe.eval.early_stop is not None
    if wanted and not recipe.eval.at_end and recipe.eval.best_by == "eval_loss" and (every or 0) > num_steps:
        yield RecipeMistake(
            key=("eval", "every_steps"),
            message=f"is longer than the run, so no evaluation finds a best state: {run_length}",
            fix=f"at most {num_steps}",
            also=(("train", how),),
        )


def name_is_a_folder_name(recipe: Recipe, _: Registries) -> Iterator[RecipeMistake]:
    """Check that the run's folder stays inside output_dir, and can be typed without quoting."""
    if not _FOLDER_NAME.fullmatch(recipe.name):
        safe = re.sub(r"[^A-Za-z0-9._-]+", "-", recipe.name).strip(".-")[:100]
        yield RecipeMistake(
            key=("name",),
            message="must be a plain folder name: up to 100 letters, digits, dots, dashes and underscores, "
            "and no dot in front",
            fix=f"try {toml_value(safe)}" if safe else "",
        )


def chat_template_is_known(recipe: Recipe, registries: Registries) -> Iterator[RecipeMistake]:
    """Check that a template is the tokenizer's, a built-in one, or a file."""
    template, allowed = recipe.data.chat_template, ["auto", *registries.templates]
    if template not in allowed and not template.endswith(".jinja"):
        yield RecipeMistake(
            key=("data", "chat_template"),
            message=f"unknown template{did_you_mean(template, allowed)}",
            fix=f"allowed: {', '.join(allowed)}, or a file ending in .jinja",
        )


def date_is_a_day(recipe: Recipe, _: Registries) -> Iterator[RecipeMistake]:
    """Check that chat templates are given a day of the calendar."""
    try:
        datetime.date.fromisoformat(recipe.data.date or "2026-01-31")
    except ValueError:
        yield RecipeMistake(key=("data", "date"), message="is no day of the calendar", fix="write it as YYYY-MM-DD")


def formats_are_known(recipe: Recipe, registries: Registries) -> Iterator[RecipeMistake]:
    """Check that a row format is registered."""
    allowed = list(dict.fromkeys(["auto", *registries.formats]))
    for part, sources in _sources(recipe):
        for position, source in enumerate(sources):
            if source.format not in allowed:
                yield RecipeMistake(
                    key=("data", part, position, "format"),
                    message=f"unknown format{did_you_mean(source.format, allowed)}",
                    fix="allowed: " + ", ".join(allowed),
                )


def one_way_to_say_how_long(recipe: Recipe, _: Registries) -> Iterator[RecipeMistake]:
    """Check that only one of `epochs` and `max_steps` is set: they would overrule each other."""
    if recipe.train.epochs is not None and recipe.train.max_steps is not None:
        yield RecipeMistake(
            key=("train", "max_steps"), message="cannot be set together with epochs", fix="remove one of the two"
        )


def micro_batch_divides_global_batch(recipe: Recipe, _: Registries) -> Iterator[RecipeMistake]:
    """Check that an optimizer step is a whole number of micro-batches."""
    total, micro = recipe.train.global_batch_size, recipe.train.micro_batch_size
    if micro != "auto" and total % micro:
        yield RecipeMistake(
            key=("train", "micro_batch_size"),
            message=f"does not divide global_batch_size = {total}",
            fix=f"try {_listed(_nearest_divisors(total, micro))}",
            also=(("train", "global_batch_size"),),
        )


def gradients_are_of_the_models_type(recipe: Recipe, _: Registries) -> Iterator[RecipeMistake]:
    """Check that an fp32 model has fp32 gradients."""
    if getattr(recipe.engine.params, "grad_dtype", "auto") == "bfloat16" and recipe.model.dtype == "float32":
        yield RecipeMistake(
            key=("engine", "grad_dtype"),
            message="has no effect: the model computes in float32, and so do its gradients",
            fix='remove it, or set [model] dtype = "bfloat16"',
            also=(("model", "dtype"),),
        )


def warm_up_ends(recipe: Recipe, _: Registries) -> Iterator[RecipeMistake]:
    """Check that the warm-up ends: one as long as the run never reaches the learning rate."""
    warmup: Any = getattr(recipe.schedule.params, "warmup_steps", None)
    if warmup and recipe.train.max_steps is not None and warmup >= recipe.train.max_steps:
        yield RecipeMistake(
            key=("schedule", "warmup_steps"),
            message=f"is not shorter than the run: max_steps = {recipe.train.max_steps}",
            fix="3 % to 10 % of the steps is usual",
            also=(("train", "max_steps"),),
        )


def weight_or_share(recipe: Recipe, _: Registries) -> Iterator[RecipeMistake]:
    """Check that a source's rows are counted either by repetition or by share."""
    for position, source in enumerate(recipe.data.train):
        if source.weight is not None and source.share is not None:
            yield RecipeMistake(
                key=("data", "train", position, "weight"),
                message="cannot be set together with share",
                fix="remove one of the two",
            )


def shares_leave_room(recipe: Recipe, _: Registries) -> Iterator[RecipeMistake]:
    """Check shares, which are fractions of an epoch whose length the other sources give."""
    shares = [(position, source.share) for position, source in enumerate(recipe.data.train) if source.share]
    if not shares:
        return
    last, keys = shares[-1][0], tuple(("data", "train", position, "share") for position, _ in shares)
    total = sum(share for _, share in shares)
    if len(shares) == len(recipe.data.train):
        yield RecipeMistake(
            key=keys[0],
            message="leaves no source whose rows give the length of an epoch",
            fix="remove share from the main source",
            also=(("data", "train"),),
        )
    elif total >= 1:
        yield RecipeMistake(
            key=("data", "train", last, "share"),
            message=f"brings the shares to {total:g} of an epoch, and other sources have no share",
            fix="shares must sum to less than 1",
            also=keys,
        )


def sources_are_distinct(recipe: Recipe, _: Registries) -> Iterator[RecipeMistake]:
    """Check that rows are repeated by weight, not by naming them twice."""
    for part, sources in _sources(recipe):
        seen: set[tuple[str | None, ...]] = set()
        for position, source in enumerate(sources):
            if _identity(source) in seen:
                yield RecipeMistake(
                    key=("data", part, position, "path"),
                    message=f"is already a source of [[data.{part}]]",
                    fix="to repeat rows set weight" if part == "train" else "remove one of the two",
                )
            seen.add(_identity(source))


def held_out_rows_are_held_out(recipe: Recipe, _: Registries) -> Iterator[RecipeMistake]:
    """Check that held-out rows are not trained: a loss on trained rows says nothing."""
    trained = {_identity(source): position for position, source in enumerate(recipe.data.train)}
    for position, source in enumerate(recipe.data.eval):
        if _identity(source) in trained:
            yield RecipeMistake(
                key=("data", "eval", position, "path"),
                message="is also trained on, in [[data.train]]",
                fix="evaluate on rows that are not trained",
                also=(("data", "train", trained[_identity(source)], "path"),),
            )


def evaluation_has_rows(recipe: Recipe, _: Registries) -> Iterator[RecipeMistake]:
    """Check that there are rows to evaluate on where the recipe says when to evaluate."""
    if recipe.data.eval:
        return
    helped = {"answers", "best_by", "at_start", "at_end", "early_stop"} if recipe.eval.answers else set[str]()
    for key in recipe.origin.raw.get("eval", ()):
        if key not in helped:
            yield RecipeMistake(
                key=("eval", key),
                message="has no effect without a [[data.eval]] source",
                fix="add one, or remove the key",
                also=(("data", "eval"),),
            )


def overlap_needs_two_sides(recipe: Recipe, _: Registries) -> Iterator[RecipeMistake]:
    """Check that there are evaluation rows where overlap with them is an error."""
    has_questions = any(map(has_own_rows, recipe.eval.answers))
    if recipe.data.overlap == "error" and not recipe.data.eval and not has_questions:
        yield RecipeMistake(
            key=("data", "overlap"),
            message="has no effect without a [[data.eval]] source",
            fix="add one, or remove the key",
            also=(("data", "eval"),),
        )


def best_is_measured(recipe: Recipe, _: Registries) -> Iterator[RecipeMistake]:
    """Check that evaluations during training can find a best state."""
    if recipe.eval.best_by != "eval_loss" or (recipe.data.eval and recipe.eval.every_steps):
        return  # other figures: see `answers.best_by_is_measured`
    for key, wanted in (
        (("checkpoint", "best"), recipe.checkpoint.best),
        (("eval", "early_stop"), recipe.eval.early_stop),
    ):
        if wanted and (key[0] == "checkpoint" or recipe.data.eval):  # without rows, [eval] itself is the mistake
            yield RecipeMistake(
                key=key,
                message="needs evaluations during training",
                fix="set [eval] every_steps"
                if recipe.data.eval
                else "add a [[data.eval]] source and [eval] every_steps",
                also=(("eval", "every_steps"), ("data", "eval")),
            )


def plain_text_is_trained_whole(recipe: Recipe, _: Registries) -> Iterator[RecipeMistake]:
    """Check that plain text, which has no turns, is trained whole."""
    loss_on, formats = recipe.data.loss_on, {source.format for source in recipe.data.train}
    if formats == {"text"} and loss_on != "all":
        yield RecipeMistake(
            key=("data", "loss_on"),
            message='cannot be found in rows of format = "text"',
            fix='use loss_on = "all", or another format',
            also=(("data", "train"),),
        )


def optimizer_fits_engine(recipe: Recipe, registries: Registries) -> Iterator[RecipeMistake]:
    """Check that an optimizer for whole matrices does not run where ranks hold pieces of them."""
    optim, engine = recipe.optim, recipe.engine
    if _elementwise(optim.spec) or not _flattens(engine.spec):
        return
    engines = [name for name, spec in registries.engine.items() if name != "auto" and not _flattens(spec)]
    optimizers = [name for name, spec in registries.optim.items() if _elementwise(spec)]
    yield RecipeMistake(
        key=("optim", "name"),
        message=f"needs whole matrices (rows and columns), but engine {toml_value(engine.name)} gives each rank pieces",
        fix=f"allowed: engine {', '.join(engines)}, or optimizer {', '.join(optimizers)}",
        also=(("engine", "name"),),
    )


def adapters_recompute_outside_gathers(recipe: Recipe, _: Registries) -> Iterator[RecipeMistake]:
    """Check that selective recomputation does not replay gathers of ZeRO-3's adapters in a block."""
    adapter = getattr(recipe.method.spec, "adapter", False)
    inside = getattr(getattr(recipe.engine.spec, "footprint", None), "gathers_inside_blocks", False)
    if adapter and inside and recipe.train.activation_checkpointing == "selective":
        yield RecipeMistake(
            key=("train", "activation_checkpointing"),
            message=f"cannot be selective for adapters under {recipe.engine.name}",
            fix='use "full" or "off", or engine fsdp2 or ddp',
            also=(("method", "name"), ("engine", "name")),
        )


RULES: tuple[Rule, ...] = (
    name_is_a_folder_name,
    chat_template_is_known,
    date_is_a_day,
    formats_are_known,
    one_way_to_say_how_long,
    micro_batch_divides_global_batch,
    gradients_are_of_the_models_type,
    warm_up_ends,
    weight_or_share,
    shares_leave_room,
    sources_are_distinct,
    held_out_rows_are_held_out,
    evaluation_has_rows,
    overlap_needs_two_sides,
    best_is_measured,
    plain_text_is_trained_whole,
    optimizer_fits_engine,
    adapters_recompute_outside_gathers,
    *ANSWER_RULES,
    *ROLLOUT_RULES,
    *TOKEN_RULES,
    *ENGINE_RULES,
    *UPDATE_RULES,
)


def _sources(recipe: Recipe) -> tuple[tuple[str, tuple[SourceTable, ...]], ...]:
    return ("train", recipe.data.train), ("eval", recipe.data.eval)


def _identity(source: SourceTable) -> tuple[str | None, ...]:
    return posixpath.normpath(source.path), source.subset, source.split


def _elementwise(optimizer: Any) -> bool:
    return getattr(optimizer, "elementwise", True)


def _flattens(engine: Any) -> bool:
    return getattr(engine, "flattens", False)


def _divisors(number: int) -> list[int]:
    small = [count for count in range(1, int(number**0.5) + 1) if number % count == 0]
    return sorted({*small, *(number // count for count in small)})


def _nearest_divisors(number: int, wanted: int) -> list[int]:
    return sorted(sorted(_divisors(number), key=lambda count: abs(count - wanted))[:4])


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers)) or "none"
