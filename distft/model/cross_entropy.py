"""The language-model head and its loss, without logits of [tokens, vocabulary] in fp32.

S supervised tokens, C tokens of one chunk, E hidden size, V vocabulary.

Only supervised positions reach the head: with a masked prompt most of the head's work is never done.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from distft.core.errors import MachineError

CHUNK_BYTES = 128 * 2**20
"""Largest fp32 logits block that exists at once."""

HeadLoss = Callable[[Tensor, Tensor, "Tensor | None", Tensor], Tensor]
"""(hidden_SE, weight_VE, bias_V, labels_S) -> fp32 losses per token [S], or [1] with their sum (fused)."""


def chunk_tokens(vocabulary: int) -> int:
    """Tokens whose fp32 logits fill CHUNK_BYTES."""
    return max(1, CHUNK_BYTES // (4 * vocabulary))


def choose(name: str, device: torch.device, *, per_token: bool = False) -> HeadLoss:
    """The loss for a recipe's `cross_entropy`: fused on a GPU with Liger, else chunked.

    `per_token`: the objective needs each token's loss, which the fused kernel does not give.

    Raises:
        MachineError: the fused kernel was asked for and cannot run.
    """
    fused = importlib.util.find_spec("liger_kernel") is not None and device.type == "cuda" and not per_token
    if name == "fused" and per_token:
        raise MachineError('cross_entropy = "fused" gives only sums, and this objective needs every token\'s loss')
    if name == "fused" and not fused:
        raise MachineError(
            'cross_entropy = "fused" needs the liger-kernel package and a GPU; '
            '"auto" takes the chunked loss where they are missing'
        )
    if name in ("fused", "auto") and fused:
        return fused_loss
    return full_loss if name == "full" else chunked_loss


def full_loss(hidden_SE: Tensor, weight_VE: Tensor, bias_V: Tensor | None, labels_S: Tensor) -> Tensor:
    """All logits at once: the plain reference."""
    return F.cross_entropy(F.linear(hidden_SE, weight_VE, bias_V).float(), labels_S, reduction="none")


def chunked_loss(hidden_SE: Tensor, weight_VE: Tensor, bias_V: Tensor | None, labels_S: Tensor) -> Tensor:
    """Chunks of at most CHUNK_BYTES of logits, recomputed in the backward pass.

    Costs one more head matmul (2·S·V·E FLOPs) and saves 12·S·V bytes. torch's linear_cross_entropy keeps gradients
    instead of recomputing, but reduces to a scalar, which preference objectives cannot use.
    """
    size = chunk_tokens(weight_VE.shape[0])
    if len(labels_S) <= size:
        return full_loss(hidden_SE, weight_VE, bias_V, labels_S)
    chunks = [
        checkpoint(full_loss, hidden_CE, weight_VE, bias_V, labels_C, use_reentrant=False)
        for hidden_CE, labels_C in zip(hidden_SE.split(size), labels_S.split(size), strict=True)
    ]
    return torch.cat(chunks)  # type: ignore[arg-type]


def fused_loss(hidden_SE: Tensor, weight_VE: Tensor, bias_V: Tensor | None, labels_S: Tensor) -> Tensor:
    """Liger's fused linear cross-entropy, which makes gradients in the forward and so gives only their sum: [1]."""
    functional: Any = importlib.import_module("liger_kernel.transformers.functional")
    loss = functional.liger_fused_linear_cross_entropy(hidden_SE, weight_VE, labels_S, bias=bias_V, reduction="sum")
    return loss.reshape(1)
