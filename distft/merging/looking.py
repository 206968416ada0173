"""What an adapter has learned, and how far two are from each other: norms, ranks, angles, subspaces, signs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from distft.merging import low_rank
from distft.merging.base_model import BaseModel, natural_key
from distft.merging.delta_sources import DeltaSource

_MOST = 0.9
_NOISE = 1e-6
"""Singular values below this share of the largest are rounding."""


@dataclass(frozen=True, kw_only=True)
class TensorLook:
    """One tensor's change."""

    name: str
    norm: float
    """Frobenius norm."""
    spectral_norm: float | None
    """Largest singular value; None of what is no product."""
    rank: int | None
    ranks_for_most: int | None
    """Singular values that hold 90 % of the squared norm."""
    relative_norm: float | None
    """Norm over the norm of the base's tensor; None without a base."""


@dataclass(frozen=True, kw_only=True)
class AdapterLook:
    """What `distft adapters inspect` shows."""

    label: str
    norm: float
    tensors: list[TensorLook]

    def to_json(self) -> dict[str, Any]:
        """Return the figures."""
        return asdict(self)


def inspect(source: DeltaSource, base: BaseModel | None) -> AdapterLook:
    """Look at every tensor that an adapter changes; one is held at a time."""
    looks = [_look(source, name, base) for name in sorted(source.names, key=natural_key)]
    return AdapterLook(label=source.label, norm=_total(look.norm for look in looks), tensors=looks)


def _look(source: DeltaSource, name: str, base: BaseModel | None) -> TensorLook:
    product = source.product(name)
    spectral, most = None, None
    if product is None:
        norm = float(source.delta(name).norm())
    else:
        values = low_rank.svd_of_product(*product.factors())[1]
        squares = values.square()
        norm, spectral = float(squares.sum().sqrt()), float(values[0])
        most = int((squares.cumsum(0) < _MOST * squares.sum()).sum()) + 1 if norm > 0 else 0
    relative = None if base is None else norm / max(float(base.value(name).norm()), 1e-30)
    return TensorLook(
        name=name,
        norm=norm,
        spectral_norm=spectral,
        rank=None if product is None else product.rank,
        ranks_for_most=most,
        relative_norm=relative,
    )


@dataclass(frozen=True, kw_only=True)
class TensorDifference:
    """One tensor's changes in two adapters."""

    name: str
    norms: tuple[float, float]
    cosine: float | None
    """Of the angle between both changes; None where one of them is zero."""
    overlap_outputs: float | None
    """Share of the smaller output subspace that lies in the other's; None of what is no product."""
    overlap_inputs: float | None
    sign_conflicts: float
    """Share of entries, of those that both change, in which they have different signs."""


@dataclass(frozen=True, kw_only=True)
class AdapterDifference:
    """What `distft adapters diff` shows."""

    labels: tuple[str, str]
    norms: tuple[float, float]
    cosine: float | None
    sign_conflicts: float
    only_in: tuple[list[str], list[str]]
    """Tensors that one of them changes alone."""
    tensors: list[TensorDifference]

    def to_json(self) -> dict[str, Any]:
        """Return the figures."""
        return asdict(self)


def diff(first: DeltaSource, second: DeltaSource) -> AdapterDifference:
    """Compare the changes of two adapters of one base, tensor by tensor."""
    shared = sorted(first.names & second.names, key=natural_key)
    found, dot, conflicts, both = list[TensorDifference](), 0.0, 0, 0
    alone = [_norm_of_rest(source, shared) for source in (first, second)]
    for name in shared:
        ours, theirs = first.delta(name), second.delta(name)
        product = float((ours.double() * theirs.double()).sum())
        changed = (ours != 0) & (theirs != 0)
        differ = int(((ours.sign() != theirs.sign()) & changed).sum())
        dot, conflicts, both = dot + product, conflicts + differ, both + int(changed.sum())
        norms = (float(ours.norm()), float(theirs.norm()))
        overlaps = _overlaps(first, second, name)
        found.append(
            TensorDifference(
                name=name,
                norms=norms,
                cosine=_cosine(product, norms),
                overlap_outputs=overlaps[0],
                overlap_inputs=overlaps[1],
                sign_conflicts=differ / max(int(changed.sum()), 1),
            )
        )
    totals = tuple(
        (sum(entry.norms[index] ** 2 for entry in found) + alone[index] ** 2) ** 0.5 for index in (0, 1)
    )  # fmt: skip
    return AdapterDifference(
        labels=(first.label, second.label),
        norms=(totals[0], totals[1]),
        cosine=_cosine(dot, (totals[0], totals[1])),
        sign_conflicts=conflicts / max(both, 1),
        only_in=(sorted(first.names - second.names), sorted(second.names - first.names)),
        tensors=found,
    )


def _norm_of_rest(source: DeltaSource, shared: Sequence[str]) -> float:
    return _total(float(source.delta(name).norm()) for name in source.names - set(shared))


def _total(norms: Any) -> float:
    return sum(norm**2 for norm in norms) ** 0.5


def _cosine(dot: float, norms: tuple[float, float]) -> float | None:
    return dot / (norms[0] * norms[1]) if norms[0] > 0 and norms[1] > 0 else None


def _overlaps(first: DeltaSource, second: DeltaSource, name: str) -> tuple[float | None, float | None]:
    """Return how much of the subspaces (rows of the stored tensor, its columns) two products share."""
    products = [source.product(name) for source in (first, second)]
    if any(product is None for product in products):
        return None, None
    spaces = []
    for product in products:
        assert product is not None
        u, s, v = low_rank.svd_of_product(*product.factors())
        kept = s > _NOISE * s.max()
        outputs, inputs = (v.T[:, kept], u[:, kept]) if product.transposed else (u[:, kept], v.T[:, kept])
        spaces.append((outputs, inputs))
    (ours_out, ours_in), (theirs_out, theirs_in) = spaces
    return _overlap(ours_out, theirs_out), _overlap(ours_in, theirs_in)


def _overlap(ours: Tensor, theirs: Tensor) -> float | None:
    """Return the mean squared cosine between two subspaces, over the dimensions of the smaller one.

    Source: Hu et al., https://arxiv.org/abs/2106.09685, section 7.2.
    """
    smaller = min(ours.shape[1], theirs.shape[1])
    return float((ours.T @ theirs).square().sum()) / smaller if smaller else None
