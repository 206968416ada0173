"""The main job, and the only file that knows every room: resolve names, prepare, open the engine, load, fit, export.

`accelerate launch -m distft.train RECIPE`, one process per accelerator; also plain, under torchrun and under srun.
"""

from __future__ import annotations

import os
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distft.catalog import REGISTRIES
from distft.core.errors import DONE, DistftError
from distft.demo.files import locate
from distft.recipe import Recipe, check_world, load_recipe
from distft.run_folder import RunFolder

if TYPE_CHECKING:
    from distft.core.types import Engine, TrainState
    from distft.data.loader import EvalSteps, Steps
    from distft.engine.processes import Processes
    from distft.metrics import Meters, RunFacts
    from distft.model.load import MetaModel

AUTO_MICRO_TOKENS = 8192
"""`micro_batch_size = "auto"` fills a micro-batch up to this many tokens: enough rows for full-speed products."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run left behind."""

    folder: Path
    """The run folder."""
    final: Path
    """What transformers or PEFT load."""
    state: TrainState


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How one optimizer step is spread over processes."""

    micro_batch_size: int
    micros_per_step: int


def train(recipe: Recipe) -> Result:
    """Run the main job in this process, which may be one of many.

    Raises:
        DistftError: see `distft.core.errors`; nothing else is the user's fault.
    """
    from distft.engine import processes

    launcher, rank, world, _ = processes.placed_by(os.environ)
    say = _Speaker(rank)
    located = locate(recipe)
    folder = RunFolder(recipe.run_dir, writes=rank == 0)
    state: TrainState | None = None
    try:
        layout = _layout(recipe, world)
        say(f"run {recipe.name} -> {folder.path} ({world} process{'es' if world > 1 else ''}, {launcher})")
        steps, eval_steps, fingerprint = _data(located, layout, rank, world, say)
        state = _run(recipe, located, folder, layout, steps, eval_steps, fingerprint, say)
    except BaseException as error:
        folder.end(code=exit_code(error), reason=_reason(error), step=state.step if state else None, rank=rank)
        raise
    folder.end(code=DONE, reason="done", step=state.step, rank=rank)
    return Result(folder=folder.path, final=folder.final, state=state)


def _run(
    recipe: Recipe,
    located: Recipe,
    folder: RunFolder,
    layout: Layout,
    steps: Steps,
    eval_steps: EvalSteps | None,
    fingerprint: dict[str, str],
    say: _Speaker,
) -> TrainState:
    """Everything between joining the processes and leaving them."""
    from distft.core.types import TrainState
    from distft.engine import processes
    from distft.evaluate import evaluate
    from distft.loop import Every, fit
    from distft.model import stats
    from distft.objectives.spec import Objective

    placed = processes.join()
    engine, why = _open_engine(recipe, placed)
    try:
        model = _model(located, placed, engine.name, layout, say)
        counts = stats.count(model.module)
        say(f"engine {engine.name}: {why}")
        say(f"{counts.trainable:,} of {counts.total:,} parameters are trained ({recipe.method.name})")
        facts = {
            "engine": engine.name, "world": placed.world, "layout": vars(layout), "seed": recipe.seed,
            "parameters": vars(counts), "data": fingerprint, "recipe_sha256": recipe.digest(),
            "device": _device_name(placed), "num_steps": steps.num_steps,
        }  # fmt: skip
        folder.start(recipe.to_toml(), facts)
        state = TrainState()
        shapes = _saved_shapes(model, recipe)
        costs = _run_facts(model, placed, state)
        engine.adopt(model, _update_rule(recipe, model, steps.num_steps), micros_per_step=layout.micros_per_step)
        objective = Objective(spec=recipe.objective.spec, params=recipe.objective.params)
        at = recipe.eval
        every = Every(
            log=lambda step: step % recipe.log.every_steps == 0 or step == steps.num_steps,
            eval=lambda step: eval_steps is not None and at.every_steps is not None and step % at.every_steps == 0
            and not (at.at_end and step == steps.num_steps),
        )  # fmt: skip
        meters = _meters(recipe, folder, costs, placed, steps, state)
        try:
            if eval_steps is not None and at.at_start:
                meters.evaluated(state, evaluate(engine, objective, eval_steps))
            state = fit(
                state, steps, eval_steps or (), engine=engine, objective=objective, meters=meters, every=every
            )  # fmt: skip
            if eval_steps is not None and at.at_end:
                meters.evaluated(state, evaluate(engine, objective, eval_steps))
        finally:
            meters.close()
        _export(recipe, located, folder, engine, model, shapes)
        say(f"done: {folder.final}")
    finally:
        engine.close()
    return state


def _layout(recipe: Recipe, world: int) -> Layout:
    """The micro-batch: the recipe's, or as many sequences as fill AUTO_MICRO_TOKENS and divide a rank's share."""
    own = recipe.train.micro_batch_size
    if own == "auto":
        share = check_world(recipe, world, 1)
        limit = max(1, AUTO_MICRO_TOKENS // recipe.data.max_length)
        own = max(size for size in range(1, min(share, limit) + 1) if share % size == 0)
    return Layout(micro_batch_size=own, micros_per_step=check_world(recipe, world, own))


def _data(
    located: Recipe, layout: Layout, rank: int, world: int, say: _Speaker
) -> tuple[Steps, EvalSteps | None, dict[str, str]]:
    """Prepared before any process group exists: however long it takes, no collective times out."""
    from distft.data.loader import EvalSteps, Steps
    from distft.data.prepare import cache_folder, prepare

    table, model = located.data, located.model
    tokenizer = model.tokenizer or model.path
    common: dict[str, Any] = {
        "tokenizer": tokenizer,
        "revision": model.revision if model.tokenizer is None else None,
        "cache_dir": cache_folder(table),
        "progress": say.progress("preparing rows"),
    }
    rows = prepare(table, table.train, split="train", **common)
    pad_to = layout.micro_batch_size * table.max_length if located.train.compile else None
    cut: dict[str, Any] = {"micro_batch_size": layout.micro_batch_size, "rank": rank, "world": world, "pad_to": pad_to}
    plan = located.train
    steps = Steps(
        rows, table, seed=located.seed, epochs=plan.epochs, max_steps=plan.max_steps,
        global_batch_size=plan.global_batch_size, **cut,
    )  # fmt: skip
    say(
        f"{rows.num_rows:,} rows, {steps.tokens_per_epoch:,} tokens an epoch "
        f"({steps.supervised_per_epoch:,} trained), {100 * steps.fill:.1f} % fill, {steps.num_steps:,} steps"
    )
    fingerprint = {"train": rows.fingerprint}
    if not table.eval:
        return steps, None, fingerprint
    held_out = prepare(table, table.eval, split="eval", **common)
    return steps, EvalSteps(held_out, table, **cut), fingerprint | {"eval": held_out.fingerprint}


def _open_engine(recipe: Recipe, placed: Processes) -> tuple[Engine, str]:
    from distft.engine.auto import choose

    params: Any = recipe.engine.params
    offload = getattr(params, "offload", "none")
    name, why = choose(
        recipe.engine.name, REGISTRIES.engine, placed, trains_all=not recipe.method.spec.adapter,
        elementwise=recipe.optim.spec.elementwise, offload=offload,
    )  # fmt: skip
    spec = REGISTRIES.engine[name]
    if recipe.engine.name == "auto":
        params = spec.params(**({"offload": offload} if "offload" in spec.params.model_fields else {}))
    return spec.open(params, placed), why


def _model(located: Recipe, placed: Processes, engine: str, layout: Layout, say: _Speaker) -> MetaModel:
    from distft.model import load, savers

    spec = located.method.spec
    model = load.build(
        located.model, load.find_folder(located.model), spec, located.method.params,
        seed=located.seed, device=placed.device, per_token=located.objective.spec.per_token,
    )  # fmt: skip
    mode, why = savers.choose_checkpointing(
        located.train.activation_checkpointing,
        model.module,
        placed.device,
        tokens=layout.micro_batch_size * located.data.max_length,
        shards=placed.world if engine in ("zero3", "fsdp2") else 1,
    )
    say(f"activation checkpointing {mode}: {why}")
    savers.checkpoint_blocks(model.module.transformer, mode)
    if located.train.compile:
        savers.compile_blocks(model.blocks)
    return model


def _update_rule(recipe: Recipe, model: MetaModel, num_steps: int) -> Any:
    from distft.core.types import UpdateRule

    optim, clip = recipe.optim, recipe.train.max_grad_norm
    params: Any = optim.params
    factor = recipe.schedule.spec.build(recipe.schedule.params, num_steps)
    return UpdateRule(
        build=lambda groups: optim.spec.build(params, groups),
        lr_at=lambda step: params.learning_rate * factor(step),
        weight_decay=params.weight_decay,
        decayed=frozenset(name for name, param in model.module.named_parameters() if param.ndim >= 2),
        max_grad_norm=None if clip == "off" else float(clip),
    )


def _run_facts(model: MetaModel, placed: Processes, state: TrainState) -> RunFacts:
    """Counted on whole shapes, so before an engine shards them."""
    from distft.metrics import RunFacts
    from distft.model import stats

    return RunFacts(
        world=placed.world,
        device_name=_device_name(placed),
        flops_per_token=stats.flops_per_token(model.module),
        flops_per_squared_length=stats.flops_per_squared_length(model.module.transformer.config),
        start=state,
    )


def _meters(
    recipe: Recipe, folder: RunFolder, facts: RunFacts, placed: Processes, steps: Steps, state: TrainState
) -> Meters:
    from distft.metrics import METRICS, Meters
    from distft.metrics.sinks import console, jsonl

    sinks: list[Any] = []
    if placed.rank == 0:
        sinks.append(jsonl.JsonlSink(folder.metrics))
        if recipe.log.tensorboard:
            from distft.metrics.sinks.tensorboard import TensorboardSink

            sinks.append(TensorboardSink(folder.tensorboard))
        if recipe.log.wandb is not None:
            from distft.metrics.sinks.wandb import WandbSink

            sinks.append(WandbSink(recipe.log.wandb, recipe.name, recipe.resolved()))
        bar = recipe.log.console == "rich" or (recipe.log.console == "auto" and sys.stderr.isatty())
        if recipe.log.console != "off":
            kind = console.BarSink if bar else console.LineSink
            sinks.append(kind(recipe.name, steps.num_steps, state.step))
    return Meters([spec.build(facts) for spec in METRICS.values()], sinks, epoch_at=steps.epoch_at)


def _saved_shapes(model: MetaModel, recipe: Recipe) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Names, whole shapes and types of what final/ will hold; asked for before an engine shards anything."""
    from distft.model.load import WRAPPER

    params = model.module.named_parameters()
    return {
        name.removeprefix(WRAPPER): (tuple(param.shape), param.dtype)
        for name, param in params
        if param.requires_grad or not recipe.method.spec.adapter
    }


