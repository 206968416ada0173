"""Several processes (NCCL on GPUs, gloo on a CPU): the same loss, traffic as planned, a rank killed, one stopped."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks.first_hour import inputs, trained
from benchmarks.first_hour.measuring import gib, off
from benchmarks.first_hour.phase import Context, Measured, Phase, Step, Table

ENGINES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
BOUND = 1e-4
"""Relative difference of losses in fp32 from those of one process."""
LEAST = {"zero3": 0.6}
"""Share of the planned traffic that an engine may stay below: zero3 keeps what it gathered last."""
HANG_S = {True: 8, False: 30}
"""guard.hang_timeout_s at toy size, and on GPUs."""


def why_not(context: Context) -> str:
    return "" if context.ranks > 1 else "one GPU: it needs two or more"


def steps(context: Context) -> Iterator[Step]:
    yield Step(name="solo", run=lambda: _engines(context, ["solo"], 1), least_s=5)
    deepspeed = importlib.util.find_spec("deepspeed") is not None
    there = [name for name in ENGINES if deepspeed or not name.startswith("zero")]
    yield Step(name="engines", run=lambda: _engines(context, there, context.ranks), least_s=10)
    yield Step(name="link", run=lambda: _link(context), least_s=0)
    for kind in ("kill", "stop"):
        yield Step(name=f"one rank: {kind}", run=partial(_lost, context, kind), least_s=10 + HANG_S[context.toy])


def _engines(context: Context, engines: list[str], world: int) -> Measured:
    recipe = inputs.train_recipe(context.work, toy=context.toy)
    batch = 8 if context.toy else 8 * context.ranks
    micro = batch // world // 2 if world > 1 else 2
    overrides = [f"train.global_batch_size={batch}", f"train.micro_batch_size={micro}"]
    overrides += ["checkpoint.every_steps=1000", "train.deterministic=false"]
    told = {"recipe": str(recipe), "engines": engines, "overrides": overrides, "toy": context.toy, "micro": micro}
    return context.worker("engines", told | {"gathered_bytes": 2**20 if context.toy else 2**29}, world=world)


def _link(context: Context) -> Measured:
    """What the launch of all engines has measured at its end."""
    import json

    return json.loads((context.work / "engines.found.json").read_text(encoding="utf-8"))["link"]


def _lost(context: Context, kind: str) -> Measured:
    """Rank 1 is sent SIGKILL or SIGSTOP in a step; the other must name it within the timeout."""
    name, limit = f"lost-{kind}", HANG_S[context.toy]
    folder = context.work / "runs" / name
    overrides = ['engine.name="ddp"', f"guard.hang_timeout_s={limit}", f"train.global_batch_size={8 * context.ranks}"]
    fault = f"{kind}:rank=1,point=forward,step=3"
    watch = _Watch(folder)
    began = time.time()
    trained.run(context, name, *overrides, world=context.ranks, codes=tuple(range(1, 256)), meanwhile=watch,
                DISTFT_FAULT=fault, limit_s=90.0 + 2 * limit)  # fmt: skip
    told = trained.ended(folder)
    named = re.search(r"rank 1 .*last seen in (\w+) of step (\d+)", told.get("reason", ""))
    return {
        "code": told.get("code"),
        "reason": told.get("reason", ""),
        "named": named is not None,
        "seconds": None if watch.lost is None or watch.ended is None else round(watch.ended - watch.lost, 1),
        "within_s": 2.0 * limit + 10,
        "whole_s": round(time.time() - began, 1),
    }


class _Watch:
    """When the rank was lost and when the run said so; ends a stopped process then, as a launcher does in the end."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.lost: float | None = None
        self.ended: float | None = None

    def __call__(self) -> None:
        from distft.health.heartbeat import HeartbeatFile

        record = HeartbeatFile(self._folder / "ranks", 0).read([1]).get(1)
        if record is None:
            return
        pid = record.process["pid"]
        if self.lost is None and _state(pid) in ("T", "Z", ""):
            self.lost = time.monotonic()
        if self.ended is None and (self._folder / "exit.json").is_file():
            self.ended = time.monotonic()
            if _state(pid) == "T":
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def _state(pid: int) -> str:
    """T: stopped, Z: ended and not waited for; empty: no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def show(measured: dict[str, Measured]) -> Iterator[Table | str]:
    if "engines" in measured:
        solo = measured["solo"]["rows"][0]["losses"] if "solo" in measured else None
        rows = []
        for row in measured["engines"]["rows"]:
            apart = _apart(row, solo)
            far = "–" if apart is None else f"{apart:.1e}"
            planned = row["planned_bytes"]
            rows.append((row["engine"], far, "–" if apart is None else "yes" if apart <= BOUND else "NO",
                         gib(row["sent_bytes"]), gib(planned), off(row["sent_bytes"], planned)))  # fmt: skip
        heads = ("engine", "losses apart from solo", f"within {BOUND:.0e}", "sent in a step", "planned", "plan off by")
        yield Table(caption=f"all engines over {measured['engines']['backend']}", heads=heads, rows=rows)
    if measured.get("link"):
        yield f"a large all-gather: {measured['link']['bytes_per_s'] / 1e9:.2f} GB/s sent by each rank"
    rows = [
        (name, str(said["code"]), "yes" if said["named"] else "NO", _told(said),
         _first(said["reason"]))
        for name, said in measured.items() if name.startswith("one rank")
    ]  # fmt: skip
    if rows:
        yield Table(caption="a rank is lost", heads=("how", "exit code", "named", "told after", "reason"), rows=rows)


def wrong(measured: dict[str, Measured]) -> Iterator[str]:
    solo = measured["solo"]["rows"][0]["losses"] if "solo" in measured else None
    for row in measured.get("engines", {"rows": ()})["rows"]:
        apart = _apart(row, solo)
        if apart is not None and not apart <= BOUND:
            yield f"{row['engine']}: losses are {apart:.1e} off those of one process"
        share = row["sent_bytes"] / row["planned_bytes"]
        if not LEAST.get(row["engine"], 0.98) <= share <= 1.02:
            yield f"{row['engine']}: sends {share:.2f} of what is planned"
    for name, said in measured.items():
        if name.startswith("one rank"):
            if said["code"] != 6 or not said["named"]:
                yield f"{name}: ended with {said['code']}, {_first(said['reason'])}"
            elif said["seconds"] is None or said["seconds"] > said["within_s"]:
                yield f"{name}: told after {said['seconds']} s, at most {said['within_s']:.0f}"


def _first(reason: str) -> str:
    return reason.splitlines()[0] if reason else "no reason"


def _told(said: Measured) -> str:
    return f"{said['seconds']} s (at most {said['within_s']:.0f})"


def _apart(row: Measured, solo: list[float] | None) -> float | None:
    """Largest relative difference of an engine's losses from one process's."""
    return max(abs(a - b) / abs(b) for a, b in zip(row["losses"], solo, strict=True)) if solo else None


PHASE = Phase(name="ranks", title="Several ranks", share=4, steps=steps, show=show, wrong=wrong, why_not=why_not)
