"""Each part of a run made from its table of the recipe, for `distft.job` to put together in order."""

from __future__ import annotations

import hashlib
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distft.catalog import REGISTRIES
from distft.core.errors import Problem, RecipeError
from distft.core.pulse import PULSE
from distft.recipe import Recipe, check_world

if TYPE_CHECKING:
    from distft.best import Best
    from distft.core.types import Engine, StateReader, TrainState, UpdateRule
    from distft.data.loader import EvalSteps, Steps
    from distft.engine.processes import Processes
    from distft.guard import Guard
    from distft.metrics import Meters, RunFacts
    from distft.model.load import MetaModel
    from distft.plan.setup import Machine
    from distft.rehearsal import Worst
    from distft.resume import Checkpoints, Resume
    from distft.run_folder import RunFolder

AUTO_MICRO_TOKENS = 8192
"""Without an accelerator, `micro_batch_size = "auto"` fills a micro-batch up to this many tokens."""

PREPARING_SAYS_S = 10.0
"""Seconds between two words on how many rows are prepared."""

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How one optimizer step is spread over processes."""

    micro_batch_size: int
    micros_per_step: int
    checkpointing: str | None = None
    """What activation checkpointing `auto` means here; None: the recipe says, or there is no accelerator."""
    why: str = ""
    """Of micro-batch and checkpointing, where they were left to `auto`."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """Prepared rows, cut into this rank's steps."""

    steps: Steps
    eval_steps: EvalSteps | None
    fingerprint: dict[str, str]
    """sha256 of the prepared rows, by split."""
    largest_id: int
    """Of all tokens in them."""
    stop_ids: tuple[int, ...]
    """What trained rows end with."""
    longest: int
    """Tokens in the longest row."""


