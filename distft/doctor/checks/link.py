"""What the network between the processes gives, against what it should."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from distft.core.accelerators import of_device
from distft.doctor.finding import Check, DoctorOptions, Facts, Finding, Here, Seen, fail, ok, warn

EXPECTED_SHARE = 0.5
"""Share of a link's rate on paper; below, something is configured badly: a fallback to sockets, a missing adapter."""
ODD_SHARE = 0.5
"""Share of the median rank's rate with its better neighbour."""


def look(here: Here) -> Facts:
    """Measure all-reduce, all-gather, then each rank with its neighbours."""
    if here.group is None or here.world == 1:
        return {"alone": True}
    import torch

    gpu = here.group.device.type == "cuda"
    gib = here.options.gib or (
        (0.125 if here.options.short else 1.0) if gpu else (1 / 128 if here.options.short else 1 / 32)
    )
    size = int(gib * 2**30)
    rates = here.group.rates(size)
    ring = here.group.ring(max(1, size // 8), range(here.world))
    return {
        "alone": False,
        "bytes": size,
        "all_reduce": rates.all_reduce,
        "all_gather": rates.all_gather,
        "ring": ring,
        "device": torch.cuda.get_device_name(here.group.device) if gpu else "cpu",
    }


def judge(seen: Sequence[Seen], options: DoctorOptions) -> Iterator[Finding]:
    """Compare with the floor that was given, half of the GPUs' nominal link rate, and the other ranks."""
    facts = seen[0].facts
    if facts["alone"]:
        yield ok("one process: nothing to send")
        return
    rate = min(facts["all_reduce"], facts["all_gather"])
    message = (
        f"all-reduce {facts['all_reduce'] / 1e9:.2f} GB/s, all-gather {facts['all_gather'] / 1e9:.2f} GB/s "
        f"({facts['bytes'] / 2**20:.0f} MiB, {len(seen)} ranks, bus bandwidth)"
    )
    slowest, rank_rate, usual = slowest_rank(seen)
    who = f"; slowest rank: {slowest.rank} on {slowest.host}, {rank_rate / 1e9:.2f} GB/s with its better neighbour"
    who += f", the median {usual / 1e9:.2f}" if len(seen) > 2 else ""
    odd = len(seen) > 2 and rank_rate < ODD_SHARE * usual
    hosts = (slowest.host,) if odd and len({process.host for process in seen}) > 1 else ()
    floor = None if options.link_floor_gb_per_s is None else options.link_floor_gb_per_s * 1e9
    expected = expected_link(facts["device"], hosts=len({process.host for process in seen}))
    fix = "NCCL_DEBUG=INFO says which network it chose (NET/IB, NET/OFI, NET/Socket); GPUs: nvidia-smi topo -m"
    if floor is not None and rate < floor:
        yield fail(f"{message}: {floor / 1e9:g} GB/s are asked for{who}", fix, hosts)
    elif expected is not None and rate < EXPECTED_SHARE * expected:
        yield warn(f"{message}: the link has {expected / 1e9:.0f} GB/s on paper{who}", fix, hosts)
    elif odd:
        yield warn(f"{message}{who}", "its cable, adapter or neighbours; or something else runs there", hosts)
    else:
        yield ok(message + who)


def slowest_rank(seen: Sequence[Seen]) -> tuple[Seen, float, float]:
    """Return (rank, its rate with its better neighbour, the median rank's): a slow one is slow with both."""
    best = {process.rank: max(process.facts["ring"].values(), default=0.0) for process in seen}
    slowest = min(seen, key=lambda process: best[process.rank])
    return slowest, best[slowest.rank], statistics.median(best.values())


def expected_link(device: str, *, hosts: int) -> float | None:
    """Return the bytes per second of the slowest link between these GPUs on paper; None where that is not known."""
    gpu = of_device(device)
    if gpu is None:
        return None
    return gpu.link_bytes_per_s if hosts == 1 else min(gpu.link_bytes_per_s, gpu.between_nodes_bytes_per_s)


CHECK = Check(name="link", look=look, judge=judge, together=True)
