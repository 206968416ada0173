"""Computing in double precision what a model computes in single, so that rounding hides nothing from a comparison.

Models upcast to float32 by name, in norms and softmaxes and before losses; under `in_double` that name means float64.

Shape letters: S rows of tokens, E and F widths before and after, X experts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class _DoubleForSingle(TorchFunctionMode):
    """Every call that asks torch for float32 gets float64."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        doubled = {name: _double(value) for name, value in (kwargs or {}).items()}
        if func is Tensor.float:
            func = Tensor.double
        elif func in _GROUPED and args[0].dtype == torch.float64:  # a kernel of 16 and 32 bits
            return _grouped_mm(*args, **doubled)
        return func(*(_double(value) for value in args), **doubled)


_GROUPED = tuple(
    getattr(where, name) for where, name in ((torch, "_grouped_mm"), (F, "grouped_mm")) if hasattr(where, name)
)


def _grouped_mm(
    rows_SE: Tensor, weight_XEF: Tensor, *, offs: Tensor, bias: Any = None, out_dtype: Any = None
) -> Tensor:
    """Multiply rows sorted by expert with their expert's matrix: [S, F]; rows after the last expert's are zeros.

    Raises:
        NotImplementedError: another of the kernel's forms is asked for.
    """
    if rows_SE.ndim != 2 or weight_XEF.ndim != 3 or bias is not None:
        raise NotImplementedError("grouped matrices of another form, in float64")
    bounds = [0, *offs.tolist()]
    parts = [rows_SE[start:end] @ weight_XEF[expert] for expert, (start, end) in enumerate(pairwise(bounds))]
    return torch.cat([*parts, rows_SE.new_zeros(len(rows_SE) - bounds[-1], weight_XEF.shape[-1])]).to(out_dtype)


def _double(value: Any) -> Any:
    if value is torch.float32:
        return torch.float64
    return "torch.DoubleTensor" if value == "torch.FloatTensor" and isinstance(value, str) else value


@contextlib.contextmanager
def in_double() -> Iterator[None]:
    """Compute in float64 where code says float32, in this thread.

    Call `torch.autograd.backward` inside it, not `Tensor.backward`, which switches it off for its length.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _DoubleForSingle():
            yield
    finally:
        torch.set_default_dtype(before)
