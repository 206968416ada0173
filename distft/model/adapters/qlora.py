"""QLoRA: LoRA beside a base whose linear weights are stored in 4 bits.

Source: https://arxiv.org/abs/2305.14314
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from pydantic import Field, model_validator

from distft.model.adapters import lora
from distft.model.adapters.lora_params import LoraParams, blocks_differ, reads_rows, settled, unplanned
from distft.model.adapters.spec import MethodSpec
from distft.model.quant_params import QuantParams

if TYPE_CHECKING:
    import torch
    from torch import nn

    from distft.core.engine_traits import EngineTraits


class QloraParams(LoraParams):
    """LoRA's settings and the base's storage."""

    quant: QuantParams = Field(default=QuantParams())
    """How base weights are stored."""

    @model_validator(mode="after")
    def _deployed_as_stored(self) -> Self:
        if self.deploy == "nf4" and (self.quant.type, self.quant.double) != ("nf4", True):
            raise ValueError(
                'deploy: "nf4" has constants that are quantised too: quant = { type = "nf4", double = true }'
            )
        return self


def _attach(lm: object, params: QloraParams, dtype: torch.dtype) -> nn.Module:
    return lora.attach(lm, params, dtype)


def _refuses(params: QloraParams, engine: EngineTraits) -> str:
    """Refuse DoRA where modules are cut: PEFT copies the packed weight outside its module's forward."""
    if params.dora and engine.parameters == "cut by module":
        return f"dora beside 4 bits cannot be trained under {engine.name}: it reads packed weights that are cut there"
    return lora.refuses(params, engine)


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
    refuses=_refuses,
    adapter=True,
    saves_memory=2,
    base_alone=lora.base_alone,
    save_adapter=lora.save,
    faster=lora.starts_at_zero,
    lr_ratio=lora.lr_ratio,
    reads_rows=reads_rows,
    settled=settled,
    unplanned=unplanned,
    blocks_differ=blocks_differ,
    library="bitsandbytes",
)
