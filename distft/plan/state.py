"""Bytes of training state that one rank holds, exactly: weights, constants, gradients, masters, optimizer state.

Each engine is a rule for which elements of which tensors a rank has; the rules follow the libraries' code, and
`tests/dist/test_plan_exact.py` compares every figure with bytes counted in processes (`engine.state_bytes`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from distft.engine.update_groups import update_groups
from distft.optim import OptimizerSpec, StateBytes
from distft.plan.inventory import Inventory, Param

FP32 = 4
ZERO3_SUB_GROUP = 1_000_000_000
"""Elements of a rank's partition that DeepSpeed updates at a time (`sub_group_size`)."""
ZERO12_ALIGNMENT = 2
"""DeepSpeed pads a flat group to a multiple of this many elements for each rank (`nccl_start_alignment_factor`)."""


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
    optimizer: int
    pageable: int
    """Part of `optimizer`."""
    update: int
    """Made for the update beside `gradients`: fp32 copies of a group of tensors, less what has been freed by then."""
    on_host: int = 0
    """Bytes in host memory, because of offload."""

    @property
    def total(self) -> int:
        """On the device, at the end of a backward pass."""
        return self.weights + self.quant_constants + self.gradients + self.master + self.optimizer


@dataclass(frozen=True, kw_only=True)
class _How:
    """What gradients are stored in, and how the update takes them."""

    fp32: bool
    """Those of half-precision parameters are kept in fp32."""
    per_tensor: bool
    """A group of tensors at a time (see `OptimizerSpec.per_tensor`)."""

    def item_bytes(self, param: Param) -> int:
        """Of one element of its gradient."""
        return FP32 if self.fp32 else param.item_bytes


@dataclass(frozen=True, kw_only=True)
class _Flat:
    """What the optimizer updates as one tensor."""

    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return prod(self.shape)


def of_rank(
    inventory: Inventory,
    engine: str,
    optim: OptimizerSpec,
    optim_params: Any,
    *,
    world: int,
    rank: int = 0,
    offload: str = "none",
    fp32_gradients: bool = False,
) -> State:
    """State of one rank; rank 0 is among those that hold most.

    `fp32_gradients`: gradients of a half-precision model are kept in fp32 (see `distft.engine.grad_dtype`).
    """
    rule = _RULES[engine if engine in _RULES else "whole"]
    how = _How(fp32=fp32_gradients and inventory.dtype.itemsize < FP32, per_tensor=optim.per_tensor)
    state, flats = rule(inventory, world, rank, how)
    own = pageable = shared = 0
    for size in _sizes(optim, optim_params, [flat.shape for flat in flats]):
        own, pageable, shared = own + size.own, pageable + size.pageable, max(shared, size.shared)
    state = replace(state, optimizer=own + shared, pageable=pageable)
    return _offloaded(state, engine, offload, keeps_sums=how.fp32 and engine in ("zero1", "zero2"))


# -- which elements a rank has ---------------------------------------------------------------------------------------

_Rule = Callable[[Inventory, int, int, _How], tuple[State, list[_Flat]]]


def _whole(inventory: Inventory, world: int, rank: int, how: _How) -> tuple[State, list[_Flat]]:
    """Solo and ddp: everything. ddp's gradients are views of its buckets, which stay; fp32 sums do not."""
    params = inventory.params
    trained = [param for param in params if param.trained]
    stored = [param.numel * how.item_bytes(param) for param in trained]
    buckets = world > 1 and not how.fp32
    state = _state(
        params,
        weights=sum(param.stored_bytes for param in params),
        gradients=sum(stored),
        accumulating=sum(stored),
        kept_gradients=sum(stored) if buckets else 0,
        master=sum(FP32 * param.numel for param in trained if param.item_bytes != FP32),
        update=_copied([param.numel for param in trained], stored, how, frees=not buckets),
    )
    return state, [_Flat(shape=param.shape) for param in trained]


