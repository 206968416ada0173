"""Bytes of training state that one rank holds, exactly: weights, constants, gradients, masters, optimizer state.

Which elements of which tensors a rank has, the engine's footprint says (`distft.engine.footprint`); the optimizer's
state and offload are added here. `tests/dist/test_plan_exact.py` compares every figure with bytes counted in processes
(`engine.state_bytes`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import prod
from typing import Any

from distft.engine import ENGINES
from distft.engine.footprint import FP32, GradientRule, State
from distft.optim import OptimizerSpec, StateBytes
from distft.plan.inventory import ROOT, Inventory, Param


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
    in_backward: bool = False,
) -> State:
    """Return the state of one rank; rank 0 is among those that hold most.

    `fp32_gradients`: gradients of a half-precision model are kept in fp32 (see `distft.engine.grad_dtype`).
    `in_backward`: each is used up once it is complete.
    """
    footprint = ENGINES[engine].footprint
    rule = GradientRule(fp32=fp32_gradients and inventory.item_bytes < FP32, per_tensor=optim.per_tensor)
    state = footprint.state(inventory, world, rank, rule)
    per_tensor = pageable = shared = 0
    for size in _sizes(optim, optim_params, inventory, state.updated):
        per_tensor, pageable, shared = per_tensor + size.per_tensor, pageable + size.pageable, max(shared, size.shared)
    state = replace(state, optimizer=per_tensor + shared, pageable=pageable)
    if in_backward:
        state = replace(state, gradients=0, accumulating=0, kept_gradients=0, update=0)
    return _offloaded(state, offload, keeps_sums=rule.fp32 and footprint.sums_stay_on_device)


# -- what an optimizer keeps ------------------------------------------------------------------------------------------


def size_of(optim: OptimizerSpec, params: Any, param: Param) -> StateBytes | None:
    """Return what is kept for one whole parameter; None if the optimizer does not say."""
    if optim.matrix_state_bytes is not None and is_block_matrix(param):
        return optim.matrix_state_bytes(params, param.shape)
    return None if optim.state_bytes is None else optim.state_bytes(param.shape)


def is_block_matrix(param: Param) -> bool:
    """Return whether it is a trained weight matrix of a block, which some optimizers have a rule of their own for."""
    return param.trained and param.block != ROOT and len(param.shape) >= 2


def _sizes(
    optim: OptimizerSpec, params: Any, inventory: Inventory, shapes: Sequence[tuple[int, ...]]
) -> Iterator[StateBytes]:
    """Yield the state of each tensor; of an optimizer that does not say, counted on a small one and scaled."""
    if optim.matrix_state_bytes is not None:  # it has whole parameters, so they are the tensors
        yield from (size for param in inventory.params if param.trained and (size := size_of(optim, params, param)))
        return
    if optim.state_bytes is not None:
        yield from map(optim.state_bytes, shapes)
        return
    each = _probed(optim, params)
    yield from (StateBytes(per_tensor=round(each * prod(shape))) for shape in shapes)


def _probed(optim: OptimizerSpec, params: Any) -> float:
    """Return the bytes per element after one step on a CPU."""
    import torch

    side = 128
    probe = torch.nn.Parameter(torch.zeros(side, side))
    probe.grad = torch.zeros_like(probe)
    made = optim.build(params, [{"params": [probe], "weight_decay": 0.0}])
    made.step()
    slots = (value for key, value in made.state[probe].items() if key != "step" and isinstance(value, torch.Tensor))
    return sum(value.numel() * value.element_size() for value in slots) / side**2


# -- what offload moves ------------------------------------------------------------------------------------------------


def _offloaded(state: State, offload: str, *, keeps_sums: bool) -> State:
    """Move state to host memory.

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
