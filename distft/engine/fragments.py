"""Training state as 1-D intervals of whole tensors, whichever way an engine lays them out.

Every engine keeps, for each trainable parameter, a contiguous interval of its flattened fp32 value inside some flat
tensor that the optimizer updates. A `Fragment` says where. From fragments alone the parameters and the optimizer's
state are read and written under names that no engine appears in, so a checkpoint of one engine and world size loads
into any other.

8-bit states are stored as the fp32 values they stand for, beside the constants of their blocks under the name of the
layout that cut them. The same layout finds its constants and gets its codes back bit for bit; another one quantises
the values anew, in its own blocks: rounded once more, and within the step of 8 bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distft.core.types import Deferred, Piece, StateReader

PARAM = "param"
_NAMES = {"state1": "exp_avg", "state2": "exp_avg_sq"}
"""bitsandbytes' names of Adam's and Lion's moments -> torch's, so that states cross optimizers too."""
BLOCK = 256
"""Elements that share one constant in bitsandbytes' 8-bit states."""
_CODE_BOOKS = {"qmap1", "qmap2"}
_CONSTANTS = ("absmax1", "absmax2", "qmap1", "qmap2", "step")


@dataclass(frozen=True, kw_only=True)
class Fragment:
    """flat[offset : offset + length] holds [start, start + length) of the flattened parameter `name`."""

    name: str
    numel: int
    """Elements of the whole parameter."""
    start: int
    length: int
    flat: Tensor
    """What the optimizer updates: fp32; the key of its state."""
    offset: int
    layout: str
    """Names `flat` among all flat tensors of all layouts: equal names mean equal cuts."""
    writes_blocks: bool = True
    """This rank stores the block constants of `flat`; of replicas, one does."""

    def of(self, tensor: Tensor) -> Tensor:
        """Return this fragment's elements of a tensor laid out like `flat`."""
        return tensor.reshape(-1)[self.offset : self.offset + self.length]


def pieces(fragments: Iterable[Fragment], optimizer: torch.optim.Optimizer) -> Iterator[Piece]:
    """Yield what this rank writes: masters and optimizer state, one interval at a time."""
    seen: set[str] = set()
    for held in fragments:
        state = optimizer.state.get(held.flat, {})
        if held.writes_blocks and held.layout not in seen:
            seen.add(held.layout)
            for key in _elementwise(state, held.flat):
                if state[key].dtype == torch.uint8:
                    constants = _constants(state, key)
                    yield Piece(name=_blocks(key, held), start=0, numel=constants.numel(), data=constants)
            for key in _of_other_shape(state, held.flat):
                values = state[key].detach().reshape(-1)
                yield Piece(name=f"{key}/{held.layout}", start=0, numel=values.numel(), data=values)
        if held.length == 0:
            continue
        yield _piece(PARAM, held, held.of(held.flat.detach()))
        for key in _elementwise(state, held.flat):
            yield _piece(_NAMES.get(key, key), held, _values(state, key, held))


def _piece(kind: str, held: Fragment, data: Tensor | Deferred) -> Piece:
    return Piece(name=f"{kind}/{held.name}", start=held.start, numel=held.numel, data=data)


def load(
    fragments: Iterable[Fragment], optimizer: torch.optim.Optimizer, reader: StateReader, *, optimizer_step: int
) -> None:
    """Fill masters and optimizer state (which must exist: see `create_state`) from a checkpoint's intervals."""
    by_flat: dict[int, list[Fragment]] = {}
    for held in fragments:
        by_flat.setdefault(id(held.flat), []).append(held)
    with torch.no_grad():
        for together in by_flat.values():
            flat = together[0].flat
            _fill(flat, PARAM, together, reader)
            state = optimizer.state.get(flat, {})
            for key in _elementwise(state, flat):
                eight_bit = state[key].dtype == torch.uint8
                values = torch.zeros_like(flat) if eight_bit else state[key]
                _fill(values, _NAMES.get(key, key), together, reader)
                if eight_bit:
                    name = _blocks(key, together[0])
                    stored = reader.read(name) if name in reader else None
                    _quantize_into(state, key, values, stored)
            for key in _of_other_shape(state, flat):
                state[key].copy_(reader.read(f"{key}/{together[0].layout}").view_as(state[key]))
            if isinstance(state.get("step"), Tensor):
                state["step"].fill_(optimizer_step)
            elif "step" in state:
                state["step"] = optimizer_step


