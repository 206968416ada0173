"""bitsandbytes' optimizers without a wait for the GPU after every tensor.

`bitsandbytes.optim.optimizer.Optimizer8bit.step` calls `torch.cuda.synchronize()` after each tensor it updates: 448
times a step for rank-16 adapters on all linear layers of an 8B model, each time with an empty queue behind it. Nothing
in the loop needs it: the library's kernels and its prefetches of managed memory are all launched on CUDA's stream 0,
which keeps their order, and stream 0 is the stream on which torch works unless told otherwise.

Two cases keep a wait, one for each call of `step`: on another stream than torch's default one, stream 0 is neither
behind the gradients nor ahead of the next forward pass; and managed memory is read by the host (a checkpoint reads
paged fp32 moments in place), which waits for no stream.

Symptom and plan of the library's own: https://github.com/bitsandbytes-foundation/bitsandbytes/pull/2050. Once a release
has it, and is the oldest that pyproject.toml allows, this file can go.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


@functools.cache
def waiting_once(library: type[Any]) -> Any:
    """Derive from a bitsandbytes optimizer (`Optimizer8bit`) one whose `step` waits at most once; the same bits."""
    return type(library.__name__, (library,), {"step": torch.no_grad()(_step), "__doc__": library.__doc__})


def _step(self: Any, closure: Callable[[], Any] | None = None) -> None:
    """Update every tensor that has a gradient; `closure` is there for torch's signature, and nobody passes one here."""
    assert closure is None, "gradients are there before the update"
    from bitsandbytes import utils

    if not self.initialized:
        self.check_overrides()
        self.to_gpu()
        self.initialized = True
    updated = [
        (group, param, group_index, index)
        for group_index, group in enumerate(self.param_groups)
        for index, param in enumerate(group["params"])
        if param.grad is not None
    ]
    if not updated:
        return
    anchor = updated[0][1]
    aside = _on_a_stream_of_its_own(anchor)
    if aside:
        utils.sync_gpu(anchor)  # the gradients, which stream 0 does not wait for
    for group, param, group_index, index in updated:
        if not self.state[param]:
            self.init_state(group, param, group_index, index)
        self.prefetch_state(param)
        self.update_step(group, param, group_index, index)
    if aside or self.is_paged:
        utils.sync_gpu(anchor)


def _on_a_stream_of_its_own(tensor: torch.Tensor) -> bool:
    """Return whether torch queues work on this tensor elsewhere than on stream 0."""
    if tensor.device.type != "cuda":
        return False
    return torch.cuda.current_stream(tensor.device) != torch.cuda.default_stream(tensor.device)
