"""What an engine costs, as plain arithmetic on sizes: state it keeps on a rank, bytes it gathers, bytes it sends.

The planner asks these of `EngineSpec.footprint`, so that it names no engine. Each rule follows the library's code, and
`tests/dist/test_plan_exact.py` and `test_traffic.py` compare it with bytes counted in processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from distft.core.accelerators import GIB
from distft.core.registry import Params
from distft.engine.grad_dtype import GradDtype, keeps_fp32_gradients
from distft.engine.params import EngineParams, ShardWithin
from distft.engine.update_groups import update_groups

FP32 = 4
ROOT = -1
"""`ParamSizes.block` of what is in no block: embedding, last norm, head."""


class ParamSizes(Protocol):
    """One parameter, by the sizes that engines look at (`distft.plan.inventory.Param`)."""

    @property
    def item_bytes(self) -> int:
        """Bytes of one stored element."""
        ...

    @property
    def trained(self) -> bool:
        """Whether it gets a gradient."""
        ...

    @property
    def decayed(self) -> bool:
        """Whether it is in the optimizer's first group, with weight decay."""
        ...

    @property
    def faster(self) -> bool:
        """Whether it has a learning rate of its own, and so another group of the optimizer."""
        ...

    @property
    def block(self) -> int:
        """Index of its transformer block, a critic's behind the policy's, or ROOT."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape as the model means it."""
        ...

    @property
    def numel(self) -> int:
        """Elements that the model means."""
        ...

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the tensor that holds it."""
        ...

    @property
    def stored_numel(self) -> int:
        """Elements of the tensor that holds it."""
        ...

    @property
    def stored_bytes(self) -> int:
        """Bytes of the tensor that holds it, whole."""
        ...

    @property
    def constants_bytes(self) -> int:
        """What belongs to a 4-bit weight beside its packed values."""
        ...


class ModelSizes(Protocol):
    """A model as one recipe trains it (`distft.plan.inventory.Inventory`)."""

    @property
    def params(self) -> Sequence[ParamSizes]:
        """Parameters in the module's order, each tied tensor once."""
        ...

    @property
    def item_bytes(self) -> int:
        """Bytes of one element in the type that the model computes in."""
        ...

    @property
    def atomic(self) -> bool:
        """Whether whole blocks are gathered (see `core.types.Weights.blocks_are_atomic`)."""
        ...

    @property
    def total(self) -> int:
        """Parameters."""
        ...

    @property
    def trained(self) -> int:
        """Parameters that are trained."""
        ...

    @property
    def largest_4bit(self) -> int:
        """Weights of the largest layer that is stored in 4 bits; 0 without any."""
        ...

    def unit_numel(self, block: int, *, trained_only: bool = False) -> int:
        """Return the stored elements of one block, or of ROOT."""
        ...


@dataclass(frozen=True, kw_only=True)
class EngineSetup:
    """The ranks, the recipe's [engine] table, and what else a footprint follows from besides the model."""

    params: Params
    """Params of the engine that the footprint belongs to."""
    world: int
    node: int
    """Ranks of a node."""
    half: bool = False
    """The model computes in bf16."""
    micros_per_step: int = 1
    """Forwards of a step on one rank."""

    @property
    def grad_dtype(self) -> GradDtype:
        """What the recipe says of sums of gradients."""
        return self.params.grad_dtype if isinstance(self.params, EngineParams) else "auto"

    @property
    def reduced_bytes(self) -> int:
        """Bytes of one element of a gradient, between ranks."""
        return 2 if self.half and self.grad_dtype == "bfloat16" else FP32

    def group(self, within: ShardWithin) -> int:
        """Return the ranks of a group (see `distft.engine.groups`)."""
        if isinstance(within, int):
            return within
        return self.world if within == "world" else self.node


