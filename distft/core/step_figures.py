"""How the figures of a step's micro-batches, and of all ranks, become one number each.

A figure is a float64 tensor; its length says what it is: [2] a sum and a count, which become a mean; [1] a largest
value; [3] the sum of weights, the sum of their squares and their number, which become the effective sample size of the
weights as a share of their number (Kish 1965): (sum w)^2 / (n sum w^2), 1 where all weigh alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

LARGEST, MEAN, EFFECTIVE = 1, 2, 3
"""Lengths of the three kinds."""


def add_figures(totals: dict[str, Tensor], more: Mapping[str, Tensor]) -> None:
    """Take the figures of a further micro-batch into those of the step."""
    for name, figure in more.items():
        if name not in totals:
            totals[name] = figure.double()
        elif len(figure) == LARGEST:
            totals[name] = totals[name].maximum(figure.double())
        else:
            totals[name] = totals[name] + figure.double()


def addable(totals: Mapping[str, Tensor], *, rank: int, world: int) -> list[Tensor]:
    """Return the figures, by name, such that ranks can add them up in one collective.

    A largest value stands at its rank's place among zeros.
    """
    return [_at_rank(figure, rank, world) if len(figure) == LARGEST else figure for _, figure in sorted(totals.items())]


def _at_rank(figure: Tensor, rank: int, world: int) -> Tensor:
    placed = figure.new_zeros(world)
    placed[rank] = figure[0]
    return placed


def read_figures(totals: Mapping[str, Tensor], sums: Sequence[float], *, world: int) -> dict[str, float]:
    """Return each figure's number from what all ranks' `addable` add up to; NaN where nothing was counted."""
    values: dict[str, float] = {}
    begin = 0
    for name, figure in sorted(totals.items()):
        end = begin + (world if len(figure) == LARGEST else len(figure))
        values[name] = _value(sums[begin:end], len(figure))
        begin = end
    assert begin == len(sums), "every figure has its sums"
    return values


def _value(sums: Sequence[float], kind: int) -> float:
    if kind == LARGEST:
        largest = math.nan if any(map(math.isnan, sums)) else max(sums)
        return math.nan if largest == -math.inf else largest
    if kind == MEAN:
        total, count = sums
        return total / count if count else math.nan
    weights, squares, number = sums
    return weights**2 / (number * squares) if number and squares else math.nan
