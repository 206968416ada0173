"""The weighted sum of changes; with negative weights task arithmetic.

Source: Ilharco et al., Editing Models with Task Arithmetic, https://arxiv.org/abs/2212.04089
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from distft.merging.hows.spec import Draws, HowSpec

if TYPE_CHECKING:
    from torch import Tensor


def weighted_sum(params: Any, deltas: Sequence[Tensor], weights: Sequence[float], draws: Draws) -> Tensor:
    """Return the sum of weight * change."""
    total = deltas[0] * weights[0]
    for delta, weight in zip(deltas[1:], weights[1:], strict=True):
        total += weight * delta
    return total


SPEC = HowSpec(name="linear", title="weighted sum of the changes, cut to --rank", combine=weighted_sum)
