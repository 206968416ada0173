"""What was learned, as changes of the base's tensors: of an adapter, or of a model that was trained whole."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Protocol

from torch import Tensor

from distft.core.errors import Problem, RecipeError
from distft.merging.adapter_folder import AdapterFolder
from distft.merging.base_model import BaseModel
from distft.merging.bound_adapter import BoundAdapter
from distft.merging.changes import LowRankChange

_SHOWN = 6


class DeltaSource(Protocol):
    """Changes of a base by the names of its tensors."""

    folder: Path
    label: str

    @property
    def names(self) -> frozenset[str]:
        """Tensors that are changed, or may be."""
        ...

    def delta(self, name: str) -> Tensor:
        """Return the change of a tensor, in fp32."""
        ...

    def product(self, name: str) -> LowRankChange | None:
        """Return the change as a product, where it is one."""
        ...

    def is_whole(self, name: str) -> bool:
        """Return whether the tensor was trained itself."""
        ...

    def digest(self) -> str:
        """Return a sha256 of the source's files."""
        ...


class AdapterDeltas:
    """The changes of an adapter."""

    def __init__(self, folder: Path, base: BaseModel) -> None:
        """Read the adapter and put it on the base.

        Raises:
            RecipeError: it is not understood, or does not fit the base.
        """
        self.adapter = AdapterFolder(folder)
        self.bound = BoundAdapter(self.adapter, base)
        self.folder, self.label, self._base = folder, self.adapter.label, base

    @property
    def names(self) -> frozenset[str]:
        """Tensors that the adapter changes."""
        return self.bound.names

    def delta(self, name: str) -> Tensor:
        """Return the change of a tensor: what the merged one has more than the base's."""
        product = self.product(name)
        if product is not None:
            return product.delta()
        base = self._base.value(name)
        return self.bound.applied(name, base) - base

    def product(self, name: str) -> LowRankChange | None:
        """Return the change as a product, where it is one."""
        return self.bound.low_rank(name)

    def is_whole(self, name: str) -> bool:
        """Return whether the adapter holds the tensor itself."""
        return self.bound.is_whole(name)

    def digest(self) -> str:
        """Return a sha256 of config and tensors."""
        return self.adapter.digest()


class FileDeltas:
    """The products of a plain adapter, without its base: enough for norms and angles, not for what the base enters."""

    def __init__(self, folder: Path) -> None:
        """Read the adapter.

        Raises:
            RecipeError: it is not understood, or has changes that only the base makes known.
        """
        self.adapter = AdapterFolder(folder)
        self.adapter.refuse_unless_plain("a look without --base")
        self.folder, self.label = folder, self.adapter.label
        self._modules = {f"{name}.weight": tensors for name, tensors in self.adapter.low_rank_modules().items()}

    @property
    def names(self) -> frozenset[str]:
        """Tensors that have a product."""
        return frozenset(self._modules)

    def delta(self, name: str) -> Tensor:
        """Return the product."""
        return self.product(name).delta()

    def product(self, name: str) -> LowRankChange:
        """Return the change as a product."""
        return self.adapter.low_rank(self._modules[name], transposed=self.adapter.config.fan_in_fan_out)

    def is_whole(self, name: str) -> bool:
        """Return False: whole tensors are not looked at here."""
        return False

    def digest(self) -> str:
        """Return a sha256 of config and tensors."""
        return self.adapter.digest()


class ModelDeltas:
    """The changes of a model that was trained whole: its task vector."""

    def __init__(self, folder: Path, base: BaseModel) -> None:
        """Read the model's headers.

        Raises:
            RecipeError: it is another model than the base.
        """
        self.folder, self.label, self._base = (
            folder,
            folder.parent.name if folder.name == "final" else folder.name,
            base,
        )
        self._model = BaseModel(folder, head=base.head)
        ours, theirs = self._shapes(self._model), self._shapes(base)
        names = sorted(ours.keys() | theirs.keys())
        wrong = [name for name in names if ours.get(name) != theirs.get(name)]
        if wrong:
            listed = [
                Problem(
                    message=f"{name}: {ours.get(name, 'not there')}, and {theirs.get(name, 'not there')} in the base",
                    fix="give the base that it was trained from with --base",
                )
                for name in wrong[:_SHOWN]
            ]
            raise RecipeError(f"{folder} and {base.folder}", listed)

    def _shapes(self, model: BaseModel) -> dict[str, tuple[int, ...]]:
        """Return shapes by name, of both ends of a tie."""
        return {name: shape for name in (*model.parameters, *model.tied) if (shape := model.shape(name)) is not None}

    @property
    def names(self) -> frozenset[str]:
        """All parameters, tied ones by both of their names."""
        return frozenset((*self._model.parameters, *self._model.tied))

    def delta(self, name: str) -> Tensor:
        """Return the model's tensor less the base's."""
        return self._model.value(name) - self._base.value(name)

    def product(self, name: str) -> LowRankChange | None:
        """Return None: the change of a whole model is no product."""
        return None

    def is_whole(self, name: str) -> bool:
        """Return True: the tensor was trained itself."""
        return True

    def digest(self) -> str:
        """Return a sha256 of the files of weights."""
        return _weights_digest(self.folder)


def source_digest(folder: Path) -> str:
    """Return the digest that the source of a folder has, without its base."""
    return _weights_digest(folder) if is_model(folder) else AdapterFolder(folder).digest()


def _weights_digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def is_model(folder: Path) -> bool:
    """Return whether a folder holds a whole model."""
    return (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file()
