"""Attention over documents laid end to end, in memory linear in tokens.

T tokens of all documents, H query heads, G key-value heads, D head size, B = 1 row.

Registered in transformers' attention registry under `VARLEN`. On a GPU in half precision it is torch's own varlen
FlashAttention; elsewhere each document runs through scaled_dot_product_attention by itself. Neither ever sees two
documents at once, and neither builds a [T, T] mask.
"""

from __future__ import annotations

import importlib.util
import inspect
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distft.core.errors import MachineError

VARLEN = "distft_varlen"
"""Name in transformers' attention registry; unknown to its mask factory, which therefore builds no mask."""

_HALF = (torch.bfloat16, torch.float16)


def choose(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """Transformers' name of the implementation for a recipe's `attention`.

    Raises:
        MachineError: flash was asked for where it cannot run.
    """
    flash = importlib.util.find_spec("flash_attn") is not None and device.type == "cuda" and dtype in _HALF
    if name == "flash" and not flash:
        raise MachineError(
            'attention = "flash" needs the flash-attn package, a CUDA device and dtype = "bfloat16"; '
            'use "auto", which takes torch\'s own varlen FlashAttention where that is missing'
        )
    if name in ("flash", "auto") and flash:
        return "flash_attention_2"
    return {"auto": VARLEN, "varlen": VARLEN, "sdpa": "sdpa", "eager": "eager"}[name]


def varlen_attention(
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
    **_: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention interface; returns ([B, T, H, D], None).

    Raises:
        ValueError: a mask or several rows were passed. Documents are told apart by `cu_seq_lens_q` alone; with a
            mask they would silently attend to each other.
    """
    if attention_mask is not None or query_BHTD.shape[0] != 1 or cu_seq_lens_q is None:
        raise ValueError(
            f"{VARLEN} wants one row of documents laid end to end with cu_seq_lens_q and no attention_mask"
        )
    if query_BHTD.shape[2] != key_BGTD.shape[2]:
        raise ValueError(f"{VARLEN} trains without a key-value cache: pass use_cache=False")
    if query_BHTD.is_cuda and query_BHTD.dtype in _HALF and dropout == 0.0:
        return flash(query_BHTD, key_BGTD, value_BGTD, cu_seq_lens_q, max_length_q, scaling, sliding_window), None
    pieces = []
    bounds = cu_seq_lens_q.tolist()
    for start, end in pairwise(bounds):
        q, k, v = (x[:, :, start:end] for x in (query_BHTD, key_BGTD, value_BGTD))
        mask = _window_mask(end - start, sliding_window, q.device)
        pieces.append(
            F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling, enable_gqa=True
            )
        )
    return torch.cat(pieces, dim=2).transpose(1, 2), None


def _window_mask(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """[length, length] causal mask of a sliding window; None when the whole document fits in it."""
    if window is None or length <= window:
        return None
    at = torch.arange(length, device=device)
    back = at[:, None] - at[None, :]
    return (back >= 0) & (back < window)


def flash(
    query_BHTD: Tensor,
    key_BGTD: Tensor,
    value_BGTD: Tensor,
    bounds: Tensor,
    longest: int | None,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """Torch's varlen FlashAttention, [B, T, H, D]; a plan runs it on the meta device too, for what it saves."""
    from torch.nn.attention import varlen

    varlen_attn: Any = varlen.varlen_attn

    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query_BHTD, key_BGTD, value_BGTD))  # [T, heads, D]
    if q.shape[1] != k.shape[1]:  # repeating is what torch < 2.12 needs; enable_gqa there does not exist
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    left = -1 if window is None else window - 1
    # torch 2.10 has is_causal and no window; later versions say causal as a window.
    if "window_size" in inspect.signature(varlen_attn).parameters:
        causal: dict[str, Any] = {"window_size": (left, 0)}
    else:
        causal = {"is_causal": True}
    return varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=scaling, **causal).unsqueeze(0)


def register() -> None:
    """Make `VARLEN` known to transformers; again is harmless."""
    from transformers import AttentionInterface

    AttentionInterface.register(VARLEN, varlen_attention)