@dataclass(frozen=True, kw_only=True)
class GradientRule:
    """What gradients are stored in, and how the update takes them."""

    fp32: bool
    """Those of half-precision parameters are kept in fp32."""
    per_tensor: bool
    """A group of tensors at a time (see `OptimizerSpec.per_tensor`)."""

    def item_bytes(self, param: ParamSizes) -> int:
        """Return the bytes of one element of its gradient."""
        return FP32 if self.fp32 else param.item_bytes


@dataclass(frozen=True, kw_only=True)
class State:
    """Bytes on one rank's device unless `on_host`; see `engine.state_bytes.Held` for what each word covers."""

    weights: int
    quant_constants: int
    gradients: int
    """Between the last backward of a step and its update."""
    accumulating: int
    """Gradients while further micro-batches of the same step run."""
    kept_gradients: int
    """Gradient memory that is there from the first forward of a step on, even with one micro-batch."""
    master: int
    optimizer: int = 0
    pageable: int = 0
    """Part of `optimizer`."""
    update: int
    """Made for the update beside `gradients`: fp32 copies of a group of tensors, less what has been freed by then."""
    on_host: int = 0
    """Bytes in host memory, because of offload."""
    updated: tuple[tuple[int, ...], ...] = field(default=(), repr=False)
    """Shapes of what the optimizer updates as one tensor each."""

    @property
    def total(self) -> int:
        """Bytes on the device, at the end of a backward pass."""
        return self.weights + self.quant_constants + self.gradients + self.master + self.optimizer


@dataclass(frozen=True, kw_only=True)
class GatheredLayers:
    """Whole layers that a sharding engine puts together, and communication buckets."""

    num_bytes: int
    formula: str
    """The formula with its numbers in it."""


@dataclass(frozen=True, kw_only=True)
class Sent:
    """Bytes that a rank sends over the slowest link of its collectives, and inside a group of ranks."""

    micro: float = 0.0
    """What is sent in each micro-batch."""
    micro_inside: float = 0.0
    step: float = 0.0
    """Once a step."""
    step_inside: float = 0.0

    def of_step(self, micros: int) -> float:
        """Return all together, in a step of so many micro-batches."""
        return micros * (self.micro + self.micro_inside) + self.step + self.step_inside


class Footprint:
    """An engine that keeps everything whole on every rank: what is not overridden is as there."""

    shards_state = False
    """Each rank keeps a part of the training state only."""
    saves_memory = 0
    """Place among the engines that a plan offers where memory is short: those with larger numbers save more, and cost
    more traffic. 0: it is not offered."""
    sums_stay_on_device = False
    """Under offload, fp32 sums of gradients are made on the device and moved for the update."""
    gathers_inside_blocks = False
    """Adapters are gathered layer by layer inside a block, which selective recomputation cannot replay."""
    traffic = "nothing until the step ends"
    """What is sent in a micro-batch, in words."""

    def shards(self, setup: EngineSetup) -> int:
        """Return the ranks that cut one tensor among themselves, under an engine that cuts."""
        return setup.world

    def storage(self, shards: int) -> str:
        """Return what a rank keeps of each tensor, in words."""
        return "whole"

    def keeps_fp32_gradients(self, setup: EngineSetup) -> bool:
        """Return whether gradients of a bf16 model are kept in fp32 until the update."""
        return keeps_fp32_gradients(setup.grad_dtype, half=setup.half, micros_per_step=setup.micros_per_step)

    def state(self, model: ModelSizes, shards: int, rank: int, rule: GradientRule) -> State:
        """Return what rank `rank` of `shards` keeps, without the optimizer's state, which follows from `State.updated`.

        Gradients of a bucketed all-reduce are views of its buckets, which stay; fp32 sums do not.
        """
        trained = [param for param in model.params if param.trained]
        stored = [param.numel * rule.item_bytes(param) for param in trained]
        buckets = shards > 1 and not rule.fp32
        return State(
            weights=sum(param.stored_bytes for param in model.params),
            quant_constants=constants_bytes(model),
            gradients=sum(stored),
            accumulating=sum(stored),
            kept_gradients=sum(stored) if buckets else 0,
            master=sum(FP32 * param.numel for param in trained if param.item_bytes != FP32),
            update=copied_bytes([param.numel for param in trained], stored, rule, frees=not buckets),
            updated=tuple(param.shape for param in trained),
        )

    def accumulating_bytes(self, model: ModelSizes, setup: EngineSetup, state: State) -> int:
        """Return the gradients while a micro-batch runs that is not the step's last."""
        return state.accumulating if setup.micros_per_step > 1 else state.kept_gradients

    def load_bytes(self, model: ModelSizes, state: State) -> int:
        """Return the most bytes while weights are filled, sharded and wrapped, before masters; beside `State`'s own."""
        return state.weights + state.quant_constants + model.largest_4bit * model.item_bytes

    def gathered(self, model: ModelSizes, setup: EngineSetup) -> GatheredLayers:
        """Return the layers that are put together, and buckets."""
        if setup.world == 1:
            return GatheredLayers(num_bytes=0, formula="none: every layer is whole")
        return GatheredLayers(num_bytes=0, formula="none: ddp's buckets are the gradients themselves")

    def fresh_gradient_bytes(self, model: ModelSizes, *, added: bool) -> int:
        """Return the largest gradient, while it exists beside what it is added to.

        `added`: to sums of other micro-batches, or in another type.
        """
        return largest_trained_bytes(model)

    def sent(self, model: ModelSizes, setup: EngineSetup) -> Sent:
        """Return what a rank sends."""
        return Sent(step=2 * setup.reduced_bytes * model.trained * (setup.world - 1) / setup.world)

    def sent_in_forward(self, model: ModelSizes, setup: EngineSetup) -> float:
        """Bytes that a rank sends in a forward without gradients."""
        return 0.0


