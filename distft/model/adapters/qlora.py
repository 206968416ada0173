"""QLoRA: LoRA beside a base whose linear weights are stored in 4 bits.

Source: https://arxiv.org/abs/2305.14314
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from pydantic import Field, model_validator

from distft.model.adapters import lora
from distft.model.adapters.lora_params import LoraParams, blocks_differ
from distft.model.adapters.spec import MethodSpec
from distft.model.quant_params import QuantParams

if TYPE_CHECKING:
    import torch
    from torch import nn


class QloraParams(LoraParams):
    """LoRA's settings and the base's storage."""

    quant: QuantParams = Field(default=QuantParams())
    """How base weights are stored."""

    @model_validator(mode="after")
    def _no_dora(self) -> Self:
        if self.dora:
            # PEFT computes the magnitudes while it attaches, from 4-bit weights that do not exist yet.
            raise ValueError('dora needs whole base weights; use it with name = "lora", or rslora here')
        return self


def _attach(lm: object, params: QloraParams, dtype: torch.dtype) -> nn.Module:
    return lora.attach(lm, params, dtype)


def _quant(params: QloraParams) -> QuantParams:
    return params.quant


SPEC = MethodSpec(
    name="qlora",
    title="QLoRA",
    params=QloraParams,
    attach=_attach,
    owns=lora.owns,
    fresh=lora.fresh,
    starts_at_zero=lora.starts_at_zero,
    base_name=lora.base_name,
    adapted=lora.adapted_layers,
    quant=_quant,
    quantized=True,
    adapter=True,
    saves_memory=2,
    base_alone=lora.base_alone,
    save_adapter=lora.save,
    faster=lora.starts_at_zero,
    lr_ratio=lora.lr_ratio,
    blocks_differ=blocks_differ,
    library="bitsandbytes",
)
