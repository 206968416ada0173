"""Training state as 1-D intervals of whole tensors, whichever way an engine lays them out.

Every engine keeps, for each trainable parameter, a contiguous interval of its flattened fp32 value inside some flat
tensor that the optimizer updates. A `Fragment` says where. From fragments alone the parameters and the optimizer's
state are read and written under names that no engine appears in, so a checkpoint of one engine and world size loads
into any other.

States of few bits are stored as the fp32 values they stand for, beside the constants of their blocks under the name of
the layout that cut them. The same layout finds its constants and gets its codes back bit for bit; another one quantises
the values anew, in its own blocks: rounded once more, and within the step of their bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

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
            for key in _elementwise(state, held.flat, optimizer):
                if (coded := _coded(optimizer, state, key)) is not None:
                    constants = coded.constants(state, key)
                    yield Piece(name=_blocks(key, held), start=0, numel=constants.numel(), data=constants)
            for key in _of_other_shape(state, held.flat, optimizer):
                values = state[key].detach().reshape(-1)
                yield Piece(name=f"{key}/{held.layout}", start=0, numel=values.numel(), data=values)
        if held.length == 0:
            continue
        yield _piece(PARAM, held, held.of(held.flat.detach()))
        for key in _elementwise(state, held.flat, optimizer):
            yield _piece(_NAMES.get(key, key), held, _values(_coded(optimizer, state, key), state, key, held))


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
            for key in _elementwise(state, flat, optimizer):
                coded = _coded(optimizer, state, key)
                values = state[key] if coded is None else torch.zeros_like(flat)
                _fill(values, _NAMES.get(key, key), together, reader)
                if coded is not None:
                    name = _blocks(key, together[0])
                    stored = reader.read(name) if name in reader else None
                    coded.encode_into(state, key, values, stored)
            for key in _of_other_shape(state, flat, optimizer):
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


def _elementwise(state: dict[str, Any], flat: Tensor, optimizer: torch.optim.Optimizer) -> list[str]:
    """Return the names of the state tensors that hold one element, or a code of one, per element of `flat`."""
    return [key for key in _tensors(state, optimizer) if _is_elementwise(state, key, flat, optimizer)]


def _of_other_shape(state: dict[str, Any], flat: Tensor, optimizer: torch.optim.Optimizer) -> list[str]:
    """Return the others (adafactor's rows and columns): they belong to a layout, and only whole matrices have them."""
    return [key for key in _tensors(state, optimizer) if not _is_elementwise(state, key, flat, optimizer)]


def _is_elementwise(state: dict[str, Any], key: str, flat: Tensor, optimizer: torch.optim.Optimizer) -> bool:
    return state[key].numel() == flat.numel() or _coded(optimizer, state, key) is not None


def _tensors(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> list[str]:
    named = [key for key, values in state.items() if isinstance(values, Tensor) and key not in _CONSTANTS]
    constants = {id(coded.constants(state, key)) for key in named if (coded := _coded(optimizer, state, key))}
    return [key for key in named if id(state[key]) not in constants]


def _values(coded: Coded | None, state: dict[str, Any], key: str, held: Fragment) -> Tensor | Deferred:
    """Return this fragment's elements of a state; codes as the fp32 they stand for."""
    if coded is None:
        return held.of(state[key].detach())
    # Paged codes are managed memory, which torch takes for a CPU's; kernels run where the constants are.
    device = coded.constants(state, key).device
    make = functools.partial(_shifted, coded, state, key, held.offset)
    return Deferred(length=held.length, dtype=torch.float32, device=device, make=make)


def _shifted(coded: Coded, state: dict[str, Any], key: str, offset: int, begin: int, end: int) -> Tensor:
    return coded.decoded(state, key, offset + begin, offset + end)


class Coded(Protocol):
    """Moments that an optimizer keeps as codes of blocks: `optimizer.coded`, or bitsandbytes' own."""

    def has(self, state: dict[str, Any], key: str) -> bool:
        """Return whether a key of a tensor's state holds codes."""
        ...

    def constants(self, state: dict[str, Any], key: str) -> Tensor:
        """Return the constants of the blocks, fp32."""
        ...

    def decoded(self, state: dict[str, Any], key: str, begin: int, end: int) -> Tensor:
        """Return the elements [begin, end) as fp32."""
        ...

    def encode_into(self, state: dict[str, Any], key: str, values: Tensor, constants: Tensor | None) -> None:
        """Write values as codes; with the constants that made the values, exactly the codes that they were."""
        ...


def _coded(optimizer: torch.optim.Optimizer, state: dict[str, Any], key: str) -> Coded | None:
    coded: Coded = getattr(optimizer, "coded", _BITSANDBYTES)
    return coded if coded.has(state, key) else None


class _EightBits:
    """bitsandbytes' 8-bit states, in its own code book."""

    def has(self, state: dict[str, Any], key: str) -> bool:
        return state[key].dtype == torch.uint8

    def constants(self, state: dict[str, Any], key: str) -> Tensor:
        return state[f"absmax{key.removeprefix('state')}"]

    def decoded(self, state: dict[str, Any], key: str, begin: int, end: int) -> Tensor:
        from bitsandbytes import functional

        first, last = begin // BLOCK, -(-end // BLOCK)
        absmax = self.constants(state, key)[first:last].contiguous()
        blocks = state[key].reshape(-1)[first * BLOCK : last * BLOCK].contiguous().to(absmax.device)
        constants: Any = {"absmax": absmax, "code": state[f"qmap{key.removeprefix('state')}"]}
        whole = functional.dequantize_blockwise(blocks, blocksize=BLOCK, **constants)
        return whole[begin - first * BLOCK : end - first * BLOCK]

    def encode_into(self, state: dict[str, Any], key: str, values: Tensor, constants: Tensor | None) -> None:
        from bitsandbytes import functional

        book = state[f"qmap{key.removeprefix('state')}"]
        if constants is None:
            codes, made = functional.quantize_blockwise(values.contiguous(), code=book, blocksize=BLOCK)
            self.constants(state, key).copy_(made.absmax)
            state[key].copy_(codes)
            return
        constants = constants.to(values.device)
        per_element = constants.repeat_interleave(BLOCK)[: values.numel()].view_as(values)
        middles = (book[1:] + book[:-1]) / 2  # the book is sorted: the nearest code lies between two middles
        state[key].copy_(torch.bucketize(values / per_element.clamp(min=torch.finfo(torch.float32).tiny), middles))
        self.constants(state, key).copy_(constants)


_BITSANDBYTES = _EightBits()
