"""QLoRA whose optimizer state is pushed off the card: paged to the host, and the losses are the same."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.first_hour import inputs
from benchmarks.first_hour.measuring import gib
from benchmarks.first_hour.phase import Context, Measured, Phase, Step, Table

BOUND = 1e-3
"""Relative difference of the losses: kernels may add in another order."""


def steps(context: Context) -> Iterator[Step]:
    def run() -> Measured:
        recipe = inputs.train_recipe(context.work, toy=context.toy)
        overrides = ['method.name="qlora"', 'optim.name="paged_adamw_32bit"', "train.deterministic=false"]
        overrides += ["checkpoint.every_steps=1000", "train.max_steps=6"]
        if not context.toy:
            wide = inputs.bench_recipe(
                context.work, "two-wide-blocks", toy=False, method="qlora", length=96, batch=8, compiled=False
            )
            overrides += [f'model.path="{wide.with_suffix("")}"', 'model.init="random"', 'model.dtype="bfloat16"']
            overrides += ['model.tokenizer="demo:tiny-llama"', "method.r=256"]
        else:
            overrides += ["method.r=4"]
        return context.worker("paging", {"recipe": str(recipe), "overrides": overrides, "steps": 3})

    yield Step(name="filled", run=run, least_s=5)


def show(measured: dict[str, Measured]) -> Iterator[Table | str]:
    said = measured["filled"]
    if not said["paged"]:
        yield "nothing was paged: bitsandbytes pages between a GPU and its host, and there is no GPU; the rest ran"
    rows = [("losses apart", f"{said['apart']:.2e} (bound {BOUND:.0e})"), ("losses equal", str(said["equal"]))]
    if said["paged"]:
        rows += [(name.replace("_", " "), gib(said[name])) for name in
                 ("managed_bytes", "filler_bytes", "free_bytes", "left_bytes", "total_bytes")]  # fmt: skip
    rows += [(f"seconds of 3 steps {when} the filler", f"{said['seconds'][when]:.2f}") for when in ("before", "after")]
    yield Table(caption="QLoRA, paged AdamW", heads=("what", "measured"), rows=rows)


def wrong(measured: dict[str, Measured]) -> Iterator[str]:
    apart = measured.get("filled", {}).get("apart", 0.0)
    if not apart <= BOUND:
        yield f"losses differ by {apart:.1e} once state was pushed off the card"


PHASE = Phase(name="paging", title="QLoRA with real paging", share=1.5, steps=steps, show=show, wrong=wrong)
