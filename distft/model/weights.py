"""Where base weights come from: files, by transformers' own rules for names, or the model's own initialisation.

Names in files differ from the names of a model in memory: prefixes that are there or not, tensors renamed, experts
stored one by one that are one parameter each. Transformers knows the rules (`conversion_mapping.py`); here they are
applied to the names first, and to the values one parameter at a time, when an engine asks for it. No process holds
more than it asked for.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from distft.model.stored import FLOATS, StoredWeights
from distft.model.tensor_files import mistake

if TYPE_CHECKING:
    from distft.model.heads.spec import HeadSpec

_NAMES_SHOWN = 6
"""Names that a message lists."""


class WeightSource(Protocol):
    """Where base weights come from."""

    def values(self, name: str, module: nn.Module, device: torch.device) -> dict[str, Tensor]:
        """Return the base module's direct parameters by their short names, in memory of their own."""
        ...

    def buffer(self, name: str, device: torch.device) -> Tensor | None:
        """Return a buffer that belongs to the weights, by its whole name; None where the constructor's value stands."""
        ...


@dataclass(kw_only=True)
class _Recipe:
    """How one parameter, or several that come from the same tensors, is made of what is stored."""

    converter: Any
    """Transformers' WeightConverter without tensors; None: the stored tensor is the parameter."""
    stored: list[tuple[str, str]] = field(default_factory=list)
    """(stored tensor, the converter's pattern that it matched), in the order in which they are stacked."""


