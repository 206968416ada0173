"""One process, plain torch: the reference that every other engine must agree with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from distft.core.registry import NoParams
from distft.core.types import Piece, StateReader, StepReport, TrainState, UpdateRule, Weights
from distft.engine import fragments
from distft.engine.base import BaseEngine
from distft.engine.fragments import Fragment
from distft.engine.owned import OwnedParameters
from distft.engine.processes import Processes


class SoloEngine(BaseEngine):
    """The step that solo, ddp and fsdp2 share; subclasses change how the model is wrapped and what ranks hold."""

    name = "solo"
    sharded = False
    """Ranks hold different pieces, so squared gradient norms add up over ranks."""

    def adopt(self, weights: Weights, rule: UpdateRule, *, micros_per_step: int) -> None:
        """Fill, wrap, and create the optimizer over what this rank owns."""
        self._rule = rule
        self._module = self._wrap(weights)
        self._module.train()
        self._owned = OwnedParameters((name, p) for name, p in self._unwrapped().named_parameters())
        self._optimizer = rule.build(rule.groups(self._owned))

    def _wrap(self, weights: Weights) -> nn.Module:
        weights.fill(weights.module, self.device)
        return weights.module

    def _unwrapped(self) -> nn.Module:
        return self.model

    @property
    def forward_only(self) -> nn.Module:
        """Wrapping serves gradients here, and weights are whole; fsdp2 alone gathers in the wrapped module."""
        return self.model if self.sharded else self._unwrapped()

    def backward(self, loss_sum: Tensor, *, divide_by: float, samples: tuple[str, ...]) -> None:
        """Gradients are averaged over ranks by ddp and fsdp2: multiply by the world to make that a sum."""
        self._remember(loss_sum, samples)
        (loss_sum * (self.world / divide_by)).backward()

    def step(self, state: TrainState, weight: float, accepts: Callable[[float], bool]) -> StepReport:
        """One host sync: loss and squared norm together."""
        grads = self._owned.collect()
        norm = get_total_norm(grads).double() if grads else torch.zeros((), dtype=torch.float64, device=self.device)
        loss_sum, squares = self._summed(torch.stack([self._loss_sum(), norm.square().to(self.device)]))
        grad_norm = math.sqrt(squares if self.sharded or self.world == 1 else squares / self.world)
        lr = self.rule.lr_at(state.step)
        updated = math.isfinite(loss_sum) and math.isfinite(grad_norm) and accepts(loss_sum / weight)
        if updated:
            self._update(lr, grad_norm)
        self._optimizer.zero_grad(set_to_none=True)
        return self._report(state, loss_sum=loss_sum, grad_norm=grad_norm, lr=lr, weight=weight, updated=updated)

    def _update(self, lr: float, grad_norm: float) -> None:
        if self.rule.max_grad_norm is not None:
            total = torch.tensor(grad_norm, dtype=torch.float32, device=self.device)
            clip_grads_with_norm_([owned for _, owned in self._owned], self.rule.max_grad_norm, total)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._owned.publish()

    def create_state(self) -> None:
        """Of what this rank owns."""
        fragments.create_state((flat for _, flat in self._owned), self._step_once, self._optimizer)

    def pieces(self) -> Iterator[Piece]:
        """Masters and optimizer state of what this rank owns."""
        return fragments.pieces(self._fragments(), self._optimizer)

    def restore(self, reader: StateReader, state: TrainState) -> None:
        """Every rank reads what it owns, and where all own everything, everything."""
        self.create_state()
        fragments.load(self._fragments(whole=True), self._optimizer, reader, optimizer_step=state.updates)
        self._owned.publish()

    def _step_once(self) -> None:
        self._optimizer.step()

    def _fragments(self, *, whole: bool = False) -> Iterator[Fragment]:
        """Replicated tensors are written in as many slices as there are ranks; `whole`: each rank reads all."""
        for name, flat in self._owned:
            numel = flat.numel()
            first, last = (0, 1) if whole else (self.rank, self.rank + 1)
            parts = 1 if whole else self.world
            start, end = numel * first // parts, numel * last // parts
            yield Fragment(
                name=name,
                numel=numel,
                start=start,
                length=end - start,
                flat=flat,
                offset=start,
                layout=f"whole/{name}",
                writes_blocks=self.rank == 0,
            )

    def full_tensors(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Every rank holds everything; rank 0 hands it out."""
        tensors: dict[str, Tensor] = dict(self._unwrapped().named_parameters(remove_duplicate=False))
        tensors.update(self._unwrapped().named_buffers())
        for name in names:
            yield name, self._whole(tensors[name].detach())

    def _whole(self, tensor: Tensor) -> Tensor:
        return tensor.cpu() if self.rank == 0 else tensor.new_empty(0)


def open_engine(name: str, params: NoParams, placed: Processes) -> SoloEngine:
    """The engine, before it has a model."""
    return SoloEngine(placed)
