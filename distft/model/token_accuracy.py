"""Counts in an evaluation how many labels are the model's likeliest token, from the chunks of logits its loss is of.

S supervised tokens, C tokens of one chunk, E hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from distft.model.cross_entropy import HeadLoss, chunk_tokens, chunked_sum, full_loss
from distft.model.logit_rule import PLAIN, LogitRule


@dataclass(frozen=True)
class Counted:
    """A `HeadLoss` without gradients: fp32 [1, 2], the sum of a loss, bit for bit, and how many labels are likeliest.

    Where the loss shows no logits (the fused kernel), the head is multiplied once more, in chunks of the same size.
    """

    loss: HeadLoss

    def __call__(
        self, hidden_SE: Tensor, weight_VE: Tensor, bias_V: Tensor | None, labels_S: Tensor, rule: LogitRule = PLAIN
    ) -> Tensor:
        """Compute both."""
        size = chunk_tokens(weight_VE.shape[0])
        if self.loss is full_loss or (self.loss is chunked_sum and len(labels_S) <= size):
            logits_SV = rule.logits(hidden_SE, weight_VE, bias_V)
            total = F.cross_entropy(logits_SV, labels_S, reduction="none").sum()
            return _pair(total, _hits(logits_SV, labels_S))
        if self.loss is chunked_sum:
            return _summed(hidden_SE, weight_VE, bias_V, labels_S, rule, size)
        hits = labels_S.new_zeros(())
        for hidden_CE, labels_C in zip(hidden_SE.split(size), labels_S.split(size), strict=True):
            hits += _hits(rule.logits(hidden_CE, weight_VE, bias_V), labels_C)
        return _pair(self.loss(hidden_SE, weight_VE, bias_V, labels_S, rule).sum(), hits)


def as_parts(judged_S2: Tensor) -> Tensor:
    """Return fp32 [S, 2], each token's loss and whether its label is likeliest, of what `judged` gives."""
    return torch.stack([-judged_S2[:, 0], judged_S2[:, 1]], 1)


def _summed(
    hidden_SE: Tensor, weight_VE: Tensor, bias_V: Tensor | None, labels_S: Tensor, rule: LogitRule, size: int
) -> Tensor:
    """Compute what `chunked_sum` does without gradients, in the same order, and the hits of each chunk."""
    if rule.hidden_scale != 1.0:
        hidden_SE = hidden_SE * rule.hidden_scale
    total = torch.zeros(1, dtype=torch.float32, device=hidden_SE.device)
    hits = labels_S.new_zeros(())
    for start in range(0, len(labels_S), size):
        hidden_CE, labels_C = hidden_SE[start : start + size], labels_S[start : start + size]
        logits_CV = rule.finish(F.linear(hidden_CE, weight_VE, bias_V).float())
        hits += _hits(logits_CV, labels_C)
        logits_CV -= logits_CV.logsumexp(1, keepdim=True)
        total -= logits_CV.gather(1, labels_C[:, None]).sum()
    return _pair(total, hits)


def _hits(logits_CV: Tensor, labels_C: Tensor) -> Tensor:
    return (logits_CV.argmax(1) == labels_C).sum()


def _pair(total: Tensor, hits: Tensor) -> Tensor:
    return torch.stack([total.reshape(()), hits.to(total.dtype)]).reshape(1, 2)
