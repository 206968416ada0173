"""Chooses the micro-batch size, finds the largest micro-batch, and advises when it does not fit."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from distft.assemble.training_data import Data, Say, agree, load_data
from distft.core.accelerators import GIB
from distft.core.errors import MachineError, Problem, RecipeError
from distft.core.phase import PHASE
from distft.model.paths import ForwardPath
from distft.recipe import Recipe, check_world, refuse_sums

if TYPE_CHECKING:
    from distft.core.types import Engine
    from distft.memory_preflight import LargestMicroBatch
    from distft.plan.setup import Machine


AUTO_MICRO_TOKENS = 8192
"""Without an accelerator, `micro_batch_size = "auto"` fills a micro-batch up to this many tokens."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How one optimizer step is spread over processes."""

    micro_batch_size: int
    micros_per_step: int
    checkpointing: str | None = None
    """What activation checkpointing `auto` means here; None: the recipe says, or there is no accelerator."""
    why: str = ""
    """The reason of micro-batch and checkpointing, where they were left to `auto`."""
    path: ForwardPath = field(default_factory=ForwardPath)
    """How the model's numbers are computed (see `distft.model.proof`)."""

    @property
    def single(self) -> bool:
        """Each document is a forward of its own."""
        return self.path.documents == "single"

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def forward_path(recipe: Recipe, say: Say) -> ForwardPath:
    """Return the fastest path that was proven to give transformers' numbers for this model, here.

    Raises:
        RecipeError: there is none, or it does not go with the recipe.
    """
    import torch

    from distft.model.load import find_folder
    from distft.model.proving import path_of, verdict_on

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    model, line = recipe.model, recipe.line_of("model.path")
    # Rows alone are of any length, and compiled graphs want one: filling up would cost more than compiling saves.
    tries = recipe.train.compile == "auto" and device != "cpu" and recipe.data.packing
    verdict = verdict_on(
        model,
        find_folder(model),
        max_length=recipe.data.max_length,
        device=device,
        compiled=tries,
        head=recipe.objective.spec.head_of(recipe.objective.params),
        waiting=lambda: PHASE.enter("rows", patient=True),
    )
    path = path_of(verdict, source=recipe.source, line=line, attention=model.attention)
    say(verdict.describe())
    if recipe.train.compile == "auto":
        if tries:
            reasons = [attempt.difference for attempt in verdict.attempts if attempt.path == "compiled"]
            say("its blocks are compiled in the first step" if path.compiled else f"not compiled: {reasons[0]}")
        return path
    path = replace(path, compiled=recipe.train.compile)
    if path.documents == "single" and path.compiled:
        problem = Problem(
            message="[train] compile = true: this model trains on one document per forward, each of another length",
            line=recipe.line_of("train.compile"),
            fix="compile = false",
        )
        raise RecipeError(recipe.source, [problem])
    return path


