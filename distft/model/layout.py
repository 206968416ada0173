"""The layout that a model's files have on the hub: names and pieces that differ from its parameters in memory.

Transformers holds the experts of a block in one parameter, the files of Qwen3-MoE or Mixtral hold each expert's
matrices, and so do converters and servers that read them. What is saved is taken apart by transformers' own rules,
reversed, a group of parameters at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from distft.model.weights import Shapes


class FileLayout:
    """Transformers' rules for saving one architecture."""

    def __init__(self, lm: Any) -> None:
        """Read the conversions of `lm`, before an engine or an adapter has changed its classes and names.

        Prefixes that the base's files lacked are written, as transformers does for a model that it made itself; tensors
        are taken apart whether or not the base's files were.
        """
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import PrefixChange, WeightConverter, WeightRenaming

        forward = [
            transform
            for transform in get_model_conversion_mapping(lm, add_legacy=False)
            if not isinstance(transform, PrefixChange)
        ]
        backward = [transform.reverse_transform() for transform in reversed(forward)]
        self._renamings = [transform for transform in backward if isinstance(transform, WeightRenaming)]
        self._converters = [transform for transform in backward if isinstance(transform, WeightConverter)]
        self._by_pattern = {
            pattern: transform for transform in self._converters for pattern in transform.source_patterns
        }
        self._model = Shapes(lm)

    def groups(self, names: Iterable[str]) -> list[tuple[str, ...]]:
        """Group the names of parameters that are saved as one tensor."""
        grouped: dict[str, list[str]] = {}
        for name in names:
            target, pattern = self._target(name)
            grouped.setdefault(name if pattern is None else f"{pattern} {target}", []).append(name)
        return [tuple(group) for group in grouped.values()]

    def stored(self, group: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of the files that hold one group of parameters."""
        names = list(group)
        target, pattern = self._target(names[0])
        if pattern is None:
            return {self._renamed(name): tensor for name, tensor in group.items()}
        converter: Any = copy.deepcopy(self._by_pattern[pattern])
        for name in names:
            converter.add_tensor(target, name, self._target(name)[1], group[name])
        made = converter.convert(target, model=self._model, config=self._model.config)
        whole = {name: value[0] if isinstance(value, list) else value for name, value in made.items()}
        return {self._renamed(name): tensor.contiguous() for name, tensor in whole.items()}

    def _target(self, name: str) -> tuple[str, str | None]:
        """Return the name that the first converter gives it, and which of its patterns did."""
        for converter in self._converters:
            target, pattern = converter.rename_source_key(name)
            if pattern is not None:
                return target, pattern
        return name, None

    def _renamed(self, name: str) -> str:
        for renaming in self._renamings:
            name, _ = renaming.rename_source_key(name)
        return name
