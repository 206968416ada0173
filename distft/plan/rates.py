"""What a GPU reaches of its data sheet, and how long a step takes by it: assumed, or as measured on that GPU.

The defaults are assumptions; `distft plan --calibrate` replaces them for one GPU (see `distft.plan.calibration`).
"""

from __future__ import annotations

from dataclasses import dataclass

from distft.core.accelerators import GIB, Accelerator


@dataclass(frozen=True, kw_only=True)
class HardwareRates:
    """Shares of data-sheet peaks that good code reaches, host times, and bytes beside what torch allocates."""

    matmul: float = 0.78
    """Share of the bf16 peak that large matrix products reach (an H200: 790 of 989 TFLOP/s measured)."""
    attention: float = 0.55
    """Share that FlashAttention 2 reaches, forward and backward together."""
    memory: float = 0.85
    """Share of the memory bandwidth that element-wise kernels reach (an H200: 4.3 TB/s measured as copies)."""
    link: float = 0.7
    """Share of a link's bandwidth that collectives of large buckets reach."""
    launch_s: float = 8e-6
    """Host time of one operation outside torch.compile: what a tiny model waits for."""
    pcie_bytes_per_s: float = 20e9
    """Between device and host memory, for offloaded weights and gradients."""
    host_update_bytes_per_s: float = 20e9
    """State that torch's AdamW reads and writes in host memory, for each process of a node."""
    context_bytes: int = int(0.6 * GIB)
    """CUDA context with the kernels of torch and its libraries: 0.5 to 0.7 GiB."""
    nccl_bytes: int = GIB
    """Buffers of NCCL's channels: 0.5 to 1.5 GiB."""
    fragmentation: float = 0.04
    """Share of what is allocated, lost between blocks (3 to 8 %; less with expandable_segments)."""
    source: str = ""
    """Which calibration this is: date, commit and GPU; empty for the assumptions above."""

    @property
    def is_measured(self) -> bool:
        """Whether they come from a calibration."""
        return bool(self.source)


ASSUMED = HardwareRates()


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one optimizer step of one GPU has to do: a step's time follows from it and the rates."""

    matmul_flops: float
    """FLOPs of a micro-batch, with what activation checkpointing repeats; so are the following ones."""
    attention_flops: float
    moved_bytes: float
    """Through the device's memory, by everything but products and attention."""
    operations: float
    """Launched by the host."""
    sent_bytes: float = 0.0
    """Over the slowest link of the collectives."""
    sent_inside_bytes: float = 0.0
    """Inside a group of ranks."""
    offloaded_bytes: float = 0.0
    """Between host and device."""
    micros: int = 1
    """Micro-batches of the step."""
    step_sent_bytes: float = 0.0
    """Once a step; so are the following ones."""
    step_sent_inside_bytes: float = 0.0
    rewritten_bytes: float = 0.0
    """Bytes of the device's memory, by the optimizer's update."""
    host_rewritten_bytes: float = 0.0
    """Bytes of the host's memory, by the optimizer's update."""


@dataclass(frozen=True, kw_only=True)
class Times:
    """Predicted seconds."""

    compute_s: float
    """Products and attention of a micro-batch."""
    memory_s: float
    launch_s: float
    micro_s: float
    """The whole micro-batch."""
    step_s: float
    """The whole step."""


def times(work: Work, rates: HardwareRates, gpu: Accelerator, *, link_bytes_per_s: float | None = None) -> Times:
    """Return how long `work` takes. `link_bytes_per_s`: of the slowest link; None: the one inside a node."""
    compute = work.matmul_flops / (rates.matmul * gpu.bf16_flops)
    compute += work.attention_flops / (rates.attention * gpu.bf16_flops)
    bandwidth = rates.memory * gpu.memory_bytes_per_s
    memory, launch = work.moved_bytes / bandwidth, work.operations * rates.launch_s
    inside = rates.link * gpu.link_bytes_per_s
    link = inside if link_bytes_per_s is None else rates.link * link_bytes_per_s
    micro = max(compute + memory, work.sent_bytes / link + work.sent_inside_bytes / inside, launch)
    micro += work.offloaded_bytes / rates.pcie_bytes_per_s
    update = work.rewritten_bytes / bandwidth + work.host_rewritten_bytes / rates.host_update_bytes_per_s
    sent = work.step_sent_bytes / link + work.step_sent_inside_bytes / inside
    step = work.micros * micro + update + max(0.0, sent - 0.5 * micro)
    return Times(compute_s=compute, memory_s=memory, launch_s=launch, micro_s=micro, step_s=step)
