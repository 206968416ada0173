"""The same bits from the same run on the same GPUs: what `[train] deterministic` sets.

FlashAttention's backward adds gradients of queries in whatever order its blocks end, cuBLAS chooses among workspaces,
cuDNN among algorithms. Each has a deterministic way, which costs time: of the attention's backward 15 to 40 % as others
report, not measured here. On a CPU all of this is deterministic anyway.
Source: https://docs.pytorch.org/docs/stable/notes/randomness.html
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
FIXED = (":4096:8", ":16:8")
"""Workspaces under which cuBLAS is deterministic."""


@contextlib.contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Use deterministic algorithms inside, if wanted; an operation that has none raises there.

    Raises:
        MachineError: the environment asks cuBLAS for a workspace that is not.
    """
    if not wanted:
        yield
        return
    import torch

    from distft.core.errors import MachineError

    before = os.environ.get(WORKSPACE)
    if before not in (None, *FIXED):
        raise MachineError(
            f"deterministic = true needs {WORKSPACE}={FIXED[0]}, the environment says {before}; unset it"
        )
    os.environ.setdefault(WORKSPACE, FIXED[0])  # read when cuBLAS is first used
    uninitialized: Any = torch.utils.deterministic
    fill, benchmark = uninitialized.fill_uninitialized_memory, torch.backends.cudnn.benchmark
    had, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    # Filling every fresh tensor with NaN finds reads of what was never written; it is no part of being deterministic.
    uninitialized.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(had, warn_only=warned)
        uninitialized.fill_uninitialized_memory = fill
        torch.backends.cudnn.benchmark = benchmark
        if before is None:
            os.environ.pop(WORKSPACE, None)


ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""The name that torch reads since 2.9, and an older one that it still takes."""


def expandable_segments() -> None:
    """Let the CUDA allocator grow its segments, unless the environment says what it is to do.

    Packed micro-batches differ in their numbers of tokens, and fixed segments fragment. Read by torch at its first
    allocation on a GPU.
    """
    if not any(name in os.environ for name in ALLOCATOR):
        os.environ[ALLOCATOR[0]] = "expandable_segments:True"
