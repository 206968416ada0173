"""A loss on an output projection that has LoRA: computed inside the forward of the adapter's own layers."""

from __future__ import annotations

import types
from typing import Any

from torch import Tensor, nn

from distft.model.cross_entropy import HeadLoss, with_adapter
from distft.model.logit_rule import LogitRule


def use_loss_with_adapter(head: Any, loss: HeadLoss, rule: LogitRule) -> None:
    """Let the forward of a head under PEFT's LoRA give a loss where it is given labels (see `distft.model.causal`).

    Each of its parts is called once, however many chunks the loss has: engines that gather parameters around a part's
    forward run a collective for every call, and ranks have different numbers of chunks. So the loss runs inside the
    forward of the base layer, which runs inside that of `lora_B`: there both weights may be touched.
    """
    base = getattr(head, "base_layer", head)
    if not isinstance(base, nn.Linear) or list(getattr(head, "lora_A", ())) != ["default"] or head.use_dora["default"]:
        raise TypeError(f"the output projection is {type(head).__name__}, neither a linear layer nor one under LoRA")
    down, up, dropout = head.lora_A["default"], head.lora_B["default"], head.lora_dropout["default"]
    own_head, own_base, own_up = (types.MethodType(type(part).forward, part) for part in (head, base, up))

    def base_forward(self: nn.Linear, hidden: Tensor, inner: Any = None, up_VR: Any = None, *labelled: Any) -> Tensor:
        if inner is None:
            return own_base(hidden)
        labels, head_loss = labelled
        return with_adapter(head_loss, hidden, inner, self.weight, self.bias, up_VR, labels, rule)

    def up_forward(self: nn.Linear, inner: Tensor, hidden: Any = None, *labelled: Any) -> Tensor:
        return own_up(inner) if hidden is None else base(hidden, inner, self.weight, *labelled)

    def forward(self: Any, hidden: Tensor, labels: Tensor | None = None, head_loss: HeadLoss = loss) -> Tensor:
        hidden = hidden.to(base.weight.dtype)
        if labels is None:
            return own_head(hidden)
        if rule.hidden_scale != 1.0:
            hidden = hidden * rule.hidden_scale
        inner = down(dropout(hidden.to(down.weight.dtype))) * self.scaling["default"]
        return up(inner, hidden, labels, head_loss)

    for part, new_forward in ((base, base_forward), (up, up_forward), (head, forward)):
        part.forward = types.MethodType(new_forward, part)
