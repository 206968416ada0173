"""Attention over documents laid end to end, in memory linear in tokens.

T tokens of all documents, H query heads, G key-value heads, D head size, B = 1 row.

Registered in transformers' attention registry under `VARLEN`. On a GPU in half precision it is torch's own varlen
FlashAttention; elsewhere each document runs through scaled_dot_product_attention by itself. Neither ever sees two
documents at once, and neither builds a [T, T] mask.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distft.core.errors import MachineError
from distft.core.optional import why_not
from distft.model.adapters.virtual_tokens import with_prefix
from distft.model.paths import SINGLE, VARLEN

_HALF = (torch.bfloat16, torch.float16)


LARGEST_HEAD = 256
"""Head size up to which FlashAttention's kernels go, in steps of 8 (torch's own and the flash-attn package's)."""


def choose(name: str, device: torch.device, dtype: torch.dtype, *, head_size: int = 0) -> str:
    """Return transformers' name of the implementation for a recipe's `attention`.

    Args:
        name: what the recipe says.
        device: of the run.
        dtype: of the run.
        head_size: the largest of the model's query heads; 0: not known.

    Raises:
        MachineError: flash was asked for where it cannot run; says what is missing.
    """
    kernel = _why_no_kernel(device, dtype, head_size)
    lacking = [kernel]
    for package, implementation in () if kernel else _flash_packages(device):
        why = why_not(package)
        if name in ("flash", "auto") and not why:
            return implementation
        lacking.append(why)
    if name == "flash":
        raise MachineError(
            f'attention = "flash" cannot run here: {"; ".join(filter(None, lacking))}; '
            'use "auto", which takes torch\'s own varlen FlashAttention where the flash-attn package is missing'
        )
    if name == "auto" and device.type == "cuda" and dtype in _HALF and kernel:
        return "sdpa"
    return {"auto": VARLEN, "varlen": VARLEN, "sdpa": "sdpa", "eager": "eager"}[name]


def _flash_packages(device: torch.device) -> list[tuple[str, str]]:
    """Return (package, transformers' name of its attention), the fastest on this device first.

    FlashAttention 3's kernels are built for Hopper (compute capability 9.0) and for nothing else.
    Source: https://github.com/Dao-AILab/flash-attention, README, "FlashAttention-3 beta release"
    """
    packages = [("flash_attn", "flash_attention_2")]
    if torch.cuda.get_device_capability(device) == (9, 0):
        packages.insert(0, ("flash_attn_interface", "flash_attention_3"))
    return packages


def _why_no_kernel(device: torch.device, dtype: torch.dtype, head_size: int) -> str:
    """Return why FlashAttention's kernels do not run; "" where they do."""
    if device.type != "cuda":
        return "it needs a CUDA device"
    if dtype not in _HALF:
        return 'it needs dtype = "bfloat16"'
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"it needs compute capability 8.0, {torch.cuda.get_device_name(device)} has {major}.{minor}"
    if head_size > LARGEST_HEAD or head_size % 8:
        return f"it takes heads of 8, 16, ... {LARGEST_HEAD}, this model's have {head_size}"
    return ""


