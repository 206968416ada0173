"""Which operations read the values of some tensors, as opposed to their shapes and types."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_SHAPES = ("_like", "new_", "is_same_size", "_has_compatible", "set_")
"""Parts of the names of operations that look at a tensor's shape and type alone."""


class BaseReads(TorchDispatchMode):
    """Inside this context every operation that makes a tensor of the watched ones' values is noted."""

    def __init__(self, watched: Iterable[Tensor]) -> None:
        """Watch tensors, by their storages."""
        super().__init__()
        self._watched = list(watched)  # kept: the place of a storage that is gone may be taken again
        self._storages = {tensor.untyped_storage()._cdata for tensor in self._watched}
        self.operations = set[str]()
        """Names of the operations."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and note it where it reads."""
        output = func(*args, **(kwargs or {}))
        name = str(func.overloadpacket.__name__)
        if any(self._is_watched(leaf) for leaf in tree_leaves((args, kwargs))):
            makes = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
            is_view = bool(makes) and all(self._is_watched(leaf) for leaf in makes)
            if name == "clone":  # what is made of a copy is what matters
                self._watched += makes
                self._storages |= {made.untyped_storage()._cdata for made in makes}
            elif not is_view and not any(part in name for part in _SHAPES):
                self.operations.add(name)
        return output

    def _is_watched(self, leaf: Any) -> bool:
        return isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata in self._storages
