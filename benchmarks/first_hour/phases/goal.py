"""The goals of tokens per second (benchmarks/goals.py), with one change at a time, and where the time goes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import goals

from benchmarks.first_hour import inputs, measuring
from benchmarks.first_hour.changes import CHANGES
from benchmarks.first_hour.measuring import gib, off
from benchmarks.first_hour.phase import Context, Measured, Phase, Step, Table

FIRST = ("llama8b-lora", "llama8b-full", "llama8b-full-kept", "llama8b-lora-8k", "llama8b-qlora", "qwen0.5b-full",
         "qwen7b-lora")  # fmt: skip
CHANGED = ("llama8b-lora", "qwen0.5b-full")
"""Goals on which every change is tried: one that is mostly products, one that is mostly head and element-wise."""
LAST = ("llama70b-qlora",)
"""Filling and quantising 70 billion weights takes minutes."""
BASE = "as it is"
TOY = [("llama8b-lora", BASE), ("llama8b-lora", "lora-unfused"), ("qwen0.5b-full", "chunk-128"),
       ("llama8b-lora", "fa3")]  # fmt: skip


def _pairs(context: Context) -> list[tuple[str, str]]:
    if context.toy:
        return TOY
    changed = [
        (name, change) for name in CHANGED for change, one in CHANGES.items() if goals.GOALS[name].method in one.methods
    ]
    return [*((name, BASE) for name in FIRST), *changed, *((name, BASE) for name in LAST)]


def steps(context: Context) -> Iterator[Step]:
    for name, change in _pairs(context):
        least = 5 if context.toy else 240 if name in LAST else 45
        yield Step(name=f"{name}: {change}", run=partial(_measured, context, name, change), least_s=least)


def _measured(context: Context, name: str, change: str) -> Measured:
    goal = goals.GOALS[name]
    compiled = not context.toy
    recipe = inputs.bench_recipe(
        context.work, goal.config, toy=context.toy, method=goal.method, length=goal.length, batch=4, compiled=compiled
    )
    sizes = {"steps": 2, "warmup": 1} if context.toy else {"steps": 10, "warmup": 5}
    overrides = [*goal.settings, f"train.compile={str(compiled).lower()}"]
    said = measuring.case(
        context, recipe, overrides=overrides, change="none" if change == BASE else change, profile=True, **sizes
    )
    what = "" if change == BASE else CHANGES[change].what
    return said | {"goal": goal.tokens_per_s, "change": what}


def show(measured: dict[str, Measured]) -> Iterator[Table | str]:
    ran = {name: said for name, said in measured.items() if not said.get("out_of_memory")}
    rows = []
    for name, said in ran.items():
        base = ran.get(f"{name.partition(':')[0]}: {BASE}")
        rate = said["tokens_per_s"]
        against = f"{rate / base['tokens_per_s']:.3f}" if base else "–"
        of_goal = f"{rate / said['goal']:.0%}" if said["ran"]["device_bytes"] else "–"
        peak, planned = said["peak_bytes"], said["tokens_per_s_planned"]
        rows.append((name, f"{rate:,.0f}", f"{said['goal']:,}", of_goal, against, off(rate, planned), gib(peak),
                     off(peak, said["planned_peak_bytes"])))  # fmt: skip
    heads = ("case", "tokens/s", "goal (H200)", "of it", "÷ as it is", "plan off by", "peak", "plan off by")
    yield Table(caption="goals, one change at a time; full-length mock rows", heads=heads, rows=rows)
    for name, said in measured.items():
        if said.get("out_of_memory"):
            yield f"{name}: out of memory ({said['out_of_memory']})"
    profiles = {name: said["profile"] for name, said in ran.items() if said.get("profile")}
    if profiles:
        kinds = list(next(iter(profiles.values()))["shares"])
        rows = [(name, *(f"{found['shares'][kind]:.1%}" for kind in kinds)) for name, found in profiles.items()]
        yield Table(caption="where a step's time goes", heads=("case", *kinds), rows=rows)
    for name, found in profiles.items():
        if name.endswith(BASE):
            rows = [(one["name"], one["kind"], str(one["count"]), f"{one['ms']:.2f}") for one in found["longest"]]
            yield Table(caption=f"longest kernels: {name}", heads=("kernel", "kind", "calls", "ms"), rows=rows)


PHASE = Phase(name="goals", title="Goals, one change at a time", share=12, steps=steps, show=show)
