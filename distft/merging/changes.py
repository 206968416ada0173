"""What an adapter does to one stored tensor of its base: a formula for each kind, in fp32 (or the caller's type).

Sources: https://arxiv.org/abs/2106.09685 (LoRA), https://arxiv.org/abs/2402.09353 (DoRA),
https://arxiv.org/abs/2205.05638 (IA3); where the papers leave a choice, peft 0.21's layers.
Letters: O outputs, I inputs, R rank, E experts, V vocabulary, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Change(Protocol):
    """One effect of an adapter on one tensor."""

    def applied(self, weight: Tensor) -> Tensor:
        """Return the tensor with the adapter in it; `weight` is left as it is."""
        ...


@dataclass(frozen=True, kw_only=True)
class LowRankChange:
    """W + scale * B A; with DoRA magnitude * (W + scale * B A) / its norm for each output."""

    a_RI: Tensor
    b_OR: Tensor
    scale: float
    transposed: bool
    """The base stores [inputs, outputs]: GPT-2's Conv1D, and embeddings, whose inputs are the vocabulary."""
    magnitude_O: Tensor | None = None

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.a_RI.shape[0]

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return (left [rows, R], right [R, columns]) whose product is the change of the stored tensor."""
        a, b = self.a_RI.float(), self.b_OR.float() * self.scale
        return (a.T, b.T) if self.transposed else (b, a)

    def delta(self) -> Tensor:
        """Return the product in the layout of the stored tensor, without the magnitude."""
        left, right = self.factors()
        return left @ right

    def applied(self, weight: Tensor) -> Tensor:
        """Return the tensor with the adapter in it."""
        moved = weight + self.delta().to(weight.dtype)
        if self.magnitude_O is None:
            return moved
        outputs, inputs = (1, 0) if self.transposed else (0, 1)
        norm = torch.linalg.norm(moved, dim=inputs, keepdim=True)
        magnitude = self.magnitude_O.to(weight.dtype)
        return moved * (magnitude.unsqueeze(1 - outputs) / norm)


@dataclass(frozen=True, kw_only=True)
class ExpertsChange:
    """W[e] + scale * B[e] A[e] for a tensor that holds all experts of a block."""

    a_EI: Tensor
    """[E * R, I]"""
    b_OE: Tensor
    """[O, R * E]; the experts are the inner dimension."""
    scale: float
    num_experts: int
    transposed: bool
    """The base stores [experts, inputs, outputs], as gpt-oss does."""

    @property
    def rank(self) -> int:
        """Rank of each expert's change."""
        return self.a_EI.shape[0] // self.num_experts

    def delta(self) -> Tensor:
        """Return the products of all experts, as the base stores them."""
        a = self.a_EI.float().reshape(self.num_experts, -1, self.a_EI.shape[1])
        b = self.b_OE.float().reshape(self.b_OE.shape[0], -1, self.num_experts).permute(2, 0, 1)
        product = self.scale * (b @ a)
        return product.transpose(1, 2) if self.transposed else product

    def applied(self, weight: Tensor) -> Tensor:
        """Return the tensor with the adapter in it."""
        return weight + self.delta().to(weight.dtype)


@dataclass(frozen=True, kw_only=True)
class WholeChange:
    """The adapter holds the tensor itself: modules_to_save, trained biases, a resized embedding."""

    value: Tensor

    def applied(self, weight: Tensor) -> Tensor:
        """Return the adapter's tensor."""
        return self.value.to(weight.dtype)


@dataclass(frozen=True, kw_only=True)
class BiasShift:
    """bias + scale * the bias of B (PEFT's lora_bias)."""

    shift_O: Tensor
    scale: float

    def applied(self, weight: Tensor) -> Tensor:
        """Return the bias with the adapter's added."""
        return weight + self.scale * self.shift_O.to(weight.dtype)


@dataclass(frozen=True, kw_only=True)
class TokenRows:
    """Rows of an embedding in place of the base's own (PEFT's trainable tokens; called a delta, stored whole)."""

    ids: tuple[int, ...]
    rows: Tensor

    def applied(self, weight: Tensor) -> Tensor:
        """Return the embedding with these rows replaced."""
        return weight.index_copy(0, torch.tensor(self.ids), self.rows.to(weight.dtype))


@dataclass(frozen=True, kw_only=True)
class ScaleChange:
    """W times a learned factor for each output (its bias too), or for each input of a feed-forward layer (IA3)."""

    factors: Tensor
    dim: int
    """The dimension of the stored tensor that the factors lie along."""

    def applied(self, weight: Tensor) -> Tensor:
        """Return the scaled tensor."""
        shape = [1] * weight.ndim
        shape[self.dim] = -1
        return weight * self.factors.to(weight.dtype).reshape(shape)
