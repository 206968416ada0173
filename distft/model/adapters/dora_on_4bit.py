"""DoRA's magnitudes beside weights in 4 bits that are not there yet.

While PEFT (0.21) attaches, it dequantises each layer's weight to take the norms of its rows. Here the weights have no
values then; the magnitudes are filled with the layer (`distft.model.adapters.lora.fresh`), so PEFT needs to make room
for them only. To be deleted when PEFT attaches DoRA beside meta weights in 4 bits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def magnitudes_later() -> Iterator[None]:
    """Let PEFT make magnitudes without values inside the context."""
    import torch
    from peft.tuners.lora.dora import DoraLinearLayer
    from torch import nn

    kind: Any = DoraLinearLayer
    before = kind.update_layer

    def update_layer(self: Any, *, base_layer: Any, **given: Any) -> None:
        self.weight = nn.Parameter(torch.empty(base_layer.out_features, device="meta"))

    kind.update_layer = update_layer
    try:
        yield
    finally:
        kind.update_layer = before
