"""Settings of 4-bit base weights; apart from `quantize`, so that recipes are checked without torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from distft.core.registry import Params

QuantName = Literal["auto", "float32", "bfloat16"]


class QuantParams(Params):
    """How base weights are stored in 4 bits."""

    type: Literal["nf4", "fp4"] = "nf4"
    """Code book: NormalFloat (weights are roughly normal) or 4-bit float."""
    double: bool = True
    """Quantise the block constants too: 0.127 instead of 0.5 bits a weight."""
    compute_dtype: QuantName = "auto"
    """What a weight is dequantised to for its product; auto = the model's dtype."""
    storage_dtype: QuantName = Field(default="auto")
    """Type of the tensor that packs the 4-bit values; auto = the model's dtype, which fsdp2 needs."""
