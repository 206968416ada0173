"""The load-balancing loss of a mixture of experts' router, document by document.

Transformers computes it over whatever one forward holds, so that it changes with the batch. Here it is the model's own
function over each document alone, weighted by the document's supervised tokens: for one document that is
transformers' loss, and over a step it does not depend on packing, micro-batches or ranks.

Shape letters: T tokens of a micro-batch, X experts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from distft.core.types import IGNORE


@dataclass(frozen=True, kw_only=True)
class RouterLoss:
    """The loss that a config asks for with `output_router_logits`."""

    balance: Callable[..., Any]
    """Transformers' load_balancing_loss_func of this model."""
    num_experts: int
    top_k: int
    coefficient: float

    def __call__(self, router_logits: tuple[Tensor, ...] | None, labels_T: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Return fp32 [1]: coefficient · Σ over documents of (supervised tokens · balance of the document).

        Args:
            router_logits: of each layer, [T, X].
            labels_T: IGNORE where nothing is supervised.
            cu_seqlens: where documents begin, and T.
        """
        if not router_logits:
            raise RuntimeError("the config asks for router losses, and the model gave no router logits")
        total = router_logits[0].new_zeros(1, dtype=torch.float32)
        for start, end in pairwise(cu_seqlens.tolist()):
            supervised = (labels_T[start:end] != IGNORE).sum()
            document = tuple(logits.reshape(-1, logits.shape[-1])[start:end] for logits in router_logits)
            total = total + supervised * self.balance(document, self.num_experts, self.top_k)
        return self.coefficient * total


def find(lm: Any) -> RouterLoss | None:
    """Return the router loss that the model's config asks for and its forward computes; None when there is none.

    A router loss of another form is not known here: the proof finds that the loss differs, and the model is refused.
    """
    config = lm.config.get_text_config(decoder=True)
    if not getattr(config, "output_router_logits", False):
        return None
    balance = getattr(sys.modules[type(lm).__module__], "load_balancing_loss_func", None)
    facts = [getattr(lm, name, None) for name in ("num_experts", "num_experts_per_tok", "router_aux_loss_coef")]
    if balance is None or any(fact is None for fact in facts):
        return None
    experts, top_k, coefficient = facts
    return RouterLoss(balance=balance, num_experts=experts, top_k=top_k, coefficient=coefficient)  # type: ignore[arg-type]
