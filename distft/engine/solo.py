"""One process, plain torch: the reference that every other engine must agree with."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_

from distft.core.errors import MachineError, NumericError
from distft.core.types import LossTerms, Piece, StateReader, StepReport, TrainState, UpdateRule, Weights
from distft.engine import fragments
from distft.engine.backward_updates import BackwardUpdates
from distft.engine.base import BaseEngine
from distft.engine.fragments import Fragment
from distft.engine.grad_dtype import GradDtype, keeps_fp32_gradients
from distft.engine.gradient_sums import GradientSums, warn_of_bf16_sums
from distft.engine.master_weights import MasterWeights
from distft.engine.node_group import reading_once
from distft.engine.params import EngineParams
from distft.engine.processes import Processes


class SoloEngine(BaseEngine):
    """The step that solo, ddp and fsdp2 share; subclasses change how the model is wrapped and what ranks hold."""

    name = "solo"
    sharded = False
    """Ranks hold different pieces, so squared gradient norms add up over ranks."""

    def __init__(self, params: EngineParams, processes: Processes) -> None:
        super().__init__(processes)
        self._grad_dtype: GradDtype = params.grad_dtype
        self._sums: GradientSums | None = None
        self._in_backward: BackwardUpdates | None = None
        self._next_step = 0
        """0-based step of the next backward pass, whose rate an update inside it takes."""

    def setup(self, weights: Weights, rule: UpdateRule, *, micros_per_step: int) -> None:
        """Fill, wrap, and create the optimizer over what this rank owns."""
        self._rule = rule
        half = weights.dtype == torch.bfloat16
        if half and self._grad_dtype == "bfloat16" and self.rank == 0:
            warn_of_bf16_sums(micros_per_step)
        self._sums_apart = keeps_fp32_gradients(self._grad_dtype, half=half, micros_per_step=micros_per_step)
        with reading_once(weights, self._processes):
            self._module = self._wrap(weights)
        self._module.train()
        if self._sums_apart:
            self._sums = self._add_in_fp32()
        named = self._unwrapped().named_parameters()
        self._owned = MasterWeights(named, sums=self._sums, per_tensor=rule.per_tensor)
        self._optimizer = rule.build(rule.groups(self._owned))
        if rule.in_backward:
            self._in_backward = self._update_in_backward(micros_per_step)

    def _update_in_backward(self, micros_per_step: int) -> BackwardUpdates:
        """Return what updates weights while gradients arrive.

        Raises:
            MachineError: gradients arrive in parts, or not on the parameters.
        """
        if micros_per_step > 1 or self._sums_apart or self.rule.max_grad_norm is not None:
            raise MachineError(
                f"an update in the backward pass takes one micro-batch a step ({micros_per_step} here), no clipping, "
                "and no sums in fp32"
            )
        return BackwardUpdates(self._owned, self._optimizer)

    def _add_in_fp32(self) -> GradientSums | None:
        """Return what adds gradients up, where autograd would do it in bf16."""
        return GradientSums(self._unwrapped().parameters())

    def _wrap(self, weights: Weights) -> nn.Module:
        for unit in [*weights.blocks, weights.module]:  # a rank that reads for others reads no more than a block ahead
            weights.fill(unit, self.device)
        return weights.module

    def _unwrapped(self) -> nn.Module:
        return self.model

    @property
    def inference_module(self) -> nn.Module:
        """Wrapping serves gradients here, and weights are whole; fsdp2 alone gathers in the wrapped module."""
        return self.model if self.sharded else self._unwrapped()

    @contextlib.contextmanager
    def accumulating(self, *, last: bool, seed: int) -> Iterator[None]:
        """Tell sums that are kept apart from autograd's which micro-batch is the step's last."""
        if self._sums is not None:
            self._sums.begin_micro(last=last)
        with super().accumulating(last=last, seed=seed):
            yield

    def backward(self, terms: LossTerms, *, divide_by: float, samples: tuple[str, ...]) -> None:
        """Multiply by the world where ddp and fsdp2 average gradients over ranks, to make that a sum."""
        self._remember(terms, samples)
        if self._in_backward is None:
            (terms.loss_sum * (self.world / divide_by)).backward()
            return
        # The loss of all ranks decides before a weight is changed.
        sums, _ = self._summed(self._step_sums())
        self._set_rates(self.rule.lr_at(self._next_step))
        with self._in_backward.active(updates=math.isfinite(sums[0])):
            (terms.loss_sum * (self.world / divide_by)).backward()

    def step(self, state: TrainState, denominator: float, allow_update: Callable[[float], bool]) -> StepReport:
        """Clip and update with one host sync: loss, figures and squared norm together."""
        if self._in_backward is not None:
            return self._after_backward(state, denominator, allow_update, self._in_backward.norms())
        norm = _norm(self._owned.gradients(), self.device)
        sums, squares = self._summed(self._step_sums(), norm.square())
        grad_norm = math.sqrt(squares / self._copies_of_gradients)
        lr = self.rule.lr_at(state.step)
        updated = math.isfinite(sums[0]) and math.isfinite(grad_norm) and allow_update(sums[0] / denominator)
        if updated:
            self._update(lr, grad_norm)
        self._owned.drop_gradients()
        return self._report(state, sums=sums, grad_norm=grad_norm, lr=lr, denominator=denominator, updated=updated)

    def _after_backward(
        self, state: TrainState, denominator: float, allow_update: Callable[[float], bool], norms: list[Tensor]
    ) -> StepReport:
        """Report a step whose weights were updated in its backward pass.

        Raises:
            NumericError: on all ranks; a gradient was not finite, and weights were changed by it.
        """
        if self._next_step != state.step:
            raise MachineError(f"step {state.step + 1} was updated with the rate of step {self._next_step + 1}")
        sums, squares = self._summed(self._step_sums(), _norm_of(norms, self.device).square())
        grad_norm = math.sqrt(squares / self._copies_of_gradients)
        updated = math.isfinite(sums[0])
        if updated and not (math.isfinite(grad_norm) and allow_update(sums[0] / denominator)):
            raise NumericError(
                f"step {state.step + 1}: gradient norm {grad_norm} though the loss is finite, and weights were changed "
                "by it in the backward pass: the same command goes on from the last checkpoint. Without "
                "optimizer_in_backward such an update is left out"
            )
        self._next_step = state.step + 1
        lr = self.rule.lr_at(state.step)
        return self._report(state, sums=sums, grad_norm=grad_norm, lr=lr, denominator=denominator, updated=updated)

    @property
    def _copies_of_gradients(self) -> int:
        """Ranks that hold the same gradient."""
        return 1 if self.sharded else self.world

    def _update(self, lr: float, grad_norm: float) -> None:
        self._set_rates(lr)
        total = torch.tensor(grad_norm, dtype=torch.float32, device=self.device)

        def step(masters: list[nn.Parameter]) -> None:
            if self.rule.max_grad_norm is not None:
                clip_grads_with_norm_(masters, self.rule.max_grad_norm, total)
            self._optimizer.step()

        self._owned.update(step)

    def _set_rates(self, lr: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group.get("lr_ratio", 1.0)

    def create_state(self) -> None:
        """Create the state of what this rank owns."""
        optimizer = self._optimizer
        self._owned.for_each_group(lambda masters: fragments.create_state(masters, self._step_once, optimizer))

    def pieces(self) -> Iterator[Piece]:
        """Yield the masters and optimizer state of what this rank owns."""
        return fragments.pieces(self._fragments(), self._optimizer)

    def restore(self, reader: StateReader, state: TrainState) -> None:
        """Restore what this rank owns: everything, where all ranks own everything."""
        self.create_state()
        fragments.load(self._fragments(whole=True), self._optimizer, reader, optimizer_step=state.updates)
        self._owned.copy_to_model()
        self._next_step = state.step

    def _step_once(self) -> None:
        self._optimizer.step()

    def _fragments(self, *, whole: bool = False) -> Iterator[Fragment]:
        """Cut replicated tensors into as many slices as there are ranks; `whole`: each rank reads all."""
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
        """Yield whole tensors, which every rank holds; rank 0 hands them out."""
        tensors: dict[str, Tensor] = dict(self._unwrapped().named_parameters(remove_duplicate=False))
        tensors.update(self._unwrapped().named_buffers())
        for name in names:
            yield name, self._whole(tensors[name].detach())

    def _whole(self, tensor: Tensor) -> Tensor:
        return tensor.cpu() if self.rank == 0 else tensor.new_empty(0)


def _norm(gradients: list[Tensor], device: torch.device) -> Tensor:
    """Return the L2 norm of all together, float64 on `device`; squares are added in fp32."""
    if not gradients:
        return torch.zeros((), dtype=torch.float64, device=device)
    each: Any = torch._foreach_norm(gradients, 2, torch.float32)  # pyright: ignore[reportPrivateImportUsage]
    return _norm_of(each, device)


def _norm_of(norms: Any, device: torch.device) -> Tensor:
    if not norms:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.linalg.vector_norm(torch.stack(norms)).double().to(device)


def open_engine(name: str, params: EngineParams, processes: Processes) -> SoloEngine:
    """Return the engine, before it has a model."""
    return SoloEngine(params, processes)
