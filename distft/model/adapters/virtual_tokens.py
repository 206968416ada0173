"""An embedding with trained rows for virtual tokens, for methods that train a prompt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from distft.core.virtual_tokens import VIRTUAL_ID


class VirtualEmbedding(nn.Module):
    """The model's own embedding, and beside it one row for each virtual token.

    What the model's embedding does to its rows (Gemma scales them) is not done to virtual ones, as in PEFT.
    """

    def __init__(self, base: nn.Module, count: int, dtype: torch.dtype) -> None:
        """Put `count` rows of type `dtype`, on the meta device, beside the embedding `base`."""
        super().__init__()
        self.base = base
        width = base.weight.shape[1]  # pyright: ignore[reportIndexIssue, reportArgumentType, reportCallIssue]
        self.virtual = nn.Embedding(count, width, device="meta", dtype=dtype)  # pyright: ignore[reportArgumentType]

    @property
    def weight(self) -> Any:
        """The rows of real tokens."""
        return self.base.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return the embedding of each id, virtual ones from their own rows."""
        is_virtual = input_ids >= VIRTUAL_ID
        real = self.base(input_ids.masked_fill(is_virtual, 0))
        virtual = self.virtual((input_ids - VIRTUAL_ID).clamp(min=0))
        return torch.where(is_virtual[..., None], virtual.to(real.dtype), real)