_BESIDE = frozenset(
    {
        "cu_seq_lens_k",  # equal to cu_seq_lens_q without a cache
        "max_length_k",
        "position_ids",  # rotary embeddings have been applied by now
        "use_cache",
        "return_dict",
        "output_attentions",
        "output_router_logits",
        "output_hidden_states",
        "logits_to_keep",
        "is_causal",  # True or None; False is refused below
    }
)
"""Arguments that models pass along and that change no number here. Any other is refused, not ignored."""


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
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **beside: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers' attention interface; returns ([B, T, H, D], None).

    Args:
        module: the attention layer; not looked at.
        query_BHTD: queries.
        key_BGTD: keys.
        value_BGTD: values; their head size may differ from the keys'.
        attention_mask: must be None.
        scaling: of the scores; 1 / sqrt(D) when None.
        dropout: on the probabilities.
        cu_seq_lens_q: where documents begin, and T.
        max_length_q: tokens in the longest document.
        sliding_window: a position sees itself and this many less one before it.
        softcap: scores become softcap · tanh(score / softcap) (Gemma 2).
        s_aux: [H], a learned score of a sink that takes probability and gives no value (gpt-oss).
        beside: what models pass along; see `_BESIDE`.

    Raises:
        ValueError: a mask or several rows were passed. Documents are told apart by `cu_seq_lens_q` alone; with a
            mask they would silently attend to each other. Or the layer says something that is not done here.
    """
    refuse_unknown(beside)
    if attention_mask is not None or query_BHTD.shape[0] != 1 or cu_seq_lens_q is None:
        raise ValueError(
            f"{VARLEN} wants one row of documents laid end to end with cu_seq_lens_q and no attention_mask"
        )
    if query_BHTD.shape[2] != key_BGTD.shape[2]:
        raise ValueError(f"{VARLEN} trains without a key-value cache: pass use_cache=False")
    plain = softcap is None and s_aux is None
    if query_BHTD.is_cuda and not plain:
        # Document by document this would hold scores of [H, L, L]; transformers' FlexAttention does it in blocks.
        raise ValueError(f"{VARLEN} has neither caps nor sinks on a GPU")
    if query_BHTD.is_cuda and query_BHTD.dtype in _HALF and dropout == 0.0:
        return flash(query_BHTD, key_BGTD, value_BGTD, cu_seq_lens_q, max_length_q, scaling, sliding_window), None
    pieces = []
    bounds = cu_seq_lens_q.tolist()
    if query_BHTD.is_cuda:
        key_BGTD, value_BGTD = (_repeated(x, query_BHTD.shape[1]) for x in (key_BGTD, value_BGTD))
    for start, end in pairwise(bounds):
        q, k, v = (x[:, :, start:end] for x in (query_BHTD, key_BGTD, value_BGTD))
        pieces.append(one_document(q, k, v, scaling, dropout, sliding_window, softcap, s_aux))
    # Laid out as [B, T, H, D], as transformers' own: some models view what they get as [T, H · D].
    return torch.cat([piece.transpose(1, 2) for piece in pieces], dim=1), None


def refuse_unknown(beside: dict[str, Any]) -> None:
    """Let pass what models hand to any attention and what changes no number here.

    Raises:
        ValueError: there is something else, or attention that is not causal is asked for.
    """
    unknown = sorted(key for key, value in beside.items() if key not in _BESIDE and value is not None)
    if unknown or beside.get("is_causal") is False:
        raise ValueError(f"{VARLEN} does not know {', '.join(unknown) or 'attention that is not causal'}")


def one_document(
    query_BHLD: Tensor,
    key_BGLD: Tensor,
    value_BGLD: Tensor,
    scaling: float | None,
    dropout: float,
    window: int | None,
    softcap: float | None,
    sink_H: Tensor | None,
) -> Tensor:
    """Return [B, H, L, D] of one document of L tokens; arguments as for `varlen_attention`."""
    if softcap is not None or sink_H is not None:
        return _capped(query_BHLD, key_BGLD, value_BGLD, scaling, dropout, window, softcap, sink_H)
    mask = _window_mask(query_BHLD.shape[2], window, query_BHLD.device)
    given: dict[str, Any] = {"attn_mask": mask, "dropout_p": dropout, "is_causal": mask is None, "scale": scaling}
    given["enable_gqa"] = query_BHLD.shape[1] != key_BGLD.shape[1]
    with _no_scores(query_BHLD.device):
        return F.scaled_dot_product_attention(query_BHLD, key_BGLD, value_BGLD, **given)


def _repeated(heads_BGTD: Tensor, count: int) -> Tensor:
    """Return the key or value heads, one for each of `count` query heads."""
    groups = count // heads_BGTD.shape[1]
    return heads_BGTD if groups == 1 else heads_BGTD.repeat_interleave(groups, dim=1)


def _no_scores(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Allow, on a GPU, only kernels that do not hold scores of [H, L, L].

    In fp32 that is the memory-efficient one, which takes no grouped heads: left to choose, torch computes scores.
    """
    if device.type != "cuda":
        return contextlib.nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION])


