"""AdamW whose moments are codes of a few bits with a constant for each block of elements.

The step and the formats are torchao's (`torchao.optim`), whose own class compiles a kernel for each shape (by a C++
compiler on CPUs), takes learning rates as tensors only, and keeps moments as tensor subclasses that no checkpoint of
plain tensors holds. Here moments are plain tensors, updated some millions of elements at a time, so that what is made
for an update stays small. The last block of a tensor may be shorter; torchao keeps such a tensor in fp32.

N elements of a tensor, in K blocks of B.
Sources: https://arxiv.org/abs/2309.01507 (4 bits); torchao/optim/adam.py, subclass_4bit.py, subclass_fp8.py
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor

SMALLEST = 4096
"""Elements from which on a tensor's moments are codes."""
CHUNK = 2**22
"""Elements that are updated together, a multiple of every block."""
MOMENTS = ("exp_avg", "exp_avg_sq")
_LEAST = 1e-12
_CONSTANTS = "_constants"


class BlockFormat(Protocol):
    """How values of one sign or two become codes."""

    block: int
    code_dtype: torch.dtype
    width: int
    """Codes of a block, as numbers of `code_dtype`."""

    def constants(self, values_KB: Tensor) -> Tensor:
        """Return the constant of each block, fp32 [K]."""
        ...

    def encode(self, values_KB: Tensor, constants_K: Tensor, *, signed: bool) -> Tensor:
        """Return codes, [K x width]."""
        ...

    def decode(self, codes: Tensor, constants_K: Tensor, *, signed: bool) -> Tensor:
        """Return fp32 [K, B]."""
        ...


class FourBits:
    """Two codes in a byte: a dynamic map for the first moment, a linear one without zero for the second."""

    block = 128
    code_dtype = torch.uint8
    width = 64

    def constants(self, values_KB: Tensor) -> Tensor:
        """Return the largest of each block."""
        return values_KB.abs().amax(-1).clip(_LEAST)

    def encode(self, values_KB: Tensor, constants_K: Tensor, *, signed: bool) -> Tensor:
        """See `BlockFormat`; a value between two of the map becomes the nearer, in the middle the larger."""
        scaled_KB = values_KB / constants_K[:, None]
        book = _book(signed, values_KB.device)
        below = (torch.bucketize(scaled_KB, book, out_int32=True, right=True) - 1).clip_(min=0)
        above = (below + 1).clip_(max=15)
        nearer = torch.where(scaled_KB - book[below] >= (book[above] - book[below]) * 0.5, above, below)
        codes = nearer.to(torch.uint8).view(-1)
        return (codes[::2] << 4) | codes[1::2]

    def decode(self, codes: Tensor, constants_K: Tensor, *, signed: bool) -> Tensor:
        """See `BlockFormat`."""
        both = torch.stack([codes >> 4, codes & 0b1111], dim=-1).int()
        return _book(signed, codes.device)[both].view(len(constants_K), -1) * constants_K[:, None]


def _book(signed: bool, device: torch.device) -> Tensor:
    """Return the 16 values that codes stand for, ascending.

    Source: torchao's `create_dynamic_map(True, 3, 4)`; unsigned, 1/16 to 1.
    """
    if not signed:
        return torch.linspace(0, 1, 17, device="cpu")[1:].to(device)
    values = [0.0, 1.0]
    for exponent, borders in ((-2, 2), (-1, 3), (0, 5)):
        edges = torch.linspace(0.1, 1, borders, device="cpu")
        means = (10.0**exponent * ((edges[:-1] + edges[1:]) / 2.0)).tolist()
        values += [*means, *(-value for value in means)]
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


class EightBitFloats:
    """Numbers of float8_e4m3fn, whose largest one a block's largest element is scaled to."""

    block = 256
    code_dtype = torch.float8_e4m3fn
    width = 256

    def constants(self, values_KB: Tensor) -> Tensor:
        """Return what each block is divided by."""
        return values_KB.abs().amax(-1).clip(_LEAST) / torch.finfo(self.code_dtype).max

    def encode(self, values_KB: Tensor, constants_K: Tensor, *, signed: bool) -> Tensor:
        """See `BlockFormat`."""
        return (values_KB / constants_K[:, None]).to(self.code_dtype).view(-1)

    def decode(self, codes: Tensor, constants_K: Tensor, *, signed: bool) -> Tensor:
        """See `BlockFormat`."""
        return codes.float().view(len(constants_K), -1) * constants_K[:, None]