def _export(
    recipe: Recipe, located: Recipe, folder: RunFolder, engine: Engine, model: MetaModel, shapes: dict[str, Any]
) -> None:
    from distft.data.render import save_tokenizer
    from distft.export import final
    from distft.model.load import WRAPPER

    def tokenizer_into(target: Path) -> None:
        source = located.model.tokenizer or located.model.path
        save_tokenizer(source, target, chat_template=located.data.chat_template, revision=located.model.revision)

    if recipe.method.spec.adapter:
        lm: Any = model.module.lm
        final.write_adapter(
            folder.final, engine, shapes, prefix=WRAPPER,
            save_adapter=lambda target, tensors: lm.save_pretrained(target, state_dict=tensors),
            save_rest=tokenizer_into,
        )  # fmt: skip
    else:
        save_rest = final.config_saver(model.module.transformer, tokenizer_into)
        final.write_model(folder.final, engine, shapes, prefix=WRAPPER, save_rest=save_rest)


def _device_name(placed: Processes) -> str:
    import torch

    return torch.cuda.get_device_name(placed.device) if placed.device.type == "cuda" else "cpu"


class _Speaker:
    """Says things once, not once per process."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def __call__(self, line: str) -> None:
        if self._rank == 0:
            print(f"distft: {line}", file=sys.stderr, flush=True)

    def progress(self, what: str) -> Any:
        """A callback that reports a growing count every ten thousand."""
        if self._rank != 0:
            return None
        return lambda rows: self(f"{what}: {rows:,}") if rows and rows % 10_000 == 0 else None


def exit_code(error: BaseException) -> int:
    """The process's exit code for what ended it."""
    if isinstance(error, DistftError):
        return error.exit_code
    return 130 if isinstance(error, KeyboardInterrupt) else 1


