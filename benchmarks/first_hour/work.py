"""`python -m benchmarks.first_hour.work TASK TOLD.json FOUND.json`: what phases run in processes of their own."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import benchmarks.first_hour  # noqa: F401  # the folders of kit and of the tests' helpers

Told = dict[str, Any]


def _device() -> Any:
    import torch

    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


# -- rates of single kernels -----------------------------------------------------------------------------------------


def kernels(told: Told) -> Told:
    """Products, attention, copies, launches, and the way to the host: medians of repeated blocks."""
    import torch

    device = _device()
    on_gpu, dtype = device.type == "cuda", torch.bfloat16 if device.type == "cuda" else torch.float32
    size, tokens, copied = (8192, 8192, 2**30) if on_gpu else (256, 256, 2**22)

    def timed(work: Callable[[], Any], rounds: int) -> float:
        """Seconds of one call."""
        for _ in range(3):
            work()
        found = []
        for _ in range(5):
            _wait(device)
            began = time.perf_counter()
            for _ in range(rounds):
                work()
            _wait(device)
            found.append((time.perf_counter() - began) / rounds)
        return statistics.median(found)

    few = torch.ones(8, device=device)
    launch = timed(lambda: few.add_(1), 1000)
    source = torch.empty(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = 2.0 * copied / timed(lambda: target.copy_(source), 5)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    matmul = 2.0 * size**3 / timed(lambda: a @ b, 10)
    return {
        "device": told["device"],
        "dtype": str(dtype),
        "matmul_flops_per_s": matmul,
        "attention_flops_per_s": _attention_rate(device, tokens, timed),
        "copy_bytes_per_s": copy,
        "launch_s": launch,
        "pcie_bytes_per_s": _host_rate(device, timed),
    }


def _wait(device: Any) -> None:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def _attention_rate(device: Any, tokens: int, timed: Any) -> float:
    """Causal, forward and backward, one document: as the planner counts it, 3.5 x 2 · heads · size · tokens²."""
    import torch
    from torch import nn

    from distft.model import attention

    heads, groups, size = (32, 8, 128) if device.type == "cuda" else (4, 2, 16)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k, v = (
        torch.randn(1, count, tokens, size, device=device, dtype=dtype, requires_grad=True)
        for count in (heads, groups, groups)
    )
    bounds = torch.tensor([0, tokens], dtype=torch.int32, device=device)

    def once() -> None:
        out, _ = attention.varlen_attention(nn.Module(), q, k, v, None, cu_seq_lens_q=bounds, max_length_q=tokens)
        out.backward(torch.ones_like(out))

    return 3.5 * 2.0 * heads * size * tokens**2 / timed(once, 3)


def _host_rate(device: Any, timed: Any) -> float | None:
    if device.type != "cuda":
        return None
    import torch

    there = torch.empty(2**28, dtype=torch.uint8, pin_memory=True)
    here = torch.empty_like(there, device=device)
    return there.numel() / timed(lambda: here.copy_(there, non_blocking=True), 3)


# -- optimizers ------------------------------------------------------------------------------------------------------


def optimizers(told: Told) -> Told:
    """Every optimizer on this device: state made early, saved, restored; {name: "" or what went wrong}."""
    from optimizer_kit import HERE, check

    found, device = {}, _device()
    for name in HERE:
        try:
            check(name, device)
            found[name] = ""
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    return {"optimizers": found}


# -- memory that runs out --------------------------------------------------------------------------------------------


def out_of_memory(told: Told) -> Told:
    """A run of the recipe with less memory than it needs; does not come back, for the run ends the process."""
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401  # before there is a limit

    from distft import job
    from distft.bench import memory_meter
    from distft.core.hard_exit import hard_exit

    if torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(told["limit_bytes"] / torch.cuda.mem_get_info()[1])
    else:
        gib = (memory_meter.host()["data_bytes"] + told["limit_bytes"]) / 2**30
        memory_meter.set_limit(gib)
    hard_exit(job.main([told["recipe"], *told["arguments"]]))


# -- a full card -----------------------------------------------------------------------------------------------------


def paging(told: Told) -> Told:
    """Losses of a run whose optimizer state is pushed off the card by a filler, beside those of one left alone."""
    import torch

    device = _device()
    # First: managed memory of a run that is over is never freed, and its pages would be those that are given away.
    filled, fill, seconds = _some_steps(told, fill=device.type == "cuda")
    plain, _, _ = _some_steps(told, fill=False)
    return {
        "paged": device.type == "cuda",
        "losses": plain,
        "losses_filled": filled,
        "equal": plain == filled,
        "apart": max(abs(a - b) / abs(a) for a, b in zip(plain, filled, strict=True)),
        **fill,
        "seconds": seconds,
        "managed_bytes": fill.get("managed_bytes", 0),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }


def _some_steps(told: Told, *, fill: bool) -> tuple[list[float], Told, Told]:
    import kit

    name = "filled" if fill else "plain"
    run = kit.Run(recipe_file=Path(told["recipe"]), overrides=[f'name="{name}-{time.time_ns()}"', *told["overrides"]])
    before = _timed(lambda: run.go(told["steps"]))
    about, filler = _filler(run) if fill else ({}, None)
    after = _timed(lambda: run.go(told["steps"]))
    losses = run.losses()
    run.close()
    del filler
    return losses, about, {"before": before, "after": after}


def _timed(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _filler(run: Any) -> tuple[Told, Any]:
    """Memory taken so that the optimizer's pages no longer fit beside what a step needs."""
    import torch

    managed = sum(_managed(run))
    if not managed:
        raise SystemExit("no state of the optimizer is in managed memory")
    needed = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    # The driver gives pages of managed memory away before it refuses an allocation.
    size = free - needed - 64 * 2**20 + managed // 2
    filler = torch.empty(max(0, size), dtype=torch.uint8, device="cuda")
    left = torch.cuda.mem_get_info()[0]
    return {"managed_bytes": managed, "filler_bytes": filler.numel(), "free_bytes": free, "left_bytes": left,
            "total_bytes": total}, filler  # fmt: skip


