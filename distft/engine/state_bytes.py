"""Measures the bytes of training state that this rank really holds, on the engine's own tensors.

What a plan predicts is compared with this (`tests/dist/test_plan_exact.py`), so nothing here is computed from shapes:
every figure is the size of a storage that exists, counted once however many views of it there are, whole even where
a view uses a part of it (padding is memory too).

Gradients exist between the last backward of a step and its update, optimizer state from the first update on: call
`gradient_bytes` before `step` and `measure` after it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

PAGED_NUMEL = 100_000
"""bitsandbytes puts the state of smaller tensors into ordinary memory (`Optimizer8bit.get_state_buffer`)."""


@dataclass(frozen=True, kw_only=True)
class MeasuredStateBytes:
    """Bytes on one rank, by component; no byte is in two of them, but `pageable` is a part of `optimizer`."""

    weights: int
    """What the model computes with: shards where the engine shards; 4-bit weights packed."""
    quant_constants: int
    """Block constants and code books of 4-bit weights."""
    master: int
    """fp32 copies that the optimizer updates, where they are not the weights themselves."""
    optimizer: int
    """Moments, with constants and code books of 8-bit ones; without step counters, a few bytes each."""
    pageable: int
    """Moments that a paged optimizer keeps in managed memory on a GPU."""


def measure(engine: Any) -> MeasuredStateBytes:
    """Return the state after an optimizer step.

    `engine` is any that has been set up with a model.
    """
    seen: set[int] = set()
    weights = _bytes(_weights(_model(engine)), seen)
    constants = _bytes(_constants(_model(engine)), seen)
    master = _bytes(_masters(engine), seen)
    inner = _inner(engine)
    state = [tensor for slots in inner.state.values() for key, tensor in slots.items() if key != "step"]
    return MeasuredStateBytes(
        weights=weights,
        quant_constants=constants,
        master=master,
        optimizer=_bytes((tensor for tensor in state if isinstance(tensor, Tensor)), seen),
        pageable=sum(
            tensor.numel() * tensor.element_size()
            for slots in inner.state.values()
            for key, tensor in slots.items()
            if getattr(inner, "is_paged", False) and key in ("state1", "state2") and tensor.numel() >= PAGED_NUMEL
        ),
    )


def gradient_bytes(engine: Any) -> int:
    """Return the bytes of gradients between the last backward of a step and its update."""
    seen: set[int] = set()
    params = list(_model(engine).parameters())
    total = _bytes((param.grad for param in params), seen)
    if (sums := getattr(engine, "_sums", None)) is not None:
        total += _bytes((sums.of(param) for param in params), seen)
    total += _bytes((getattr(param, "grad_accum", None) for param in params), seen)  # DeepSpeed's stage 1
    zero = getattr(engine, "_optimizer", None)
    for name in ("grad_partitions_flat_buffer", "averaged_gradients", "all_grad_tensors", "grads_in_partition"):
        total += _bytes(_tensors(getattr(zero, name, None)), seen)
    return total


def _model(engine: Any) -> nn.Module:
    """Return the module with its own parameter names, without the engine's wrapper."""
    module = engine.model
    return getattr(module, "module", module)


def _inner(engine: Any) -> torch.optim.Optimizer:
    """Return the optimizer that was built, without the engine's wrapper."""
    return getattr(engine._optimizer, "optimizer", engine._optimizer)


def _weights(module: nn.Module) -> Iterator[Tensor]:
    for param in module.parameters():
        shard = getattr(param, "ds_tensor", None)  # DeepSpeed's; the parameter itself is empty meanwhile
        yield param if shard is None else shard


def _constants(module: nn.Module) -> Iterator[Tensor]:
    for part in module.modules():
        states = [getattr(part, "quant_state", None), *part.__dict__.get("quant_states", {}).values()]
        for holder in (quant_state for state in states for quant_state in (state, getattr(state, "state2", None))):
            yield from (value for value in vars(holder).values() if isinstance(value, Tensor)) if holder else ()


def _masters(engine: Any) -> Iterator[Tensor]:
    owned = getattr(engine, "_owned", None)
    yield from (tensor for _, tensor in owned) if owned is not None else engine._flats()


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield every tensor in nested dicts and lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _bytes(tensors: Iterable[Tensor | None], seen: set[int]) -> int:
    """Return the sizes of the storages behind `tensors` that are not in `seen` yet."""
    total = 0
    for tensor in tensors:
        if tensor is None:
            continue
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        storage = local.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total
