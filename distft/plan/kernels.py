"""Kernels of a GPU (and of a CPU) as the meta device can run them: right shapes, right saved tensors, no numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from distft.model import attention
from distft.model.cross_entropy import PLAIN, LogitRule

FLASH = "distft_plan_flash"
"""torch's varlen FlashAttention, as `distft.model.attention` calls it on a GPU."""
CPU = "distft_plan_cpu"
"""scaled_dot_product_attention over one document, as `distft.model.attention` calls it on a CPU."""
EAGER = "distft_plan_eager"
"""Plain products, as transformers' own eager attention: probabilities of [T, T] for each head are kept."""
ATTENTION = (FLASH, CPU, EAGER)


def flash_attention(
    module: nn.Module,
    query_BHTD: Tensor,
    key_BGTD: Tensor,
    value_BGTD: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    cu_seq_lens_q: Any = None,
    max_length_q: int | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention interface."""
    heads = (query_BHTD, key_BGTD, value_BGTD)
    return attention.flash(*heads, cu_seq_lens_q, max_length_q, scaling, sliding_window), None


def cpu_attention(
    module: nn.Module,
    query_BHTD: Tensor,
    key_BGTD: Tensor,
    value_BGTD: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The same; the operation that scaled_dot_product_attention takes on a CPU, which meta would decompose."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out_BHTD, _lse = flash(query_BHTD, key_BGTD, value_BGTD, 0.0, True, scale=scaling)
    return torch.cat([out_BHTD], dim=2).transpose(1, 2), None


def eager_attention(
    module: nn.Module,
    query_BHTD: Tensor,
    key_BGTD: Tensor,
    value_BGTD: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float = 1.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """The same. Source: transformers.models.llama.modeling_llama.eager_attention_forward."""
    groups = query_BHTD.shape[1] // key_BGTD.shape[1]
    key_BHTD, value_BHTD = (x.repeat_interleave(groups, dim=1) for x in (key_BGTD, value_BGTD))
    scores_BHTT = query_BHTD @ key_BHTD.transpose(2, 3) * scaling
    masked_BHTT = scores_BHTT + scores_BHTT.new_zeros(scores_BHTT.shape[-2:])
    probabilities_BHTT = masked_BHTT.softmax(dim=-1, dtype=torch.float32).to(query_BHTD.dtype)
    return (probabilities_BHTT @ value_BHTD).transpose(1, 2).contiguous(), None


def register() -> None:
    """Make them known to transformers; again is harmless."""
    from transformers import AttentionInterface

    AttentionInterface.register(FLASH, flash_attention)
    AttentionInterface.register(CPU, cpu_attention)
    AttentionInterface.register(EAGER, eager_attention)


def fused_loss(
    hidden_SE: Tensor, weight_VE: Tensor, bias_V: Tensor | None, labels_S: Tensor, rule: LogitRule = PLAIN
) -> Tensor:
    """Liger's fused linear cross-entropy by its allocations; its kernels need a GPU even for shapes: [1]."""
    return _Fused.apply(hidden_SE, weight_VE).reshape(1)


class _Fused(torch.autograd.Function):
    """Gradients are made in the forward, chunk by chunk, and kept for the backward.

    Source: liger_kernel/ops/fused_linear_cross_entropy.py, fused_linear_cross_entropy_forward
    """

    @staticmethod
    def forward(ctx: Any, hidden_SE: Tensor, weight_VE: Tensor) -> Tensor:
        tokens, width = hidden_SE.shape
        vocabulary = weight_VE.shape[0]
        pieces = -(-vocabulary // width)
        chunk = min(tokens, 1 << (-(-tokens // pieces) - 1).bit_length())
        hidden_gradient = torch.zeros_like(hidden_SE)
        weight_gradient = torch.zeros_like(weight_VE) if weight_VE.requires_grad else None
        losses = hidden_SE.new_zeros(tokens, dtype=torch.float32)
        logits_CV = hidden_SE[:chunk] @ weight_VE.t()  # the kernel writes their gradient in place
        hidden_gradient[:chunk] = logits_CV @ weight_VE
        if weight_gradient is not None:
            weight_gradient += logits_CV.t() @ hidden_SE[:chunk]
        ctx.save_for_backward(hidden_gradient, weight_gradient)
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        hidden_gradient, weight_gradient = ctx.saved_tensors
        return hidden_gradient, weight_gradient
