"""A change of a matrix as a product of two thin ones: the best of a rank, and what is lost by it.

Letters: M rows, N columns, R rank, K inner size of given factors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Truncated:
    """A product of rank R, its singular values shared between both factors."""

    left_MR: Tensor
    right_RN: Tensor
    norm: float
    """Frobenius norm of what was approximated."""
    lost: float
    """Frobenius norm of the difference."""

    @property
    def relative_error(self) -> float:
        """Lost over norm; 0 where there was nothing to approximate."""
        return self.lost / self.norm if self.norm > 0 else 0.0


def truncate(delta_MN: Tensor, rank: int) -> Truncated:
    """Return the best product of `rank` for a dense matrix; with fewer singular values the rest is zero."""
    u, s, v = torch.linalg.svd(delta_MN.float(), full_matrices=False)
    return _cut(u, s, v, rank)


def truncate_product(left_MK: Tensor, right_KN: Tensor, rank: int) -> Truncated:
    """Return the best product of `rank` for a product, without making it: the matrices are at most K wide."""
    u, s, v = svd_of_product(left_MK, right_KN)
    return _cut(u, s, v, rank)


def svd_of_product(left_MK: Tensor, right_KN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the singular value decomposition (U, S, V^T) of a product, in float64."""
    left_q, left_r = torch.linalg.qr(left_MK.double())
    right_q, right_r = torch.linalg.qr(right_KN.double().T)
    u, s, v = torch.linalg.svd(left_r @ right_r.T, full_matrices=False)
    return left_q @ u, s, v @ right_q.T


def padded(left_MR: Tensor, right_RN: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the same product at a larger rank: columns and rows of zeros are added."""
    more = rank - left_MR.shape[1]
    left = torch.nn.functional.pad(left_MR, (0, more))
    return left, torch.nn.functional.pad(right_RN, (0, 0, 0, more))


def _cut(u: Tensor, s: Tensor, v: Tensor, rank: int) -> Truncated:
    squares = s.double().square()
    root = s[:rank].sqrt()
    left, right = padded((u[:, :rank] * root).float(), (root[:, None] * v[:rank]).float(), max(rank, 1))
    return Truncated(
        left_MR=left,
        right_RN=right,
        norm=float(squares.sum().sqrt()),
        lost=float(squares[rank:].sum().sqrt()),
    )
