"""How fast checkpoints can be written, by one process of every host at the same time."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from distft.doctor.finding import Check, DoctorOptions, Facts, Finding, Here, Seen, fail, ok, warn
from distft.doctor.places import Probe

MIB = 2**20
SLOW_BYTES_PER_S = 100e6
"""A checkpoint of 8 billion parameters is about 100 GB: more than a quarter of an hour."""
LIMIT_S, SHORT_LIMIT_S = 30.0, 3.0
"""A slow disk is known before it has taken everything."""


def look(here: Here) -> Facts:
    """Write to the folder and make it durable."""
    size = int((here.options.gib or (0.0625 if here.options.short else 0.25)) * 2**30)
    limit_s = SHORT_LIMIT_S if here.options.short else LIMIT_S
    if not here.leads:
        return {"rate": None, "bytes": 0}
    done, began = 0, time.perf_counter()
    with Probe(here.options.output) as probe:
        while done < size and (not done or time.perf_counter() - began < limit_s):
            probe.write(f"{done}", b"\xa5" * min(16 * MIB, size - done))
            done += min(16 * MIB, size - done)
        took = time.perf_counter() - began
        return {"rate": done / took, "bytes": done, "folder": str(probe.parent)}


def judge(seen: Sequence[Seen], options: DoctorOptions) -> Iterator[Finding]:
    """Compare with the floor that was given, else with a rate that makes saves slow."""
    writers = [process for process in seen if process.facts["rate"]]
    if not writers:
        return
    slowest = min(writers, key=lambda process: process.facts["rate"])
    rate, folder = slowest.facts["rate"], slowest.facts["folder"]
    message = f"{folder}: {rate / 1e6:,.0f} MB/s written and made durable by {slowest.host}"
    message += f", the slowest of {len(writers)} hosts" if len(writers) > 1 else ""
    floor = options.disk_floor_gb_per_s
    others = sorted(process.facts["rate"] for process in writers)[len(writers) // 2]
    hosts = [slowest.host] if len(writers) > 1 and others > 2 * rate else []
    if floor is not None and rate < floor * 1e9:
        yield fail(f"{message}; {floor:g} GB/s are asked for", "another output_dir, or tell the site", hosts)
    elif rate < SLOW_BYTES_PER_S:
        yield warn(message, "a faster output_dir, or fewer checkpoints ([checkpoint] every_steps)", hosts)
    else:
        yield ok(message)


CHECK = Check(name="disk", look=look, judge=judge, together=True)
