"""Updates each weight as soon as its gradient is complete, so that one gradient is there at a time, and not all.

What needs all gradients at once cannot be had: clipping by their norm, sums over micro-batches, and leaving an update
out because a gradient is not finite.
Source: https://docs.pytorch.org/tutorials/intermediate/optimizer_step_in_backward_tutorial.html
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from distft.engine.master_weights import MasterWeights


class BackwardUpdates:
    """Hooks on the trained parameters of a model; outside `active` they do nothing."""

    def __init__(self, owned: MasterWeights, optimizer: torch.optim.Optimizer) -> None:
        """`optimizer`: of the masters; steps those that have a gradient, each from its own state alone."""
        self._owned, self._optimizer = owned, optimizer
        self._norms: dict[int, Tensor] = {}
        self._active = self._updates = False
        for index, param in enumerate(owned.params()):
            param.register_post_accumulate_grad_hook(_updating(weakref.ref(self), index))

    @contextlib.contextmanager
    def active(self, *, updates: bool) -> Iterator[None]:
        """Update weights in the backward pass inside; `updates` False: drop its gradients, and leave weights alone."""
        self._active, self._updates = True, updates
        self._norms.clear()
        try:
            yield
        finally:
            self._active = False

    def norms(self) -> list[Tensor]:
        """Return the L2 norm of each gradient of the last backward pass, fp32 [], in the order of the parameters."""
        return [self._norms[index] for index in sorted(self._norms)]

    @torch.no_grad()
    def _update(self, index: int) -> None:
        if not self._active:
            return
        assert index not in self._norms, "a gradient arrived twice in one backward pass"
        gradient = self._owned.gradient(index)
        self._norms[index] = torch._foreach_norm([gradient], 2, torch.float32)[0]  # pyright: ignore
        if self._updates:
            self._owned.update_one(index, self._optimizer.step)
        else:
            self._owned.drop_gradient(index)


def _updating(updates: weakref.ref[BackwardUpdates], index: int) -> Callable[[Tensor], None]:
    """Return a hook that keeps nothing alive: Python cannot collect a cycle that passes through a tensor's hooks."""

    def update(param: Tensor) -> None:
        assert isinstance(param, nn.Parameter)
        if (there := updates()) is not None:
            there._update(index)

    return update
