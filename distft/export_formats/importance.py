"""How much an error in each column of a matrix weighs: the mean square of what goes into it on calibration rows.

Source: llama.cpp's tools/imatrix, which takes the same figure of the same inputs, computed by llama.cpp.

Shape letters: I inputs of a matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from distft.core.errors import NumericError


@torch.no_grad()
def importance_matrix(model: Any, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Return the mean squared input of every linear layer, fp32 [I], by the name of its weight in the base's files.

    Args:
        model: transformers' model, or PEFT's with an adapter beside it.
        rows: token ids.

    Raises:
        NumericError: an input was not finite.
    """
    sums: dict[str, Tensor] = {}
    num_tokens = sum(map(len, rows))
    handles = [
        module.register_forward_pre_hook(_adding(sums, name))
        for module, name in _linear_layers(model)
    ]  # fmt: skip
    try:
        for ids in rows:
            model(input_ids=torch.tensor([list(ids)], device=next(model.parameters()).device))
    finally:
        for handle in handles:
            handle.remove()
    made = {name: (total / num_tokens).float().cpu() for name, total in sums.items()}
    for name, weights in made.items():
        if not bool(weights.isfinite().all()):
            raise NumericError(f"{name}: what goes into it is not finite on the calibration rows; the model is broken")
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    if getattr(core.config, "tie_word_embeddings", False):
        embedding = next(name for name, param in core.named_parameters() if param is core.get_input_embeddings().weight)
        made[embedding] = made["lm_head.weight"]
    return made


def _linear_layers(model: Any) -> list[tuple[Any, str]]:
    """Return every linear layer of the base with the name of its weight; an adapter's own layers are left out."""
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    found = []
    for name, module in core.named_modules():
        if isinstance(module, torch.nn.Linear) and not any(part.startswith("lora_") for part in name.split(".")):
            found.append((module, name.removesuffix(".base_layer") + ".weight"))
    return found


def _adding(sums: dict[str, Tensor], name: str) -> Any:
    def add(module: Any, inputs: tuple[Tensor, ...]) -> None:
        squares_I = inputs[0].detach().double().square().flatten(0, -2).sum(0)
        sums[name] = sums.get(name, 0) + squares_I

    return add
