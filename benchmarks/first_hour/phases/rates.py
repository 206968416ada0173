"""Rates of single kernels: where calibration begins."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.first_hour.phase import Context, Measured, Phase, Step, Table


def steps(context: Context) -> Iterator[Step]:
    def run() -> Measured:
        return context.worker("kernels", {"device": context.device})

    yield Step(name="kernels", run=run, least_s=5)


def show(measured: dict[str, Measured]) -> Iterator[Table | str]:
    from distft.core.accelerators import of_device

    said = measured["kernels"]
    known = of_device(said["device"])
    peaks = {
        "matmul_flops_per_s": known and known.bf16_flops,
        "attention_flops_per_s": known and known.bf16_flops,
        "copy_bytes_per_s": known and known.memory_bytes_per_s,
    }
    rows = []
    for name, value in said.items():
        if isinstance(value, float):
            peak = peaks.get(name)
            rows.append((name, f"{value:.4g}", f"{value / peak:.1%}" if peak else "–"))
    heads = ("rate", "measured", "share of the data sheet")
    yield Table(caption=f"single kernels, {said['dtype']}", heads=heads, rows=rows)


PHASE = Phase(name="rates", title="Rates of single kernels", share=1, steps=steps, show=show)
