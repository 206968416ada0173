"""What LoRA's matrices start from, beside the default: noise, or a part of the base's weight.

`pissa` and `olora` take their part out of the base, so that the model starts as it was. What is saved fits the base as
it is in its files: the adapter that was trained and, beside it, the one it started from with its sign turned.

W [O, I] weight, A [R, I], B [O, R]; the update is s * B A.
Sources: https://arxiv.org/abs/2404.02948 (PiSSA), https://arxiv.org/abs/2406.01775 (OLoRA),
https://arxiv.org/abs/2310.08659 (LoftQ, its step that leaves the base as it is),
https://datta0.github.io/posts/rethink-lora-init/ (orthogonal); PEFT's code, peft/tuners/lora/layer.py
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from distft.core.errors import MachineError

if TYPE_CHECKING:
    from pathlib import Path

Init = Literal["default", "gaussian", "orthogonal", "pissa", "olora", "loftq"]
CHANGES_BASE = frozenset({"pissa", "olora"})
_PAIR, _STARTS, RESIDUAL = "distft_start", "distft_mutated", "distft_residual"
"""Attributes: of a layer, its pair until both are read; of a model, the pairs taken out of its base; of a layer in 4
bits, what quantisation has lost of its weight."""


def start(name: str, init: Init, model: Any, generator: torch.Generator) -> Tensor:
    """Return what the matrix of this name starts as; of the first of a layer's two that is asked for, both are made."""
    layer_name, _, rest = name.partition(".lora_")
    layer: Any = model.get_submodule(layer_name)
    pair = layer.__dict__.pop(_PAIR, None)
    if pair is None:
        pair = layer.__dict__[_PAIR] = _pair(layer, init, generator)
        if init in CHANGES_BASE:
            _take_out(layer, *pair)
            model.__dict__.setdefault(_STARTS, {})[layer_name] = tuple(matrix.cpu() for matrix in pair)
    return pair[0] if rest.startswith("A.") else pair[1]


def _pair(layer: Any, init: Init, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    rank, scale = layer.r["default"], layer.scaling["default"]
    inputs, outputs = layer.in_features, layer.out_features
    if init == "gaussian":
        return torch.empty(rank, inputs).normal_(std=1 / rank, generator=generator), torch.zeros(outputs, rank)
    if init == "orthogonal":  # halves of one orthogonal matrix, so that B A = 0
        q_RR, _ = torch.linalg.qr(torch.empty(rank, rank).normal_(generator=generator))
        half_AI = torch.empty(rank // 2, inputs).normal_(generator=generator)
        half_OB = torch.empty(outputs, rank // 2).normal_(generator=generator)
        return q_RR[0::2].T @ half_AI / 10, half_OB @ q_RR[1::2] / 10
    base = layer.get_base_layer()
    if init == "loftq":
        if RESIDUAL not in base.__dict__:
            raise MachineError(f"{type(base).__name__} has not kept what quantisation lost of it")
        return _leading(base.__dict__.pop(RESIDUAL), rank, scale)
    weight_OI = _weight(layer).float()
    if init == "pissa":
        return _leading(weight_OI, rank, scale)
    q_OO, r_OI = torch.linalg.qr(weight_OI)
    return r_OI[:rank], q_OO[:, :rank]


def _leading(weight_OI: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return the `rank` largest singular directions, half of each value in either matrix."""
    u_OR, value_R, v_RI = torch.linalg.svd(weight_OI, full_matrices=False)
    root_R = (value_R[:rank] / scale).sqrt()
    return root_R[:, None] * v_RI[:rank], u_OR[:, :rank] * root_R


def _weight(layer: Any) -> Tensor:
    weight = layer.get_base_layer().weight.detach()
    return weight.T if layer.fan_in_fan_out else weight


def _take_out(layer: Any, a_RI: Tensor, b_OR: Tensor) -> None:
    weight_OI = _weight(layer)  # of the parameter itself, where it lies
    weight_OI.copy_(weight_OI.float() - layer.scaling["default"] * (b_OR @ a_RI))


def save(lm: Any, folder: Path, tensors: dict[str, Tensor]) -> None:
    """Save as PEFT does; where a part of the base was taken out, an adapter of twice the rank that fits it whole."""
    starts: dict[str, tuple[Tensor, Tensor]] = lm.__dict__.get(_STARTS, {})
    if not starts:
        lm.save_pretrained(folder, state_dict=tensors, save_embedding_layers=False)
        return
    doubled = {}
    for name, tensor in tensors.items():
        layer, _, rest = name.partition(".lora_")
        is_a = rest.startswith("A.")
        before = starts[layer][0 if is_a else 1].to(tensor.dtype) if rest and layer in starts else None
        doubled[name] = tensor if before is None else torch.cat([tensor, before if is_a else -before], 0 if is_a else 1)
    config = lm.peft_config["default"]
    lm.peft_config["default"] = _doubled(config)
    try:
        lm.save_pretrained(folder, state_dict=doubled, save_embedding_layers=False)
    finally:
        lm.peft_config["default"] = config


def _doubled(config: Any) -> Any:
    """Return the config with twice the rank and the same scale."""
    changed = copy.deepcopy(config)
    more = math.sqrt(2) if config.use_rslora else 2
    changed.r, changed.lora_alpha = 2 * config.r, more * config.lora_alpha
    changed.rank_pattern = {name: 2 * rank for name, rank in config.rank_pattern.items()}
    changed.alpha_pattern = {name: more * alpha for name, alpha in config.alpha_pattern.items()}
    return changed


def keep_residuals(wrapped: nn.Module) -> None:
    """Let layers in 4 bits keep, until their adapter is filled, what quantisation loses of their weight."""
    from peft.tuners.lora.layer import LoraLayer

    for module in wrapped.modules():
        if isinstance(module, LoraLayer):
            module.get_base_layer().__dict__[RESIDUAL] = None