def single_attention(
    module: nn.Module,
    query_BHTD: Tensor,
    key_BGTD: Tensor,
    value_BGTD: Tensor,
    attention_mask: Tensor | None,
    **given: Any,
) -> tuple[Tensor, None]:
    """Attend like `varlen_attention` to one document.

    Raises:
        ValueError: as there; or borders of documents are given.
    """
    if given.pop("cu_seq_lens_q", None) is not None:
        raise ValueError(f"{SINGLE} takes one document")
    length = query_BHTD.shape[2]
    bounds = torch.tensor([0, length], dtype=torch.int32, device=query_BHTD.device)
    given |= {"cu_seq_lens_q": bounds, "max_length_q": length}
    return varlen_attention(module, query_BHTD, key_BGTD, value_BGTD, attention_mask, **given)


def _capped(
    query_BHLD: Tensor,
    key_BGLD: Tensor,
    value_BGLD: Tensor,
    scaling: float | None,
    dropout: float,
    window: int | None,
    softcap: float | None,
    sink_H: Tensor | None,
) -> Tensor:
    """Return [B, H, L, D] of one document with capped scores and a sink; holds its scores.

    Sources: https://arxiv.org/abs/2408.00118, section 2 (caps); https://arxiv.org/abs/2309.17453 (sinks)
    """
    length, heads = query_BHLD.shape[2], query_BHLD.shape[1]
    key_BHLD, value_BHLD = (_repeated(x, heads) for x in (key_BGLD, value_BGLD))
    scale = query_BHLD.shape[-1] ** -0.5 if scaling is None else scaling
    scores_BHLL = query_BHLD @ key_BHLD.transpose(2, 3) * scale
    if softcap is not None:
        scores_BHLL = softcap * torch.tanh(scores_BHLL / softcap)
    visible_LL = _window_mask(length, window, scores_BHLL.device)
    if visible_LL is None:
        visible_LL = torch.ones(length, length, dtype=torch.bool, device=scores_BHLL.device).tril()
    scores_BHLL = scores_BHLL.float().masked_fill(~visible_LL, float("-inf"))
    if sink_H is not None:
        sink_BHL1 = sink_H.float().reshape(1, -1, 1, 1).expand(scores_BHLL.shape[0], -1, length, 1)
        scores_BHLL = torch.cat([scores_BHLL, sink_BHL1], dim=-1)
    probabilities_BHLL = scores_BHLL.softmax(-1)[..., :length].to(value_BHLD.dtype)
    return F.dropout(probabilities_BHLL, dropout) @ value_BHLD


def _window_mask(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """Return the [length, length] causal mask of a sliding window; None when the whole document fits in it."""
    if window is None or length <= window:
        return None
    positions = torch.arange(length, device=device)
    back = positions[:, None] - positions[None, :]
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
    """Run torch's varlen FlashAttention, [B, T, H, D]; a plan runs it on meta too, for what it saves."""
    from torch.nn.attention import varlen

    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query_BHTD, key_BGTD, value_BGTD))  # [T, heads, D]
    grouped: dict[str, Any] = {}
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in _varlen_parameters():
            grouped["enable_gqa"] = True
        else:  # torch < 2.12
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    window_size = (-1 if window is None else window - 1, 0)
    varlen_attn: Any = varlen.varlen_attn
    out = varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=scaling, window_size=window_size, **grouped)
    return out.unsqueeze(0)


@functools.cache
def _varlen_parameters() -> frozenset[str]:
    """Return the names that this version of torch's varlen attention takes."""
    from torch.nn.attention import varlen

    return frozenset(inspect.signature(varlen.varlen_attn).parameters)


def register() -> None:
    """Make `VARLEN` and `SINGLE` known to transformers; again is harmless."""
    from transformers import AttentionInterface

    AttentionInterface.register(VARLEN, with_prefix(varlen_attention))
    AttentionInterface.register(SINGLE, with_prefix(single_attention))


def let_take_prefixes() -> None:
    """Let transformers' own attention put in the prefixes of its module, too; it stays what it is where none is."""
    from transformers import AttentionInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    functions: Any = ALL_ATTENTION_FUNCTIONS
    for name in ("sdpa", "flash_attention_2", "flash_attention_3"):
        AttentionInterface.register(name, with_prefix(functions[name]))
