"""A case of `distft bench` as one step of a phase: measured in fresh processes, beside its plan."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.first_hour.changes import CHANGES
from benchmarks.first_hour.phase import Context, Measured, NotHere, OutOfTime, StepFailed


def case(
    context: Context,
    recipe: Path,
    *,
    overrides: Sequence[str] = (),
    change: str = "none",
    steps: int,
    warmup: int,
    profile: bool = False,
    engine: str = "solo",
    calibrates: bool = True,
) -> Measured:
    """Its figures.

    `calibrates`: the planner's view of it holds: no compiler, and no kernels but those it knows.

    Raises:
        NotHere: the change cannot be made, or the recipe's rules or the device refuse it.
        OutOfTime: it took longer than there was.
        StepFailed: it ended otherwise.
    """
    from distft.bench import case_launcher, cases
    from distft.bench.planned import Planning, peak_bytes, planned_peak
    from distft.bench.runner import Runner

    if change != "none" and (why := CHANGES[change].why_not()):
        raise NotHere(why)
    made = [*overrides, *(CHANGES[change].overrides if change != "none" else ())]
    wanted = cases.BenchGrid(
        recipe=str(recipe), overrides=tuple(made), steps=steps, warmup=warmup, rows="full", profile=profile,
        nproc=context.ranks, engines=(engine,),
    )  # fmt: skip
    (only,) = cases.grid(wanted)
    timeout = context.left_s()

    def run(one: cases.BenchCase, folder: Path) -> dict[str, Any]:
        module = ("-m", "benchmarks.first_hour.case", change)
        return case_launcher.run_case(one, folder, timeout_s=timeout, module=module)

    record = Runner(context.work / "bench" / change, run, lambda line: None).record(only)
    if record["outcome"] == "memory":
        planned = Planning().beside(only, record).get("planned")
        return {"out_of_memory": record["reason"], "planned": planned and planned["tensors"], "work": None}
    if record["outcome"] == "refused":
        raise NotHere(record["reason"])
    if record["outcome"] != "measured":
        raise (OutOfTime if "not done after" in record["reason"] else StepFailed)(record["reason"])
    record = Planning().beside(only, record)
    planned, speed = record.get("planned") or {}, record["speed"]
    devices = [rank["device"] for rank in record["ranks"]]
    compiled = only.content["train"]["compile"]
    return {
        "tokens_per_s": speed["tokens_per_s"],
        "step_s": speed["step_s"]["median"],
        "step_s_p10": speed["step_s"]["p10"],
        "step_s_p90": speed["step_s"]["p90"],
        "mfu": speed["mfu"],
        "of_matmul_rate": speed["of_matmul_rate"],
        "settled": speed["settled"],
        "world": only.world,
        "ran": record["ran"],
        "first_loss": record["loss"][0],
        "last_loss": record["loss"][-1],
        "peak_bytes": peak_bytes(record),
        "planned_peak_bytes": planned_peak(record),
        "tokens_per_s_planned": planned.get("tokens_per_s_predicted"),
        "not_planned": record.get("not_planned"),
        "allocated_bytes": _most(devices, "allocated_bytes"),
        "reserved_bytes": _most(devices, "reserved_bytes"),
        "used_bytes": _most(devices, "used_bytes"),
        "alloc_retries": _most(devices, "alloc_retries"),
        "held": record["ranks"][0]["held"],
        "planned": planned.get("tensors"),
        "work": planned.get("work"),
        "calibrates": calibrates and not compiled and change in ("none", "compile-off"),
        "profile": record.get("profile"),
    }


def _most(devices: Sequence[dict[str, Any]], key: str) -> int | None:
    given = [device[key] for device in devices if device[key] is not None]
    return max(given) if given else None


def gib(num_bytes: float | None) -> str:
    """As a page shows it."""
    if num_bytes is None:
        return "–"
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**28 else f"{num_bytes / 2**20:.2f} MiB"


def off(measured: float | None, planned: float | None) -> str:
    """How far a plan is off what was measured."""
    return "–" if not measured or not planned else f"{planned / measured - 1:+.1%}"