def layout(recipe: Recipe, world: int) -> Layout:
    """The recipe's micro-batch, or on accelerators what the planner chooses, which looks at memory and speed.

    Without one: as many sequences as fill AUTO_MICRO_TOKENS and divide a rank's share.

    Raises:
        RecipeError: the global batch does not split over `world` processes.
    """
    own, train = recipe.train.micro_batch_size, recipe.train
    share = check_world(recipe, world, 1 if own == "auto" else own)
    if "auto" in (own, train.activation_checkpointing) and (machine := _accelerators(world)) is not None:
        from distft.demo.files import locate
        from distft.engine.processes import launcher_wants
        from distft.model.load import find_folder
        from distft.plan import auto

        located = locate(recipe)
        chosen = auto.for_job(located, find_folder(located.model), machine, wants=launcher_wants(os.environ))
        return Layout(
            micro_batch_size=chosen.micro_batch_size,
            micros_per_step=check_world(recipe, world, chosen.micro_batch_size),
            checkpointing=chosen.checkpointing,
            why=chosen.reason,
        )
    if own == "auto":
        limit = max(1, AUTO_MICRO_TOKENS // recipe.data.max_length)
        own = max(size for size in range(1, min(share, limit) + 1) if share % size == 0)
    return Layout(micro_batch_size=own, micros_per_step=check_world(recipe, world, own))


def _accelerators(world: int) -> Machine | None:
    """What the run is on, every rank alike; None on CPUs."""
    import torch

    if not torch.cuda.is_available():
        return None
    from distft.core import accelerators
    from distft.plan.machine import of_size
    from distft.plan.setup import Machine

    first = torch.cuda.get_device_properties(0)
    gib = first.total_memory // accelerators.GIB  # whole ones: boards of one kind differ by a few MiB
    known = accelerators.of_device(first.name) or of_size(gib)
    per_node = min(world, torch.cuda.device_count())
    return Machine(gpu=replace(known, memory_gib=gib), gpus_per_node=per_node, nodes=-(-world // per_node))


def data(located: Recipe, cut: Layout, rank: int, world: int, say: Say) -> Data:
    """Prepared before any process group exists: however long it takes, no collective times out.

    Raises:
        DataError: rows that cannot be trained on.
    """
    from distft.data.loader import EvalSteps, Steps
    from distft.data.prepare import cache_folder, prepare

    table = located.data
    tokenizer, revision = _tokenizer(located)
    common: dict[str, Any] = {"tokenizer": tokenizer, "revision": revision, "cache_dir": cache_folder(table)}
    common["progress"] = _Preparing(say)
    common["waiting"] = lambda: PULSE.at("rows", patient=True)
    rows = prepare(table, table.train, split="train", **common)
    micro = cut.micro_batch_size
    slice_: dict[str, Any] = {"micro_batch_size": micro, "rank": rank, "world": world}
    slice_["pad_to"] = micro * table.max_length if located.train.compile else None
    plan = located.train
    steps = Steps(
        rows,
        table,
        seed=located.seed,
        epochs=plan.epochs,
        max_steps=plan.max_steps,
        global_batch_size=plan.global_batch_size,
        **slice_,
    )
    say(
        f"{rows.num_rows:,} rows, {steps.tokens_per_epoch:,} tokens an epoch "
        f"({steps.supervised_per_epoch:,} trained), {100 * steps.fill:.1f} % fill, {steps.num_steps:,} steps"
    )
    splits = {"train": rows}
    if table.eval:
        splits["eval"] = prepare(table, table.eval, split="eval", **common)
    return Data(
        steps=steps,
        eval_steps=EvalSteps(splits["eval"], table, **slice_) if table.eval else None,
        fingerprint={split: prepared.fingerprint for split, prepared in splits.items()},
        largest_id=max(prepared.report.largest_id for prepared in splits.values()),
        stop_ids=rows.report.stop_ids,
        longest=int(rows.lengths.max()),
    )


class _Preparing:
    """Says now and then how far it is, and lets a preempted process go: preparing may outlast the grace period."""

    def __init__(self, say: Say) -> None:
        self._say, self._said_at = say, -math.inf

    def __call__(self, rows: int) -> None:
        """Called after every few rows.

        Raises:
            Preempted: this process has been asked to stop.
        """
        PULSE.at("rows")
        if time.monotonic() - self._said_at >= PREPARING_SAYS_S:
            self._said_at = time.monotonic()
            self._say(f"preparing rows: {rows:,}")


def _tokenizer(located: Recipe) -> tuple[str, str | None]:
    """(path, revision) of the tokenizer: the model's unless the recipe names another."""
    model = located.model
    return (model.path, model.revision) if model.tokenizer is None else (model.tokenizer, None)


def open_engine(recipe: Recipe, placed: Processes, say: Say) -> Engine:
    """The recipe's engine, or the one `auto` chooses.

    Raises:
        MachineError: it cannot run here, or the launcher was configured for another.
    """
    from distft.engine.auto import choose

    params: Any = recipe.engine.params
    offload = getattr(params, "offload", "none")
    name, why = choose(
        recipe.engine.name,
        REGISTRIES.engine,
        placed,
        trains_all=not recipe.method.spec.adapter,
        elementwise=recipe.optim.spec.elementwise,
        offload=offload,
    )
    spec = REGISTRIES.engine[name]
    if recipe.engine.name == "auto":
        params = spec.params(**({"offload": offload} if "offload" in spec.params.model_fields else {}))
    say(f"engine {name}: {why}")
    return spec.open(params, placed)


def model(located: Recipe, placed: Processes, engine: str, cut: Layout, rows: Data, say: Say) -> MetaModel:
    """The model without values, adapters attached, memory savers on.

    Raises:
        RecipeError: weights are missing or unusable, or a token has no row in the embedding.
    """
    from distft.model import load, savers, stats

    spec = located.method.spec
    built = load.build(
        located.model,
        load.find_folder(located.model),
        spec,
        located.method.params,
        seed=located.seed,
        device=placed.device,
        per_token=located.objective.spec.per_token,
    )
    num_embeddings = built.module.transformer.get_input_embeddings().num_embeddings
    if rows.largest_id >= num_embeddings:
        problem = Problem(
            message=f"[model] the tokenizer wrote token {rows.largest_id}, and the embedding has {num_embeddings} rows",
            line=located.line_of("model.tokenizer") or located.line_of("model.path"),
            fix="use the tokenizer that belongs to the model, or a chat_template of tokens it knows",
        )
        raise RecipeError(located.source, [problem])
    mode, why = savers.choose_checkpointing(located.train.activation_checkpointing, cut.checkpointing, cut.why)
    say(f"activation checkpointing {mode}: {why}")
    savers.checkpoint_blocks(built.module.transformer, mode)
    if located.train.compile:
        savers.compile_blocks(built.blocks)
    counts = stats.count(built.module)
    say(f"{counts.trainable:,} of {counts.total:,} parameters are trained ({located.method.name})")
    return built


def update_rule(recipe: Recipe, built: MetaModel, num_steps: int) -> UpdateRule:
    """Optimizer, schedule and clipping."""
    from distft.core.types import UpdateRule

    optim, clip = recipe.optim, recipe.train.max_grad_norm
    params: Any = optim.params
    factor = recipe.schedule.spec.build(recipe.schedule.params, num_steps)
    return UpdateRule(
        build=lambda groups: optim.spec.build(params, groups),
        lr_at=lambda step: params.learning_rate * factor(step),
        weight_decay=getattr(params, "weight_decay", 0.0),
        decayed=frozenset(name for name, param in built.module.named_parameters() if param.ndim >= 2),
        max_grad_norm=None if clip == "off" else float(clip),
    )


def worst(recipe: Recipe, cut: Layout, rows: Data) -> Worst:
    """The largest micro-batch of the run: packed sequences may be full, rows alone are as long as the longest."""
    from distft.rehearsal import Worst

    longest = recipe.data.max_length if recipe.data.packing or recipe.train.compile else rows.longest
    return Worst(
        sequences=cut.micro_batch_size,
        longest=longest,
        micros=cut.micros_per_step,
        evaluates=rows.eval_steps is not None,
    )


def advice(recipe: Recipe, located: Recipe, world: int) -> str:
    """What makes a run smaller, cheapest first: the planner's word on accelerators, on a CPU what always helps."""
    machine = _accelerators(world)
    if machine is not None:
        from distft.model.load import find_folder
        from distft.plan.planner import Planner

        given = list(recipe.origin.overrides.values())
        planner = Planner(path=recipe.source, overrides=given, folder=find_folder(located.model), machine=machine)
        found = planner.changes(planner.case())[:5]
        return "\n".join(["what fits, by plan:", *(f"  {change}" for change in found)])
    steps = [
        ("train.micro_batch_size=1", recipe.train.micro_batch_size != 1),
        ('train.activation_checkpointing="full"', recipe.train.activation_checkpointing != "full"),
        ('model.cross_entropy="chunked"', recipe.model.cross_entropy == "full"),
        (f"data.max_length={recipe.data.max_length // 2}", True),
    ]
    return "try, in this order: " + "  ".join(f"--set {change}" for change, helps in steps if helps)


def run_facts(built: MetaModel, placed: Processes, state: TrainState) -> RunFacts:
    """Counted on whole shapes, so before an engine shards them."""
    from distft.metrics import RunFacts
    from distft.model import stats

    return RunFacts(
        world=placed.world,
        device_name=device_name(placed),
        flops_per_token=stats.flops_per_token(built.module),
        flops_per_squared_length=stats.flops_per_squared_length(built.module.transformer.config),
        start=state,
    )


def checkpoints(
    recipe: Recipe,
    located: Recipe,
    folder: RunFolder,
    engine: Engine,
    rows: Data,
    say: Say,
    *,
    judges: dict[str, Guard | Best],
    resume: Resume,
    allow_changes: bool,
) -> tuple[Checkpoints, TrainState, StateReader | None]:
    """Where state is saved, and where this run starts: at zero, or at a checkpoint with a reader for its tensors.

    Raises:
        CheckpointError: there are checkpoints and none is valid, or the one to continue does not fit this run.
        DataError: it was trained on other rows.
    """
    from distft.checkpoint.store import CheckpointStore
    from distft.core.types import TrainState
    from distft.resume import Checkpoints, about, check_fits

    base = _base_hash(located, engine) if located.method.spec.adapter else ""
    says = about(recipe, rows.fingerprint, base, rows.steps.num_steps)
    root = folder.path / "checkpoints"
    if resume == "never" and engine.rank == 0:
        folder.set_aside(root)
    engine.barrier()
    hashes = {"recipe": recipe.digest(), "base": base, **rows.fingerprint}
    store = CheckpointStore(root, engine, keep=recipe.checkpoint.keep, engine=engine.name, hashes=hashes)
    keeper = Checkpoints(
        store,
        engine,
        says,
        asynchronous=recipe.checkpoint.asynchronous,
        grace_s=recipe.checkpoint.grace_s,
        reached=folder.reach,
        note=folder.note,
        judges=lambda: {name: judge.state() for name, judge in judges.items()},
    )
    loaded = store.load(resume) if isinstance(resume, Path) else store.load_newest()
    if loaded is None:
        return keeper, TrainState(), None
    for rejected in loaded.rejected:
        say(f"passed over {rejected}")
    changed = check_fits(loaded.state, says, loaded.path, allow_changes=allow_changes)
    state = TrainState(**loaded.state["train"])
    was = f"{loaded.manifest.engine} x {loaded.manifest.world}"
    say(f"continuing {loaded.path} at step {state.step} of {rows.steps.num_steps} (saved under {was})")
    for change in changed:
        say(f"changed since: {change}")
    folder.reach(state.step)
    folder.note("continued", checkpoint=str(loaded.path), was=was, passed_over=loaded.rejected, changed=changed)
    for name, judge in judges.items():
        judge.restore(loaded.state[name])
    return keeper, state, loaded.reader


def _base_hash(located: Recipe, engine: Engine) -> str:
    """sha256 of the frozen weights; the files of one host are hashed once and remembered by size and time."""
    from distft.data.fingerprint import file_hash
    from distft.data.prepare import cache_folder
    from distft.model.load import find_folder

    if located.model.init == "random":
        return f"random-{located.seed}"
    if engine.rank != 0:
        return engine.gather("")[0]
    memory = cache_folder(located.data) / "hashes"
    files = sorted(find_folder(located.model).glob("*.safetensors"))
    digest = hashlib.sha256("".join(file_hash(file, memory) for file in files).encode()).hexdigest()
    return engine.gather(digest)[0]


def meters(recipe: Recipe, folder: RunFolder, facts: RunFacts, placed: Processes, steps: Steps) -> Meters:
    """Every registered metric, and on rank 0 the sinks that the recipe asks for."""
    from distft.metrics import METRICS, Meters
    from distft.metrics.sinks import console, jsonl

    sinks: list[Any] = []
    if placed.rank == 0:
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
    if recipe.log.samples:
        from distft.metrics.sample_log import SampleLog

        metrics.append(SampleLog(folder.path / "samples", placed.rank, placed.world, start=facts.start.step))
    return Meters(metrics, sinks, epoch_at=steps.epoch_at)


def saved_shapes(built: MetaModel, recipe: Recipe) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Names, whole shapes and types of what final/ will hold; asked for before an engine shards anything."""
    from distft.model.load import WRAPPER

    return {
        name.removeprefix(WRAPPER): (tuple(param.shape), param.dtype)
        for name, param in built.module.named_parameters()
        if param.requires_grad or not recipe.method.spec.adapter
    }


def export(
    located: Recipe, folder: RunFolder, engine: Engine, built: MetaModel, shapes: dict[str, Any], rows: Data
) -> None:
    """Write final/: what transformers, PEFT and inference servers load."""
    from distft.data.render import save_tokenizer
    from distft.export import final
    from distft.model.load import WRAPPER

    lm: Any = built.module.lm
    tokenizer, revision = _tokenizer(located)

    def save_beside(target: Path) -> None:
        save_tokenizer(tokenizer, target, chat_template=located.data.chat_template, revision=revision)
        final.save_generation_config(built.module.transformer, target, rows.stop_ids)

    def save_config_too(target: Path) -> None:
        final.save_config(built.module.transformer, target)
        save_beside(target)

    if located.method.spec.adapter:
        final.write_adapter(
            folder.final,
            engine,
            shapes,
            prefix=WRAPPER,
            save_adapter=lambda target, tensors: lm.save_pretrained(target, state_dict=tensors),
            save_rest=save_beside,
        )
    else:
        final.write_model(folder.final, engine, shapes, prefix=WRAPPER, save_rest=save_config_too)


def device_name(placed: Processes) -> str:
    """The accelerator's product name, or "cpu"."""
    import torch

    return torch.cuda.get_device_name(placed.device) if placed.device.type == "cuda" else "cpu"
