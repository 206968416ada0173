"""An adapter on its base: for every tensor of the base the changes that the adapter makes to it, in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from distft.core.errors import Problem, RecipeError
from distft.merging.adapter_config import adapter_mistake
from distft.merging.adapter_folder import AdapterFolder, ModuleTensors, matches
from distft.merging.base_model import BaseModel, is_finite
from distft.merging.changes import BiasShift, Change, ExpertsChange, LowRankChange, ScaleChange, TokenRows, WholeChange

_SHOWN = 6
_FIX = "give the base that it was trained on with --base"


class BoundAdapter:
    """The changes of an adapter by the names of its base's tensors.

    `names` are the tensors it changes. What an adapter does to one of two tied tensors is done to that one alone, as
    PEFT does it; trained rows of tokens are for both.
    """

    def __init__(self, adapter: AdapterFolder, base: BaseModel) -> None:
        """Find each tensor's place.

        Raises:
            RecipeError: the base has no such module or another shape, or tensors are missing for some of its modules.
        """
        self.adapter, self.base = adapter, base
        self._makers: dict[str, list[Callable[[], Change]]] = {}
        self._problems: list[str] = []
        for name, key in adapter.whole.items():
            self._whole(name, key)
        for tensors in adapter.modules.values():
            self._place(tensors)
        self._check_complete()
        if self._problems:
            more = len(self._problems) - _SHOWN
            listed = [Problem(message=message, fix=_FIX) for message in self._problems[:_SHOWN]]
            listed += [Problem(message=f"and {more} more like these", fix=_FIX)] if more > 0 else []
            raise RecipeError(f"{adapter.folder} on {base.folder}", listed)

    @property
    def names(self) -> frozenset[str]:
        """Tensors that the adapter changes."""
        return frozenset(self._makers)

    def changes(self, name: str) -> list[Change]:
        """Return what is done to a tensor, in order; reads the adapter's file."""
        return [make() for make in self._makers.get(name, ())]

    def applied(self, name: str, weight: Tensor) -> Tensor:
        """Return a tensor of the base with the adapter in it.

        Raises:
            RecipeError: the result is not finite.
        """
        for change in self.changes(name):
            weight = change.applied(weight)
        if name in self._makers and not is_finite(weight):
            raise adapter_mistake(
                self.adapter.file, f"{name} is not finite with the adapter in it", "the adapter is damaged or diverged"
            )
        return weight

    def low_rank(self, name: str) -> LowRankChange | None:
        """Return the tensor's product where that is all the adapter does to it."""
        changes = self._without_copies(name)
        only = changes[0] if len(changes) == 1 else None
        return only if isinstance(only, LowRankChange) and only.magnitude_O is None else None

    def is_whole(self, name: str) -> bool:
        """Return whether the adapter holds the tensor itself."""
        return any(isinstance(change, WholeChange) for change in self._without_copies(name))

    def _without_copies(self, name: str) -> list[Change]:
        """Return the changes without copies of the base's own tensor, which PEFT stores beside adapted embeddings."""
        changes = self.changes(name)
        if len(changes) > 1 and isinstance(changes[0], WholeChange):
            copied = changes[0].value
            if torch.equal(self.base.value(name).to(copied.dtype), copied):
                return changes[1:]
        return changes

    # -- finding places --------------------------------------------------------------------------------------------

    def _add(self, name: str, make: Callable[[], Change]) -> None:
        self._makers.setdefault(name, []).append(make)

    def _has(self, name: str, shape: tuple[int, ...], what: str) -> bool:
        wanted = self.base.shape(name)
        if wanted is None:
            self._problems.append(f"{what} belongs to {name}, which the base does not have")
        elif wanted != shape:
            self._problems.append(f"{what} is made for {name} of shape {shape}, and the base has {wanted}")
        return wanted == shape

    def _whole(self, name: str, key: str) -> None:
        if self._has(name, self.adapter.entries[key].shape, key):
            self._add(name, lambda: WholeChange(value=self.adapter.read(key)))

    def _place(self, tensors: ModuleTensors) -> None:
        kind = self.base.kinds.get(tensors.module)
        if kind is None:
            self._problems.append(f"{tensors.module}: the base has no such module ({type(self.base.lm).__name__})")
        elif "tokens" in tensors.keys:
            self._tokens(tensors)
        elif "factors" in tensors.keys:
            self._ia3(tensors)
        elif kind == "other" or self._is_parameter(tensors):
            self._parameter(tensors)
        else:
            self._product(tensors)

    def _shape(self, tensors: ModuleTensors, part: str) -> tuple[int, ...]:
        return self.adapter.entries[tensors.keys[part]].shape

    def _product(self, tensors: ModuleTensors) -> None:
        kind = self.base.kinds[tensors.module]
        is_embedding = "embedding_a" in tensors.keys
        if is_embedding != (kind == "embedding"):
            ours, theirs = ("an embedding", "a linear layer")[:: 1 if is_embedding else -1]
            self._problems.append(f"{tensors.module}: tensors of {ours}, and the base has {theirs}")
            return
        a = self._shape(tensors, "embedding_a" if is_embedding else "a")
        b = self._shape(tensors, "embedding_b" if is_embedding else "b")
        transposed = kind != "linear"
        name = f"{tensors.module}.weight"
        shape = (a[-1], b[0]) if transposed else (b[0], a[-1])
        if not self._has(name, shape, f"{tensors.module}: B A"):
            return
        self._add(name, lambda: self.adapter.low_rank(tensors, transposed=transposed))
        if "magnitude" in tensors.keys and self._count(tensors, "magnitude") != b[0]:
            self._problems.append(
                f"{tensors.module}: {self._count(tensors, 'magnitude')} magnitudes for {b[0]} outputs"
            )
        if "shift" in tensors.keys:
            self._shift(tensors)

    def _shift(self, tensors: ModuleTensors) -> None:
        name, scale = f"{tensors.module}.bias", self.adapter.config.scale_of(tensors.module)
        if self.base.shape(name) is None:
            self._problems.append(f"{tensors.module}: lora_bias, and the layer of the base has no bias")
        elif self._has(name, self._shape(tensors, "shift"), f"{tensors.module}: the bias of B"):
            self._add(name, lambda: BiasShift(shift_O=self.adapter.read(tensors.keys["shift"]), scale=scale))

    def _is_parameter(self, tensors: ModuleTensors) -> bool:
        """Return whether the module is adapted as one that holds parameters, such as a router's plain matrix."""
        return bool(self._parameters_of(tensors.module))

    def _parameters_of(self, module: str) -> list[str]:
        """Return the short names of the module's parameters that target_parameters means, in the model's order."""
        wanted = self.adapter.config.target_parameters
        own = [short for short, param in self.base.lm.get_submodule(module)._parameters.items() if param is not None]
        return [short for short in own if matches(f"{module}.{short}", wanted)]

    def _parameter(self, tensors: ModuleTensors) -> None:
        """Place a product on a parameter: PEFT wraps in the model's order, so the last one is outermost."""
        shorts = self._parameters_of(tensors.module)
        if tensors.depth >= len(shorts) or "a" not in tensors.keys:
            self._problems.append(f"{tensors.module}: tensors for no parameter that target_parameters names")
            return
        name = f"{tensors.module}.{shorts[-1 - tensors.depth]}"
        shape = self.base.shape(name)
        assert shape is not None
        a, b, config = self._shape(tensors, "a"), self._shape(tensors, "b"), self.adapter.config
        count = shape[0] if len(shape) == 3 else 1
        swapped = len(shape) == 3 and bool(getattr(self.base.lm.get_submodule(tensors.module), "is_transposed", False))
        made = (b[0], a[1]) if len(shape) == 2 else (count, a[1], b[0]) if swapped else (count, b[0], a[1])
        if made != shape or a[0] != b[1] or a[0] != count * config.rank_of(name):
            self._problems.append(
                f"{name}: A is {a} and B is {b} at rank {config.rank_of(name)}, and the base has {shape}"
            )
            return
        self._add(name, lambda: self._experts(tensors, name, count if len(shape) == 3 else 0, swapped))

    def _experts(self, tensors: ModuleTensors, name: str, count: int, swapped: bool) -> Change:
        a, b = (self.adapter.read(tensors.keys[part]) for part in ("a", "b"))
        scale = self.adapter.config.scale_of(name)
        if not count:
            return LowRankChange(a_RI=a, b_OR=b, scale=scale, transposed=False)
        return ExpertsChange(a_EI=a, b_OE=b, scale=scale, num_experts=count, transposed=swapped)

    def _count(self, tensors: ModuleTensors, part: str) -> int:
        return torch.Size(self._shape(tensors, part)).numel()

    def _tokens(self, tensors: ModuleTensors) -> None:
        name, config = f"{tensors.module}.weight", self.adapter.config
        by_name = config.token_indices
        if config.kind == "TRAINABLE_TOKENS":
            ids = next(iter(by_name.values()), ())
        else:
            ids = next((ids for end, ids in by_name.items() if not end or matches(tensors.module, (end,))), ())
        shape = self.base.shape(name)
        count, width = self._shape(tensors, "tokens")
        if shape is None or len(ids) != count or width != shape[-1] or max(ids, default=0) >= shape[0]:
            self._problems.append(
                f"{tensors.module}: {count} rows of width {width} for {len(ids)} token ids "
                f"up to {max(ids, default=0)}, and the base has {shape}"
            )
            return
        for tied in self._tied_with(name):
            if not any(f"{other.module}.weight" == tied for other in self.adapter.modules.values()) or tied == name:
                self._add(tied, lambda: TokenRows(ids=ids, rows=self.adapter.read(tensors.keys["tokens"])))

    def _tied_with(self, name: str) -> Iterator[str]:
        yield name
        yield from (target for target, origin in self.base.tied.items() if origin == name)
        if name in self.base.tied:
            yield self.base.tied[name]

    def _ia3(self, tensors: ModuleTensors) -> None:
        kind, config = self.base.kinds[tensors.module], self.adapter.config
        if kind not in ("linear", "conv1d"):
            self._problems.append(f"{tensors.module}: factors for a {kind} module")
            return
        on_inputs = matches(tensors.module, config.feedforward_modules)
        dim = int(on_inputs) if kind == "linear" else 1 - int(on_inputs)
        name, count = f"{tensors.module}.weight", self._count(tensors, "factors")
        shape = self.base.shape(name)
        if shape is None or shape[dim] != count:
            self._problems.append(f"{name}: {count} factors, and the base has {shape}")
            return
        self._add(name, lambda: ScaleChange(factors=self.adapter.read(tensors.keys["factors"]), dim=dim))
        if not on_inputs and self.base.shape(f"{tensors.module}.bias") is not None:
            self._add(
                f"{tensors.module}.bias", lambda: ScaleChange(factors=self.adapter.read(tensors.keys["factors"]), dim=0)
            )

    def _check_complete(self) -> None:
        """Report modules of the base that the config names and the file holds nothing of."""
        config = self.adapter.config
        if config.kind == "TRAINABLE_TOKENS" or config.partial_layers or not config.target_modules:
            return
        held = {tensors.module for tensors in self.adapter.modules.values()}
        for module, kind in self.base.kinds.items():
            left_out = matches(module, config.exclude_modules) or matches(module, config.modules_to_save)
            named = kind != "other" and matches(module, config.target_modules) and not left_out
            if named and module not in held:
                self._problems.append(f"{module}: target_modules names it, and the file holds nothing of it")
