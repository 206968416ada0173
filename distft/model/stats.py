"""Exact counts from a module on the meta device: parameters, and the FLOPs of one token.

N_mat parameters that take part in a matrix product, L layers, h heads, d head size, s document length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from distft.model.attention_shape import attention_shapes


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Parameters of one module, tied ones once."""

    total: int
    trainable: int


def count(module: nn.Module) -> Counts:
    """Parameters by whole shape; call before an engine shards or quantisation packs them."""
    params = list(module.parameters())
    return Counts(total=sum(p.numel() for p in params), trainable=sum(p.numel() for p in params if p.requires_grad))


def flops_per_token(module: nn.Module) -> float:
    """Matrix-product FLOPs of forward and backward for one token.

    A product costs 2 per weight forward, 2 for the input's gradient, and 2 for the weight's own when it is trained:
    6N full, 4N + 6N_adapter with a frozen base. Embedding look-ups cost nothing.
    Source: Kaplan et al., https://arxiv.org/abs/2001.08361, section 2.1
    """
    return sum((6.0 if trained else 4.0) * weights for weights, trained in products(module))


def products(module: nn.Module) -> Iterator[tuple[int, bool]]:
    """(weights, trained) of each linear layer: what takes part in matrix products, 4-bit ones by what they mean."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            yield layer.in_features * layer.out_features, layer.weight.requires_grad


def flops_per_squared_length(config: Any) -> float:
    """Causal attention FLOPs per (document length)**2: forward 2·L·h·d, backward 2.5 times that (flash).

    Source: Dao, FlashAttention-2, https://arxiv.org/abs/2307.08691, section 4.1
    """
    return 3.5 * 2.0 * sum(shape.width for shape in attention_shapes(config))
