"""Exact counts from a module on the meta device: parameters, and the FLOPs of one token.

N_mat parameters that take part in a matrix product, L layers, h heads, d head size, s document length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from distft.model import experts
from distft.model.attention_shape import attention_shapes


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Parameters of one module, tied ones once."""

    total: int
    trainable: int


def count(module: nn.Module) -> Counts:
    """Return the parameters by whole shape; call before an engine shards or quantisation packs them."""
    params = list(module.parameters())
    return Counts(total=sum(p.numel() for p in params), trainable=sum(p.numel() for p in params if p.requires_grad))


def flops_per_token(module: nn.Module) -> float:
    """Return the matrix-product FLOPs of forward and backward for one token.

    A product costs 2 per weight forward, 2 for the input's gradient, and 2 for the weight's own when it is trained:
    6N full, 4N + 6N_adapter with a frozen base. Embedding look-ups cost nothing.
    Source: Kaplan et al., https://arxiv.org/abs/2001.08361, section 2.1
    """
    return sum((6.0 if trained else 4.0) * weights for weights, trained in products(module))


def products(module: nn.Module) -> Iterator[tuple[int, bool]]:
    """Yield (weights, trained) of each matrix: what takes part in matrix products, 4-bit ones by what they mean.

    Of experts in fused form, and of the adapters on them, the share that one token is sent to.
    """
    for part in module.modules():
        yield from of_module(part, module)


def of_module(part: nn.Module, model: nn.Module) -> Iterator[tuple[int, bool]]:
    """Yield what `products` gives for one module of `model`, a causal language model or a wrapper of one."""
    from transformers.pytorch_utils import Conv1D

    config = getattr(getattr(model, "transformer", model), "config", None)
    if isinstance(part, nn.Linear):
        beside = part.__dict__.get("beside_experts")  # an adapter's matrix, with rows for each expert
        share = 1.0 if beside is None else experts.active_share(config, beside)
        yield round(share * part.in_features * part.out_features), part.weight.requires_grad
    elif isinstance(part, Conv1D):
        yield part.weight.numel(), part.weight.requires_grad
    else:
        tensors = experts.expert_tensors(part)
        share = experts.active_share(config, part) if tensors else 1.0
        for short in tensors:
            param = part._parameters[short]
            assert param is not None
            yield round(share * param.numel()), param.requires_grad
        router = part._parameters.get("weight")
        if router is not None and router.ndim == 2 and hasattr(part, "top_k"):
            yield router.numel(), router.requires_grad


def active(module: nn.Module) -> int:
    """Return the parameters that one token meets: all but those of experts that it is not sent to."""
    idle = 0
    config = getattr(getattr(module, "transformer", module), "config", None)
    for part in module.modules():
        tensors = experts.expert_tensors(part)
        if tensors:
            share = experts.active_share(config, part)
            idle += sum(round((1 - share) * part._parameters[short].numel()) for short in tensors)  # type: ignore[union-attr]
    return count(module).total - idle


def flops_per_squared_length(config: Any) -> float:
    """Return causal attention FLOPs per (document length)**2: forward 2·L·h·d, backward 2.5 times that (flash).

    Source: Dao, FlashAttention-2, https://arxiv.org/abs/2307.08691, section 4.1
    """
    return 3.5 * 2.0 * sum(shape.width for shape in attention_shapes(config))
