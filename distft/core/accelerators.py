"""Accelerators people have: one table for what a plan must know before it runs and what MFU divides by after.

Memory is what the driver reports as usable, not the number on the box; rates are dense (without sparsity); links are
one direction, per GPU. Cards without bf16 (Turing and older) are left out: nothing here runs well on them.

Where each row's figures are from, and when they were read, stands in `SOURCES`. Nothing of this was measured here.
"""

from __future__ import annotations

from dataclasses import dataclass

from distft.core.registry import nearest

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """One kind of GPU. Rates in units per second."""

    name: str
    """What `--gpu` takes: maker's name and memory, in lower case."""
    product: str
    """The part of the driver's product name that tells it apart."""
    memory_gib: float
    """Usable."""
    bf16_flops: float
    """Dense bf16 tensor-core peak."""
    memory_bytes_per_s: float
    """Device memory bandwidth."""
    link_bytes_per_s: float
    """To another GPU of the same node: NVLink where the board has it, else PCIe."""
    between_nodes_bytes_per_s: float = 50e9
    """To a GPU of another node; by default one 400 Gb/s port for each GPU, as cloud nodes of this class have."""

    @property
    def source(self) -> str:
        """Where the figures are from, and when they were read."""
        return SOURCES.get(self.name, _SHEET)

    @property
    def memory_bytes(self) -> int:
        """Usable memory."""
        return int(self.memory_gib * GIB)


_PCIE4, _PCIE5 = 24e9, 50e9
"""What all-gathers reach on 16 lanes, of 31.5 and 63 GB/s."""
_HOST = 10e9
"""Through host memory, where GeForce cards cannot reach each other's; 8 to 13 GB/s as others report."""
_ETHERNET = 12.5e9
"""100 Gb/s a GPU: nodes of cards without NVLink."""


def _gpu(name: str, product: str, gib: float, tera: float, hbm: float, link: float, far: float = 50e9) -> Accelerator:
    return Accelerator(
        name=name,
        product=product,
        memory_gib=gib,
        bf16_flops=tera * 1e12,
        memory_bytes_per_s=hbm * 1e9,
        link_bytes_per_s=link,
        between_nodes_bytes_per_s=far,
    )


