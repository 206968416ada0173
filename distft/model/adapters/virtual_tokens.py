"""Positions before every document that no tokenizer writes: what methods put there, in the embedding or in attention.

T tokens, B rows, K positions that are attended to (with those in a cache), n virtual tokens, E hidden size, G key-value
heads, D their size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distft.core.errors import MachineError
from distft.core.virtual_tokens import VIRTUAL_ID

ROWS = "prefix_rows"
"""Name of the argument, passed through the model's layers to attention, that says which positions are virtual: int64
[B, K], the index of the virtual token, -1 for a token of text."""
HIDDEN = "prefix_hidden"
"""Name of the argument by which a projected prefix gets what all layers project from: [n, H]."""


class VirtualEmbedding(nn.Module):
    """The model's own embedding, and beside it one row for each virtual token.

    What the model's embedding does to its rows (Gemma scales them) is not done to virtual ones, as in PEFT.
    """

    def __init__(self, base: nn.Module, count: int, dtype: torch.dtype) -> None:
        """Put `count` rows of type `dtype`, on the meta device, beside the embedding `base`."""
        super().__init__()
        self.base = base
        self.virtual = nn.Embedding(count, _width(base), device="meta", dtype=dtype)

    @property
    def weight(self) -> Any:
        """The rows of real tokens."""
        return self.base.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return the embedding of each id, virtual ones from their own rows."""
        is_virtual = input_ids >= VIRTUAL_ID
        real = self.base(input_ids.masked_fill(is_virtual, 0))
        virtual = self.rows((input_ids - VIRTUAL_ID).clamp(min=0))
        return torch.where(is_virtual[..., None], virtual.to(real.dtype), real)

    def rows(self, index: Tensor) -> Tensor:
        """Return the embedding of virtual tokens, by index: int64 [...] -> [..., E]."""
        return self.virtual(index)


class EncodedEmbedding(VirtualEmbedding):
    """Virtual rows that an encoder of their own makes, as in PEFT's p-tuning."""

    def __init__(self, base: nn.Module, count: int, encoder: nn.Module) -> None:
        """Put `count` rows that `encoder` makes of their indices beside the embedding `base`."""
        nn.Module.__init__(self)
        self.base, self.count = base, count
        self.virtual = encoder

    def rows(self, index: Tensor) -> Tensor:
        """See `VirtualEmbedding`; every row is made once, however many documents begin with it."""
        made_nE = self.virtual(torch.arange(self.count, device=index.device))
        return F.embedding(index, made_nE)


class EmptyEmbedding(VirtualEmbedding):
    """Virtual tokens without an embedding: zeros, for methods that put them into attention alone."""

    def __init__(self, base: nn.Module) -> None:
        """Let the embedding `base` read virtual ids."""
        nn.Module.__init__(self)
        self.base = base

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return the embedding of each id, zeros for virtual ones."""
        is_virtual = input_ids >= VIRTUAL_ID
        return self.base(input_ids.masked_fill(is_virtual, 0)).masked_fill(is_virtual[..., None], 0.0)


class KeyValuePrefix(nn.Module):
    """Keys and values of the virtual tokens in one attention layer: trained themselves, or projected from [n, H]."""

    def __init__(self, count: int, kv_heads: int, head_dim: int, hidden: int | None, dtype: torch.dtype) -> None:
        """Make it on the meta device.

        Args:
            count: virtual tokens.
            kv_heads: of the layer.
            head_dim: of the layer.
            hidden: H, where keys and values are projected; None: they are trained themselves.
            dtype: of the parameters.
        """
        super().__init__()
        self.kv_heads, self.head_dim = kv_heads, head_dim
        columns = 2 * kv_heads * head_dim
        made: dict[str, Any] = {"device": "meta", "dtype": dtype}
        if hidden is None:
            self.weight = nn.Parameter(torch.empty(count, columns, **made))
            self.register_parameter("bias", None)
        else:
            self.weight = nn.Parameter(torch.empty(columns, hidden, **made))
            self.bias = nn.Parameter(torch.empty(columns, **made))
        self.starts_at_zero = False
        """What it is filled with."""
        self.calls = 0
        """Forwards so far; engines may run one twice."""

    def forward(self, hidden_nH: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return keys and values, each [n, G, D]."""
        self.calls += 1
        both = self.weight if hidden_nH is None else F.linear(hidden_nH, self.weight, self.bias)
        keys, values = both.reshape(both.shape[0], 2, self.kv_heads, self.head_dim).unbind(1)
        return keys, values


