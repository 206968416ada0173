"""The numbers that low-bit formats can hold: what their writers make of a matrix, read back.

Each function gives, bit for bit, what the format's own writer stores and its reader reads: gguf's `quantize` (equal to
ggml's), bitsandbytes' `quantize_4bit`, and compressed-tensors' rounding to nearest as llm-compressor applies it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

GGML_BLOCK = 32
"""Numbers of a row that share a scale in Q8_0 and Q4_0."""
INT4_GROUP = 128
"""The same for int4; what [method] deploy takes, and `distft export --as int4`."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """How a format rounds matrices."""

    on: Callable[[Tensor], Tensor]
    """Matrix [O, I] -> what is read back of it, in its type."""
    rows_of: int
    """Rows are multiples of so many numbers; 1: any."""
    every_matrix: bool
    """It rounds embeddings and the head too; False: the linear layers of blocks alone."""
    export: str
    """How a model card says it is written."""


def q8_0(matrix: Tensor) -> Tensor:
    """Round to multiples of the largest / 127 in blocks of 32; the scale is fp16."""
    blocks = matrix.float().reshape(-1, GGML_BLOCK)
    scale = blocks.abs().amax(1, keepdim=True) / 127
    levels = _half_away(blocks * _inverse(scale))
    return (levels * scale.half().float()).view(matrix.shape).to(matrix.dtype)


def q4_0(matrix: Tensor) -> Tensor:
    """Round to 16 multiples of the one with the largest absolute value / -8 in blocks of 32; the scale is fp16."""
    blocks = matrix.float().reshape(-1, GGML_BLOCK)
    scale = blocks.gather(1, blocks.abs().argmax(1, keepdim=True)) / -8
    levels = torch.trunc(blocks * _inverse(scale) + 8.5).clamp_(0, 15) - 8
    return (levels * scale.half().float()).view(matrix.shape).to(matrix.dtype)


def int4(matrix: Tensor) -> Tensor:
    """Round to 16 multiples of the largest / 7.5 in groups of 128; the scale has the matrix's type."""
    groups = matrix.reshape(-1, INT4_GROUP)
    scale = groups.abs().amax(1, keepdim=True) / 7.5
    scale = torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale)
    return (torch.round(groups / scale).clamp_(-8, 7) * scale).view(matrix.shape)


def nf4(matrix: Tensor) -> Tensor:
    """Round as bitsandbytes stores NF4 with constants that are quantised too."""
    if matrix.is_meta:
        return torch.empty_like(matrix)
    from distft.model import quantize
    from distft.model.quant_params import QuantParams

    return quantize.stored_4bit(quantize.packed_4bit(matrix, QuantParams()), matrix.dtype)


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 0.0, 1 / scale)


def _half_away(values: Tensor) -> Tensor:
    """Round to nearest, halves away from zero; torch's own takes halves to even."""
    size = values.abs()
    floor = size.floor()
    return values.sign() * (floor + (2 * (size - floor)).floor())


GRIDS: dict[str, Grid] = {
    "q8_0": Grid(on=q8_0, rows_of=GGML_BLOCK, every_matrix=True, export="distft export RUN --as gguf --level Q8_0"),
    "q4_0": Grid(on=q4_0, rows_of=GGML_BLOCK, every_matrix=True, export="distft export RUN --as gguf --level Q4_0"),
    "nf4": Grid(
        on=nf4, rows_of=1, every_matrix=False,
        export="distft merge RUN, and load_in_4bit with double quantisation when it is loaded",
    ),
    "int4": Grid(on=int4, rows_of=INT4_GROUP, every_matrix=False, export="distft export RUN --as int4"),
}  # fmt: skip


def rounded(module: Any, value: Tensor, name: str) -> Tensor:
    """Return a weight as its format holds it, where the module is marked with that format's name."""
    mark = module.__dict__.get(MARK)
    return value if mark is None or name != "weight" else GRIDS[mark].on(value)


MARK = "distft_rounded"
"""Attribute of a module whose frozen weight is rounded when it is filled."""