def _fill(values: Tensor, kind: str, together: Iterable[Fragment], reader: StateReader) -> None:
    for held in together:
        held.of(values).copy_(reader.read(f"{kind}/{held.name}", held.start, held.start + held.length))


def _blocks(key: str, held: Fragment) -> str:
    return f"blocks/{_NAMES.get(key, key)}/{held.layout}"


def _constants(state: dict[str, Any], key: str) -> Tensor:
    return state[f"absmax{key.removeprefix('state')}"]


def create_state(flats: Iterable[Tensor], step: Callable[[], None], optimizer: torch.optim.Optimizer) -> None:
    """Let the optimizer make the state that it has none of yet, as it is before its first update.

    One step of zero gradients at learning rate zero changes no weight. What it leaves is set to zero in place and not
    dropped: bitsandbytes never frees managed memory.

    Args:
        flats: what the optimizer updates.
        step: takes the optimizer's step.
        optimizer: whose state is made.
    """
    flats, groups = list(flats), optimizer.param_groups
    if all(flat in optimizer.state for flat in flats):
        return
    rates = [group["lr"] for group in groups]
    before = [flat.grad for flat in flats]  # DeepSpeed keeps a buffer there when it offloads
    for group in groups:
        group["lr"] = 0.0
    for flat in flats:
        flat.grad = torch.zeros_like(flat)
    step()
    for flat, grad in zip(flats, before, strict=True):
        flat.grad = grad
        state = optimizer.state[flat]
        for key in state.keys() - _CODE_BOOKS:
            state[key] = state[key].zero_() if isinstance(state[key], Tensor) else 0
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate


def _elementwise(state: dict[str, Any], flat: Tensor) -> list[str]:
    """Return the names of the state tensors that hold one element per element of `flat`."""
    return [key for key in _tensors(state) if state[key].numel() == flat.numel()]


def _of_other_shape(state: dict[str, Any], flat: Tensor) -> list[str]:
    """Return the others (adafactor's rows and columns): they belong to a layout, and only whole matrices have them."""
    return [key for key in _tensors(state) if state[key].numel() != flat.numel()]


def _tensors(state: dict[str, Any]) -> list[str]:
    return [key for key, values in state.items() if isinstance(values, Tensor) and key not in _CONSTANTS]


def _values(state: dict[str, Any], key: str, held: Fragment) -> Tensor | Deferred:
    """Return this fragment's elements of a state; 8-bit ones as the fp32 they stand for."""
    codes = state[key]
    if codes.dtype != torch.uint8:
        return held.of(codes.detach())
    make = functools.partial(_dequantized, state, key, held.offset)
    # Paged codes are managed memory, which torch takes for a CPU's; kernels run where the constants are.
    return Deferred(length=held.length, dtype=torch.float32, device=_constants(state, key).device, make=make)


def _dequantized(state: dict[str, Any], key: str, offset: int, begin: int, end: int) -> Tensor:
    """Return the elements [offset + begin, offset + end) of an 8-bit state, block by block around them."""
    from bitsandbytes import functional

    codes, number = state[key], key.removeprefix("state")
    begin, end = offset + begin, offset + end
    first, last = begin // BLOCK, -(-end // BLOCK)
    absmax = state[f"absmax{number}"][first:last].contiguous()
    blocks = codes.reshape(-1)[first * BLOCK : last * BLOCK].contiguous().to(absmax.device)
    constants: Any = {"absmax": absmax, "code": state[f"qmap{number}"]}
    whole = functional.dequantize_blockwise(blocks, blocksize=BLOCK, **constants)
    return whole[begin - first * BLOCK : end - first * BLOCK]


def _quantize_into(state: dict[str, Any], key: str, values: Tensor, constants: Tensor | None) -> None:
    """Quantise in the optimizer's own code book; with the constants that made the values, exactly."""
    from bitsandbytes import functional

    book = state[f"qmap{key.removeprefix('state')}"]
    if constants is None:
        codes, made = functional.quantize_blockwise(values.contiguous(), code=book, blocksize=BLOCK)
        _constants(state, key).copy_(made.absmax)
        state[key].copy_(codes)
        return
    constants = constants.to(values.device)
    per_element = constants.repeat_interleave(BLOCK)[: values.numel()].view_as(values)
    middles = (book[1:] + book[:-1]) / 2  # the book is sorted: the nearest code lies between two middles
    state[key].copy_(torch.bucketize(values / per_element.clamp(min=torch.finfo(torch.float32).tiny), middles))
    _constants(state, key).copy_(constants)