def _reason(error: BaseException) -> str:
    kind = error.kind if isinstance(error, DistftError) else type(error).__name__
    return f"{kind}: {error}" if str(error) else kind


def report_error(error: BaseException, rank: int) -> None:
    """A user's mistake as text; our own as a traceback. Mistakes in files are the same on every rank: said once."""
    if not isinstance(error, DistftError):
        traceback.print_exception(error)
    elif rank == 0 or error.exit_code not in (2, 3, 8):
        who = "" if rank == 0 else f"rank {rank}: "
        print(f"{who}{error}", file=sys.stderr, flush=True)


def run(recipe: str, overrides: list[str], output_dir: str | None) -> int:
    """The command: returns the exit code."""
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
    if output_dir is not None:
        overrides = [*overrides, f"output_dir={_toml_string(output_dir)}"]
    try:
        train(load_recipe(recipe, registries=REGISTRIES, overrides=overrides))
    except (Exception, KeyboardInterrupt) as error:
        report_error(error, rank)
        return exit_code(error)
    return DONE


def _toml_string(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def main(argv: list[str] | None = None) -> int:
    """`python -m distft.train`."""
    import argparse

    parser = argparse.ArgumentParser(prog="distft.train", description="Fine-tune as a recipe says.")
    parser.add_argument("recipe", help="TOML file")
    parser.add_argument("--set", action="append", default=[], metavar="TABLE.KEY=VALUE", help="change one key; repeat")
    parser.add_argument("--output-dir", help="folder of run folders, instead of the recipe's output_dir")
    args = parser.parse_args(argv)
    return run(args.recipe, args.set, args.output_dir)