ACCELERATORS = (
    # name, product, usable GiB, bf16 TFLOP/s, HBM GB/s, link B/s, between nodes B/s
    _gpu("gb300-288gb", "GB300", 267.0, 2500.0, 8000.0, 900e9, 100e9),
    _gpu("b300-288gb", "B300", 267.0, 2250.0, 8000.0, 900e9, 100e9),
    _gpu("gb200-186gb", "GB200", 183.0, 2500.0, 8000.0, 900e9),
    _gpu("b200-180gb", "B200", 178.0, 2250.0, 8000.0, 900e9),
    _gpu("mi300x-192gb", "MI300X", 191.7, 1307.4, 5300.0, 448e9),
    _gpu("gh200-96gb", "GH200", 95.0, 989.0, 4000.0, 450e9),
    _gpu("h200-nvl-141gb", "H200 NVL", 139.7, 835.0, 4800.0, 450e9),
    _gpu("h200-141gb", "H200", 139.7, 989.0, 4800.0, 450e9),
    _gpu("h100-nvl-94gb", "H100 NVL", 93.0, 835.0, 3900.0, 300e9),
    _gpu("h100-pcie-80gb", "H100 PCIe", 79.2, 756.0, 2000.0, _PCIE5),
    _gpu("h100-80gb", "H100", 79.2, 989.0, 3350.0, 450e9),
    _gpu("h800-pcie-80gb", "H800 PCIe", 79.2, 756.0, 2000.0, _PCIE5),
    _gpu("h800-80gb", "H800", 79.2, 989.0, 3350.0, 200e9),
    _gpu("h20-96gb", "H20", 95.0, 148.0, 4000.0, 450e9),
    _gpu("a100-40gb", "A100-SXM4-40GB", 39.4, 312.0, 1555.0, 300e9, 25e9),
    _gpu("a100-pcie-40gb", "A100-PCIE-40GB", 39.4, 312.0, 1555.0, _PCIE4, _ETHERNET),
    _gpu("a100-pcie-80gb", "A100 80GB PCIe", 79.2, 312.0, 1935.0, _PCIE4, _ETHERNET),
    _gpu("a100-80gb", "NVIDIA A100", 79.2, 312.0, 2039.0, 300e9, 25e9),
    _gpu("a800-pcie-80gb", "A800 80GB PCIe", 79.2, 312.0, 1935.0, _PCIE4, _ETHERNET),
    _gpu("a800-80gb", "A800-SXM4-80GB", 79.2, 312.0, 2039.0, 200e9, 25e9),
    _gpu("l40s-48gb", "L40S", 44.4, 362.0, 864.0, _PCIE4, _ETHERNET),
    _gpu("l40-48gb", "L40", 44.4, 181.0, 864.0, _PCIE4, _ETHERNET),
    _gpu("l4-24gb", "L4", 22.0, 121.0, 300.0, _PCIE4, _ETHERNET),
    _gpu("rtx6000-ada-48gb", "RTX 6000 Ada", 47.4, 364.0, 960.0, _PCIE4, _ETHERNET),
    _gpu("rtx-pro-6000-96gb", "RTX PRO 6000", 95.0, 504.0, 1792.0, _PCIE5, _ETHERNET),
    _gpu("a6000-48gb", "RTX A6000", 47.5, 155.0, 768.0, _PCIE4, _ETHERNET),
    _gpu("a40-48gb", "NVIDIA A40", 44.4, 150.0, 696.0, _PCIE4, _ETHERNET),
    _gpu("a10g-24gb", "A10G", 22.0, 70.0, 600.0, _PCIE4, _ETHERNET),
    _gpu("a10-24gb", "NVIDIA A10", 22.0, 125.0, 600.0, _PCIE4, _ETHERNET),
    _gpu("rtx5090-32gb", "RTX 5090", 31.4, 209.5, 1792.0, _HOST, _ETHERNET),
    _gpu("rtx5080-16gb", "RTX 5080", 15.5, 112.6, 960.0, _HOST, _ETHERNET),
    _gpu("rtx5070ti-16gb", "RTX 5070 Ti", 15.5, 87.9, 896.0, _HOST, _ETHERNET),
    _gpu("rtx5070-12gb", "RTX 5070", 11.5, 61.7, 672.0, _HOST, _ETHERNET),
    _gpu("rtx5060ti-16gb", "RTX 5060 Ti", 15.5, 47.4, 448.0, _HOST, _ETHERNET),
    _gpu("rtx4090d-24gb", "RTX 4090 D", 23.5, 147.1, 1008.0, _HOST, _ETHERNET),
    _gpu("rtx4090-24gb", "RTX 4090", 23.5, 165.2, 1008.0, _HOST, _ETHERNET),
    _gpu("rtx4080-super-16gb", "RTX 4080 SUPER", 15.6, 104.4, 736.0, _HOST, _ETHERNET),
    _gpu("rtx4080-16gb", "RTX 4080", 15.6, 97.5, 717.0, _HOST, _ETHERNET),
    _gpu("rtx4070ti-super-16gb", "RTX 4070 Ti SUPER", 15.6, 88.2, 672.0, _HOST, _ETHERNET),
    _gpu("rtx4060ti-16gb", "RTX 4060 Ti", 15.6, 44.0, 288.0, _HOST, _ETHERNET),
    _gpu("rtx3090ti-24gb", "RTX 3090 Ti", 23.5, 80.0, 1008.0, _HOST, _ETHERNET),
    _gpu("rtx3090-24gb", "RTX 3090", 23.5, 71.0, 936.0, _HOST, _ETHERNET),
    _gpu("rtx3080-10gb", "RTX 3080", 9.6, 59.5, 760.0, _HOST, _ETHERNET),
)
"""The first whose `product` is a part of a device's name is that device, so longer names come before shorter ones."""

