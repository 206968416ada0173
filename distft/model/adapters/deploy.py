"""LoRA that is trained as it will be deployed: every forward multiplies with Q(W + s B A), Q the writer's rounding.

The gradient passes Q as if it were not there (https://arxiv.org/abs/1308.3432): of A and B it is LoRA's own, of the
input the product with the rounded weight. What has no adapter and is rounded by the writer too (an embedding, a head)
is frozen, and rounded when it is filled.

O outputs, I inputs, R rank.
"""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distft.core.errors import Problem, RecipeError
from distft.model import quantize
from distft.model.adapters.deploy_grids import GRIDS, MARK, Grid

if TYPE_CHECKING:
    from distft.model.adapters.lora_params import LoraParams


def install(wrapped: nn.Module, lm: Any, params: LoraParams, adapter: str) -> None:
    """Let LoRA's layers below `wrapped` compute with rounded weights, and mark what else the writer rounds.

    Raises:
        RecipeError: the format has no such model: rows of another length, matrices of a kind that it is not known for.
    """
    from peft.tuners.lora.layer import LoraLayer

    assert params.deploy is not None
    grid, inside = GRIDS[params.deploy], set[int]()
    for name, module in wrapped.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        layer: Any = module
        base = layer.get_base_layer()
        if not isinstance(base, nn.Linear) or (base is lm.get_output_embeddings() and not grid.every_matrix):
            raise _mistake(f"{name} is no linear layer of a block", "leave it out of target_modules")
        _check_rows(name, layer.in_features, grid, params.deploy)
        inside.add(id(base))
        layer.forward = types.MethodType(_deployed(grid, adapter), layer)
    ends = {id(end) for end in (lm.get_input_embeddings(), lm.get_output_embeddings()) if end is not None}
    for name, module in lm.named_modules():
        own = [short for short, param in module._parameters.items() if param is not None and param.ndim >= 2]
        if not own or id(module) in inside or any(param.requires_grad for param in module.parameters(recurse=False)):
            continue
        if quantize.is_4bit(module):
            raise _mistake(f"{name} has no adapter and is stored in 4 bits already", 'target_modules = "all-linear"')
        if own != ["weight"] or not isinstance(module, nn.Linear | nn.Embedding):
            raise _mistake(f"{name} is a {type(module).__name__}, whose rounding is not known here", "leave deploy out")
        if grid.every_matrix or id(module) not in ends:
            _check_rows(name, module.weight.shape[1], grid, params.deploy)
            module.__dict__[MARK] = params.deploy


def _check_rows(name: str, inputs: int, grid: Grid, deploy: str) -> None:
    if inputs % grid.rows_of:
        others = ", ".join(f'"{other}"' for other, each in GRIDS.items() if inputs % each.rows_of == 0)
        message = f'"{deploy}" stores {grid.rows_of} numbers of a row together, and {name} has rows of {inputs}'
        raise _mistake(message, f"allowed: {others}")


def refuse_rows_of_tokens(params: LoraParams, ids: Any) -> None:
    """Refuse trained rows of an embedding that the format rounds.

    Raises:
        RecipeError: there are some.
    """
    if ids and params.deploy is not None and GRIDS[params.deploy].every_matrix:
        raise _mistake(f'"{params.deploy}" rounds the embedding, whose rows are trained', 'take "nf4" or "int4"')


def weight_of(base: Any) -> Tensor:
    """Return a layer's weight [O, I] as its forward computes with it; of one in 4 bits, the values that those mean."""
    if not quantize.is_4bit(base):
        return base.weight
    if base.weight.is_meta:
        return torch.empty(base.out_features, base.in_features, device="meta", dtype=base.compute_dtype)
    return quantize.value_of(base)


@torch.no_grad()
def deployed_weight(weight_OI: Tensor, a_RI: Tensor | None, b_OR: Tensor | None, scale: float, grid: Grid) -> Tensor:
    """Return what the exported file holds of a layer, as `distft merge` and the format's writer make it."""
    if a_RI is None or b_OR is None:
        return grid.on(weight_OI.detach())
    delta_OI = (b_OR.detach().float() * scale) @ a_RI.detach().float()
    return grid.on((weight_OI.detach().float() + delta_OI).to(weight_OI.dtype))


def _deployed(grid: Grid, adapter: str) -> Any:
    def forward(layer: Any, x: Tensor) -> Tensor:
        first, second, base = layer.lora_A[adapter], layer.lora_B[adapter], layer.get_base_layer()
        scale = layer.scaling[adapter]
        if layer.disable_adapters:
            return F.linear(x, deployed_weight(weight_of(base), None, None, scale, grid), base.bias)
        # Of A and B the gradient is LoRA's; what they add here is zero.
        low = second(first(x.detach().to(first.weight.dtype))) * scale
        product = _Product.apply(x, base, first.weight, second.weight, scale, grid, base.weight)
        result = product if base.bias is None else product + base.bias
        return result + (low - low.detach()).to(result.dtype)

    return forward


class _Product(torch.autograd.Function):
    """x Q(W + s B A)ᵀ with a gradient of x alone; the weight is made again for it, or a model's would be kept."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, base: Any, a_RI: Tensor, b_OR: Tensor, scale: float, grid: Grid, stored: Tensor
    ) -> Tensor:
        ctx.base, ctx.scale, ctx.grid = base, scale, grid
        # What is saved is handed back by engines as it was in the forward, whole, when the backward comes.
        ctx.save_for_backward(a_RI, b_OR, stored)
        return F.linear(x, deployed_weight(weight_of(base), a_RI, b_OR, scale, grid).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        a_RI, b_OR, stored = ctx.saved_tensors
        weight = weight_of(ctx.base) if quantize.is_4bit(ctx.base) else stored
        deployed = deployed_weight(weight, a_RI, b_OR, ctx.scale, ctx.grid).to(grad.dtype)
        return grad @ deployed, None, None, None, None, None, None


def _mistake(message: str, fix: str) -> RecipeError:
    return RecipeError("recipe", [Problem(message=f"[method] deploy: {message}", fix=fix)])
