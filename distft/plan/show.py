"""A plan as text: one table of all cases, one case in detail, changes to paste, formulas on request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from distft.core.accelerators import GIB
from distft.plan.case import PlanCase
from distft.plan.generation_memory import is_written_elsewhere
from distft.plan.max_size import Limit
from distft.plan.memory import Part
from distft.plan.planner import Refused
from distft.plan.suggestions import RecipeChange

_COLUMNS = ("method", "engine", "micro", "ckpt", "weights", "grads", "master", "optim", "gather", "acts", "logits",
            "peak", "of", "fits", "tok/s/GPU", "MFU")  # fmt: skip


def table(cases: Sequence[PlanCase], refused: Sequence[Refused]) -> Iterator[str]:
    """Yield one line for each case, GiB per GPU."""
    rows = [_COLUMNS, *map(_row, cases)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    yield "GiB per GPU; peak and speed are predicted, weights to optimizer state are exact"
    for row in rows:
        cells = (
            text.ljust(width) if column < 4 else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  " + "  ".join(cells).rstrip()
    sources = {case.setup.machine.rates.source for case in cases} - {""}
    yield from (f"  rates: {source}" for source in sorted(sources))
    for refusal in refused:
        yield f"  {refusal.method} x {refusal.engine}: not possible: {refusal.reason}"


def _row(case: PlanCase) -> tuple[str, ...]:
    state, kept, setup = case.memory.state, case.memory.activations, case.setup
    sizes = (state.weights + state.quant_constants, state.gradients, state.master, state.optimizer,
             case.memory.gathered, kept.saved, kept.head, case.memory.peak, setup.machine.gpu.memory_bytes)  # fmt: skip
    return (
        setup.recipe.method.name,
        setup.engine,
        str(setup.micro_batch_size),
        setup.checkpointing,
        *(f"{size / GIB:.1f}" for size in sizes),
        _fits(case),
        f"{case.speed.tokens_per_s_per_gpu:,.0f}",
        f"{case.speed.mfu:.0%}",
    )


def _fits(case: PlanCase) -> str:
    if not case.fits:
        return "no"
    return "paged" if case.paged_bytes else "yes"


def details(case: PlanCase, *, price: float | None, explain: bool) -> Iterator[str]:
    """Yield the memory by component and phase, host and disk, speed."""
    setup, machine, held, fast = case.setup, case.setup.machine, case.memory, case.speed
    where = f"{machine.gpus_per_node} x {machine.gpu.name}" + (f" x {machine.nodes} nodes" if machine.nodes > 1 else "")
    yield f"{setup.recipe.name}: {setup.recipe.method.name}, {setup.engine}, {where}"
    each = f"micro-batch {setup.micro_batch_size} x {setup.recipe.data.max_length:,} tokens"
    if setup.single:
        each = f"a document of at most {setup.recipe.data.max_length:,} tokens a forward"
    yield (
        f"  {each}, {setup.micros_per_step} per step, checkpointing {setup.checkpointing}, "
        f"cross-entropy {setup.loss} ({case.chosen})"
    )
    if path := setup.path.describe():
        yield f"  proven for this model: {path}"
    if setup.single and setup.document_tokens is None:
        yield "  speed is that of rows as long as that; for shorter ones say how long: --row-tokens"
    yield "\nper GPU, GiB (weights to optimizer state exact, the rest predicted)"
    for part in held.parts:
        if part.num_bytes or explain:
            yield _line(part, explain)
    yield "\npeak by phase, GiB (predicted)"
    for name, value in vars(held.phases).items():
        if not value:
            continue
        mark = "  <- the most" if value == held.peak else ""
        yield f"  {name.replace('_', ' '):<28} {value / GIB:>9.2f}{mark}"
    yield ""
    yield verdict(case)
    disk = setup.recipe.checkpoint.keep * held.checkpoint + held.final
    per_node = held.host * machine.gpus_per_node
    yield (
        f"host memory {held.host / GIB:.1f} GiB per process, {per_node / GIB:.1f} per node; disk {disk / GIB:.1f} GiB "
        f"({setup.recipe.checkpoint.keep} checkpoints of {held.checkpoint / GIB:.1f}, final/ {held.final / GIB:.1f})"
    )
    yield (
        f"speed (predicted): {fast.tokens_per_s_per_gpu:,.0f} tokens/s per GPU, {fast.tokens_per_s:,.0f} in all, "
        f"MFU {fast.mfu:.0%}, {fast.step_s:.2f} s a step, {fast.flops_per_token / 1e9:.2f} GFLOP a token"
    )
    if held.rollout is not None:
        rows, step = held.rollout.rows, fast.step_s
        yield (
            f"answers (predicted): {rows} written at once on a GPU, {fast.rollout_s:.2f} s of a step "
            f"({fast.rollout_s / step:.0%}) where each takes max_new_tokens"
            + (f"; {1 + more} times as long where refill replaces all" if (more := setup.recipe.rollout.refill) else "")
        )
    if is_written_elsewhere(setup.recipe):
        yield "answers: a server writes them, whose memory and time are not counted here"
    yield _length(case, price)
    yield f"rates: {machine.rates.source or 'assumed shares of the data sheet; distft plan --calibrate measures them'}"
    if explain:
        yield "\nspeed, explained"
        for part in fast.parts:
            yield f"  {part.name:<40} {part.num_bytes:>18,}  {part.formula}"


def _line(part: Part, explain: bool) -> str:
    text = f"  {part.name:<34} {part.num_bytes / GIB:>9.3f}"
    return f"{text}  {part.num_bytes:>16,} bytes = {part.formula}" if explain else text


def verdict(case: PlanCase) -> str:
    """Return whether a case fits, and by how much, in a line."""
    peak, usable = case.memory.peak / GIB, case.setup.machine.gpu.memory_gib
    if not case.fits:
        return (
            f"DOES NOT FIT: {peak:.1f} GiB at the peak, {usable:.1f} usable: {-case.spare_bytes / GIB:.1f} GiB too much"
        )
    if case.paged_bytes:
        paged = case.paged_bytes / GIB
        return f"fits by paging {paged:.1f} GiB of optimizer state to host memory: {peak:.1f} GiB of {usable:.1f}"
    return f"fits: {peak:.1f} GiB of {usable:.1f} usable, {case.spare_bytes / GIB:.1f} GiB to spare"


def _length(case: PlanCase, price: float | None) -> str:
    fast, world = case.speed, case.setup.machine.world
    hours = fast.hours_per_billion_tokens if fast.hours is None else fast.hours
    of = "per billion tokens (how many an epoch has, distft check tells)" if fast.hours is None else "for the run"
    cost = "" if price is None else f", {hours * world * price:,.2f} at {price:g} per GPU hour"
    return f"time (predicted): {hours:,.2f} hours {of}{cost}"


def advice(changes: Sequence[RecipeChange]) -> Iterator[str]:
    """Yield the changes, numbered, cheapest first."""
    if not changes:
        yield "no single change, nor the savers together, make it fit: a smaller model, or more memory"
        return
    yield "what makes it fit, cheapest first:"
    for number, change in enumerate(changes, start=1):
        yield f"  {number}. {change}"


def limit(result: Limit, case: PlanCase) -> str:
    """Return the limit in one sentence."""
    gpu = case.setup.machine.gpu
    if result.case is None:
        return f"max {result.what}: not even the smallest fits {gpu.name}"
    peak = result.case.memory.peak / GIB
    words = {
        "seq": f"{result.value:,} tokens in a sequence (micro-batch 1)",
        "micro": f"{result.value:,} sequences of {case.setup.recipe.data.max_length:,} tokens in a micro-batch",
    }
    text = words.get(result.what)
    if text is None:
        billions = result.case.parameters / 1e9
        text = f"{billions:.1f} B parameters (this architecture with {result.value} blocks of the same width)"
    return (
        f"max {result.what}: {text}: {peak:.1f} of {gpu.memory_gib:.1f} GiB, checkpointing {case.setup.checkpointing}"
    )
