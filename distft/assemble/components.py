"""Builds engine, model, optimizer and metrics, each from its table of the recipe."""

from __future__ import annotations

import functools
import os
import sys
from typing import TYPE_CHECKING, Any

from distft import compatibility
from distft.assemble.batch_layout import Layout
from distft.assemble.step_source import num_steps
from distft.assemble.training_data import Data, HeldOut, Say
from distft.catalog import PLUGINS, REGISTRIES
from distft.core.errors import DataError, Problem, RecipeError
from distft.recipe import Recipe, refuse_engine

if TYPE_CHECKING:
    from distft.columns.teacher import Teacher
    from distft.core.protocols import StepSource
    from distft.core.types import Engine, TrainState, UpdateRule
    from distft.engine.processes import Processes
    from distft.metrics import Meters, RunFacts
    from distft.model.load import MetaModel
    from distft.objectives.spec import Objective
    from distft.run_folder import RunFolder


def open_engine(recipe: Recipe, processes: Processes, say: Say) -> Engine:
    """Return the recipe's engine, or the one `auto` chooses.

    Raises:
        MachineError: it cannot run here, or the launcher was configured for another.
        RecipeError: it cannot train what the recipe asks for.
    """
    from distft.engine.auto import choose
    from distft.model.adapters.spec import optimizer_of

    params: Any = recipe.engine.params
    offload = getattr(params, "offload", "none")
    name, why = choose(
        recipe.engine.name,
        REGISTRIES.engine,
        processes,
        trains_all=not recipe.method.spec.adapter,
        elementwise=optimizer_of(recipe.method.spec, recipe.method.params, recipe.optim.spec).elementwise,
        offload=offload,
    )
    refuse_engine(recipe, name, REGISTRIES.engine)
    spec = REGISTRIES.engine[name]
    if recipe.engine.name == "auto":
        chosen = {"offload": offload, "grad_dtype": getattr(params, "grad_dtype", "auto")}
        params = spec.params(**{key: value for key, value in chosen.items() if key in spec.params.model_fields})
    say(f"engine {name}: {why}")
    return spec.open(params, processes)


def build_model(
    recipe: Recipe, processes: Processes, layout: Layout, rows: HeldOut, say: Say, *, trains: bool = True
) -> MetaModel:
    """Return the model without values, adapters attached, memory savers on.

    Where nothing `trains`, nor restores what was trained, a critic is left out.

    Raises:
        RecipeError: weights are missing or unusable, or a token has no row in the embedding.
    """
    from distft.model import activation_checkpointing, load, quantize, stats
    from distft.model.heads import HEADS

    spec, head = recipe.method.spec, HEADS[recipe.objective.spec.head_of(recipe.objective.params)]
    with compatibility.with_model_line(recipe):
        built = load.build(
            recipe.model,
            load.find_folder(recipe.model),
            spec,
            recipe.method.params,
            seed=recipe.seed,
            device=processes.device,
            per_token=recipe.objective.spec.per_token,
            path=layout.path,
            head=HEADS["lm"] if head.values and not trains else head,
        )
    num_embeddings = built.module.transformer.get_input_embeddings().weight.shape[0]
    if rows.largest_id >= num_embeddings:
        problem = Problem(
            message=f"[model] the tokenizer wrote token {rows.largest_id}, and the embedding has {num_embeddings} rows",
            line=recipe.line_of("model.tokenizer") or recipe.line_of("model.path"),
            fix="use the tokenizer that belongs to the model, or a chat_template of tokens it knows; your own "
            "tokens are added by [model] add_tokens, beside the model's own tokenizer, and the embedding grows",
        )
        raise RecipeError(recipe.source, [problem])
    mode, why = activation_checkpointing.choose_checkpointing(
        recipe.train.activation_checkpointing, layout.checkpointing, layout.why
    )
    say(f"activation checkpointing {mode}: {why}")
    for model in built.module.pretrained:
        activation_checkpointing.checkpoint_blocks(model, mode)
    counts = stats.count(built.module)
    say(f"{counts.trainable:,} of {counts.total:,} parameters are trained ({recipe.method.name})")
    active = stats.active(built.module)
    if active < counts.total:
        say(f"a token meets {active:,} of them, with the experts that it is sent to")
    if spec.adapted is not None:
        layers, tensors = spec.adapted(built.module)
        say(f"adapters on {layers} layers" + (f" and {tensors} expert tensors" if tensors else ""))
    if spec.quant(recipe.method.params) is not None:
        say(str(quantize.count(built.module)))
    return built


def set_up_engine(recipe: Recipe, engine: Engine, built: MetaModel, layout: Layout, num_steps: int) -> None:
    """Let the engine fill and wrap the model and make the optimizer; then compile what it has wrapped."""
    from distft.model import activation_checkpointing

    engine.setup(built, update_rule(recipe, built, num_steps), micros_per_step=layout.micros_per_step)
    if layout.path.compiled:
        activation_checkpointing.compile_blocks(built.blocks)