def state_bytes(chosen: BlockFormat, shape: tuple[int, ...]) -> int:
    """Return the bytes of two moments: codes of whole blocks with their constants, or fp32 of a small tensor."""
    numel = prod(shape)
    if numel < SMALLEST:
        return 8 * numel
    return 2 * -(-numel // chosen.block) * (chosen.width * chosen.code_dtype.itemsize + 4)


class CodedMoments:
    """Moments as fp32, and back: what a checkpoint asks of them (`distft.engine.fragments`)."""

    def __init__(self, chosen: BlockFormat) -> None:
        """`chosen`: the optimizer's."""
        self._format = chosen

    def has(self, state: dict[str, Any], key: str) -> bool:
        """Return whether a key of a tensor's state holds codes."""
        return key in MOMENTS and f"{key}{_CONSTANTS}" in state

    def constants(self, state: dict[str, Any], key: str) -> Tensor:
        """Return the constants of a moment's blocks, fp32 [K]."""
        return state[f"{key}{_CONSTANTS}"]

    def decoded(self, state: dict[str, Any], key: str, begin: int, end: int) -> Tensor:
        """Return the elements [begin, end), fp32."""
        chosen, first, last = self._format, begin // self._format.block, -(-end // self._format.block)
        codes = state[key][first * chosen.width : last * chosen.width]
        whole = chosen.decode(codes, self.constants(state, key)[first:last], signed=key == MOMENTS[0]).view(-1)
        return whole[begin - first * chosen.block : end - first * chosen.block]

    def encode_into(self, state: dict[str, Any], key: str, values: Tensor, constants: Tensor | None) -> None:
        """Write values as codes; with the constants that they were made with, the codes that they were."""
        values_KB = _blocks(values.reshape(-1), self._format.block)
        kept_K = self._format.constants(values_KB) if constants is None else constants.to(values.device)
        units_K = kept_K.clamp(min=torch.finfo(torch.float32).tiny)  # zero before the first update
        state[key].copy_(self._format.encode(values_KB, units_K, signed=key == MOMENTS[0]))
        self.constants(state, key).copy_(kept_K)


class BlockAdamW(torch.optim.Optimizer):
    """AdamW that reads moments from codes, and writes codes."""

    def __init__(
        self,
        groups: list[dict[str, Any]],
        chosen: BlockFormat,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        """`chosen`: how moments are kept."""
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self._format = chosen
        self.coded = CodedMoments(chosen)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every tensor that has a gradient."""
        assert closure is None, "the loop computes the loss"
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, group)

    def _update(self, param: Tensor, group: dict[str, Any]) -> None:
        state = self.state[param]
        if not state:
            self._begin(param, state)
        state["step"] += 1
        values_N, gradient_N = param.view(-1), param.grad.reshape(-1)  # type: ignore[union-attr]
        for begin in range(0, len(values_N), CHUNK):
            end = min(begin + CHUNK, len(values_N))
            moments = tuple(self._moment(state, key, begin, end) for key in MOMENTS)
            _step(values_N[begin:end], gradient_N[begin:end].float(), moments, int(state["step"]), group)
            for key, moment in zip(MOMENTS, moments, strict=True):
                self._keep(state, key, moment, begin, end)

    def _begin(self, param: Tensor, state: dict[str, Any]) -> None:
        state["step"] = torch.tensor(0.0)
        coded, chosen = param.numel() >= SMALLEST, self._format
        blocks = -(-param.numel() // chosen.block)
        for key in MOMENTS:
            if coded:
                state[key] = torch.zeros(blocks * chosen.width, dtype=chosen.code_dtype, device=param.device)
                state[f"{key}{_CONSTANTS}"] = torch.zeros(blocks, device=param.device)
            else:
                state[key] = torch.zeros_like(param, dtype=torch.float32)

    def _moment(self, state: dict[str, Any], key: str, begin: int, end: int) -> Tensor:
        if self.coded.has(state, key):
            return self.coded.decoded(state, key, begin, end)
        return state[key].view(-1)[begin:end]

    def _keep(self, state: dict[str, Any], key: str, moment: Tensor, begin: int, end: int) -> None:
        if not self.coded.has(state, key):
            return  # changed where it lies
        chosen, first, last = self._format, begin // self._format.block, -(-end // self._format.block)
        values_KB = _blocks(moment, chosen.block)
        constants_K = chosen.constants(values_KB)
        codes = chosen.encode(values_KB, constants_K, signed=key == MOMENTS[0])
        state[key][first * chosen.width : last * chosen.width] = codes
        state[f"{key}{_CONSTANTS}"][first:last] = constants_K


def _step(values_N: Tensor, gradient_N: Tensor, moments: tuple[Tensor, ...], step: int, group: dict[str, Any]) -> None:
    """Update some elements and their moments in place, in fp32.

    Source: torchao/optim/adam.py (`single_param_adam`)
    """
    first_N, second_N = moments
    (beta1, beta2), lr = group["betas"], float(group["lr"])
    values_N.sub_(values_N * (lr * group["weight_decay"]))
    first_N.lerp_(gradient_N, 1 - beta1)
    second_N.lerp_(gradient_N.square(), 1 - beta2)
    denominator_N = second_N.sqrt().div_((1 - beta2**step) ** 0.5).add_(group["eps"])
    values_N.addcdiv_(first_N, denominator_N, value=-lr / (1 - beta1**step))


def _blocks(values_N: Tensor, block: int) -> Tensor:
    """Return [K, block], the last one filled up with zeros."""
    short = -len(values_N) % block
    return torch.nn.functional.pad(values_N, (0, short)).view(-1, block)
