"""calibration.json: what `distft plan --calibrate` reads, from the records of the phases that measured it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

SCHEMA = 1
"""Of `distft.plan.calibration`."""


def write(out: Path, records: Mapping[str, dict[str, Any]]) -> None:
    """Write what there is so far; nothing before single kernels were measured."""
    from distft.core.files import replace_json

    kernels = _step(records.get("rates"), "kernels")
    if kernels is None:
        return
    told = records["rates"]
    link = _step(records.get("ranks"), "link")
    measurement = {
        "schema": SCHEMA,
        "date": told["date"],
        "commit": told["commit"],
        "device": told["device"],
        "versions": {name: version for name, version in told["versions"].items() if version},
        "kernels": {name: kernels.get(name) for name in KERNELS} | {"link_bytes_per_s": link and link["bytes_per_s"]},
        "cases": [*_cases(records.get("memory")), *_cases(records.get("goals"))],
    }
    replace_json(out / "calibration.json", measurement, indent=1)


SIZES = ("allocated_bytes", "reserved_bytes", "used_bytes")
KERNELS = ("matmul_flops_per_s", "attention_flops_per_s", "copy_bytes_per_s", "launch_s", "pcie_bytes_per_s")


def _step(record: dict[str, Any] | None, name: str) -> dict[str, Any] | None:
    return record["steps"].get(name, {}).get("measured") if record else None


def _cases(record: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """Measured as the planner sees them: without torch.compile and other kernels, which move other bytes."""
    for name, step in (record["steps"] if record else {}).items():
        found = step["measured"]
        if found and found.get("work") and found["calibrates"]:
            sizes = [found[name] for name in SIZES]
            # Where memory was given back before the end, what was used then says nothing about the peak.
            whole = None not in sizes and sizes == sorted(sizes)
            yield {"name": name, "device": record["device"] if record else ""} | {
                **{key: found[key] for key in ("world", "step_s", "work")},
                **dict(zip(SIZES, sizes if whole else [None] * len(SIZES), strict=True)),
            }
