"""What to change so that a run fits, cheapest in speed first; each change is planned again before it is offered."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from distft.core.errors import DistftError
from distft.engine import ENGINES, EngineSpec
from distft.engine.grad_dtype import error_of_bf16_sums
from distft.model.adapters import METHODS
from distft.plan.case import PlanCase
from distft.plan.setup import Machine

Replan = Callable[[Sequence[str], Machine], PlanCase]
"""(overrides "table.key=value", machine) -> the case they give."""

GPU_COUNTS = (2, 4, 8, 16, 32, 64, 128, 256, 512)


@dataclass(frozen=True, kw_only=True)
class RecipeChange:
    """One way to make it fit."""

    what: str
    """The change in words."""
    overrides: tuple[str, ...]
    """What to paste after `--set`."""
    machine: Machine
    case: PlanCase
    """Planned with it."""
    cost: float
    """Share of tokens/s per GPU that is lost; negative when it is faster."""
    changes_result: bool
    """Another method: not the same training, so it comes after what only costs time."""

    def __str__(self) -> str:
        lost = (
            f"{self.cost:.0%} slower"
            if self.cost >= 0.005
            else f"{-self.cost:.0%} faster"
            if self.cost < 0
            else "as fast"
        )
        sets = " ".join(f"--set {shlex.quote(override)}" for override in self.overrides)
        gib = self.case.memory.peak / 2**30
        return f"{self.what}: {gib:.1f} GiB, {lost} (predicted)" + (f"\n      {sets}" if sets else "")


def changes(case: PlanCase, replan: Replan) -> list[RecipeChange]:
    """Return single changes, and where none is enough pairs of them, that make `case` fit, in order of their cost.

    Savers of memory come first, in order of tokens/s per GPU; then more GPUs; then methods that train something else.
    """
    machine = case.setup.machine
    tried = [_tried(case, replan, what, overrides, machine) for what, overrides in _savers(case)]
    singles = [change for change in tried if change is not None]
    fitting = [change for change in singles if change.case.fits]
    if not fitting:
        helpful = sorted(singles, key=lambda change: change.case.memory.peak)[:4]
        fitting = list(_pairs(case, replan, helpful))
    fitting.sort(key=lambda change: (change.cost, len(change.overrides)))
    return [*fitting, *_more_gpus(case, replan), *_methods(case, replan)]


def _savers(case: PlanCase) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield what costs time and leaves the training as it is (8-bit moments: nearly)."""
    setup = case.setup
    recipe, world = setup.recipe, setup.machine.world
    micro = setup.micro_batch_size
    smaller = [size for size in range(1, micro) if micro % size == 0 and not setup.single]
    for size in reversed(smaller):
        yield f"micro-batch {size} instead of {micro}", (f"train.micro_batch_size={size}",)
    order = ("off", "selective", "full")
    for mode in order[order.index(setup.checkpointing) + 1 :]:
        yield f"activation checkpointing {mode}", (f'train.activation_checkpointing="{mode}"',)
    if setup.fp32_gradients:
        error = error_of_bf16_sums(setup.micros_per_step)
        yield f"gradients summed in bf16 (off by {error})", ('engine.grad_dtype="bfloat16"',)
    if setup.loss == "full":
        yield "chunked cross-entropy", ('model.cross_entropy="chunked"',)
    if setup.loss in ("chunked", "full"):
        yield "fused cross-entropy (needs liger-kernel)", ('model.cross_entropy="fused"',)
    for name in ("adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"):
        if recipe.optim.name.removeprefix("paged_") in ("adamw", "adamw_8bit") and name != recipe.optim.name:
            yield f"optimizer {name}", (f'optim.name="{name}"',)
    if world > 1 and recipe.optim.spec.elementwise:
        for engine in _saving_engines():
            if engine.name != setup.engine:
                yield f"engine {engine.name}", (f'engine={{name="{engine.name}"}}',)
    if setup.offload == "none" and recipe.optim.spec.elementwise:
        words = {"optimizer": "optimizer state", "all": "weights and optimizer state"}
        for kind, moved in words.items():
            able = [engine.name for engine in _saving_engines() if kind in engine.offloads]
            if able:
                yield f"{moved} in host memory", (f'engine={{name="{able[-1]}", offload="{kind}"}}',)