def choose_layout(recipe: Recipe, world: int, say: Say = lambda line: None) -> Layout:
    """Choose how the model computes, and the micro-batch: the recipe's, or on accelerators the planner's.

    Without one: as many sequences as fill AUTO_MICRO_TOKENS and divide a rank's share.

    Raises:
        RecipeError: the global batch does not split over `world` processes; no path gives the model's numbers.
    """
    micro, train = recipe.train.micro_batch_size, recipe.train
    share = check_world(recipe, world, 1 if micro == "auto" else micro)
    path = forward_path(recipe, say)
    if "auto" in (micro, train.activation_checkpointing) and (machine := _accelerators(world)) is not None:
        from distft.engine.processes import launcher_wants
        from distft.model.load import find_folder
        from distft.plan import auto_setup

        wants = launcher_wants(os.environ)
        chosen = auto_setup.for_job(recipe, find_folder(recipe.model), machine, wants=wants, path=path)
        micros = check_world(recipe, world, chosen.micro_batch_size)
        refuse_sums(recipe, chosen.setup.micros_per_step)
        return Layout(
            micro_batch_size=chosen.micro_batch_size,
            micros_per_step=micros,
            checkpointing=chosen.checkpointing,
            why=chosen.reason,
            path=path,
        )
    if micro == "auto":
        limit = 1 if path.documents == "single" else max(1, AUTO_MICRO_TOKENS // recipe.data.max_length)
        limit = share if recipe.train.optimizer_in_backward and path.documents != "single" else limit
        micro = max(size for size in range(1, min(share, limit) + 1) if share % size == 0)
    micros = check_world(recipe, world, micro)
    refuse_sums(recipe, micros if path.documents == "packed" else micros * micro)
    return Layout(micro_batch_size=micro, micros_per_step=micros, path=path)


def agree_on_layout(local_layout: Layout, gather: Callable[[Any], list[Any]]) -> Layout:
    """Return the layout of all ranks, collectively: that of the rank with the least device memory.

    Each rank has chosen one for its own device; on a mixed partition (40 and 80 GB cards) other choices would be other
    numbers of collectives, and ranks would wait for each other for ever.

    Args:
        local_layout: what this rank has chosen.
        gather: every rank's value on every rank.

    Raises:
        MachineError: on all ranks; devices differ in how they compute the model.
    """
    everyone: list[tuple[int, str, Layout]] = gather((*_device(), local_layout))
    chosen = min(everyone, key=lambda report: report[0])[2]
    others = sorted({report[1] for report in everyone if report[2].path != everyone[0][2].path})
    if others:
        raise MachineError(
            f"{everyone[0][1]} computes this model by {everyone[0][2].path}, {', '.join(others)} by another path; "
            'use GPUs of one kind, or set [model] attention = "sdpa", which all of them have'
        )
    return chosen


def _device() -> tuple[int, str]:
    """GiB and product name of this process's accelerator."""
    import torch

    if not torch.cuda.is_available():
        return 0, "cpu"
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    return device.total_memory // GIB, device.name


def agree_on_all_ranks(
    recipe: Recipe, local_layout: Layout, rows: Data, engine: Engine, say: Say
) -> tuple[Layout, Data]:
    """Return the layout and the rows that all ranks train on, collectively; rows are made anew where it is another's.

    Raises:
        MachineError: devices differ in how they compute the model.
        DataError: rows differ between nodes.
    """
    layout = agree_on_layout(local_layout, engine.gather)
    if layout != local_layout:
        rows = load_data(recipe, layout, engine.rank, engine.world, say)
    agree(rows, engine.gather)
    return layout, rows


def plan_of_run(recipe: Recipe, world: int, layout: Layout, row_tokens: int) -> dict[str, Any] | None:
    """Return a case of `distft plan --json` for this very run, to compare measured memory with; None on CPUs.

    `row_tokens`: of a row on average. A plan that cannot be made is not worth a run.
    """
    machine = _accelerators(world)
    if machine is None:
        return None
    from distft.core.errors import DistftError
    from distft.engine.processes import launcher_wants
    from distft.model.load import find_folder
    from distft.plan import inventory
    from distft.plan.case import plan

    method = recipe.method
    try:
        given = {"path": layout.path, "head": recipe.objective.spec.head_of(recipe.objective.params)}
        read = inventory.read(recipe.model, find_folder(recipe.model), method.spec, method.params, **given)
        return plan(recipe, read, machine, wants=launcher_wants(os.environ), document_tokens=row_tokens).to_json()
    except DistftError as error:
        return {"why": str(error)}


def _accelerators(world: int) -> Machine | None:
    """Return the machine that the run is on, the same on every rank; None on CPUs."""
    import torch

    if not torch.cuda.is_available():
        return None
    from distft.core import accelerators
    from distft.engine import processes
    from distft.plan.calibration import of_gpu
    from distft.plan.machine import of_size
    from distft.plan.setup import Machine

    ours = torch.cuda.get_device_properties(torch.cuda.current_device())
    gib = ours.total_memory // accelerators.GIB  # whole ones: boards of one kind differ by a few MiB
    accelerator = accelerators.of_device(ours.name) or of_size(gib)
    # Each process may see its own GPU alone, so the launcher is asked first.
    per_node = processes.per_node(os.environ, world) or min(world, torch.cuda.device_count())
    nodes, rates = -(-world // per_node), of_gpu(accelerator)
    return Machine(gpu=replace(accelerator, memory_gib=gib), gpus_per_node=per_node, nodes=nodes, rates=rates)


def largest_micro_batch(recipe: Recipe, layout: Layout, rows: Data) -> LargestMicroBatch:
    """Return the run's largest micro-batch: packed sequences may be full, rows alone are at most the longest."""
    from distft.memory_preflight import LargestMicroBatch

    longest = recipe.data.max_length if recipe.data.packing or layout.path.compiled else rows.longest
    # Documents alone: a sequence of several has as many forwards.
    sequences = layout.micros_per_step * layout.micro_batch_size
    alone = sequences + 1 if recipe.data.packing and rows.longest < recipe.data.max_length else sequences
    return LargestMicroBatch(
        sequences=1 if layout.single else layout.micro_batch_size,
        longest=rows.longest if layout.single else longest,
        micros=alone if layout.single else layout.micros_per_step,
        evaluates=rows.eval_steps is not None,
        group_size=recipe.objective.spec.group_size,
        values=rows.row_passes[0].prepared.report.values if rows.row_passes else (),
    )


def memory_advice(recipe: Recipe, world: int, layout: Layout) -> str:
    """Return what makes a run smaller, cheapest first: by plan on accelerators, on a CPU what always helps."""
    machine = _accelerators(world)
    if machine is not None and not recipe.method.spec.unplanned(recipe.method.params):
        from distft.model.load import find_folder
        from distft.plan.planner import Planner

        given = list(recipe.origin.overrides.values())
        folder = find_folder(recipe.model)
        planner = Planner(
            path=recipe.source, overrides=given, folder=folder, machine=machine, path_of_model=layout.path
        )
        changes = planner.changes(planner.case())[:5]
        return "\n".join(["what fits, by plan:", *(f"  {change}" for change in changes)])
    steps = [
        ("train.micro_batch_size=1", recipe.train.micro_batch_size != 1 and not layout.single),
        ('train.activation_checkpointing="full"', recipe.train.activation_checkpointing != "full"),
        ('model.cross_entropy="chunked"', recipe.model.cross_entropy == "full" and layout.path.head == "chunked"),
        (f"data.max_length={recipe.data.max_length // 2}", True),
    ]
    return "try, in this order: " + "  ".join(f"--set {change}" for change, helps in steps if helps)
