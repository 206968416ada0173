"""Several adapters, or models that were trained whole, made into one: on what they changed, tensor by tensor.

A and B of adapters are never added to each other: (A1 + A2)(B1 + B2) has products of one adapter's A with another's B,
which nobody has trained. What is combined is each tensor's change; back to a rank it goes by its singular values, and
what that loses is told for each tensor.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distft.core.registry import Params
from distft.merging import low_rank
from distft.merging.adapter_builder import AdapterBuilder, copy_beside, write_report
from distft.merging.adapter_config import adapter_mistake, read_adapter_config
from distft.merging.base_model import BaseModel, TrainedIn4bit, base_hashes, natural_key
from distft.merging.delta_sources import AdapterDeltas, DeltaSource, ModelDeltas, is_model
from distft.merging.folder_writer import refuse_existing, whole_folder
from distft.merging.hows import HowSpec
from distft.merging.merging import MergeSource, open_base
from distft.merging.model_writer import ModelWriter
from distft.model.random_weights import seed_of

REPORT = "combine.json"


@dataclass(frozen=True, kw_only=True)
class CombineOptions:
    """How changes are combined."""

    how: HowSpec
    params: Params
    weights: tuple[float, ...]
    rank: int | None = None
    """Of the result; None: the largest of the sources, or the sum where nothing is cut."""
    whole: bool = False
    """Write a whole model instead of an adapter."""
    dtype: torch.dtype | None = None
    """Of a whole model; None: the base's."""
    named_base: str | None = None
    """What was named as the base, if it was."""


@dataclass(frozen=True, kw_only=True)
class CombinedTensor:
    """What became of one tensor's changes."""

    name: str
    norm: float
    """Frobenius norm of the combined change."""
    rank: int
    """0: kept whole."""
    lost: float
    """Frobenius norm of what the rank left out."""

    @property
    def relative_error(self) -> float:
        """Lost over norm."""
        return self.lost / self.norm if self.norm > 0 else 0.0


