"""fp32 sums of a bf16 model's gradients over the micro-batches of a step.

Autograd adds the gradient of each micro-batch to the one before in the parameter's own type. In bf16 an addition keeps
8 bits: after a hundred micro-batches most of a new gradient falls below the sum's last bit, and the sum is not only
noisy but too small (docs/decisions/0060). Here each gradient is added to an fp32 sum as soon as it is complete, and
freed.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distft.engine.grad_dtype import MANY_MICROS, error_of_bf16_sums

log = logging.getLogger(__name__)


def local(tensor: Tensor) -> Tensor:
    """Return the part of it that this rank holds, sharing storage."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class GradientSums:
    """One fp32 sum for each parameter that is trained in another type, from its first gradient in a step on.

    `all_types`: for fp32 parameters too, which autograd could add up as well.
    """

    def __init__(self, params: Iterable[nn.Parameter], *, all_types: bool = False) -> None:
        self._sums: dict[nn.Parameter, Tensor] = {}
        for param in params:
            if param.requires_grad and (all_types or param.dtype != torch.float32):
                param.register_post_accumulate_grad_hook(_adds_to(weakref.ref(self)))

    def of(self, param: nn.Parameter) -> Tensor | None:
        """Return the sum so far, of this rank's part; None before the first gradient."""
        return self._sums.get(param)

    def begin_micro(self, *, last: bool) -> None:
        """Begin a micro-batch; `last`: of its step."""

    def finish(self) -> None:
        """Finish the step's gradients, which are all there."""

    def drop(self, param: nn.Parameter) -> None:
        """Free its sum."""
        self._sums.pop(param, None)

    @torch.no_grad()
    def _add(self, param: Tensor) -> None:
        assert isinstance(param, nn.Parameter)
        assert param.grad is not None
        gradient = local(param.grad)
        if gradient.device.type == "cpu" and torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()  # fsdp2's offload under torch 2.11 may still be copying it
        total = self._sums.get(param)
        if total is None:
            self._sums[param] = self._first(param, gradient)
        else:
            total.add_(gradient)
        param.grad = None

    def _first(self, param: nn.Parameter, gradient: Tensor) -> Tensor:
        return gradient.float()


def _adds_to(sums: weakref.ref[GradientSums]) -> Callable[[Tensor], None]:
    """Return a hook that keeps nothing alive: Python cannot collect a cycle that passes through a tensor's hooks."""

    def add(param: Tensor) -> None:
        if (there := sums()) is not None:
            there._add(param)

    return add


def warn_of_bf16_sums(micros_per_step: int) -> None:
    """Say once what bf16 sums of so many micro-batches cost."""
    if micros_per_step > MANY_MICROS:
        log.warning(
            '[engine] grad_dtype = "bfloat16" adds %d micro-batches per step in bf16: the summed gradient is off by '
            "%s, most where micro-batches agree; it loses what falls below its last bit, so it is also too small. "
            'grad_dtype = "auto" adds in fp32, for 2 more bytes a trained weight',
            micros_per_step,
            error_of_bf16_sums(micros_per_step),
        )
