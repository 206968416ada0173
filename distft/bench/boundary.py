"""The largest micro-batch or length that runs: doubled until memory runs out, then bisected, in fresh processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from distft.bench import provenance
from distft.bench.cases import BenchCase, BenchGrid, make_case
from distft.bench.planned import Planning, peak_bytes, planned_peak
from distft.bench.runner import Runner
from distft.core.errors import MachineError
from distft.recipe import Recipe

MOST_DOUBLINGS = 20
STEPS, WARMUP = 5, 1
MICROS = 2
"""Micro-batches of a step: gradients of the first lie around while the second runs."""
LENGTH_UNIT = 64
"""Tokens to within which the longest length is found."""
NAMES = {"micro": "micro-batch", "length": "length"}


class _Refused(Exception):
    """Something else than memory ends the search."""


@dataclass(frozen=True, kw_only=True)
class MemoryBoundary:
    """Where the boundary is."""

    largest: int | None
    """That ran; None: not even the first did."""
    smallest_too_large: int | None
    """None: no limit was met."""
    tries: tuple[tuple[int, bool], ...]
    """(size, whether it ran), in order."""


def bisect(runs: Callable[[int], bool], first: int, *, unit: int = 1) -> MemoryBoundary:
    """Find the boundary in multiples of `unit`, to within one: from `first` (a multiple) up, or down.

    `runs` is taken to be true up to the boundary and false beyond it; each size is tried once.
    """
    tries: list[tuple[int, bool]] = []

    def tried(units: int) -> bool:
        tries.append((units * unit, runs(units * unit)))
        return tries[-1][1]

    good, bad, size = 0, 0, max(1, first // unit)
    for _ in range(MOST_DOUBLINGS):
        if not tried(size):
            bad = size
            break
        good, size = size, 2 * size
    while bad and bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if tried(middle) else (good, middle)
    return MemoryBoundary(largest=good * unit or None, smallest_too_large=bad * unit or None, tries=tuple(tries))


def search(
    runner: Runner, wanted: BenchGrid, base_recipe: Recipe, axis: str, say: Callable[[str], None]
) -> tuple[dict[str, Any], list[tuple[BenchCase, dict[str, Any]]]]:
    """Find the boundary along `axis` ("micro" or "length") of the first method, engine, micro-batch and length wanted.

    Returns:
        What a table shows of it, and every case that was tried with its record.

    Raises:
        MachineError: a try failed of something that is not memory.
    """
    wanted = replace(wanted, steps=STEPS, warmup=WARMUP, rows="full")
    method = wanted.methods[0] if wanted.methods else base_recipe.method.name
    engine = wanted.engines[0] if wanted.engines else base_recipe.engine.name
    fixed = base_recipe.train.micro_batch_size if base_recipe.train.micro_batch_size != "auto" else 1
    micro = wanted.micros[0] if wanted.micros else fixed
    length = wanted.lengths[0] if wanted.lengths else base_recipe.data.max_length
    planning, tried, shown = Planning(), [], []

    def runs(value: int) -> bool:
        size = {"micro": micro, "length": length} | {axis: value}
        world = 1 if engine == "solo" else wanted.nproc
        batch = f"train.global_batch_size={world * size['micro'] * MICROS}"
        case = make_case(
            wanted, base_recipe, method=method, engine=engine, micro=size["micro"], length=size["length"], extra=[batch]
        )
        say(f"{NAMES[axis]} {value:,} …")
        record = planning.beside(case, runner.record(case))
        tried.append((case, record))
        outcome = record["outcome"]
        say(f"{NAMES[axis]} {value:,}: {'runs' if outcome == 'measured' else record['reason']}")
        if outcome == "failed":
            raise MachineError(f"{case}: {record['reason']} (in {runner.folder})")
        shown.append(_shown(value, record))
        if outcome == "refused":
            raise _Refused(record["reason"])
        return outcome == "measured"

    first = micro if axis == "micro" else length
    unit = 1 if axis == "micro" else min(LENGTH_UNIT, length)
    try:
        boundary, why = bisect(runs, first, unit=unit), ""
    except _Refused as refused:
        boundary, why = _so_far(shown), f"; {refused}"
    case = tried[0][0]
    fixed_size = f"length {length:,}" if axis == "micro" else f"micro-batch {micro}"
    return {
        "axis": NAMES[axis],
        "case": f"{case.method}, {case.engine}{f' x {case.world}' if case.world > 1 else ''}, {fixed_size}",
        "limit": _limit(wanted),
        "limit_gib": wanted.limit_gib,
        "steps": STEPS,
        "largest": boundary.largest,
        "smallest_too_large": boundary.smallest_too_large,
        "found": _describe(NAMES[axis], boundary) + why,
        "tries": sorted(shown, key=lambda entry: entry["value"]),
    }, tried


def _shown(value: int, record: dict[str, Any]) -> dict[str, Any]:
    measured = record["outcome"] == "measured"
    return {
        "value": value,
        "outcome": "runs" if measured else {"memory": "out of memory"}.get(record["outcome"], record["outcome"]),
        "reason": record["reason"],
        "key": record["key"],
        "planned_bytes": planned_peak(record),
        "peak_bytes": peak_bytes(record) if measured else None,
        "own_bytes": max(rank["host"]["own_data_bytes"] for rank in record["ranks"]) if measured else None,
    }


def _so_far(shown: list[dict[str, Any]]) -> MemoryBoundary:
    ran = [entry["value"] for entry in shown if entry["outcome"] == "runs"]
    not_run = [entry["value"] for entry in shown if entry["outcome"] == "out of memory"]
    tries = tuple((entry["value"], entry["outcome"] == "runs") for entry in shown)
    return MemoryBoundary(largest=max(ran, default=None), smallest_too_large=min(not_run, default=None), tries=tries)


def _limit(wanted: BenchGrid) -> str:
    if provenance.gpus():
        return f"the GPU's own memory ({provenance.gpus()[0]})"
    if wanted.limit_gib is None:
        return f"this machine's memory ({provenance.hardware()['memory_gib']} GiB), no limit on the process"
    return (
        f"{wanted.limit_gib:g} GiB of private memory for each process (RLIMIT_DATA: heap and anonymous maps, Python "
        "and the libraries included)"
    )


def _describe(what: str, boundary: MemoryBoundary) -> str:
    if boundary.largest is None:
        return f"not even {what} {boundary.smallest_too_large:,} runs"
    if boundary.smallest_too_large is None:
        return f"{what} {boundary.largest:,} runs, and no limit was met"
    return f"{what} {boundary.largest:,} runs, {boundary.smallest_too_large:,} does not"