@dataclass(frozen=True, kw_only=True)
class CombineReport:
    """What was combined, and what was lost; combine.json."""

    how: str
    params: dict[str, Any]
    weights: tuple[float, ...]
    sources: list[dict[str, str]]
    base: str
    base_sha256: dict[str, str]
    asked: dict[str, Any]
    """The other flags, for `distft reproduce`: rank, whole, dtype and base; None where they were left out."""
    rank: int
    tensors: list[CombinedTensor]
    files_sha256: dict[str, str] = field(default_factory=dict[str, str])
    """Of everything else in the folder."""

    @property
    def relative_error(self) -> float:
        """Norm of everything lost over the norm of all combined changes."""
        norm = sum(tensor.norm**2 for tensor in self.tensors)
        return (sum(tensor.lost**2 for tensor in self.tensors) / norm) ** 0.5 if norm > 0 else 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the report with relative errors and the versions of the libraries."""
        raw = asdict(self)
        raw["relative_error"] = self.relative_error
        for entry, tensor in zip(raw["tensors"], self.tensors, strict=True):
            entry["relative_error"] = tensor.relative_error
        raw["versions"] = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
        return raw


def combine(
    folders: Sequence[Path],
    base_folder: Path,
    out: Path,
    options: CombineOptions,
    *,
    in_4bit: TrainedIn4bit | None = None,
) -> CombineReport:
    """Write the combination of adapters or models of one base to `out`; `in_4bit`: how their runs had the base.

    Raises:
        RecipeError: something does not fit the base, or the way of combining.
        FileSystemError: it cannot be written.
    """
    refuse_existing(out, *folders, base_folder)
    _check_options(folders, options)
    adapters = [folder for folder in folders if not is_model(folder)]
    first = MergeSource(adapter=folders[0], base=base_folder, in_4bit=in_4bit)
    base = open_base(first, read_adapter_config(adapters[0])) if adapters else BaseModel(base_folder)
    sources: list[DeltaSource] = [
        ModelDeltas(folder, base) if is_model(folder) else AdapterDeltas(folder, base) for folder in folders
    ]
    _refuse_unset(base, sources)
    whole = options.whole or any(isinstance(source, ModelDeltas) for source in sources)
    if whole and options.rank is not None:
        raise adapter_mistake("--rank", "the result is a whole model, which is not cut to a rank", "leave --rank out")
    combined = _Combined(sources, base, options)
    if whole:
        return _write_model(combined, out)
    if options.dtype is not None:
        raise adapter_mistake("--dtype", "the result is an adapter, which is written in fp32", "leave --dtype out")
    return _write_adapter(combined, out)


def _check_options(folders: Sequence[Path], options: CombineOptions) -> None:
    how = options.how
    if how.num_sources is not None and len(folders) != how.num_sources:
        raise adapter_mistake(
            f"--how {how.name}", f"takes {how.num_sources} adapters, and {len(folders)} are given", "name two"
        )
    if len(options.weights) != len(folders):
        raise adapter_mistake(
            "--weights",
            f"{len(options.weights)} for {len(folders)} adapters",
            "give one weight for each, in their order",
        )
    if how.keeps_ranks and options.rank is not None:
        raise adapter_mistake(
            "--rank", f"{how.name} keeps the sum of the ranks", "leave --rank out, or take --how svd or linear"
        )


def _refuse_unset(base: BaseModel, sources: Sequence[DeltaSource]) -> None:
    """Refuse a head that the base does not have: each run began its own at random, so there is no common start."""
    for source in sources:
        if unset := sorted(base.unset & source.names):
            raise adapter_mistake(
                source.folder, f"{unset[0]} is not in the base, and began at random in each run: it has no change",
                "combine adapters of a base that has the head",
            )  # fmt: skip


def made_hashes(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file of a combined folder but the report and what people write in."""
    hashes: dict[str, str] = {}
    for path in sorted(folder.iterdir()):
        if path.name not in (REPORT, "README.md"):
            with path.open("rb") as file:
                hashes[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


class _Combined:
    """Gives combined changes of tensors."""

    def __init__(self, sources: Sequence[DeltaSource], base: BaseModel, options: CombineOptions) -> None:
        self.sources, self.base, self.options = sources, base, options
        self.names = sorted(frozenset[str]().union(*(source.names for source in sources)), key=natural_key)

    def delta(self, name: str) -> Tensor | None:
        """Return the combined change; None where no source changes the tensor."""
        if not any(name in source.names for source in self.sources):
            return None
        shape = self.base.shape(name)
        assert shape is not None
        deltas = [
            source.delta(name) if name in source.names else torch.zeros(shape) for source in self.sources
        ]  # fmt: skip
        seed = getattr(self.options.params, "seed", 0)

        def draws(index: int) -> torch.Generator:
            return torch.Generator().manual_seed(seed_of(seed, f"{name} {index}"))

        return self.options.how.combine(self.options.params, deltas, self.options.weights, draws)

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """Return the weighted sum of products as one product (left, right).

        Raises:
            RecipeError: a source's change is no product.
        """
        lefts, rights = [], []
        for source, weight in zip(self.sources, self.options.weights, strict=True):
            if name not in source.names:
                continue
            product = source.product(name)
            if product is None:
                raise adapter_mistake(
                    f"--how {self.options.how.name}",
                    f"{source.label}: its change of {name} is no product of two matrices",
                    "take --how linear, which is cut to a rank, or --whole for a merged model",
                )
            left, right = product.factors()
            lefts.append(weight * left)
            rights.append(right)
        return torch.cat(lefts, 1), torch.cat(rights, 0)

    def report(self, tensors: list[CombinedTensor], rank: int) -> CombineReport:
        return CombineReport(
            how=self.options.how.name,
            params=self.options.params.model_dump(),
            weights=self.options.weights,
            sources=[{"path": str(source.folder.absolute()), "sha256": source.digest()} for source in self.sources],
            base=str(self.base.folder.absolute()),
            base_sha256=base_hashes(self.base.folder),
            asked=self._asked(),
            rank=rank,
            tensors=tensors,
        )

    def _asked(self) -> dict[str, Any]:
        dtype, named = self.options.dtype, self.options.named_base
        named = str(Path(named).absolute()) if named is not None and Path(named).exists() else named
        dtype_name = None if dtype is None else str(dtype).removeprefix("torch.")
        return {"rank": self.options.rank, "whole": self.options.whole, "dtype": dtype_name, "base": named}


def _write_adapter(combined: _Combined, out: Path) -> CombineReport:
    builder, tensors, rank = AdapterBuilder(combined.base), list[CombinedTensor](), _rank(combined)
    for tensor in _cut_tensors(combined, builder, rank):
        tensors.append(tensor)
    configs = [source.adapter.config for source in combined.sources if isinstance(source, AdapterDeltas)]
    report = combined.report(tensors, max((tensor.rank for tensor in tensors), default=0))
    with whole_folder(out) as aside:
        copy_beside(combined.sources[0].folder, aside)
        builder.write(aside, base=configs[0].base, task_type=configs[0].task_type)
        report = replace(report, files_sha256=made_hashes(aside))
        write_report(aside, REPORT, report.to_json())
    return report


def _cut_tensors(combined: _Combined, builder: AdapterBuilder, rank: int) -> Iterator[CombinedTensor]:
    how, base = combined.options.how, combined.base
    for name in combined.names:
        shape = base.shape(name)
        assert shape is not None
        kind = base.kinds.get(name.removesuffix(".weight"), "other") if name.endswith(".weight") else "other"
        if len(shape) > 2 or (len(shape) == 2 and kind == "other"):
            raise adapter_mistake(
                "adapters combine", f"{name}: a change of experts is not written as an adapter", "add --whole"
            )
        if len(shape) < 2 or any(source.is_whole(name) for source in combined.sources if name in source.names):
            delta = combined.delta(name)
            assert delta is not None
            builder.add_whole(name, base.value(name) + delta)
            yield CombinedTensor(name=name, norm=float(delta.norm()), rank=0, lost=0.0)
            continue
        limit = min(shape)
        if how.keeps_ranks:
            left, right = combined.factors(name)
            builder.add_product(name, left, right)
            norm = float(low_rank.svd_of_product(left, right)[1].norm())
            yield CombinedTensor(name=name, norm=norm, rank=left.shape[1], lost=0.0)
            continue
        if rank > limit:
            raise adapter_mistake("--rank", f"{rank} for {name} of shape {shape}", f"at most {limit}")
        if how.keeps_factors:
            cut = low_rank.truncate_product(*combined.factors(name), rank)
        else:
            delta = combined.delta(name)
            assert delta is not None
            cut = low_rank.truncate(delta, rank)
        builder.add_product(name, cut.left_MR, cut.right_RN)
        yield CombinedTensor(name=name, norm=cut.norm, rank=rank, lost=cut.lost)


def _rank(combined: _Combined) -> int:
    """Return the rank of the result: as asked, else the largest of the sources'."""
    if combined.options.rank is not None:
        return combined.options.rank
    ranks = [
        product.rank
        for source in combined.sources
        for name in source.names
        if (product := source.product(name)) is not None
    ]
    ranks += [
        source.adapter.config.rank
        for source in combined.sources
        if isinstance(source, AdapterDeltas) and source.adapter.config.kind == "LORA"
    ]
    if not ranks:
        raise adapter_mistake("--rank", "none of the adapters has a rank", "give --rank N, or --whole")
    return max(ranks)


def _write_model(combined: _Combined, out: Path) -> CombineReport:
    base, options = combined.base, combined.options
    tensors: list[CombinedTensor] = []
    writer = ModelWriter(base, options.dtype or base.dtype, tied=_stays_tied(combined))

    def value(name: str) -> Tensor:
        delta, weight = combined.delta(name), base.value(name)
        if delta is None:
            return weight
        tensors.append(CombinedTensor(name=name, norm=float(delta.norm()), rank=0, lost=0.0))
        return weight + delta

    with whole_folder(out, writer.num_bytes) as aside:
        writer.write(aside, value)
        writer.write_rest(aside, combined.sources[0].folder, base.folder)
        report = replace(combined.report(tensors, 0), files_sha256=made_hashes(aside))
        write_report(aside, REPORT, report.to_json())
    return report


def _stays_tied(combined: _Combined) -> bool:
    for target, origin in combined.base.tied.items():
        for source in combined.sources:
            changed = [name for name in (target, origin) if name in source.names]
            if len(changed) == 1 or (changed and not torch.equal(source.delta(target), source.delta(origin))):
                return False
    return True
