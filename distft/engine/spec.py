"""What an engine declares about itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, get_args

from distft.core.engine_traits import ParametersOnRank
from distft.core.registry import Params
from distft.engine.footprint import Footprint

if TYPE_CHECKING:
    from distft.core.types import Engine
    from distft.engine.processes import Processes


@dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """A named way to spread one model over processes."""

    name: str
    params: type[Params]
    module: str
    """Where `open_engine(name, params, processes)` is; imported when the engine is opened, so that recipes are checked
    without torch."""
    parameters: ParametersOnRank = "whole"
    """What a rank holds of the parameters between forwards, and what it gathers at once."""
    flattens: bool = False
    """The optimizer gets 1-D pieces of tensors, so it must be elementwise."""
    updates_in_backward: bool = False
    """It can update a weight once its gradient is complete (`UpdateRule.in_backward`)."""
    library: str | None = None
    """Importable name of the package it needs beyond torch."""
    max_world: int | None = None
    """Most processes it runs on."""
    footprint: Footprint = field(default_factory=Footprint)
    """State it keeps on a rank, bytes it gathers and sends: what `distft plan` reckons with. The default is that of an
    engine that keeps everything whole on every rank."""

    @property
    def offloads(self) -> tuple[str, ...]:
        """Values that its `offload` takes beside "none"."""
        key = self.params.model_fields.get("offload")
        return () if key is None else tuple(value for value in get_args(key.annotation) if value != "none")

    def open(self, params: Params, processes: Processes) -> Engine:
        """Return the engine, before it has a model."""
        return import_module(self.module).open_engine(self.name, params, processes)