class SafetensorsSource:
    """Weights from the *.safetensors files of a folder, converted one parameter at a time."""

    def __init__(
        self,
        folder: Path,
        lm: Any,
        dtype: torch.dtype,
        *,
        head: HeadSpec | None = None,
        fresh: WeightSource | None = None,
    ) -> None:
        """Decide for every parameter where it comes from; reads headers only.

        `lm`: transformers' model on the meta device, before adapters and quantisation change its names. `dtype`: of
        weights that are dequantised. `head`: of the model; what it declares as fresh comes from `fresh` where the files
        do not hold it. Leaves the renamings that were used on `lm`, as transformers' own loader does.

        Raises:
            RecipeError: files are damaged or stored in a way that is not understood, tensors are missing, have other
                shapes or are not wanted, or tied ones differ.
        """
        from transformers.conversion_mapping import get_model_conversion_mapping

        self._folder, self._head, self._fresh = folder, head, fresh
        self._absent: frozenset[str] = frozenset()
        self._weights = StoredWeights(folder, dtype)
        self._model = Shapes(lm)
        self.tensors = self._model.tensors
        transforms = get_model_conversion_mapping(lm)
        self._recipes: dict[str, _Recipe] = {}
        self._made_with: dict[str, str] = {}
        self._alias: dict[str, str] = {}
        self._latest: tuple[str, dict[str, Tensor]] = ("", {})
        unwanted = self._assign(lm, transforms)
        self._tie(lm)
        self._check_complete()
        self._check_unwanted(lm, unwanted)
        self._check_shapes()
        lm._weight_conversions = [transform for transform in transforms if transform.was_used()]

    def values(self, name: str, module: nn.Module, device: torch.device) -> dict[str, Tensor]:
        """Read and converted, one module at a time.

        Raises:
            RecipeError: a value is not finite, or not what the config says.
        """
        if self._fresh is not None and any(f"{name}.{short}" in self._absent for short, _ in meta_params(module)):
            return self._fresh.values(name, module, device)
        return {short: self._value(f"{name}.{short}" if name else short, device) for short, _ in meta_params(module)}

    def close(self) -> None:
        """Unmap the files that were read; see `TensorFiles.close`."""
        self._weights.files.close()

    @property
    def absent(self) -> frozenset[str]:
        """Parameters of the head that the files do not hold."""
        return self._absent

    def buffer(self, name: str, device: torch.device) -> Tensor | None:
        """Return buffers that the files hold, such as DeepSeek-V3's routing bias, in the type they are stored in."""
        return self._value(name, device, cast=False) if name in self._model.tensors else None

    def _assign(self, lm: Any, transforms: list[Any]) -> set[str]:
        """Assign each stored tensor to its parameter; return the (renamed) names that no parameter has.

        The same steps as transformers' `convert_and_load_state_dict_in_model`.
        """
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

        renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
        converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        prefix, tensors = lm.base_model_prefix, self._model.tensors
        unwanted: set[str] = set()
        for stored in sorted(self._weights.names, key=dot_natural_key):
            target, pattern = rename_source_key(stored, renamings, converters, prefix, tensors)  # type: ignore[arg-type]
            if target not in tensors and stored in tensors:
                target, pattern = rename_source_key(stored, [], [], prefix, tensors)  # type: ignore[arg-type]
            if target not in tensors:
                unwanted.add(target)
                continue
            converter = None if pattern is None else by_pattern[pattern]
            recipe = self._recipes.setdefault(target, _Recipe(converter=converter))
            recipe.stored.append((stored, pattern or ""))
            if converter is None:
                self._made_with[target] = target
            else:
                first, *rest = converter.target_patterns
                for also in (first, *rest):
                    self._made_with[target.replace(first, also)] = target
        return unwanted

    def _tie(self, lm: Any) -> None:
        """Tie tensors of which the files hold one, or both alike."""
        for target, origin in (getattr(lm, "all_tied_weights_keys", None) or {}).items():
            has_target, has_origin = target in self._made_with, origin in self._made_with
            if has_target and has_origin:
                if not torch.equal(self._made(target)[0], self._made(origin)[0]):
                    raise mistake(
                        f"{self._folder}: config.json ties {target} to {origin}, and the files hold both, which differ",
                        "set tie_word_embeddings to false in config.json, or remove the one that is not meant",
                    )
            elif has_target:
                self._alias[origin] = target
            elif has_origin:
                self._alias[target] = origin

    def _check_complete(self) -> None:
        missing = sorted(self._model.tensors.keys() - self._made_with.keys() - self._alias.keys())
        if self._head is not None:
            self._absent = frozenset(missing) & frozenset(self._head.fresh)
            missing = [name for name in missing if name not in self._absent]
        if missing:
            what = "tensors" if len(missing) > 1 else "tensor"
            raise mistake(
                f"{self._folder}: the weights lack {len(missing)} {what} that the config asks for, first {missing[0]}",
                "the files and config.json belong to different models",
            )

    def _check_unwanted(self, lm: Any, unwanted: set[str]) -> None:
        """Refuse tensors that the model has no place for, but those that transformers leaves out by rule."""
        rules = [*(lm._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$"]
        buffers = {name for name, _ in lm.named_buffers()}
        prefix = f"{lm.base_model_prefix}."
        if unwanted and self._head is not None:
            unwanted = unwanted - self._head.surplus(lm.config)
        left = sorted(
            name
            for name in unwanted
            if not any(re.search(rule, name) for rule in rules) and not {name, prefix + name} & buffers
        )
        if left:
            listed = ", ".join(left[:_NAMES_SHOWN]) + (
                f" and {len(left) - _NAMES_SHOWN} more" if len(left) > _NAMES_SHOWN else ""
            )
            raise mistake(
                f"{self._folder}: {type(lm).__name__} has no place for {len(left)} tensors of the files: {listed}",
                "the files and config.json belong to different models, or the model is stored in a way that "
                "transformers does not know",
            )

    def _check_shapes(self) -> None:
        for name, recipe in self._recipes.items():
            if recipe.converter is not None:
                continue
            stored, _ = recipe.stored[-1]
            entry, wanted = self._weights.entry(stored), self._model.tensors[name]
            if entry is None:  # known when it is dequantised
                continue
            if entry.shape != tuple(wanted.shape):
                raise mistake(
                    f"{entry.file}: {stored} has shape {entry.shape}, and config.json asks for {tuple(wanted.shape)}",
                    "the files and config.json belong to different models",
                )
            if wanted.is_floating_point() and entry.dtype not in FLOATS:
                raise mistake(
                    f"{entry.file}: {stored} is stored as {entry.dtype}, and config.json has no quantization_config",
                    "add the quantization_config that the files belong to, or fetch 16-bit weights",
                )

    def _value(self, name: str, device: torch.device, *, cast: bool = True) -> Tensor:
        (value, owned), wanted = self._made(name), self._model.tensors[name]
        if value.shape != wanted.shape:
            raise mistake(
                f"{self._origin(name)}: {name} has shape {tuple(value.shape)} in the weights "
                f"and {tuple(wanted.shape)} in the config",
                "the files and config.json belong to different models",
            )
        if value.device != device or (cast and value.dtype != wanted.dtype):
            value = value.to(device, wanted.dtype if cast else value.dtype)
        elif not owned:
            value = value.clone()
        if value.is_floating_point() and value.numel():
            low, high = torch.aminmax(value)  # NaN is the least and the greatest
            if not (torch.isfinite(low) & torch.isfinite(high)):
                kind = "NaN" if torch.isnan(low) else "infinite values"
                raise mistake(
                    f"{self._origin(name)}: {name} holds {kind} (read as {value.dtype})",
                    "the base is damaged: fetch it again, or train from another",
                )
        return value

    def _origin(self, name: str) -> Path:
        stored, _ = self._recipes[self._made_with[self._alias.get(name, name)]].stored[0]
        return self._weights.file(stored)

    def _made(self, name: str) -> tuple[Tensor, bool]:
        """Return a parameter's value, and whether its memory is its own, not a file's or another parameter's.

        Of those that come from the same tensors the others are kept until something else is asked for: they are
        neighbours in a block.
        """
        name = self._alias.get(name, name)
        first = self._made_with[name]
        recipe = self._recipes[first]
        if recipe.converter is None:
            stored = recipe.stored[-1][0]
            value = self._weights.read(stored)
            return value, self._weights.entry(stored) is None and value.is_contiguous()
        if self._latest[0] != first or name not in self._latest[1]:
            self._latest = ("", {})
            self._latest = (first, self._converted(first, recipe))
        return self._latest[1].pop(name), True

    def _converted(self, first: str, recipe: _Recipe) -> dict[str, Tensor]:
        """Return the parameters that are made of a recipe's tensors, each in memory of its own.

        Raises:
            RecipeError: what is stored does not fit together.
        """
        try:
            return self._by_expert(first, recipe) or self._at_once(first, recipe)
        except (ValueError, RuntimeError, KeyError, IndexError) as error:
            reason = str(error).strip().splitlines()[0]
            raise mistake(
                f"{self._weights.file(recipe.stored[0][0])}: {first} cannot be made of "
                f"{recipe.stored[0][0]} and {len(recipe.stored) - 1} more: {reason}",
                "the files and config.json belong to different models",
            ) from error

    def _by_expert(self, first: str, recipe: _Recipe) -> dict[str, Tensor]:
        """Convert one expert at a time, so that no more is held than the result; empty where that is not possible.

        Stacked and joined at once the parts of `gate_up_proj` would be there twice.
        """
        if not _stacks_experts(recipe.converter):
            return {}
        parts: dict[str, list[str]] = {}
        for stored, pattern in recipe.stored:
            parts.setdefault(pattern, []).append(stored)
        targets = [name for name, made_with in self._made_with.items() if made_with == first]
        count = len(next(iter(parts.values())))
        if len(targets) != 1 or any(len(names) != count for names in parts.values()):
            return {}
        wanted = self._model.tensors[targets[0]]
        if wanted.shape[0] != count:
            return {}
        whole = torch.empty(wanted.shape, dtype=wanted.dtype)
        for expert, names in enumerate(zip(*parts.values(), strict=True)):
            stored = list(zip(names, parts, strict=True))
            made = self._at_once(first, _Recipe(converter=recipe.converter, stored=stored))[targets[0]]
            if made.shape != (1, *wanted.shape[1:]):
                raise ValueError(f"expert {expert} has shape {tuple(made.shape[1:])}, not {tuple(wanted.shape[1:])}")
            whole[expert].copy_(made[0])
        return {targets[0]: whole}

    def _at_once(self, first: str, recipe: _Recipe) -> dict[str, Tensor]:
        converter = copy.deepcopy(recipe.converter)
        read: set[int] = set()

        def reading(stored: str) -> Tensor:
            tensor = self._weights.read(stored)
            read.add(tensor.untyped_storage().data_ptr())
            return tensor

        for stored, pattern in recipe.stored:
            converter.add_tensor(first, stored, pattern, functools.partial(reading, stored))
        made = converter.convert(first, model=self._model, config=self._model.config)
        tensors: dict[str, Tensor] = {}
        for name, value in made.items():
            tensor = value[0] if isinstance(value, list) else value
            memory = tensor.untyped_storage().data_ptr()
            tensors[name] = tensor.clone() if memory in read else tensor.contiguous()
            read.add(memory)
        return tensors


def _stacks_experts(converter: Any) -> bool:
    """Return whether a converter stacks matrices and does nothing after it that mixes one with another."""
    from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose

    stacking, *others = converter.operations
    if not isinstance(stacking, MergeModulelist) or stacking.dim != 0:
        return False
    within = [
        (isinstance(operation, Concatenate) and operation.dim > 0)
        or (isinstance(operation, Transpose) and not operation.check_dims and min(operation.dim0, operation.dim1) > 0)
        for operation in others
    ]
    return all(within)


class Shapes:
    """What transformers' conversions ask of the model, kept from before adapters changed its names."""

    def __init__(self, lm: Any) -> None:
        self.config = lm.config
        self.tensors: Mapping[str, Tensor] = dict(lm.state_dict())

    def get_parameter(self, name: str) -> Tensor:
        """Return a parameter by its name."""
        return self.tensors[name]


def meta_params(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the direct parameters of a module that have no values yet."""
    for short, param in module._parameters.items():
        if param is not None and param.is_meta:
            yield short, param


def digest(tensor: Tensor) -> str:
    """Return the sha256 of a tensor's type and bytes."""
    values = tensor.detach().cpu().contiguous()
    return hashlib.sha256(str(values.dtype).encode() + values.view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
