"""Base weights read once by the ranks of a node, and handed around.

An engine fills a model unit by unit, the same units in the same order on every rank. The modules of a unit are dealt
out as runs of neighbours with about as many bytes each: a rank reads and converts its run, then every value is sent
to the others in order. Files of a node are read once instead of once a rank, by all ranks at a time, and a rank holds
its part of one unit beyond what it did before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor, nn

from distft.core.ranks import ReadGroup
from distft.model.weights import WeightSource, meta_params

Expected = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and type of the values of a module, by short name."""


@dataclass(kw_only=True)
class _Dealt:
    """A module's values: who reads them, and what they are like."""

    reader: int
    expected: Expected
    values: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    """Values on the rank that has read them, until they are sent."""


class SharedReads:
    """A source that reads together with the other ranks of the node; one for the units that an engine fills."""

    def __init__(self, source: WeightSource, tensors: Mapping[str, Tensor], group: ReadGroup) -> None:
        """`tensors`: what `source` gives by its whole name, on any device."""
        self._source, self._tensors, self._group = source, tensors, group
        self._dealt: dict[str, _Dealt] = {}

    def read(self, modules: Sequence[tuple[str, nn.Module]], device: torch.device) -> None:
        """Read this rank's part of what is going to be asked for; collective.

        Args:
            modules: name and module of each call of `values` that follows, the same on all ranks.
            device: where values are wanted.

        Raises:
            DistftError: a weight is damaged; on the ranks that did not read it PeerEnded.
        """
        modules = list({name: (name, module) for name, module in modules}.values())
        expected = [self._expected(name, module) for name, module in modules]
        sizes = [sum(prod(shape) * dtype.itemsize for shape, dtype in each.values()) for each in expected]
        readers = dealt_out(sizes, self._group.size)
        self._dealt = {
            name: _Dealt(reader=reader, expected=each)
            for (name, _), reader, each in zip(modules, readers, expected, strict=True)
        }
        failure: Exception | None = None
        try:
            for name, module in modules:
                if self._dealt[name].reader == self._group.rank:
                    self._dealt[name].values = self._source.values(name, module, device)
        except Exception as error:  # any: the others wait for this rank
            failure = error
        self._group.raise_together(failure)

    def _expected(self, name: str, module: nn.Module) -> Expected:
        wanted = {short: self._tensors[f"{name}.{short}" if name else short] for short, _ in meta_params(module)}
        return {short: (tuple(tensor.shape), tensor.dtype) for short, tensor in wanted.items()}

    def values(self, name: str, module: nn.Module, device: torch.device) -> dict[str, Tensor]:
        """Return values from the rank that has read them; collective. What was not announced each rank reads."""
        dealt = self._dealt.pop(name, None)
        if dealt is None or dealt.expected.keys() != {short for short, _ in meta_params(module)}:
            return self._source.values(name, module, device)
        values: dict[str, Tensor] = {}
        for short, (shape, dtype) in dealt.expected.items():
            if dealt.reader == self._group.rank:
                value = dealt.values.pop(short).contiguous()
                assert tuple(value.shape) == shape, (name, short)
                assert value.dtype == dtype, (name, short)
            else:
                value = torch.empty(shape, dtype=dtype, device=device)
            self._group.broadcast(value, dealt.reader)
            values[short] = value
        return values

    def buffer(self, name: str, device: torch.device) -> Tensor | None:
        """Read by every rank: there are few, and small."""
        return self._source.buffer(name, device)


def dealt_out(sizes: Sequence[int], ranks: int) -> list[int]:
    """Deal neighbours to ranks, in order, so that each gets about as many bytes.

    Args:
        sizes: bytes of each module.
        ranks: how many share them.

    Returns:
        The rank of each module: the one in whose equal part of all bytes the middle of the module lies.
    """
    total, before, readers = sum(sizes), 0, list[int]()
    for size in sizes:
        readers.append(min(ranks - 1, (2 * before + size) * ranks // (2 * total)) if total else 0)
        before += size
    return readers
