"""torch.compile x activation checkpointing x attention: memory planned beside measured."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product

from benchmarks.first_hour import inputs, measuring
from benchmarks.first_hour.measuring import gib, off
from benchmarks.first_hour.phase import Context, Measured, Phase, Step, Table

CASES = list(product((False, True), ("off", "selective", "full"), ("varlen", "sdpa")))
TOY = [(False, "off", "varlen"), (False, "full", "sdpa"), (True, "selective", "varlen")]
"""Each value of each axis once: a compilation on a CPU takes as long as ten other cases."""
BOUND = 0.05
"""Of the measured peak."""
SLACK_BYTES = 2**18
"""Beside it: of a toy model's few MiB, a mask is a part that a plan may take for larger than it is."""


def steps(context: Context) -> Iterator[Step]:
    cases = TOY if context.toy else CASES
    for compiled, checkpointing, attention in sorted(cases, key=lambda case: case[0]):
        name = f"compile {'on' if compiled else 'off'}, checkpointing {checkpointing}, {attention}"
        run = partial(_measured, context, compiled, checkpointing, attention)
        yield Step(name=name, run=run, least_s=5 if context.toy else 25)


def _measured(context: Context, compiled: bool, checkpointing: str, attention: str) -> Measured:
    recipe = inputs.bench_recipe(
        context.work, "Qwen2.5-0.5B", toy=context.toy, method="full", length=4096, batch=4, compiled=compiled
    )
    overrides = [
        f'train.activation_checkpointing="{checkpointing}"',
        f'model.attention="{attention}"',
        f"train.compile={str(compiled).lower()}",
        "train.micro_batch_size=2",
    ]
    sizes = {"steps": 2, "warmup": 1} if context.toy else {"steps": 6, "warmup": 4}
    # Another attention than the planner's makes other traffic and takes other time; its memory is planned all the same.
    return measuring.case(context, recipe, overrides=overrides, calibrates=attention == "varlen", **sizes)


def show(measured: dict[str, Measured]) -> Iterator[Table | str]:
    rows = []
    for name, said in measured.items():
        if said.get("out_of_memory"):
            rows.append((name, "out of memory", gib(max((said["planned"] or {"": 0}).values())), "", "", ""))
            continue
        peak, planned = said["peak_bytes"], said["planned_peak_bytes"]
        within = "–" if not planned else "yes" if _is_near(peak, planned) else "NO"
        rows.append((name, gib(peak), gib(planned), off(peak, planned), within, f"{said['tokens_per_s']:,.0f}"))
    heads = ("case", "peak", "planned", "plan off by", f"within {BOUND:.0%}", "tokens/s")
    yield Table(caption="full fine-tuning of Qwen2.5-0.5B's shape, 2 x 4,096 tokens", heads=heads, rows=rows)


def wrong(measured: dict[str, Measured]) -> Iterator[str]:
    for name, said in measured.items():
        if said.get("out_of_memory"):
            continue
        peak, planned = said["peak_bytes"], said["planned_peak_bytes"]
        if planned and not _is_near(peak, planned):
            yield f"{name}: {gib(peak)} at the peak, {gib(planned)} planned ({off(peak, planned)})"


def _is_near(peak: int, planned: int) -> bool:
    return abs(planned - peak) <= BOUND * peak + SLACK_BYTES


PHASE = Phase(name="memory", title="Memory, planned and measured", share=6, steps=steps, show=show, wrong=wrong)
