"""Kernels of a GPU (and of a CPU) as the meta device can run them: right shapes, right saved tensors, no numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distft.model import attention
from distft.model.adapters.virtual_tokens import with_prefix
from distft.model.logit_rule import PLAIN, LogitRule
from distft.model.paths import SINGLE, VARLEN, ForwardPath

FLASH = "distft_plan_flash"
"""torch's varlen FlashAttention, as `distft.model.attention` calls it on a GPU; and what saves the same tensors."""
CPU = "distft_plan_cpu"
"""scaled_dot_product_attention over one document, as `distft.model.attention` calls it on a CPU."""
SDPA = "sdpa"
"""Transformers' `sdpa` on a GPU, with a [T, T] mask where it makes one."""
SDPA_CPU = "sdpa on a CPU"
"""The same on a CPU."""
EAGER = "eager"
"""The model's own plain products: probabilities of [T, T] for each head are kept."""


def of_path(path: ForwardPath, *, on_cpu: bool = False) -> str:
    """Return what stands on the meta device for the attention that a path takes on a GPU, or on a CPU.

    Raises:
        ValueError: nothing does.
    """
    kinds = {
        VARLEN: FLASH,
        SINGLE: FLASH,
        "flash_attention_2": FLASH,
        "flash_attention_3": FLASH,
        "flex_attention": FLASH,
        "sdpa": SDPA,
        "eager": EAGER,
    }
    if path.attention not in kinds:
        raise ValueError(f"the planner does not know what attention {path.attention} keeps")
    kernel = kinds[path.attention]
    return {FLASH: CPU, SDPA: SDPA_CPU}.get(kernel, kernel) if on_cpu else kernel


def registered(kernel: str) -> str:
    """Return the name by which transformers knows a kernel."""
    return "sdpa" if kernel == SDPA_CPU else kernel


def flash_attention(
    module: nn.Module,
    query_BHTD: Tensor,
    key_BGTD: Tensor,
    value_BGTD: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **beside: Any,
) -> tuple[Tensor, None]:
    """Attend by transformers' interface; arguments as for `distft.model.attention.varlen_attention`.

    Caps, sinks and values of another head size run in FlexAttention there; a sink scales its output.

    Raises:
        ValueError: the model passes what that function does not know either.
    """
    _refuse(attention_mask, beside)
    if dropout:
        heads = (query_BHTD, key_BGTD, value_BGTD)
        return attention.one_document(*heads, scaling, dropout, sliding_window, softcap, s_aux).transpose(1, 2), None
    if cu_seq_lens_q is None:  # one document alone
        cu_seq_lens_q = torch.empty(2, dtype=torch.int32, device=query_BHTD.device)
    longest = query_BHTD.shape[2] if max_length_q is None else max_length_q
    heads = (query_BHTD, key_BGTD, value_BGTD)
    if softcap is not None or s_aux is not None or value_BGTD.shape[-1] != query_BHTD.shape[-1]:
        out_BTHD = _Flex.apply(*heads)
        if s_aux is not None:
            scale_BTH = torch.sigmoid(out_BTHD.new_empty(out_BTHD.shape[:3], dtype=torch.float32) - s_aux)
            out_BTHD = out_BTHD * scale_BTH[..., None].to(out_BTHD.dtype)
        return out_BTHD, None
    return attention.flash(*heads, cu_seq_lens_q, longest, scaling, sliding_window), None


class _Flex(torch.autograd.Function):
    """FlexAttention by its allocations: it takes heads as they are, and keeps them, the output and a sum a row.

    Source: torch/_higher_order_ops/flex_attention.py, FlexAttentionAutogradOp
    """

    @staticmethod
    def forward(ctx: Any, query_BHTD: Tensor, key_BGTD: Tensor, value_BGTD: Tensor) -> Tensor:
        out_BHTD = query_BHTD.new_empty(*query_BHTD.shape[:3], value_BGTD.shape[-1])
        sums_BHT = query_BHTD.new_empty(query_BHTD.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(query_BHTD, key_BGTD, value_BGTD, out_BHTD, sums_BHT)
        return out_BHTD.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(given) for given in ctx.saved_tensors[:3])


def cpu_attention(
    module: nn.Module,
    query_BHTD: Tensor,
    key_BGTD: Tensor,
    value_BGTD: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **beside: Any,
) -> tuple[Tensor, None]:
    """Attend to all tokens as one document."""
    _refuse(attention_mask, beside)
    heads = (query_BHTD, key_BGTD, value_BGTD)
    out_BHTD = attention.one_document(*heads, scaling, dropout, sliding_window, softcap, s_aux)
    return torch.cat([out_BHTD], dim=2).transpose(1, 2), None


def _refuse(attention_mask: Tensor | None, beside: dict[str, Any]) -> None:
    if attention_mask is not None:
        raise ValueError(f"{VARLEN} takes no attention_mask")
    attention.refuse_unknown(beside)


def register() -> None:
    """Make them known to transformers; again is harmless."""
    from transformers import AttentionInterface

    AttentionInterface.register(FLASH, with_prefix(flash_attention))
    AttentionInterface.register(CPU, with_prefix(cpu_attention))


