"""The tensors an optimizer updates: fp32, local, plain.

Under solo, ddp and fsdp2 the optimizer never sees a bf16 parameter or a DTensor. Each trainable parameter is
represented by the fp32 tensor this rank owns of it: the parameter itself, its local shard (sharing storage), or an
fp32 master copy of either when the model computes in bf16. So every elementwise optimizer, bitsandbytes' included,
runs under every engine, with the same arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class OwnedParameters:
    """fp32 stand-ins for the trainable parameters, by name."""

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]]) -> None:
        self._pairs: list[tuple[str, nn.Parameter, nn.Parameter]] = []
        for name, param in named:
            if not param.requires_grad:
                continue
            local = _local(param.detach())
            if local.numel() == 0:  # a small tensor sharded over many ranks: others own it
                continue
            plain_fp32 = param.dtype == torch.float32 and not isinstance(param, DTensor)
            owned = param if plain_fp32 else nn.Parameter(local.float())
            self._pairs.append((name, param, owned))

    def __iter__(self):
        return ((name, owned) for name, _, owned in self._pairs)

    def collect(self) -> list[Tensor]:
        """Move the parameters' gradients, as fp32, to what the optimizer sees; returns them."""
        for _, param, owned in self._pairs:
            if owned is not param and param.grad is not None:
                owned.grad = _local(param.grad).float()
                param.grad = None
        return [owned.grad for _, _, owned in self._pairs if owned.grad is not None]

    @torch.no_grad()
    def publish(self) -> None:
        """Write updated masters back into the parameters they stand for."""
        for _, param, owned in self._pairs:
            local = _local(param.detach())
            if local.data_ptr() != owned.data_ptr():
                local.copy_(owned)