def update_rule(recipe: Recipe, built: MetaModel, num_steps: int) -> UpdateRule:
    """Return the optimizer, schedule and clipping."""
    from distft.core.types import UpdateRule
    from distft.model.adapters.spec import optimizer_of

    optim, clip = recipe.optim, recipe.train.max_grad_norm
    params: Any = optim.params
    factor = recipe.schedule.spec.build(recipe.schedule.params, num_steps)
    method, ratio = recipe.method.spec, recipe.method.spec.lr_ratio(recipe.method.params)
    named = dict(built.module.named_parameters())
    with compatibility.with_model_line(recipe):
        spec = optimizer_of(method, recipe.method.params, optim.spec, num_steps)
    return UpdateRule(
        build=lambda groups: spec.build(params, groups),
        lr_at=lambda step: params.learning_rate * factor(step),
        weight_decay=getattr(params, "weight_decay", 0.0),
        decayed=frozenset(name for name, param in named.items() if param.ndim >= 2),
        max_grad_norm=None if clip == "off" else float(clip),
        matrices=_matrices(recipe, built),
        per_tensor=spec.per_tensor,
        in_backward=recipe.train.optimizer_in_backward,
        named=method.optimizer is not None,
        faster=frozenset(name for name in named if method.faster(name)) if ratio != 1.0 else frozenset(),
        lr_ratio=ratio,
    )


def _matrices(recipe: Recipe, built: MetaModel) -> frozenset[str] | None:
    """Return the names of the trained weight matrices of the blocks, where the optimizer has a rule for those.

    Raises:
        RecipeError: one of them has more dimensions than the rule is made for.
    """
    spec = recipe.optim.spec
    if spec.matrix_state_bytes is None:
        return None
    from distft.model.blocks import block_matrices

    matrices = block_matrices(built.module, built.blocks)
    for name, dims in matrices.items():
        if spec.matrix_dims is not None and dims > spec.matrix_dims:
            message = f'[optim] name = "{spec.name}" takes weights of {spec.matrix_dims} dimensions; {name} has {dims}'
            line = recipe.line_of("optim.name")
            raise RecipeError(recipe.source, [Problem(message=message, line=line, fix='name = "adamw"')])
    return frozenset(matrices)


def build_objective(
    recipe: Recipe,
    engine: Engine,
    built: MetaModel,
    layout: Layout,
    rows: HeldOut,
    say: Say,
    *,
    is_trained: bool = False,
    trains: bool = True,
    teacher: Teacher | None = None,
) -> Objective:
    """Return the recipe's objective over the model that the engine holds, with what fills its columns.

    Collective; the engine's weights are those that training starts from, unless it `is_trained`: then what follows from
    those must have been computed before. So must what follows from another model (`compute_other_reference`). The
    `teacher` is there where the objective names one and the run `trains` (`open_teacher`).

    Raises:
        MachineError: a column that it reads cannot be had in this run.
    """
    from distft.assemble.reference import column_specs, logprobs_folder, other_model, reads_reference, rows_to_pass
    from distft.columns import ColumnFiller, ColumnInputs
    from distft.columns.reference import ReferenceModel
    from distft.core.protocols import NO_COLUMNS
    from distft.model.adapters.spec import leaves_base_alone
    from distft.model.policy import ModelPolicy
    from distft.objectives.spec import Objective

    chosen, method = recipe.objective, recipe.method
    temperature = recipe.rollout.temperature if chosen.spec.writes else 1.0
    policy = ModelPolicy(engine.model, temperature, None if teacher is None else teacher.policy.teacher)
    alone = method.spec.base_alone if leaves_base_alone(method.spec, method.params) else None
    specs, other = column_specs(recipe), other_model(recipe)
    if not specs or (chosen.spec.writes and not trains):  # no rows have a loss: answers alone are looked at
        return Objective(spec=chosen.spec, params=chosen.params, policy=policy, columns=NO_COLUMNS)
    row_passes, derived = rows_to_pass(specs, rows)
    before = ReferenceModel(
        policy=policy,
        engine=engine,
        base_alone=None if alone is None or other is not None else functools.partial(alone, built.module),
        row_passes=tuple(row_passes),
        folder_of=logprobs_folder(recipe if other is None else other, engine, layout),
        is_trained=is_trained or other is not None,
        say=say,
        written_meanwhile=chosen.spec.writes,
    )
    inputs = ColumnInputs(
        policy=policy,
        engine=engine,
        reference=functools.cache(before.open),
        teacher=teacher,
        derived=derived,
    )
    suppliers = {name: spec.open(inputs) for name, spec in specs.items()}
    return Objective(
        spec=chosen.spec,
        params=chosen.params,
        policy=policy,
        columns=ColumnFiller(engine, suppliers),
        reference=inputs.reference() if reads_reference(specs) else None,
    )


