"""The module of a bottleneck adapter, called where the part that it stands behind has ended."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    import torch

    from distft.model.adapters.bottleneck import BottleneckParams


class BottleneckLayer(nn.Module):
    """scale * up(activation(down(x))) for x [..., E]; made on the meta device."""

    def __init__(self, width: int, params: BottleneckParams, dtype: torch.dtype) -> None:
        """Make the two layers, of `width` and `params.size`."""
        super().__init__()
        made: dict[str, Any] = {"bias": params.bias, "device": "meta", "dtype": dtype}
        self.down = nn.Linear(width, params.size, **made)
        self.up = nn.Linear(params.size, width, **made)
        self.left_out = False
        """Forwards compute with the base alone."""
        self._beside, self._scale = params.placement == "parallel", params.scale
        self._activation: Any = getattr(F, params.activation)

    def stand_behind(self, part: nn.Module) -> None:
        """Become a part of `part`, and add to what it gives from now on."""
        part.bottleneck = self
        part.register_forward_hook(_add, with_kwargs=True)

    def forward(self, read: Tensor) -> Tensor:
        """Return what is added."""
        return self._scale * self.up(self._activation(self.down(read.to(self.down.weight.dtype))))

    @property
    def is_beside(self) -> bool:
        """Whether it reads what the part reads, and not what that gives."""
        return self._beside


def _add(part: nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
    layer: Any = part._modules["bottleneck"]
    if layer.left_out:
        return output
    made = output[0] if isinstance(output, tuple) else output
    read = (*given, *named.values())[0] if layer.is_beside else made
    made = made + layer(read).to(made.dtype)
    return (made, *output[1:]) if isinstance(output, tuple) else made
