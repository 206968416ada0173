"""What a form of a trained model declares about itself: the folder that other programs load."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distft.core.registry import NoParams, Params

if TYPE_CHECKING:
    import torch

    from distft.core.types import Engine
    from distft.model.adapters import MethodSpec
    from distft.model.heads import HeadSpec
    from distft.model.layout import FileLayout

Shapes = Mapping[str, "tuple[tuple[int, ...], torch.dtype]"]
"""Parameter name (as the saved folder spells it) -> whole shape and type, tied tensors once."""


@dataclass(frozen=True, kw_only=True)
class ExportInputs:
    """A trained model as its engine holds it. All ranks have the same; files are written by rank 0."""

    engine: Engine
    """Gives whole tensors one at a time (`Engine.full_tensors`)."""
    lm: Any
    """The attached model, for its config and its names; its tensors are the engine's."""
    shapes: Shapes
    """What the method saves: trained tensors of an adapter, all tensors of a whole model."""
    prefix: str
    """What engines put before the names in `shapes`."""
    layout: FileLayout
    """How the hub's files name and split the tensors."""
    method: MethodSpec
    starts: Mapping[str, str]
    """sha256 of what parameters of a method that starts with no zeros started as (see `MetaModel.starts`)."""
    write_config: Callable[[Path], None]
    """Writes config.json into a folder."""
    write_beside: Callable[[Path], None]
    """Writes what stands beside weights: the tokenizer, generation_config.json, the model card."""


def _never(params: Any, method: MethodSpec, head: HeadSpec) -> str:
    return ""


@dataclass(frozen=True, kw_only=True)
class ExportSpec:
    """A named form of a trained model."""

    name: str
    write: Callable[[Any, ExportInputs, Path], None]
    """(params, inputs, folder) -> collective; the folder appears whole or not at all."""
    params: type[Params] = NoParams
    refuses: Callable[[Any, MethodSpec, HeadSpec], str] = _never
    """(params, method, head) -> why such a model has no such form; "" where it has."""
