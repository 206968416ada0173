"""Whether memory ran out, and what was held when it did."""

from __future__ import annotations

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """On an accelerator torch has a class for it; on a CPU it is a sentence."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def held() -> str:
    """What torch held of the accelerator when memory ran out; empty without one."""
    if not torch.cuda.is_available():
        return ""
    now, peak = torch.cuda.memory_allocated() / 2**30, torch.cuda.max_memory_allocated() / 2**30
    whole = torch.cuda.mem_get_info()[1] / 2**30
    return f": {now:.1f} GiB held, {peak:.1f} at the peak, of {whole:.1f}"