def _saving_engines() -> list[EngineSpec]:
    """Return the engines that are offered where memory is short; the last one saves most."""
    saving = [spec for spec in ENGINES.values() if spec.footprint.saves_memory]
    return sorted(saving, key=lambda spec: spec.footprint.saves_memory)


def _tried(
    case: PlanCase,
    replan: Replan,
    what: str,
    overrides: tuple[str, ...],
    machine: Machine,
    *,
    changes_result: bool = False,
) -> RecipeChange | None:
    """Plan a change; None when the recipe's rules or the engine refuse it."""
    try:
        planned = replan(_pinned(case, overrides, machine), machine)
    except DistftError:
        return None
    before, after = case.speed.tokens_per_s_per_gpu, planned.speed.tokens_per_s_per_gpu
    return RecipeChange(
        what=what,
        overrides=overrides,
        machine=machine,
        case=planned,
        cost=1 - after / before,
        changes_result=changes_result,
    )


def _pinned(case: PlanCase, overrides: tuple[str, ...], machine: Machine) -> tuple[str, ...]:
    """Keep what `auto` chose before, on the same machine, so that a change is that one change."""
    if machine != case.setup.machine:
        return overrides
    keys = {override.split("=")[0] for override in overrides}
    kept = {
        "train.micro_batch_size": str(case.setup.micro_batch_size),
        "train.activation_checkpointing": f'"{case.setup.checkpointing}"',
    }
    return (*(f"{key}={value}" for key, value in kept.items() if key not in keys), *overrides)


def _pairs(case: PlanCase, replan: Replan, helpful: list[RecipeChange]) -> Iterator[RecipeChange]:
    """Combine two, three, … of the changes that save most, until the case fits."""
    taken: list[RecipeChange] = []
    for change in helpful:
        tables = {override.split("=")[0] for chosen in taken for override in chosen.overrides}
        if any(override.split("=")[0] in tables for override in change.overrides):
            continue
        taken.append(change)
        if len(taken) < 2:
            continue
        overrides = tuple(override for chosen in taken for override in chosen.overrides)
        what = " and ".join(chosen.what for chosen in taken)
        both = _tried(case, replan, what, overrides, case.setup.machine)
        if both is not None and both.case.fits:
            yield both
            return


def _more_gpus(case: PlanCase, replan: Replan) -> Iterator[RecipeChange]:
    """Return the next larger number of GPUs on which the recipe fits, engine `auto` where one process ran."""
    machine = case.setup.machine
    most = _saving_engines()[-1].name
    cuts = machine.world > 1 and case.setup.footprint.shards_state
    overrides = () if cuts else (f'engine={{name="{most}"}}',)
    for count in GPU_COUNTS:
        if count <= machine.world:
            continue
        per_node = min(count, max(8, machine.gpus_per_node))
        larger = replace(machine, gpus_per_node=per_node, nodes=-(-count // per_node))
        change = _tried(case, replan, f"{count} GPUs instead of {machine.world}", overrides, larger)
        if change is not None and change.case.fits:
            yield change
            return


def _methods(case: PlanCase, replan: Replan) -> Iterator[RecipeChange]:
    """Yield methods that save more, LoRA before QLoRA: what is trained changes, so they come last."""
    now = case.setup.recipe.method.spec
    saving = [spec for spec in METHODS.values() if spec.saves_memory > now.saves_memory]
    for spec in sorted(saving, key=lambda spec: spec.saves_memory):
        overrides = (f'method={{name="{spec.name}"}}', 'engine={name="auto"}')
        change = _tried(
            case, replan, f"{spec.name} instead of {now.name}", overrides, case.setup.machine, changes_result=True
        )
        if change is not None and change.case.fits:
            yield change
