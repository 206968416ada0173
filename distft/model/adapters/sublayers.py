"""The two parts of a block that add to its hidden states: attention, and what follows it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distft.core.errors import Problem, RecipeError

if TYPE_CHECKING:
    from torch import nn


def attention_of(lm: Any, block: nn.Module, method: str) -> Any:
    """Return a block's attention: transformers numbers them, for caches.

    Raises:
        RecipeError: there is none, or more than one.
    """
    numbered = [module for module in block.modules() if hasattr(module, "layer_idx") and module is not block]
    layers = [module for module in numbered if "attention" in type(module).__name__.lower()]
    if len(layers) != 1:
        raise misfit(lm, method, f"has {len(layers)} attention layers in a {type(block).__name__}, not one")
    return layers[0]


def feed_forward_of(lm: Any, block: nn.Module, method: str) -> Any:
    """Return the part of a block that is neither attention nor a norm: an MLP, or a mixture of experts.

    Raises:
        RecipeError: there is none, or more than one.
    """
    attention = attention_of(lm, block, method)
    parts = [
        part
        for part in block.children()
        if attention not in set(part.modules()) and any(param.ndim > 1 for param in part.parameters())
    ]
    if len(parts) != 1:
        raise misfit(lm, method, f"has {len(parts)} parts beside attention in a {type(block).__name__}, not one")
    return parts[0]


def misfit(lm: Any, method: str, message: str) -> RecipeError:
    """Return the refusal of an architecture that a method does not fit."""
    problem = Problem(message=f"[method] {method}: {type(lm).__name__} {message}", fix='use name = "lora"')
    return RecipeError("recipe", [problem])