def _managed(run: Any) -> list[int]:
    """Bytes of each tensor of the optimizer's state that is in managed memory."""
    import gc

    import torch

    found = []
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and getattr(thing, "is_paged", False):
            found.append(thing.numel() * thing.element_size())
    return found


# -- several ranks ---------------------------------------------------------------------------------------------------


def engines(told: Told) -> Told:
    """Losses, gradient norms and traffic of every engine in one launch; the planner's bytes beside."""
    import kit
    import scaling

    from distft.bench import traffic
    from distft.engine import processes, zero_footprint

    placed = processes.join(timeout_s=120)  # the group outlives the engines
    zero_footprint.BUCKET_ELEMENTS = scaling.BUCKET * (
        1 if told["toy"] else 40
    )  # a model of 14 M weights, not of 0.2 M
    rows = []
    for engine in told["engines"]:
        overrides = [f'name="{engine}-x{placed.world}"', f'engine.name="{engine}"', *told["overrides"]]
        run = kit.Run(recipe_file=Path(told["recipe"]), overrides=overrides)
        run.go(2)
        with traffic.counted(placed.world) as found:
            run.go(1)
        run.go(1)
        micros = run.recipe.train.global_batch_size // placed.world // told["micro"]
        theory = scaling.theory(run, placed.world, micros, told["micro"])
        losses = run.losses() if placed.rank == 0 else []
        run.close()
        sent = sum(one.wire_bytes(placed.world) for one in found.tensors)
        rows.append({"engine": engine, "losses": losses, "sent_bytes": round(sent), "planned_bytes": round(theory)})
    return {"rows": rows, "backend": _backend(), "link": _link(told) if placed.world > 1 else None}


def _backend() -> str:
    import torch.distributed as dist

    return str(dist.get_backend()) if dist.is_initialized() else "none"


def _link(told: Told) -> Told:
    """What a large all-gather sends from each rank in a second."""
    import torch
    import torch.distributed as dist

    device, world = _device(), dist.get_world_size()
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    part = torch.ones(told["gathered_bytes"] // world, dtype=torch.uint8, device=device)
    whole = torch.empty(part.numel() * world, dtype=torch.uint8, device=device)
    taken = []
    for _ in range(8):
        _wait(device)
        began = time.perf_counter()
        dist.all_gather_into_tensor(whole, part)
        _wait(device)
        taken.append(time.perf_counter() - began)
    return {"bytes_per_s": part.numel() * (world - 1) / statistics.median(taken[3:]), "gathered_bytes": whole.numel()}


TASKS: dict[str, Callable[[Told], Told]] = {
    task.__name__: task for task in (kernels, optimizers, out_of_memory, paging, engines)
}


def main(argv: list[str]) -> None:
    from distft.core.hard_exit import hard_exit

    task, told, found = argv
    said = TASKS[task](json.loads(Path(told).read_text(encoding="utf-8")))
    if os.environ.get("RANK", "0") == "0":
        Path(found).write_text(json.dumps(said), encoding="utf-8")
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    hard_exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
