"""The device in bf16 against the CPU in fp32: the same recipe, weights and rows, step by step."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.first_hour import trained
from benchmarks.first_hour.phase import Context, Measured, Phase, Step, Table

BOUNDS = {"loss": 0.01, "grad_norm": 0.05, "weights": 0.01, "update": 0.2}
"""Largest relative difference: of losses and gradient norms in any step, of the final weights and of all updates.

bf16 keeps 8 bits: 0.4 % of a weight is lost when it is stored. AdamW divides by the gradient's own size, so gradients
near zero make updates of any sign. On a CPU (2026-11-28): 0.1 %, 0.3 %, 0.35 % and 4.5 %.
"""


def steps(context: Context) -> Iterator[Step]:
    yield Step(name="on the device", run=lambda: trained.columns(trained.straight(context)), least_s=5)
    yield Step(name="on the CPU", run=lambda: trained.columns(trained.on_the_host(context)), least_s=5)
    yield Step(name="compared", run=lambda: _compared(context), least_s=1)


def _compared(context: Context) -> Measured:
    device, host = trained.straight(context), trained.on_the_host(context)
    ours, theirs = trained.columns(device), trained.columns(host)
    apart = {
        name: max(abs(a - b) / abs(b) for a, b in zip(ours[name], theirs[name], strict=True))
        for name in ("loss", "grad_norm")
    }
    return {"apart": apart | _weights(context, device, host), "bounds": BOUNDS, "steps": len(ours["loss"])}


def _weights(context: Context, device: object, host: object) -> dict[str, float]:
    from safetensors.torch import load_file

    before = {name: value.float() for name, value in load_file(context.work / "model/model.safetensors").items()}
    ours, theirs = trained.tensors(device), trained.tensors(host)  # type: ignore[arg-type]
    off = sum(float((ours[name] - value).square().sum()) for name, value in theirs.items()) ** 0.5
    whole = sum(float(value.square().sum()) for value in theirs.values()) ** 0.5
    moved = sum(float((value - before[name]).square().sum()) for name, value in theirs.items()) ** 0.5
    return {"weights": off / whole, "update": off / moved}


def show(measured: dict[str, Measured]) -> Iterator[Table | str]:
    if "compared" not in measured:
        return
    said = measured["compared"]
    rows = [
        (name, f"{value:.3%}", f"{said['bounds'][name]:.1%}", "yes" if value <= said["bounds"][name] else "NO")
        for name, value in said["apart"].items()
    ]
    caption = f"bf16 on the device against fp32 on the CPU, {said['steps']} steps"
    yield Table(caption=caption, heads=("what", "apart", "bound", "within"), rows=rows)


def wrong(measured: dict[str, Measured]) -> Iterator[str]:
    said = measured.get("compared", {"apart": {}})
    for name, value in said["apart"].items():
        if not value <= said["bounds"][name]:
            yield f"{name} differ by {value:.2%}, the bound is {said['bounds'][name]:.1%}"


PHASE = Phase(
    name="parity", title="The device in bf16 against the CPU in fp32", share=1.5, steps=steps, show=show, wrong=wrong
)
