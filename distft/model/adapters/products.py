"""LoRA's product added to the layer's in one pass; PEFT's own forward makes six over [tokens, out], in 4 bits seven.

For N tokens, in I and out O features and rank R, PEFT computes `W x + (B (A x)) * s`: it writes B's product, reads and
writes it again to scale it, and reads and writes both sums. Here s scales [N, R], and B's product is added where W's
lies. In lower precision that is rounded less often; in fp32 it differs by rounding alone.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


def fuse(wrapped: nn.Module, adapter: str) -> None:
    """Give every plain linear LoRA layer below `wrapped` the fused forward; others keep PEFT's.

    Args:
        wrapped: a model that PEFT has wrapped.
        adapter: name of the one adapter that is trained.
    """
    from peft.tuners.lora.layer import Linear, LoraLayer

    kinds: tuple[type, ...] = (Linear, *_four_bit())
    for module in wrapped.modules():
        if isinstance(module, LoraLayer) and type(module) in kinds and adapter not in module.lora_variant:
            layer: Any = module
            layer.forward = types.MethodType(_fused(adapter, layer.forward), layer)
            product = layer.lora_B[adapter]
            product.adds_in_place = True
            product.forward = types.MethodType(_added, product)


def write_in_place(model: nn.Module, allowed: bool) -> None:
    """Say whether fused layers below `model` may add to their layer's product where it lies, or to a copy of it."""
    for module in model.modules():
        if hasattr(module, "adds_in_place"):
            module.adds_in_place = allowed  # type: ignore[assignment]


def _four_bit() -> tuple[type, ...]:
    from peft.import_utils import is_bnb_4bit_available

    if not is_bnb_4bit_available():
        return ()
    from peft.tuners.lora.bnb import Linear4bit

    return (Linear4bit,)


def _fused(adapter: str, peft_forward: Any) -> Callable[..., Tensor]:
    """Return a forward for one layer; whatever is not plain training or inference with the adapter is left to PEFT's.

    A function, and no object that can be called: torch 2.11 compiles no methods of those.
    """

    def forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        first, second = layer.lora_A[adapter], layer.lora_B[adapter]
        plain = not (args or kwargs or layer.disable_adapters or layer.merged)
        if not plain or layer.active_adapters != [adapter] or x.dtype != first.weight.dtype:
            return peft_forward(x, *args, **kwargs)
        x_NI = x.reshape(-1, x.shape[-1])  # so that the layer's product is no view, and may be added to in place
        result_NO = layer.base_layer(x_NI)
        low_NR = first(layer.lora_dropout[adapter](x_NI)) * layer.scaling[adapter]
        if result_NO.dtype != low_NR.dtype:
            return (result_NO + second(low_NR)).to(result_NO.dtype).view(*x.shape[:-1], -1)
        return second(low_NR, result_NO).view(*x.shape[:-1], -1)

    return forward


def _added(product: Any, low_NR: Tensor, onto_NO: Tensor | None = None) -> Tensor:
    """Return `onto + low Wᵀ`; a forward of the module itself, where engines gather its weight."""
    import torch
    import torch.nn.functional as F

    if onto_NO is None or product.bias is not None:
        added = F.linear(low_NR, product.weight, product.bias)
        return added if onto_NO is None else onto_NO + added
    # ZeRO-3 hands out views of what it was given, which must not be written; compilers fuse the sum by themselves.
    if not product.adds_in_place or torch.compiler.is_compiling() or onto_NO._is_view():
        return torch.addmm(onto_NO, low_NR, product.weight.t())
    return onto_NO.addmm_(low_NR, product.weight.t())
