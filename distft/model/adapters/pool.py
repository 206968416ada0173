"""One base in memory with many adapters beside it: switched in no time, mixed, or one for each row of a batch.

PEFT holds the adapters and computes with them. What takes it time that grows with modules times adapters (choosing one
asks every tensor of every adapter whether it is trained) is done here on a list of the layers, for inference alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distft.core.errors import Problem, RecipeError
from distft.core.nearest import nearest
from distft.model.adapters.whole import add_adapter, load_beside

if TYPE_CHECKING:
    import torch

FIRST = "default"
"""PEFT's name of the adapter that the pool was opened with."""
_BASE_ROW = "__base__"
"""PEFT's word for rows without an adapter."""


class AdapterPool:
    """A base with named adapters. Contexts are for inference, and one at a time."""

    def __init__(self, folder: Path, *, dtype: torch.dtype) -> None:
        """Load the base that an adapter names, with the adapter beside it under the name `FIRST`.

        Raises:
            RecipeError: PEFT cannot put it on its base.
        """
        self.model: Any = load_beside(folder, dtype=dtype)
        self._layers: list[Any] = []
        self._plain = True
        self._find_layers()

    @property
    def names(self) -> tuple[str, ...]:
        """Adapters in the order in which they came."""
        return tuple(self.model.peft_config)

    def layers(self) -> list[tuple[str, Any]]:
        """Return PEFT's layers of products with their names in the base."""
        known = {id(layer) for layer in self._layers}
        return [(name, module) for name, module in self.model.get_base_model().named_modules() if id(module) in known]

    def to(self, device: torch.device | str) -> AdapterPool:
        """Move base and adapters."""
        self.model.to(device)
        return self

    def add(self, name: str, folder: Path) -> None:
        """Load a further adapter of the same base.

        Raises:
            RecipeError: the name is taken, it was trained on another base, or has other shapes.
        """
        if name in self.names:
            raise _mistake(f"adapter {name}: the name is taken", "another name")
        add_adapter(self.model, name, folder)
        self.model.eval()
        self._find_layers()

    def remove(self, name: str) -> None:
        """Forget an adapter and its memory.

        Raises:
            RecipeError: there is none of this name, or it is the last one.
        """
        self._refuse_unknown([name])
        if len(self.names) == 1:
            raise _mistake(f"adapter {name}: is the last one", "keep it, and use the base alone")
        self.model.delete_adapter(name)
        self._find_layers()

    def num_bytes(self, name: str | None) -> int:
        """Return the bytes of an adapter's tensors; None: of the base's."""
        params = list(self.model.named_parameters())
        of_adapters = {
            adapter: [param for key, param in params if f".{adapter}." in f".{key}." and "base_layer" not in key]
            for adapter in self.names
        }
        if name is not None:
            self._refuse_unknown([name])
            return sum(param.numel() * param.element_size() for param in of_adapters[name])
        taken = {id(param) for group in of_adapters.values() for param in group}
        return sum(param.numel() * param.element_size() for _, param in params if id(param) not in taken)

    @contextlib.contextmanager
    def using(self, name: str | None) -> Iterator[Any]:
        """Compute with one adapter, or the base alone (None), inside the context; gives the model.

        Raises:
            RecipeError: there is none of this name.
        """
        if name is None:
            with self.rows_of([]) if self._plain else self.model.disable_adapter():
                yield self.model
            return
        self._refuse_unknown([name])
        if not self._plain:  # saved modules and the like: PEFT knows what belongs to whom
            before = self.model.active_adapter
            self.model.set_adapter(name)
            try:
                yield self.model
            finally:
                self.model.set_adapter(before)
            return
        with self._active([name]):
            yield self.model

    @contextlib.contextmanager
    def mixing(self, weights: Mapping[str, float]) -> Iterator[Any]:
        """Compute with the weighted sum of several adapters' changes inside the context; gives the model.

        Raises:
            RecipeError: there is none of a name, or an adapter is more than LoRA on layers.
        """
        self._refuse_unknown(weights)
        self._refuse_others(weights, "cannot be mixed")
        first = [dict(layer.scaling) for layer in self._layers]
        with self._active(list(weights)):
            for layer in self._layers:
                for name, weight in weights.items():
                    if name in layer.scaling:
                        layer.scaling[name] *= weight
            try:
                yield self.model
            finally:
                for layer, scaling in zip(self._layers, first, strict=True):
                    layer.scaling.update(scaling)

    @contextlib.contextmanager
    def rows_of(self, names: Sequence[str | None]) -> Iterator[Any]:
        """Compute each row of every batch with an adapter of its own inside the context; gives the model.

        Args:
            names: adapter of each row, None: the base alone; empty: all rows with the base alone.

        Raises:
            RecipeError: there is none of a name, or an adapter is more than LoRA on layers.
        """
        self._refuse_unknown([name for name in names if name is not None])
        self._refuse_others([name for name in names if name is not None], "cannot be chosen row by row")
        if not names:
            with self._active([]):
                yield self.model
            return
        words = [_BASE_ROW if name is None else name for name in names]
        handles = [layer.register_forward_pre_hook(_with_names(words), with_kwargs=True) for layer in self._layers]
        try:
            yield self.model
        finally:
            for handle in handles:
                handle.remove()

    @contextlib.contextmanager
    def _active(self, names: list[str]) -> Iterator[None]:
        before = [layer._active_adapter for layer in self._layers]
        for layer in self._layers:
            layer._active_adapter = names
        try:
            yield
        finally:
            for layer, active in zip(self._layers, before, strict=True):
                layer._active_adapter = active

    def _find_layers(self) -> None:
        from peft.tuners.lora import LoraLayer
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper

        modules = list(self.model.modules())
        self._layers = [module for module in modules if isinstance(module, LoraLayer)]
        others = (BaseTunerLayer, AuxiliaryTrainingWrapper)
        known = {id(layer) for layer in self._layers}
        self._plain = all(id(module) in known for module in modules if isinstance(module, others)) and all(
            config.peft_type == "LORA" and config.bias == "none" for config in self.model.peft_config.values()
        )

    def _refuse_unknown(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self.names:
                meant = nearest(name, list(self.names))
                hint = f"did you mean {meant}?  " if meant else ""
                raise _mistake(f"adapter {name}: there is none", f"{hint}allowed: {', '.join(self.names)}")

    def _refuse_others(self, names: Iterable[str], what: str) -> None:
        """Refuse adapters that are more than products beside layers.

        Raises:
            RecipeError: names the first.
        """
        if not self._plain:
            raise _mistake(
                f"adapters with saved modules, biases or of another kind than LoRA {what}", "switch, or merge"
            )
        for name in names:
            if any(name in layer.lora_variant for layer in self._layers):
                raise _mistake(f"adapter {name}: DoRA and other variants of LoRA {what}", "switch, or merge it")


def _with_names(names: list[str]) -> Any:
    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if len(args[0]) != len(names):
            raise AssertionError(f"{len(args[0])} rows, and adapters for {len(names)}")
        return args, kwargs | {"adapter_names": names}

    return hook


def _mistake(message: str, fix: str) -> RecipeError:
    return RecipeError("adapters", [Problem(message=message, fix=fix)])
