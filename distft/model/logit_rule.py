"""What stands between a model's last hidden states and its logits.

Shape letters: S supervised tokens, E hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LogitRule:
    """What a model does between its last hidden state and its logits, beside the product with the head's weight.

    logits = soft_cap(scale · (hidden_scale · hidden @ weightᵀ + bias)) / temperature,
    soft_cap(x) = cap · tanh(x / cap).
    """

    hidden_scale: float = 1.0
    scale: float = 1.0
    cap: float | None = None
    temperature: float = 1.0
    """No part of the model: what answers are drawn at; see `distft.model.cross_entropy.AtTemperature`."""

    @property
    def is_plain(self) -> bool:
        """Whether logits are the head's product as it is."""
        return self == PLAIN

    def logits(self, hidden_SE: Tensor, weight_VE: Tensor, bias_V: Tensor | None) -> Tensor:
        """Return fp32 logits [S, V]; scale and cap are applied in fp32 whatever the weights are stored in."""
        if self.hidden_scale != 1.0:
            hidden_SE = hidden_SE * self.hidden_scale
        return self.finish(F.linear(hidden_SE, weight_VE, bias_V).float())

    def finish(self, product_SV: Tensor) -> Tensor:
        """Return the logits of the head's fp32 product."""
        if self.scale != 1.0:
            product_SV = product_SV * self.scale
        logits_SV = product_SV if self.cap is None else self.cap * torch.tanh(product_SV / self.cap)
        return logits_SV if self.temperature == 1.0 else logits_SV / self.temperature

    def slope_(self, grad_SV: Tensor, logits_SV: Tensor) -> Tensor:
        """Turn a gradient of the logits into one of the head's product, in place: · scale · (1 - (logits / cap)²)."""
        assert self.temperature == 1.0, "sums of losses have no temperature"
        if self.cap is not None:
            grad_SV *= 1 - (logits_SV / self.cap).square_()
        return grad_SV.mul_(self.scale) if self.scale != 1.0 else grad_SV


PLAIN = LogitRule()
