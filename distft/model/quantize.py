"""4-bit base weights (bitsandbytes): linear layers swapped on the meta device, quantised one by one when filled.

Source: Dettmers et al., QLoRA, https://arxiv.org/abs/2305.14314
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from distft.core.registry import Params

if TYPE_CHECKING:
    import torch
    from torch import nn

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


def swap_linears(lm: Any, params: QuantParams, dtype: torch.dtype) -> None:
    """Turn every linear layer but the output projection into a 4-bit one; weights stay meta until filled."""
    import torch
    from bitsandbytes.nn.modules import Linear4bit
    from torch import nn

    def resolved(name: QuantName) -> torch.dtype:
        return dtype if name == "auto" else getattr(torch, name)

    head = lm.get_output_embeddings()
    targets = [(name, mod) for name, mod in lm.named_modules() if type(mod) is nn.Linear and mod is not head]
    for name, linear in targets:
        parent_name, _, leaf = name.rpartition(".")
        swapped = Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            compute_dtype=resolved(params.compute_dtype),
            compress_statistics=params.double,
            quant_type=params.type,
            quant_storage=resolved(params.storage_dtype),
            device="meta",
        )
        # bitsandbytes 0.50 repacks the weights for AVX-512 at the first forward in eval mode, rounding their constants
        # to bf16: an evaluation would change what is trained. Drop this when repacking leaves the constants alone.
        swapped.support_avx512bf16_for_cpu = False
        if swapped.bias is not None:
            swapped.bias = nn.Parameter(swapped.bias.to(dtype), requires_grad=False)
        setattr(lm.get_submodule(parent_name), leaf, swapped)
    lm.is_loaded_in_4bit = True  # what PEFT and transformers look for


def is_4bit(module: nn.Module) -> bool:
    """Whether this layer's weight is stored in 4 bits."""
    return type(module).__name__ == "Linear4bit" and type(module).__module__.startswith("bitsandbytes")


def quantized(module: Any, whole: torch.Tensor) -> Any:
    """The 4-bit parameter that holds `whole` for this layer, on the same device."""
    from bitsandbytes.nn import modules

    params_4bit: Any = modules.Params4bit
    meta = module.weight
    weight = params_4bit(
        whole,
        requires_grad=False,
        compress_statistics=meta.compress_statistics,
        quant_type=meta.quant_type,
        quant_storage=meta.quant_storage,
        module=module,
    )
    return weight.to(whole.device)  # moving is what quantises
