"""What rooms hand each other.

Shape letters: T tokens of one micro-batch, all its documents laid end to end; S of them supervised; D documents in it;
G groups of documents.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

from distft.core.batch import IGNORE as IGNORE
from distft.core.batch import Batch as Batch
from distft.core.ranks import Ranks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    import torch
    from torch import Tensor, nn

    from distft.core.ranks import ReadGroup


@dataclass(frozen=True)
class LossTerms:
    """What an objective says of one micro-batch: sums and counts, never means."""

    loss_sum: Tensor
    """Scalar with gradient: the loss summed over supervised tokens (SFT) or pairs (preference objectives)."""
    figures: Mapping[str, Tensor] = field(default_factory=dict[str, "Tensor"])
    """By name, without gradient, the same names always: [2], sum and count, logged as a mean; or another kind of
    `distft.core.step_figures`."""

    by_group: Mapping[str, Tensor] = field(default_factory=dict[str, "Tensor"])
    """Figures of each group: [G], without gradient; evaluations keep them."""

    @classmethod
    def of(
        cls,
        loss_sum: Tensor,
        figures: Mapping[str, tuple[Tensor | float, ...]] | None = None,
        by_group: Mapping[str, Tensor] | None = None,
    ) -> LossTerms:
        """Return the terms with each figure's parts (a mean's: sum, count) as one fp64 tensor on the loss's device."""
        import torch

        made: dict[str, Tensor] = {}
        for name, parts in (figures or {}).items():
            on_device = (torch.as_tensor(part, dtype=torch.float64, device=loss_sum.device) for part in parts)
            made[name] = torch.stack([part.detach().reshape(()) for part in on_device])
        return cls(loss_sum, made, {name: value.detach().double() for name, value in (by_group or {}).items()})


