"""Where a step's time goes: kernels of the device (operators on a CPU) by kind, the longest by name, and idle time."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

LONGEST = 12
"""Kernels that are named."""
KINDS = (
    ("collectives", ("nccl", "gloo:")),
    ("attention", ("flash", "fmha", "attention", "attn", "softmax")),
    ("products", ("gemm", "cutlass", "nvjet", "xmma", "cublas", "matmul", "aten::mm", "aten::addmm", "aten::bmm")),
    ("quantisation", ("dequant", "quantize", "kgemm_4bit", "bitsandbytes")),
    ("copies", ("memcpy", "memset", "aten::copy_", "aten::fill_", "aten::zero_")),
)
"""The first kind one of whose words is in a kernel's name, in lower case; others are element-wise."""
OTHER = "elementwise"

Span = tuple[str, float, float]
"""(name, start, end) of a kernel, in microseconds."""


def of(work: Callable[[], None], device: Any) -> dict[str, Any]:
    """Return the summary of `work` on `device`; see `summary`."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiled:
        began = time.perf_counter()
        work()
        if on_gpu:
            torch.cuda.synchronize(device)
        wall_us = 1e6 * (time.perf_counter() - began)
    events: Any = profiled.events()
    if on_gpu:
        kernels = [event for event in events if event.device_type.name != "CPU"]
        return summary([(event.name, event.time_range.start, event.time_range.end) for event in kernels], wall_us)
    return _of_operators(events, wall_us)


def _of_operators(events: Iterable[Any], wall_us: float) -> dict[str, Any]:
    """Summarise by an operator's own time on a CPU, without that of those it calls; each is a span of its own."""
    spans, start = [], 0.0
    for event in events:
        if event.name.startswith(("aten::", "gloo:", "bitsandbytes::")) and event.self_cpu_time_total > 0:
            spans.append((event.name, start, start + event.self_cpu_time_total))
            start = spans[-1][2]
    return summary(spans, max(wall_us, start))


def kind(name: str) -> str:
    """Return a kernel's kind by its name: products, attention, elementwise and others."""
    low = name.lower()
    return next((kind for kind, words in KINDS if any(word in low for word in words)), OTHER)


def summary(spans: Sequence[Span], wall_us: float) -> dict[str, Any]:
    """Return the shares of `wall_us` by kind, with what is `idle`; the longest kernels with their counts.

    Kernels of several streams may run at one time: shares by kind are of kernel time, scaled to the time in which any
    ran, so that all of them and `idle` make one.
    """
    busy = _covered(spans)
    by_name: dict[str, list[float]] = defaultdict(list)
    for name, start, end in spans:
        by_name[name].append(end - start)
    total = sum(sum(times) for times in by_name.values())
    shares = dict.fromkeys([*(kind for kind, _ in KINDS), OTHER], 0.0)
    for name, times in by_name.items():
        shares[kind(name)] += sum(times) / total * busy / wall_us if total else 0.0
    longest = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:LONGEST]
    return {
        "wall_ms": round(wall_us / 1000, 3),
        "kernels": len(spans),
        "shares": {name: round(share, 4) for name, share in shares.items()} | {"idle": round(1 - busy / wall_us, 4)},
        "longest": [
            {"name": name[:120], "kind": kind(name), "count": len(times), "ms": round(sum(times) / 1000, 3)}
            for name, times in longest
        ],
    }


def _covered(spans: Iterable[Span]) -> float:
    """Return the microseconds in which at least one kernel ran."""
    covered, until = 0.0, float("-inf")
    for _, start, end in sorted(spans, key=lambda span: span[1]):
        covered += max(0.0, end - max(start, until))
        until = max(until, end)
    return covered