def _copied(numels: list[int], stored: list[int], how: _How, *, frees: bool) -> int:
    """Most bytes beside all stored gradients, as `MasterWeights.update` makes fp32 copies of those that are not.

    `frees`: a gradient's memory is free once its copy has been used; else it stays.
    """
    now = most = 0
    for group in update_groups(numels):
        copies = sum(FP32 * numels[at] for at in group if stored[at] != FP32 * numels[at])
        most = max(most, now + copies)
        freed = sum(stored[at] for at in group) if frees else 0
        now += (0 if how.per_tensor else copies) - freed
    return most


def _rows(inventory: Inventory, world: int, rank: int, how: _How) -> tuple[State, list[_Flat]]:
    """fsdp2: the rank-th of `world` equal chunks of rows; storages are padded to the first rank's chunk."""
    params = inventory.params
    trained = [param for param in params if param.trained]
    flats, masters, stored = [], 0, []
    for param in trained:
        rows, *rest = param.stored_shape
        chunk = -(-rows // world)
        mine = min(rows, (rank + 1) * chunk) - min(rows, rank * chunk)
        if mine * prod(rest) == 0:
            continue
        flats.append(_Flat(shape=(mine, *rest)))
        stored.append(mine * prod(rest) * how.item_bytes(param))
        masters += FP32 * mine * prod(rest) if param.item_bytes != FP32 else 0
    gradients = sum(stored) if how.fp32 else sum(_row_shard(param, world) for param in trained)
    state = _state(
        params,
        weights=sum(_row_shard(param, world) for param in params),
        gradients=gradients,
        accumulating=gradients,
        kept_gradients=0,
        master=masters,
        update=_copied([flat.numel for flat in flats], stored, how, frees=True),
    )
    return state, flats


def _row_shard(param: Param, world: int) -> int:
    rows, *rest = param.stored_shape
    return -(-rows // world) * prod(rest) * param.item_bytes


def _elements(inventory: Inventory, world: int, rank: int, how: _How) -> tuple[State, list[_Flat]]:
    """zero3: ceil(numel / world) elements of every tensor on every rank, padded; masters always, even of fp32."""
    params = inventory.params
    trained = [param for param in params if param.trained]
    flats = [_Flat(shape=(numel,)) for group in _groups(trained) for numel in _sub_groups(group, world)]
    local = sum(flat.numel for flat in flats)
    item = FP32 if how.fp32 else inventory.dtype.itemsize  # one buffer, whatever adapters compute in
    gradients = local * item
    state = _state(
        params,
        weights=sum(_share(param, world) * param.item_bytes for param in params),
        gradients=gradients,
        accumulating=gradients,
        kept_gradients=gradients,  # one flat buffer, made once
        master=FP32 * local,
        update=_flattened(flats, item),
    )
    return state, flats


def _share(param: Param, world: int) -> int:
    return -(-param.stored_numel // world)


def _sub_groups(group: list[Param], world: int) -> Iterator[int]:
    """A group's local elements, cut after the tensor that reaches ZERO3_SUB_GROUP of them."""
    if sum(param.numel for param in group) <= ZERO3_SUB_GROUP:
        yield sum(_share(param, world) for param in group)
        return
    filled = 0
    for param in group:
        filled += _share(param, world)
        if filled >= ZERO3_SUB_GROUP or param is group[-1]:
            yield filled
            filled = 0


def _flat_groups(inventory: Inventory, world: int, rank: int, how: _How, *, shards: bool) -> tuple[State, list[_Flat]]:
    """zero1 and zero2: each group laid end to end, padded and cut into `world` equal parts."""
    params = inventory.params
    trained = [param for param in params if param.trained]
    weights = sum(param.stored_bytes for param in params if not param.trained)
    item = inventory.dtype.itemsize  # DeepSpeed converts the module, adapters of another type too
    flats, gradients = [], 0
    for group in _groups(trained):
        numel = sum(param.numel for param in group)
        padded = -(-numel // (ZERO12_ALIGNMENT * world)) * ZERO12_ALIGNMENT * world
        part = padded // world
        weights += padded * item
        flats.append(_Flat(shape=(part,)))
        # fp32 ones are added into this rank's part, without what its tensors have beyond it.
        gradients += FP32 * part if how.fp32 else item * _gradients_touching(group, rank * part, part)
    whole = (FP32 if how.fp32 else item) * sum(param.numel for param in trained)
    state = _state(
        params,
        weights=weights,
        gradients=gradients,
        # zero1 reduces at the end of the step only, so it keeps every gradient until then; fp32 ones into its part.
        accumulating=gradients if shards else whole + (gradients if how.fp32 else 0),
        kept_gradients=0,
        master=FP32 * sum(flat.numel for flat in flats),
        update=0 if how.fp32 else _flattened(flats, max((param.item_bytes for param in trained), default=FP32)),
    )
    return state, flats


def _flattened(flats: list[_Flat], item: int) -> int:
    """DeepSpeed lays the gradients of one group end to end, then converts them to fp32: one group at a time."""
    return (FP32 + (item if item != FP32 else 0)) * max((flat.numel for flat in flats), default=0)


def _gradients_touching(group: list[Param], start: int, part: int) -> int:
    """Elements of every gradient that [start, start + part) of the group touches, whole, and of the padding.

    DeepSpeed keeps views of whole gradients: of a tensor that two ranks share, each holds all of it.
    """
    held, at, end = 0, 0, start + part
    for param in group:
        if at < end and at + param.numel > start:
            held += param.numel
        at += param.numel
    return held + max(0, end - max(at, start))


def _groups(trained: Iterable[Param]) -> list[list[Param]]:
    """The optimizer's parameter groups: with weight decay, and without; empty ones are left out."""
    trained = list(trained)
    groups = ([p for p in trained if p.decayed], [p for p in trained if not p.decayed])
    return [group for group in groups if group]


def _state(params: Iterable[Param], **figures: int) -> State:
    """Constants of 4-bit weights stay whole on every rank: no engine shards what is not a parameter."""
    return State(quant_constants=sum(param.constants_bytes for param in params), optimizer=0, pageable=0, **figures)


_RULES: dict[str, _Rule] = {
    "whole": _whole,
    "zero1": functools.partial(_flat_groups, shards=False),
    "zero2": functools.partial(_flat_groups, shards=True),
    "zero3": _elements,
    "fsdp2": _rows,
}


# -- what an optimizer keeps ------------------------------------------------------------------------------------------


def _sizes(optim: OptimizerSpec, params: Any, shapes: list[tuple[int, ...]]) -> Iterator[StateBytes]:
    """State of each tensor; of an optimizer that does not say, counted on a small one and scaled."""
    if optim.state_bytes is not None:
        yield from map(optim.state_bytes, shapes)
        return
    each = _probed(optim, params)
    yield from (StateBytes(own=round(each * prod(shape))) for shape in shapes)


def _probed(optim: OptimizerSpec, params: Any) -> float:
    """Bytes an element after one step on a CPU."""
    import torch

    side = 128
    probe = torch.nn.Parameter(torch.zeros(side, side))
    probe.grad = torch.zeros_like(probe)
    made = optim.build(params, [{"params": [probe], "weight_decay": 0.0}])
    made.step()
    slots = (value for key, value in made.state[probe].items() if key != "step" and isinstance(value, torch.Tensor))
    return sum(value.numel() * value.element_size() for value in slots) / side**2


# -- what offload moves ------------------------------------------------------------------------------------------------


def _offloaded(state: State, engine: str, offload: str, *, keeps_sums: bool) -> State:
    """Host memory instead of device memory.

    `optimizer` moves masters, moments, and under ZeRO the gradients with an fp32 copy; `all` the weights too.
    `keeps_sums`: fp32 sums of gradients are made on the device and moved for the update.
    """
    if offload == "none":
        return state
    moved = state.master + state.optimizer + state.gradients + state.update
    weights = state.weights if offload == "all" else 0
    return replace(
        state,
        weights=state.weights - weights,
        gradients=state.gradients if keeps_sums else 0,
        accumulating=state.accumulating if keeps_sums else 0,
        kept_gradients=0,
        master=0,
        optimizer=0,
        pageable=0,
        update=0,
        on_host=moved + weights,
    )
