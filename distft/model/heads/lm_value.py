"""The language modelling head beside a critic: what the rest of an answer is expected to be worth, by position."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from distft.core.errors import Problem, RecipeError
from distft.model.heads import lm as language_model

if TYPE_CHECKING:
    import torch
    from torch import nn

    from distft.model.paths import ForwardPath


def build(lm: Any, path: ForwardPath, dtype: torch.dtype) -> nn.Linear:
    """Return the critic's layer without values.

    Raises:
        RecipeError: the model's hidden states are not to be had.
    """
    from torch import nn

    if path.head == "own":
        message = f"{type(lm).__name__} computes its logits in its own way, so a critic cannot read its hidden states"
        raise RecipeError("recipe", [Problem(message=message, fix="take an objective without one, such as grpo")])
    return nn.Linear(lm.get_output_embeddings().in_features, 1, device="meta", dtype=dtype)


SPEC = replace(language_model.SPEC, name="lm_value", values=True)