class SoloFootprint(Footprint):
    """One process: a gradient becomes the parameter's own."""

    def fresh_gradient_bytes(self, model: ModelSizes, *, added: bool) -> int:
        """Return the bytes of a fresh gradient; None where it is not added to another."""
        return largest_trained_bytes(model) if added else 0


def largest_trained_bytes(model: ModelSizes) -> int:
    """Return the bytes of the largest tensor that is trained; 0 without any."""
    return max((param.stored_bytes for param in model.params if param.trained), default=0)


def constants_bytes(model: ModelSizes) -> int:
    """Return the bytes of 4-bit weights' constants, which stay whole on every rank: they are no parameters."""
    return sum(param.constants_bytes for param in model.params)


def unit_bytes(model: ModelSizes) -> int:
    """Return the largest block, or what is in none: a unit is whole until it is sharded."""
    units = {param.block for param in model.params}
    return max(sum(param.stored_bytes for param in model.params if param.block == unit) for unit in units)


def block_bytes(model: ModelSizes) -> int:
    """Return the largest block."""
    return max(sum(p.stored_bytes for p in model.params if p.block == block) for block in _blocks(model))


def trained_in_block(model: ModelSizes) -> int:
    """Return the most trained elements of one block."""
    return max(model.unit_numel(block, trained_only=True) for block in _blocks(model))


def _blocks(model: ModelSizes) -> set[int]:
    return {param.block for param in model.params} - {ROOT}


def copied_bytes(numels: list[int], stored: list[int], rule: GradientRule, *, frees: bool) -> int:
    """Return the most bytes beside all stored gradients: fp32 copies that `MasterWeights.update` makes.

    `frees`: a gradient's memory is free once its copy has been used; else it stays.
    """
    now = most = 0
    for group in update_groups(numels):
        copies = sum(FP32 * numels[index] for index in group if stored[index] != FP32 * numels[index])
        most = max(most, now + copies)
        freed = sum(stored[index] for index in group) if frees else 0
        now += (0 if rule.per_tensor else copies) - freed
    return most


def gib_text(num_bytes: float) -> str:
    """Return `1.23 GiB`, or MiB where that is little."""
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB / 100 else f"{num_bytes / 2**20:.2f} MiB"