class PrefixEncoder(nn.Module):
    """What all layers of a projected prefix have in common: an embedding and the first of two layers."""

    def __init__(self, count: int, width: int, hidden: int, dtype: torch.dtype) -> None:
        """Make it on the meta device: `count` rows of `width`, projected to `hidden`."""
        super().__init__()
        self.embedding = nn.Embedding(count, width, device="meta", dtype=dtype)
        self.project = nn.Linear(width, hidden, device="meta", dtype=dtype)

    def forward(self, index: Tensor) -> Tensor:
        """Return tanh(W e + b) of each virtual token: [n] -> [n, H]."""
        return torch.tanh(self.project(self.embedding(index)))


class PrefixInputs:
    """What the forwards of a model with prefixes in its attention pass on to them; nothing for other models."""

    def __init__(self, lm: Any) -> None:
        """Look for prefixes in a model."""
        base = lm.get_base_model() if hasattr(lm, "get_base_model") else lm
        self._prefixes = [module for module in base.modules() if isinstance(module, KeyValuePrefix)]
        self._encoder: PrefixEncoder | None = getattr(base, "prefix_encoder", None)
        self._calls = 0

    def of_ids(self, ids_BT: Tensor) -> dict[str, Any]:
        """Return the arguments of a forward that reads these ids."""
        return self._arguments(torch.where(ids_BT >= VIRTUAL_ID, ids_BT - VIRTUAL_ID, -1)) if self._prefixes else {}

    def of_rows(self, ids_BL: Tensor, mask_BK: Tensor | None, cached: int) -> dict[str, Any]:
        """Return the arguments of a forward of rows behind `cached` positions: each begins with all virtual tokens."""
        if not self._prefixes:
            return {}
        if mask_BK is None:
            mask_BK = ids_BL.new_ones(ids_BL.shape[0], cached + ids_BL.shape[1])
        attended_BK = mask_BK.long()
        index_BK = attended_BK.cumsum(-1) - 1
        virtual_BK = (attended_BK > 0) & (index_BK < self._count)
        return self._arguments(torch.where(virtual_BK, index_BK, -1))

    @property
    def _count(self) -> int:
        weight: Any = self._prefixes[0].weight if self._encoder is None else self._encoder.embedding.weight
        return int(getattr(weight, "ds_shape", weight.shape)[0])

    def _arguments(self, rows_BK: Tensor) -> dict[str, Any]:
        self._calls = sum(prefix.calls for prefix in self._prefixes)
        hidden_nH = None
        if self._encoder is not None:
            hidden_nH = self._encoder(torch.arange(self._count, device=rows_BK.device))
        return {ROWS: rows_BK, HIDDEN: hidden_nH}

    def check(self) -> None:
        """Check after a forward that every layer's attention has put its prefix in.

        Raises:
            MachineError: some layer has not: the model does not pass arguments on to its attention.
        """
        called = sum(prefix.calls for prefix in self._prefixes) - self._calls
        if called < len(self._prefixes):
            raise MachineError(
                f"the attention of {called} of {len(self._prefixes)} layers has read its prefix: this model does not "
                'pass arguments on to attention, or runs one that is its own  use [method] name = "prompt_tuning"'
            )


def with_prefix(attend: Any) -> Any:
    """Return a function of transformers' attention interface that puts prefixes in before `attend` runs."""

    def attended(
        module: nn.Module, query: Tensor, key_BGKD: Tensor, value_BGKD: Tensor, *given: Any, **beside: Any
    ) -> Any:
        rows_BK, hidden_nH = beside.pop(ROWS, None), beside.pop(HIDDEN, None)
        prefix: Any = module._modules.get("kv_prefix")
        if prefix is not None:
            if rows_BK is None:
                raise MachineError("attention was not told which positions are virtual")
            keys_nGD, values_nGD = prefix(hidden_nH)
            key_BGKD = _put(keys_nGD, key_BGKD, rows_BK)
            value_BGKD = _put(values_nGD, value_BGKD, rows_BK)
        return attend(module, query, key_BGKD, value_BGKD, *given, **beside)

    attended.__dict__["puts_prefixes"] = True
    return attended if "puts_prefixes" not in getattr(attend, "__dict__", {}) else attend


def _put(prefix_nGD: Tensor, own_BGKD: Tensor, rows_BK: Tensor) -> Tensor:
    """Return keys or values with those of virtual positions in the place of what the layer computed there."""
    if own_BGKD.shape[1] != prefix_nGD.shape[1] or own_BGKD.shape[3] != prefix_nGD.shape[2]:
        raise MachineError(
            f"attention has keys or values of {own_BGKD.shape[1]} heads of {own_BGKD.shape[3]}, and the config says "
            f'{prefix_nGD.shape[1]} of {prefix_nGD.shape[2]}  use [method] name = "prompt_tuning"'
        )
    at_BGKD = prefix_nGD[rows_BK.clamp(min=0)].transpose(1, 2).to(own_BGKD.dtype)
    return torch.where((rows_BK >= 0)[:, None, :, None], at_BGKD, own_BGKD)


def _width(base: nn.Module) -> int:
    weight: Any = base.weight
    return int(weight.shape[1])