@contextlib.contextmanager
def standing_in(kernel: str, *, packed: bool) -> Iterator[None]:
    """Let operations that depend on values run on the meta device, inside the context.

    Args:
        kernel: FLASH, CPU, SDPA, SDPA_CPU or EAGER.
        packed: several documents stand in one forward, so masks are of blocks and are never left out.
    """
    from transformers import masking_utils
    from transformers.integrations import moe

    find_indices, grouped = masking_utils.find_packed_sequence_indices, moe._can_use_grouped_mm

    def indices(position_ids: Tensor) -> Tensor | None:
        """Return a stand-in for what is read off the values otherwise: whether there are several documents."""
        if not position_ids.is_meta:
            return find_indices(position_ids)
        return torch.empty_like(position_ids) if packed else None

    def has_grouped(input: Tensor, weight: Tensor, offs: Tensor) -> bool:
        """Return whether the grouped product can run: on meta torch has it in bf16 alone."""
        return grouped(input, weight, offs) and not (weight.is_meta and weight.dtype != torch.bfloat16)

    masking_utils.find_packed_sequence_indices, moe._can_use_grouped_mm = indices, has_grouped
    attends, stand_in = F.scaled_dot_product_attention, _on_cpu if kernel in (CPU, SDPA_CPU) else _on_gpu

    def attend(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Attend by a stand-in on meta, which would decompose what a device has a kernel for."""
        return (stand_in if query.is_meta else attends)(query, *args, **kwargs)

    F.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        F.scaled_dot_product_attention = attends
        masking_utils.find_packed_sequence_indices, moe._can_use_grouped_mm = find_indices, grouped


def _on_cpu(
    query_BHTD: Tensor,
    key_BGTD: Tensor,
    value_BGTD: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Follow aten/src/ATen/native/transformers/attention.cpp, scaled_dot_product_attention."""
    learned_mask = attn_mask is not None and attn_mask.requires_grad
    broadcast = query_BHTD.shape[1] != key_BGTD.shape[1] and not enable_gqa
    if dropout_p or learned_mask or broadcast or query_BHTD.shape[-1] != value_BGTD.shape[-1]:
        return _plain(query_BHTD, key_BGTD, value_BGTD, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    mask = _additive(attn_mask, query_BHTD)
    out_BHTD, _lse = flash(query_BHTD, key_BGTD, value_BGTD, 0.0, is_causal, attn_mask=mask, scale=scale)
    return out_BHTD


def _on_gpu(
    query_BHTD: Tensor,
    key_BGTD: Tensor,
    value_BGTD: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Use FlashAttention without a mask and in 16 bits, else memory-efficient attention.

    Source: aten/src/ATen/native/transformers/cuda/sdp_utils.cpp.
    """
    if query_BHTD.shape[1] != key_BGTD.shape[1] and not enable_gqa:  # heads that broadcast: no kernel takes them
        return _plain(query_BHTD, key_BGTD, value_BGTD, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    same_size = query_BHTD.shape[-1] == key_BGTD.shape[-1] == value_BGTD.shape[-1]
    if attn_mask is None and query_BHTD.dtype in (torch.bfloat16, torch.float16) and same_size:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(query_BHTD, key_BGTD, value_BGTD, dropout_p, is_causal, False, scale=scale)[0]
    if key_BGTD.shape[1] != query_BHTD.shape[1]:
        groups = query_BHTD.shape[1] // key_BGTD.shape[1]
        key_BGTD, value_BGTD = (x.repeat_interleave(groups, dim=1) for x in (key_BGTD, value_BGTD))
    mask = _additive(attn_mask, query_BHTD)
    if mask is not None:
        mask = mask.expand(*query_BHTD.shape[:3], key_BGTD.shape[2])
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    keeps = torch.is_grad_enabled() and query_BHTD.requires_grad
    return efficient(query_BHTD, key_BGTD, value_BGTD, mask, keeps, dropout_p, is_causal, scale=scale)[0]


def _additive(mask: Tensor | None, query_BHTD: Tensor) -> Tensor | None:
    """Turn a mask of yes and no into one that is added, in the query's type."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=query_BHTD.dtype).masked_fill_(mask.logical_not(), float("-inf"))


def _plain(
    query_BHTD: Tensor,
    key_BGTD: Tensor,
    value_BGTD: Tensor,
    mask: Tensor | None,
    dropout: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    """Compute plain products, where no kernel does it."""
    math, mask = torch.ops.aten._scaled_dot_product_attention_math, _additive(mask, query_BHTD)
    given = (query_BHTD, key_BGTD, value_BGTD, mask, dropout, is_causal)
    return math(*given, scale=scale, enable_gqa=enable_gqa)[0]


def fused_loss(
    hidden_SE: Tensor, weight_VE: Tensor, bias_V: Tensor | None, labels_S: Tensor, rule: LogitRule = PLAIN
) -> Tensor:
    """Stand in for Liger's fused loss by its allocations; its kernels need a GPU even for shapes: [1]."""
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
