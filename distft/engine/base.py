"""What every engine does the same way: placing batches, seeds, evaluation, and the finite check."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distft.core.errors import MachineError
from distft.core.step_figures import add_figures, addable, read_figures
from distft.core.types import Batch, LossTerms, StepReport, TrainState, UpdateRule
from distft.engine import processes
from distft.engine.gradient_sums import local
from distft.engine.process_ranks import ProcessRanks
from distft.engine.processes import Processes


class BaseEngine(ProcessRanks):
    """Common ground; subclasses say how the model is wrapped, how gradients meet, and how a step is taken."""

    name = ""
    collective_forward = False

    def __init__(self, processes: Processes) -> None:
        super().__init__(processes)
        self._processes = processes
        self._module: nn.Module | None = None
        self._rule: UpdateRule | None = None
        self._losses: list[tuple[Tensor, tuple[str, ...]]] = []
        self._figures: dict[str, Tensor] = {}

    @property
    def model(self) -> nn.Module:
        """The wrapped module to call."""
        assert self._module is not None, "setup() comes first"
        return self._module

    @property
    def inference_module(self) -> nn.Module:
        """What to call where no gradients are wanted."""
        return self.model

    @property
    def rule(self) -> UpdateRule:
        """How parameters change."""
        assert self._rule is not None, "setup() comes first"
        return self._rule

    def place(self, batch: Batch) -> Batch:
        """Return the same micro-batch on this rank's device (copies overlap with compute from pinned memory)."""
        if self.device.type == "cpu":
            return batch
        tensors = {
            field.name: self._copied(value)
            for field in dataclasses.fields(batch)
            if isinstance(value := getattr(batch, field.name), Tensor)
        }
        columns = {name: self._copied(column) for name, column in batch.columns.items()}
        return dataclasses.replace(batch, **tensors, columns=columns)

    def _copied(self, tensor: Tensor) -> Tensor:
        if tensor.device.type != "cpu":  # a column that was computed on the device
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)

    @contextlib.contextmanager
    def accumulating(self, *, last: bool, seed: int) -> Iterator[None]:
        """Surround one micro-batch's forward and backward.

        The seed names the data, not the process, so dropout repeats after a resume and on another world size.
        """
        torch.manual_seed(seed)
        yield

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Turn dropout and gradients off; afterwards the mode is the one that was there before."""
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.model.train(training)

    def frozen_weights(self, reads: Callable[[str], bool]) -> Callable[[], AbstractContextManager[None]]:
        """Copy this rank's part of the trained weights; return a context in which the model has them again.

        `reads`: name of a parameter -> whether forwards inside read it; the others are not copied.

        Inside, no update is made and nothing is saved. Weights and copies change places tensor by tensor, so that both
        keep their memory, and with it everything that refers to it.

        Raises:
            MachineError: they read nothing that is trained.
        """
        read = [weight for name, weight in self._weights_here() if reads(name.removeprefix("module."))]
        if not read:
            raise MachineError(
                "weights of before training are wanted, and none of those that are trained is among them"
            )
        weights = [weight for weight in read if weight.numel()]
        copies = [weight.clone() for weight in weights]

        @contextlib.contextmanager
        def frozen() -> Iterator[None]:
            self._exchange(weights, copies)
            try:
                yield
            finally:
                self._exchange(weights, copies)

        return frozen

    def _weights_here(self) -> Iterator[tuple[str, Tensor]]:
        """Yield what forwards read of trained parameters, of each the part that this rank stores."""
        named = self.model.named_parameters()
        yield from ((name, local(param.detach())) for name, param in named if param.requires_grad)

    def _forget_gathered(self) -> None:
        """Drop what was gathered of sharded weights, so that the next forward gathers again."""

    def _exchange(self, weights: list[Tensor], copies: list[Tensor]) -> None:
        self._forget_gathered()
        with torch.no_grad():
            for weight, copied in zip(weights, copies, strict=True):
                kept = weight.clone()
                weight.copy_(copied)
                copied.copy_(kept)

    def close(self) -> None:
        """Leave the process group, unless the caller made it."""
        processes.leave(self._processes)

    def _remember(self, terms: LossTerms, samples: tuple[str, ...]) -> None:
        """Keep a micro-batch's loss and add up its figures.

        Raises:
            MachineError: the figures are not those of the micro-batch before; ranks could not add them up.
        """
        if self._losses and self._figures.keys() != terms.figures.keys():
            raise MachineError(
                f"the objective gave the figures {sorted(terms.figures)} after {sorted(self._figures)}: "
                "every micro-batch of a run has to give the same"
            )
        self._losses.append((terms.loss_sum.detach(), samples))
        add_figures(self._figures, terms.figures)

    def _step_sums(self) -> Tensor:
        """Return this rank's loss sum over the step so far, and its figures as ranks add them; fp64 on the device."""
        loss = torch.stack([loss.double() for loss, _ in self._losses]).sum()
        return torch.cat([loss.reshape(1), *addable(self._figures, rank=self.rank, world=self.world)])

    def _summed(self, sums: Tensor, squares: Tensor | None = None) -> tuple[list[float], float]:
        """Sum `sums` and squared gradient norms over ranks on the host: the one sync of a step."""
        values = sums if squares is None else torch.cat([sums, squares.reshape(1)])
        if self.world > 1:
            # float64 on NCCL is fine: some numbers once a step.
            dist.all_reduce(values)
        host = values.tolist()
        return (host, math.nan) if squares is None else (host[:-1], host[-1])

    def _report(
        self, state: TrainState, *, sums: list[float], grad_norm: float, lr: float, denominator: float, updated: bool
    ) -> StepReport:
        samples = "" if updated else self._guilty()
        figures = read_figures(self._figures, sums[1:], world=self.world)
        self._losses.clear()
        self._figures.clear()
        return StepReport(
            step=state.step + 1,
            loss=sums[0] / denominator,
            grad_norm=grad_norm,
            lr=lr,
            denominator=denominator,
            updated=updated,
            samples=samples,
            figures=figures,
        )

    def _guilty(self) -> str:
        """Collective: the rows of micro-batches whose loss is not finite, else of each rank's largest, by rank."""
        losses = [(loss.item(), samples) for loss, samples in self._losses]
        mine = [samples for loss, samples in losses if not math.isfinite(loss)]
        everyone = self.gather(mine)
        if not any(everyone):
            everyone = self.gather([max(losses, key=lambda item: item[0])[1]] if losses else [])
        return "; ".join(
            f"rank {rank}: {', '.join(samples) or 'unnamed samples'}"
            for rank, micros in enumerate(everyone)
            for samples in micros
        )
