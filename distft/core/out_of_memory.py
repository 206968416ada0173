"""Whether memory ran out, and what was held when it did."""

from __future__ import annotations

import torch

_SENTENCES = ("out of memory", "can't allocate memory", "ALLOC_FAILED", "cudaErrorMemoryAllocation")
"""What torch's allocators (of the device, of pinned memory, of the host), NCCL, cuBLAS, cuDNN and Triton say."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out: only torch's device allocator has a class for it, all others have a sentence.

    The first collective of a full card fails with NCCL's, as a DistBackendError.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sentence in str(error) for sentence in _SENTENCES)


def held() -> str:
    """Return what torch held of the accelerator when memory ran out; empty without one."""
    if not torch.cuda.is_available():
        return ""
    now, peak = torch.cuda.memory_allocated() / 2**30, torch.cuda.max_memory_allocated() / 2**30
    whole = torch.cuda.mem_get_info()[1] / 2**30
    return f": {now:.1f} GiB held, {peak:.1f} at the peak, of {whole:.1f}"
