"""Experts in fused form: modules that hold the matrices of all experts in one parameter, [experts, rows, columns].

Their forward reads the parameters as attributes of the module (`self.gate_up_proj`), so what it computes with can be
another tensor for the length of a call: dequantised, or with an adapter's product added. Nothing is registered or
renamed for that: engines, which gather and release parameters around forwards, see the parameters that there are.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

Change = Callable[[Tensor], Tensor]
"""A parameter as it is stored (or as the change before gave it) -> what the forward computes with."""
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def expert_tensors(module: nn.Module) -> list[str]:
    """Return the short names of a module's own parameters that hold one matrix for each of several experts."""
    if isinstance(module, _CONVOLUTIONS):
        return []
    return [
        short
        for short, param in module._parameters.items()
        if param is not None and param.ndim == 3 and min(param.shape) > 1
    ]


def all_expert_tensors(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield (name of the module, module, short name) of every expert tensor."""
    for name, module in model.named_modules():
        for short in expert_tensors(module):
            yield name, module, short


def compute_with(module: Any, short: str, change: Change, *, first: bool = False) -> None:
    """Have the module's forward compute with `change` of the parameter, after the earlier changes, or before them."""
    if "changes" not in module.__dict__:
        module.__dict__["changes"] = {}
        inner = module.forward

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                for name, changes in self.__dict__["changes"].items():
                    value = self._parameters[name]
                    for apply in changes:
                        value = apply(value)
                    self.__dict__[name] = value  # found before the parameter of that name
                return inner(*args, **kwargs)
            finally:
                for name in self.__dict__["changes"]:
                    self.__dict__.pop(name, None)

        module.forward = types.MethodType(forward, module)
    changes = module.__dict__["changes"].setdefault(short, [])
    changes.insert(0 if first else len(changes), change)


_PER_TOKEN = (
    "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k", "experts_per_token",
    "num_selected_experts", "router_topk", "top_k_experts",
)  # fmt: skip
"""What configs call the number of experts that a token is sent to."""


def active_share(config: Any, module: nn.Module) -> float:
    """Return the share of an expert module's weights that one token is multiplied with; 1 if the config gives none."""
    text = config.get_text_config()
    top_k = [value for key in _PER_TOKEN if isinstance(value := getattr(text, key, None), int) and value > 0]
    count = max(param.shape[0] for short in expert_tensors(module) if (param := module._parameters[short]) is not None)
    return min(1.0, top_k[0] / count) if top_k else 1.0