_SHEET = "maker's data sheet; agreed in a second reading, 2026-11-28"
_MEMORY = "from memory, 2026-11-28; no page with it was found on 2026-11-29"
_RTX = "from memory, 2026-11-28, and not looked up; bf16 is twice the fp32 rate"
SOURCES = {
    "gb300-288gb": "verda.com, NVIDIA GB300 NVL72: GPU Architecture & Performance (2.5 PFLOP/s, 8 TB/s, 900 GB/s one "
    "way), read 2026-11-29; memory from memory",
    "b300-288gb": "glennklockwood.com, B300 (2,250 TFLOP/s, 8 TB/s) and fibermall.com, HGX B300 (links, network), "
    "read 2026-11-29; verda.com says 7.7 TB/s; memory from memory",
    "gb200-186gb": "glennklockwood.com, B200 (GB200 at 1,200 W: 2,500 TFLOP/s, 8 TB/s, 900 GB/s one way), read "
    "2026-11-29; verda.com says 2,250 and 7.7 TB/s; memory from memory",
    "b200-180gb": "docs.vultr.com, NVIDIA HGX B200 Hardware Overview, 2026-03-11 (memory as the driver reports it, "
    "8 TB/s, 1.8 TB/s both ways) and glennklockwood.com, B200 (2,250 TFLOP/s), read 2026-11-29",
    "mi300x-192gb": "alpharomercoma, MI300X-vs-H200, REPORT.md (1,307.4 TFLOP/s, 5.3 TB/s, 192 GB), read 2026-11-29; "
    "links from memory",
    "h200-nvl-141gb": "openmetal.io, How the H200 is built (memory and its rate), read 2026-11-29; 835 TFLOP/s and "
    "450 GB/s from the project's desk check of 2026-11-28, without a page",
    "h800-pcie-80gb": _MEMORY,
    "h800-80gb": "philisun.com, NVIDIA H800 vs H100 (compute and memory of an H100), and tumgag.com, the same title "
    "(400 GB/s both ways), read 2026-11-29",
    "h20-96gb": "the hub's hardware page of the H20 (96 GB, 148 TFLOP/s) and ke60.top (4.0 TB/s), read 2026-11-29; "
    "links from memory",
    "a800-pcie-80gb": _MEMORY,
    "a800-80gb": _MEMORY,
    "l40s-48gb": "mullet.se, copy of NVIDIA's table of L40 and L40S (362.05 TFLOP/s, 864 GB/s), read 2026-11-29",
    "l40-48gb": "mullet.se, copy of NVIDIA's table of L40 and L40S (181.05 TFLOP/s, 864 GB/s), read 2026-11-29",
    "rtx5090-32gb": "Linux Format, May 2025 (1,792 GB/s; 838 TFLOP/s sparse with fp16 sums, of which dense with fp32 "
    "sums is a quarter), read 2026-11-29",
    "rtx5080-16gb": "brojogopalsapui.com, RTX 5080 deep dive, after NVIDIA's RTX Blackwell whitepaper (960 GB/s; "
    "1,801 sparse fp4 TOP/s, of which dense bf16 is a sixteenth), read 2026-11-29",
    **dict.fromkeys(("rtx5070ti-16gb", "rtx5070-12gb", "rtx4090d-24gb", "rtx4080-super-16gb"), _RTX),
    **dict.fromkeys(("rtx5060ti-16gb", "rtx4070ti-super-16gb", "rtx3090ti-24gb"), _RTX),
}
"""Of rows that have another than the first table's. All pages are second-hand: no maker's data sheet was at hand."""

_OTHERS = frozenset({"ti", "super", "d", "laptop", "max-q", "nvl", "mig", "mobile"})
"""Words after a product's name that make it another product, with other rates."""

BY_NAME = {gpu.name: gpu for gpu in ACCELERATORS}


def of_device(device_name: str) -> Accelerator | None:
    """Return the table's row for the driver's product name; None for a device that is not in it (and for CPUs)."""
    accelerator = next((gpu for gpu in ACCELERATORS if gpu.product in device_name), None)
    if accelerator is not None and _OTHERS & set(device_name.partition(accelerator.product)[2].lower().split()):
        return None
    return accelerator


def peak_flops(device_name: str) -> float | None:
    """Return a device's dense bf16 FLOP/s by its product name; None when the table does not have it."""
    accelerator = of_device(device_name)
    return None if accelerator is None else accelerator.bf16_flops


def named(text: str) -> Accelerator:
    """Return the accelerator that `--gpu` means: a name of the table, without its memory where that leaves one.

    Raises:
        KeyError: carries the nearest name, or an empty string.
    """
    word = text.lower().replace(" ", "-").replace("_", "-")
    if word in BY_NAME:
        return BY_NAME[word]
    starts = [gpu for gpu in ACCELERATORS if gpu.name.startswith(f"{word}-")]
    alone = [gpu for gpu in starts if gpu.name.removeprefix(f"{word}-").removesuffix("gb").isdigit()] or starts
    if len(alone) == 1:
        return alone[0]
    raise KeyError(nearest(word, list(BY_NAME)) or next((gpu.name for gpu in starts), ""))
