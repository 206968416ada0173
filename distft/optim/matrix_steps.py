"""Update rules of weight matrices, beside AdamW for everything else; imported when such an optimizer is built."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distft.optim.spec import MATRIX, ParamGroups

Make = Callable[[ParamGroups], torch.optim.Optimizer]


class MatrixOptimizer(torch.optim.Optimizer):
    """Updates the groups of weight matrices by one optimizer and all others by another, as if they were one.

    Both see the groups and the state of this one, so learning rates and checkpoints reach them.
    """

    def __init__(self, groups: ParamGroups, *, learning_rate: float, matrices: Make, others: Make) -> None:
        super().__init__(groups, {"lr": learning_rate, "weight_decay": 0.0})
        of_matrices = [group for group in self.param_groups if group.get(MATRIX)]
        rest = [group for group in self.param_groups if not group.get(MATRIX)]
        self._parts = [make(chosen) for make, chosen in ((matrices, of_matrices), (others, rest)) if chosen]
        for part in self._parts:
            part.state = self.state

    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every tensor that has a gradient."""
        assert closure is None, "the loop computes the loss"
        for part in self._parts:
            part.step()


@dataclass(frozen=True, kw_only=True)
class LowRankSettings:
    """What GaLore and APOLLO share."""

    rank: int
    update_gap: int
    """Steps between two projections."""
    scale: float
    betas: tuple[float, float]
    eps: float


class LowRankStep(torch.optim.Optimizer, ABC):
    """Adam's moments of gradients that are projected to `rank` rows or columns; what is done with them, subclasses say.

    The shorter side is projected: [m, n] becomes [m, rank] where m >= n, else [rank, n]. Leading dimensions (experts in
    fused form) are batches of matrices.
    """

    def __init__(self, groups: ParamGroups, settings: LowRankSettings) -> None:
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0})
        self._settings = settings

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every matrix that has a gradient; weight decay is decoupled and comes first, as in AdamW."""
        assert closure is None, "the loop computes the loss"
        number = 0
        for group in self.param_groups:
            for param in group["params"]:
                number += 1
                if param.grad is None:
                    continue
                state = self.state[param]
                low = self._project(param.grad, state, number)
                if "exp_avg" not in state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(low), torch.zeros_like(low)
                beta1, beta2 = self._settings.betas
                state["exp_avg"].mul_(beta1).add_(low, alpha=1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(low, low, value=1 - beta2)
                normalised = state["exp_avg"] / (state["exp_avg_sq"].sqrt() + self._settings.eps)
                update = self._update(param.grad, low, normalised, state, number)
                step = state["step"] = state.get("step", 0) + 1
                correction = math.sqrt(1 - beta2**step) / (1 - beta1**step)
                param.mul_(1 - group["lr"] * group["weight_decay"])
                param.add_(update, alpha=-group["lr"] * correction)

    def _project(self, gradient: Tensor, state: dict[str, Any], number: int) -> Tensor:
        """Return the gradient in `rank` dimensions: [..., m, rank] or [..., rank, n]."""
        projection = self._projection(gradient, state, number)
        return gradient @ projection.mT if _is_tall(gradient) else projection.mT @ gradient

    @abstractmethod
    def _projection(self, gradient: Tensor, state: dict[str, Any], number: int) -> Tensor:
        """Return [..., rank, n] of a tall matrix, [..., m, rank] of a wide one."""

    @abstractmethod
    def _update(self, gradient: Tensor, low: Tensor, normalised: Tensor, state: dict[str, Any], number: int) -> Tensor:
        """Return what is subtracted, before Adam's correction of its zero beginnings: the gradient's shape."""


class GaloreStep(LowRankStep):
    """GaLore: the update is Adam's in the space of the gradient's largest singular vectors."""

    def _projection(self, gradient: Tensor, state: dict[str, Any], number: int) -> Tensor:
        if state.get("step", 0) % self._settings.update_gap == 0:
            left, _, right = torch.linalg.svd(gradient, full_matrices=False)
            rank = self._settings.rank
            vectors = right[..., :rank, :] if _is_tall(gradient) else left[..., :, :rank]
            state["projection"] = vectors.contiguous()
        return state["projection"]

    def _update(self, gradient: Tensor, low: Tensor, normalised: Tensor, state: dict[str, Any], number: int) -> Tensor:
        projection = state["projection"]
        whole = normalised @ projection if _is_tall(gradient) else projection @ normalised
        return whole * self._settings.scale


GROWTH = 1.01
"""Largest growth of an update's norm from one step to the next (Chen et al., Fira, https://arxiv.org/abs/2410.01623)."""


class ApolloStep(LowRankStep):
    """APOLLO: the update is the gradient, scaled as Adam scales it in a random space of few dimensions.

    `tensor`: one factor for a whole matrix instead of one for each of its rows or columns (APOLLO-Mini).
    """

    def __init__(self, groups: ParamGroups, settings: LowRankSettings, *, tensor: bool) -> None:
        super().__init__(groups, settings)
        self._tensor = tensor

    def _projection(self, gradient: Tensor, state: dict[str, Any], number: int) -> Tensor:
        """Draw it again in every step, from the matrix's number and the projection's: no memory is kept for it."""
        *batch, rows, columns = gradient.shape
        rank = min(self._settings.rank, rows, columns)
        turn = state.get("step", 0) // self._settings.update_gap
        # A CPU's generator takes 32 bits of a seed.
        generator = torch.Generator(gradient.device).manual_seed((1_000_003 * number + turn) % 2**32)
        shape = (*batch, rank, columns) if _is_tall(gradient) else (*batch, rows, rank)
        drawn = torch.randn(shape, generator=generator, device=gradient.device, dtype=gradient.dtype)
        return drawn / math.sqrt(rank)

    def _update(self, gradient: Tensor, low: Tensor, normalised: Tensor, state: dict[str, Any], number: int) -> Tensor:
        over = (-2, -1) if self._tensor else (-1,) if _is_tall(gradient) else (-2,)
        adapted, plain = (torch.linalg.vector_norm(values, dim=over, keepdim=True) for values in (normalised, low))
        update = gradient * (adapted / (plain + 1e-8))
        norm = torch.linalg.vector_norm(update, dim=(-2, -1), keepdim=True)
        if state.get("step", 0) == 0:
            state["update_norm"] = norm
        else:
            limiter = (norm / (state["update_norm"] + 1e-8)).clamp(min=GROWTH) / GROWTH
            update /= limiter
            state["update_norm"] = norm / limiter
        return update * math.sqrt(self._settings.scale)


def _is_tall(matrix: Tensor) -> bool:
    return matrix.shape[-2] >= matrix.shape[-1]
