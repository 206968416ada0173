"""Holds the fp32, local, plain tensors that an optimizer updates.

Under solo, ddp and fsdp2 the optimizer never sees a bf16 parameter or a DTensor. Each trainable parameter is
represented by the fp32 tensor this rank owns of it: the parameter itself, its local shard (sharing storage), or an
fp32 master copy of either when the model computes in bf16. So every elementwise optimizer, bitsandbytes' included,
runs under every engine, with the same arithmetic.

An update takes a group of tensors at a time: gradients become fp32, the optimizer steps, masters are written back and
gradients freed before the next group's turn. All fp32 copies at once would be the largest thing in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distft.engine.gradient_sums import GradientSums, local
from distft.engine.update_groups import GROUP_ELEMENTS, update_groups


@dataclass(frozen=True, kw_only=True, eq=False)
class _Owned:
    """One trainable parameter."""

    name: str
    param: nn.Parameter
    local: Tensor
    """This rank's part of the parameter, sharing its storage."""
    master: nn.Parameter
    """What the optimizer updates."""

    @property
    def shares(self) -> bool:
        """Updating the master updates the parameter."""
        return self.local.data_ptr() == self.master.data_ptr()


class MasterWeights:
    """fp32 stand-ins for the trainable parameters, by name.

    `sums`: where gradients are found that are added up in fp32; None: on the parameters, in their type. `per_tensor`:
    the optimizer may step some tensors before others (see `UpdateRule.per_tensor`).
    """

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        *,
        sums: GradientSums | None = None,
        per_tensor: bool = False,
        limit: int = GROUP_ELEMENTS,
    ) -> None:
        self._sums, self._limit = sums, limit
        self._all: list[_Owned] = []
        for name, param in named:
            if not param.requires_grad:
                continue
            part = local(param.detach())
            if part.numel() == 0:  # a small tensor sharded over many ranks: others own it
                continue
            plain_fp32 = param.dtype == torch.float32 and not isinstance(param, DTensor)
            master = param if plain_fp32 else nn.Parameter(part.float())
            self._all.append(_Owned(name=name, param=param, local=part, master=master))
        numels = [owned.master.numel() for owned in self._all]
        self._groups = list(update_groups(numels, limit)) if per_tensor else [range(len(numels))] if numels else []

    def __iter__(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((owned.name, owned.master) for owned in self._all)

    def gradients(self) -> list[Tensor]:
        """Return every gradient as it is stored, bf16 or fp32; nothing is copied."""
        if self._sums is not None:
            self._sums.finish()
        return [gradient for owned in self._all if (gradient := self._stored(owned)) is not None]

    def update(self, step: Callable[[list[nn.Parameter]], None]) -> None:
        """Call `step` with each group of masters, whose `grad` is then set and no other's; gradients are used up."""
        waiting = [self._stored(owned) for owned in self._all]
        self.drop_gradients()
        for group in self._groups:
            members = [self._all[index] for index in group]
            for part in update_groups([owned.master.numel() for owned in members], self._limit):
                indices = range(group.start + part.start, group.start + part.stop)
                _set_gradients([self._all[index] for index in indices], [waiting[index] for index in indices])
                waiting[indices.start : indices.stop] = [None] * len(indices)
            step([owned.master for owned in members if owned.master.grad is not None])
            for owned in members:
                owned.master.grad = None
            self._copy_to_model(members)

    def params(self) -> list[nn.Parameter]:
        """Return the parameters that the masters stand for, in their order."""
        return [owned.param for owned in self._all]

    def gradient(self, index: int) -> Tensor:
        """Return the gradient of the parameter at `index`, as it is stored."""
        stored = self._stored(self._all[index])
        assert stored is not None
        return stored

    def update_one(self, index: int, step: Callable[[], object]) -> None:
        """Call `step` while one master alone has a gradient, which is used up."""
        owned = self._all[index]
        stored = self.gradient(index)
        self.drop_gradient(index)
        _set_gradients([owned], [stored])
        step()
        owned.master.grad = None
        self._copy_to_model([owned])

    def drop_gradient(self, index: int) -> None:
        """Free one gradient."""
        owned = self._all[index]
        owned.param.grad = owned.master.grad = None

    def for_each_group(self, run: Callable[[list[nn.Parameter]], None]) -> None:
        """Call `run` with the masters of each group."""
        for group in self._groups:
            run([self._all[index].master for index in group])

    def drop_gradients(self) -> None:
        """Free every gradient."""
        for owned in self._all:
            owned.param.grad = owned.master.grad = None
            if self._sums is not None:
                self._sums.drop(owned.param)

    def copy_to_model(self) -> None:
        """Write masters back into the parameters they stand for."""
        self._copy_to_model(self._all)

    def _stored(self, owned: _Owned) -> Tensor | None:
        total = self._sums.of(owned.param) if self._sums is not None else None
        if total is not None:
            return total
        return None if owned.param.grad is None else local(owned.param.grad)

    @torch.no_grad()
    def _copy_to_model(self, members: list[_Owned]) -> None:
        stale = [owned for owned in members if not owned.shares]
        if stale:
            torch._foreach_copy_([owned.local for owned in stale], [owned.master for owned in stale])  # pyright: ignore[reportPrivateImportUsage]


def _set_gradients(members: list[_Owned], stored: list[Tensor | None]) -> None:
    """Give the masters their gradients, as fp32: what is fp32 already is not copied."""
    copies: list[Tensor] = []
    originals: list[Tensor] = []
    for owned, gradient in zip(members, stored, strict=True):
        if gradient is None or gradient.dtype == torch.float32:
            owned.master.grad = gradient
        else:
            owned.master.grad = torch.empty_like(gradient, dtype=torch.float32)
            copies.append(owned.master.grad)
            originals.append(gradient)
    if copies:
        torch._foreach_copy_(copies, originals)  # pyright: ignore[reportPrivateImportUsage]
