"""Processes on the CPU cores of their GPU's socket, so that copies to pinned memory do not cross to another one."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

SYSFS = Path("/sys/bus/pci/devices")


def bind(properties: Any) -> None:
    """Restrict this process to the allowed cores that its GPU is attached to; leaves it as it is where none are known.

    Args:
        properties: of the device, as `torch.cuda.get_device_properties` returns them.
    """
    numbers = [getattr(properties, key, None) for key in ("pci_domain_id", "pci_bus_id", "pci_device_id")]
    if all(isinstance(number, int) for number in numbers):
        domain, bus, device = numbers
        cores = cores_near(f"{domain:04x}:{bus:02x}:{device:02x}.0", os.sched_getaffinity(0), SYSFS)
        with contextlib.suppress(OSError):  # a container may forbid it
            os.sched_setaffinity(0, cores)


def cores_near(address: str, allowed: set[int], sysfs: Path) -> set[int]:
    """Return the cores of `allowed` that belong to the socket of a PCI device; all of them where that is unknown.

    A launcher that has bound the process to other cores (`srun --cpu-bind`) counts more.

    Args:
        address: of the device, as in "0000:1b:00.0".
        allowed: numbers of the cores that this process may use.
        sysfs: folder of PCI devices.
    """
    try:
        near = parse_cores((sysfs / address / "local_cpulist").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return allowed
    return allowed & near or allowed


def parse_cores(text: str) -> set[int]:
    """Return {0, 1, 2, 3, 8} for "0-3,8", the kernel's notation.

    Raises:
        ValueError: it is not in that notation.
    """
    cores: set[int] = set()
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            cores |= set(range(int(first), int(last or first) + 1))
    return cores