def refuse_other_policy(recipe: Recipe, engine: Engine, objective: Objective, steps: StepSource) -> None:
    """Collective: check that the policy is its reference before the first update (see `distft.identity_gate`).

    Where another model is the reference, that was checked when its log-probabilities were computed.

    Raises:
        NumericError: it is not.
    """
    from distft.assemble.reference import other_model
    from distft.identity_gate import refuse_other_policy as refuse

    if objective.reference is not None and other_model(recipe) is None:
        refuse(engine, objective.policy, objective.reference, next(steps.from_step(0))[0], torch_dtype(recipe))


def torch_dtype(recipe: Recipe) -> Any:
    """Return the type that the model computes in."""
    import torch

    return getattr(torch, recipe.model.dtype)


def run_facts(built: MetaModel, processes: Processes, state: TrainState) -> RunFacts:
    """Count facts on whole shapes, so before an engine shards them."""
    from distft.metrics import RunFacts
    from distft.model import stats

    return RunFacts(
        world=processes.world,
        device_name=device_name(processes),
        flops_per_token=stats.flops_per_token(built.module),
        flops_per_squared_length=sum(stats.flops_per_squared_length(model.config) for model in built.module.pretrained),
        start=state,
    )


def fetch_model(recipe: Recipe) -> None:
    """Bring the model's files to where this process reads them: before any group exists, for it may take an hour.

    Raises:
        RecipeError: neither a folder nor a hub id that can be had.
    """
    from distft.model import load

    load.find_folder(recipe.model)


def build_meters(
    recipe: Recipe,
    folder: RunFolder,
    facts: RunFacts,
    engine: Engine,
    processes: Processes,
    steps: StepSource,
    say: Say,
) -> Meters:
    """Return every registered metric, and on rank 0 the sinks that the recipe asks for."""
    from distft.metrics import METRICS, Meters
    from distft.metrics.sinks import console, jsonl
    from distft.metrics.startup import StartUp

    sinks: list[Any] = []
    if processes.rank == 0:
        sinks.append(jsonl.JsonlSink(folder.metrics, start=facts.start.step))
        if recipe.log.tensorboard:
            from distft.metrics.sinks.tensorboard import TensorboardSink

            sinks.append(TensorboardSink(folder.tensorboard))
        if recipe.log.wandb is not None:
            from distft.metrics.sinks.wandb import WandbSink

            sinks.append(WandbSink(recipe.log.wandb, recipe.name, recipe.resolved()))
        bar = recipe.log.console == "rich" or (recipe.log.console == "auto" and sys.stderr.isatty())
        if recipe.log.console != "off":
            kind = console.BarSink if bar else console.LineSink
            sinks.append(kind(recipe.name, steps.num_steps, facts.start.step))
    metrics: list[Any] = [spec.build(facts) for spec in METRICS.values()]
    metrics.append(StartUp(processes.rank, engine.gather, say, folder.note, os.environ))
    if recipe.log.samples:
        from distft.metrics.sample_log import SampleLog

        metrics.append(SampleLog(folder.path / "samples", processes.rank, processes.world, start=facts.start.step))
    return Meters(metrics, sinks, epoch_at=steps.epoch_at)


def manifest(
    recipe: Recipe, built: MetaModel, engine: Engine, processes: Processes, layout: Layout, rows: Data
) -> dict[str, Any]:
    """Return what the run depends on, for manifest.json; collective, and whole on rank 0 alone."""
    import socket

    from distft.assemble import input_hashes
    from distft.model import stats

    places = engine.gather((socket.gethostname(), device_name(processes)))
    here = processes.rank == 0
    return {
        "engine": engine.name,
        "world": processes.world,
        "nodes": len({name for name, _ in places}),
        "devices": [{"host": name, "device": device} for name, device in places],
        "launcher": processes.launcher,
        "launcher_wants": processes.wants,
        "command": sys.orig_argv if here else [],
        "recipe": {"source": recipe.source, "overrides": list(recipe.origin.overrides.values())},
        "layout": layout.to_json(),
        "seed": recipe.seed,
        "date": recipe.data.date,
        "parameters": vars(stats.count(built.module)),
        "data": rows.fingerprint,
        "trained_rows": {"stop_ids": list(rows.stop_ids), "chats": _chats(recipe)} if here else {},
        "sources": input_hashes.rows(recipe) if here else {},
        "recipe_sha256": recipe.digest(),
        "plugins": [plugin.to_json() for plugin in PLUGINS.load()],
        "device": device_name(processes),
        "num_steps": num_steps(recipe, rows),
        "tokens_per_epoch": rows.steps.tokens_per_epoch,
    }


def _chats(recipe: Recipe) -> bool | None:
    """Return whether trained rows are chats; None: the first ones, which may all be left out as bad, do not say."""
    from distft.data.questions import trained_as_chat

    try:
        return trained_as_chat(recipe.data.train, merge_turns=recipe.data.merge_turns)
    except DataError:
        return None


def device_name(processes: Processes) -> str:
    """Return the accelerator's product name, or "cpu"."""
    import torch

    return torch.cuda.get_device_name(processes.device) if processes.device.type == "cuda" else "cpu"