class Policy(Protocol):
    """The model that is trained, as objectives see it. Each call is one forward; all ranks make the same calls."""

    def loss_sum(self, batch: Batch) -> LossTerms:
        """Return the cross-entropy summed over the supervised tokens, by the fastest way there is."""
        ...

    def measuring(self) -> Policy:
        """Return the policy of an evaluation: `loss_sum` has the share of labels that are the likeliest token too."""
        ...

    def token_logprobs(self, batch: Batch) -> Tensor:
        """Return fp32 [S], the log-probability of every label, in order; never [tokens, vocabulary] at once."""
        ...

    def token_logprobs_and_values(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return fp32 [S] twice: log-probabilities, and a critic's value before each label (head `lm_value`)."""
        ...

    def divergence(
        self, batch: Batch, hidden_SE: Tensor, kind: Literal["forward", "reverse", "js"], mixture: float
    ) -> tuple[Tensor, Tensor]:
        """Return fp32 [S] twice: from a teacher's distributions, by its hidden states [S, E]; and log-probabilities."""
        ...

    def scores(self, batch: Batch) -> Tensor:
        """Return fp32 [D], the value of a scalar head at each document's last token."""
        ...


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What one optimizer step did, equal on all ranks."""

    step: int
    loss: float
    """Sum over the whole step and all ranks ÷ its denominator."""
    grad_norm: float
    """Global L2 norm before clipping."""
    lr: float
    denominator: float
    """What the step's loss was divided by: supervised tokens, or pairs, of all ranks."""
    updated: bool = True
    """False: the update was left out, the weights are those of the step before."""
    samples: str = ""
    """The rows that a skipped step's loss comes from, by rank."""
    figures: Mapping[str, float] = field(default_factory=dict[str, float])
    """The objective's own, over the whole step and all ranks."""


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """Where the run stands, at an optimizer-step boundary."""

    step: int = 0
    """Optimizer steps taken."""
    samples: int = 0
    """Packed sequences consumed by the optimizer: the data position, independent of the world size."""
    tokens: int = 0
    """Real tokens consumed."""
    tokens_loss: int = 0
    """Supervised tokens consumed."""
    left_out: int = 0
    """Steps whose update was left out (see `distft.guard`)."""

    @property
    def updates(self) -> int:
        """What optimizers call their step."""
        return self.step - self.left_out

    def after(self, report: StepReport, *, samples: int, tokens: int, tokens_loss: int) -> TrainState:
        """Return the state one optimizer step later."""
        return replace(
            self,
            step=self.step + 1,
            left_out=self.left_out + (not report.updated),
            samples=self.samples + samples,
            tokens=self.tokens + tokens,
            tokens_loss=self.tokens_loss + tokens_loss,
        )


@dataclass(frozen=True, kw_only=True)
class Deferred:
    """Elements that are made when they are read: 8-bit moments as fp32 would take four times their memory at once."""

    length: int
    dtype: torch.dtype
    device: torch.device
    make: Callable[[int, int], Tensor]
    """(begin, end) -> those elements, 1-D, on the device."""


@dataclass(frozen=True)
class Piece:
    """Some consecutive elements of a flattened tensor: what checkpoints are made of, whoever wrote them."""

    name: str
    """Kind and parameter: `param/…` (fp32 master), `exp_avg/…`, `exp_avg_sq/…`."""
    start: int
    """Index of the first element in the flattened whole tensor."""
    numel: int
    """Elements of the whole tensor."""
    data: Tensor | Deferred
    """1-D, on any device; see `read`."""

    @property
    def length(self) -> int:
        """Elements of this piece."""
        return self.data.length if isinstance(self.data, Deferred) else self.data.numel()

    @property
    def stop(self) -> int:
        """One past the last element."""
        return self.start + self.length

    @property
    def num_bytes(self) -> int:
        """Bytes of the data."""
        return self.length * self.data.dtype.itemsize

    def read(self, begin: int = 0, end: int | None = None) -> Tensor:
        """Some of its elements, counted from its own first one: a view, or made now."""
        end = self.length if end is None else end
        if isinstance(self.data, Deferred):
            return self.data.make(begin, end)
        return self.data.detach()[begin:end]

    def part(self, begin: int, end: int) -> Piece:
        """Return the same elements as a piece of their own; nothing is copied or made."""
        data = self.data
        if isinstance(data, Deferred):
            make = functools.partial(_shifted, data.make, begin)
            sliced: Tensor | Deferred = Deferred(length=end - begin, dtype=data.dtype, device=data.device, make=make)
        else:
            sliced = data[begin:end]
        return Piece(self.name, self.start + begin, self.numel, sliced)


def _shifted(make: Callable[[int, int], Tensor], by: int, begin: int, end: int) -> Tensor:
    return make(by + begin, by + end)


class StateReader(Protocol):
    """The tensors of a checkpoint, by name."""

    def __contains__(self, name: object) -> bool:
        """Return whether there is such a tensor."""
        ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements [start, stop) of the flattened tensor, on the CPU.

        Raises:
            CheckpointError: no such tensor or interval.
        """
        ...


class Weights(Protocol):
    """A model on the meta device and the means to fill it unit by unit, straight where an engine wants it."""

    @property
    def module(self) -> nn.Module:
        """What is trained and wrapped: forward of one micro-batch's tensors -> loss (see `distft.model.causal`)."""
        ...

    blocks: list[nn.Module]
    """The repeated transformer blocks, in order: the unit of sharding, checkpointing and compilation."""
    ends: list[nn.Module]
    """The embedding and the head, where they share no weight: units of sharding that are used once a pass each."""
    dtype: torch.dtype
    """What the model computes in."""
    blocks_are_atomic: bool
    """Every weight of a block has its gradient once the block's input has: an engine may release all of them then."""

    def fill(self, unit: nn.Module, device: torch.device) -> None:
        """Give every parameter and buffer below `unit` that is still meta its values on `device`."""
        ...

    def read_within(self, group: ReadGroup | None) -> None:
        """Let the ranks of `group` read weights once between them from now on; None: every rank reads for itself.

        All of them then fill the same units in the same order.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class UpdateRule:
    """How trainable parameters change in one optimizer step; built by `train.py`, carried out by the engine."""

    build: Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
    """Parameter groups -> optimizer."""
    lr_at: Callable[[int], float]
    """Learning rate of a 0-based step."""
    weight_decay: float
    decayed: frozenset[str]
    """Names that weight decay applies to; decided on whole shapes, before any engine flattens them."""
    max_grad_norm: float | None
    """Global L2 norm that gradients are clipped to; None clips nothing."""
    matrices: frozenset[str] | None = None
    """Names of weight matrices that the optimizer treats otherwise than the rest, in a group that says so
    (`{"matrix": True}`). None: it treats all alike."""
    per_tensor: bool = False
    """The optimizer may step some tensors before others: `step()` changes those that have a gradient, each from its own
    state alone. False: it gets all gradients at once."""

    in_backward: bool = False
    """Each weight is updated in the backward pass, once its gradient is complete: one micro-batch, no clipping."""

    named: bool = False
    """Groups have the `names` of their tensors."""
    faster: frozenset[str] = frozenset()
    """Names of parameters whose learning rate is `lr_ratio` times that of the others."""
    lr_ratio: float = 1.0

    def groups(self, named: Iterable[tuple[str, Tensor]]) -> list[dict[str, Any]]:
        """Return Torch's parameter groups: decayed tensors first, the rest without decay; empty groups are left out.

        Weight matrices that are treated otherwise come before the other decayed tensors, with `matrix`; in each of
        these the faster ones come last, with `lr_ratio`, which engines multiply their rate by.
        """
        kinds = {
            (is_matrix, decays, is_faster): list[tuple[str, "Tensor"]]()
            for is_matrix, decays in ((True, True), (False, True), (False, False))
            for is_faster in (False, True)
        }
        for name, tensor in named:
            is_matrix = self.matrices is not None and name in self.matrices
            kinds[is_matrix, is_matrix or name in self.decayed, name in self.faster].append((name, tensor))
        return [
            {"params": [tensor for _, tensor in members], "weight_decay": self.weight_decay if decays else 0.0}
            | ({"matrix": True} if is_matrix else {})
            | ({"lr_ratio": self.lr_ratio} if is_faster else {})
            | ({"names": [name for name, _ in members]} if self.named else {})
            for (is_matrix, decays, is_faster), members in kinds.items()
            if members
        ]


class Engine(Ranks, Protocol):
    """Processes, and where tensors live: all that the loop and the other rooms know of either."""

    name: str
    device: torch.device
    collective_forward: bool
    """A forward is collective: every rank has to run as many as the others, gradients or not."""

    @property
    def model(self) -> nn.Module:
        """The wrapped module to call."""
        ...

    @property
    def inference_module(self) -> nn.Module:
        """The module to call where no gradients are wanted: the bare one, unless a forward has to gather weights."""
        ...

    def setup(self, weights: Weights, rule: UpdateRule, *, micros_per_step: int) -> None:
        """Fill, shard and wrap the model; create the optimizer over what this rank owns.

        Raises:
            MachineError: what runs is not what was asked for.
        """
        ...

    def place(self, batch: Batch) -> Batch:
        """Return the same micro-batch on this rank's device."""
        ...

    def sum_over_ranks(self, *values: float) -> list[float]:
        """Return the host numbers summed over all ranks (float64: exact for counts below 2**53)."""
        ...

    def accumulating(self, *, last: bool, seed: int) -> AbstractContextManager[None]:
        """Surround forward and backward of one micro-batch; `seed` starts its random numbers (dropout)."""
        ...

    def backward(self, terms: LossTerms, *, divide_by: float, samples: tuple[str, ...]) -> None:
        """Accumulate the gradient of (sum over ranks of loss_sum) / divide_by, whatever the library averages.

        The figures of `terms` are kept for the step's report.
        """
        ...

    def step(self, state: TrainState, denominator: float, allow_update: Callable[[float], bool]) -> StepReport:
        """Clip by the true global norm and update; or skip the update on all ranks and drop the gradients.

        The update is skipped when the loss or the norm is not finite on some rank, or when `allow_update`, called with
        the step's global loss on every rank, returns False.
        """
        ...

    def create_state(self) -> None:
        """Let the optimizer make its state, as it is before the first update; nothing where it has one."""
        ...

    def evaluating(self) -> AbstractContextManager[None]:
        """Surround forwards without gradients, dropout off."""
        ...

    def frozen_weights(self, reads: Callable[[str], bool]) -> Callable[[], AbstractContextManager[None]]:
        """Copy the trained weights, each rank its part; return a context in which forwards compute with the copies.

        `reads`: name of a parameter -> whether those forwards read it; the others are not copied.

        Entering and leaving it is collective. Inside, no update is made and nothing is saved.
        """
        ...

    def full_tensors(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Collective: whole tensors one at a time, on the CPU of rank 0; other ranks get empty ones."""
        ...

    def pieces(self) -> Iterator[Piece]:
        """Yield this rank's share of the training state; all ranks' together hold every element exactly once."""
        ...

    def restore(self, reader: StateReader, state: TrainState) -> None:
        """Take parameters and optimizer state from a checkpoint written under any engine and world size."""
        ...

    def close(self) -> None:
        """Leave the process group."""
        ...
