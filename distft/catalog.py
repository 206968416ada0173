"""Every registry a recipe can choose from; the recipe room is handed them, because it may import none of them.

Reading a recipe loads the parts of other packages first; whoever asks the registries before that calls `PLUGINS.load`.
"""

import sys
from collections.abc import Sequence
from typing import Any

from distft.columns import COLUMNS
from distft.core.registry import Registry
from distft.data.formats import FORMATS
from distft.data.templates import BUILT_IN
from distft.demo.files import resolve_paths
from distft.engine import ENGINES
from distft.export import EXPORTS
from distft.generation import GENERATORS
from distft.model.adapters import METHODS
from distft.model.heads import HEADS
from distft.objectives import OBJECTIVES
from distft.optim import OPTIMIZERS, SCHEDULES
from distft.plugins import Plugins, installed
from distft.recipe import Registries
from distft.scores import SCORES
from distft.step_sources import STEP_SOURCES

_ONCE_IMPORTED = {
    "distft.metrics": "METRICS",
    "distft.importers": "IMPORTERS",
    "distft.export_formats": "EXPORT_FORMATS",
}


def _open_registries() -> Sequence[Registry[Any]]:
    """Return what plugins may add to.

    Metrics import torch, and importers are many tables for one command: both count once something has imported them.
    """
    once_imported = [getattr(sys.modules[room], name) for room, name in _ONCE_IMPORTED.items() if room in sys.modules]
    parts = [METHODS, OBJECTIVES, OPTIMIZERS, SCHEDULES, ENGINES, FORMATS, SCORES, COLUMNS, HEADS]
    return [*parts, GENERATORS, STEP_SOURCES, EXPORTS, *once_imported]


PLUGINS = Plugins(_open_registries, installed)

REGISTRIES = Registries(
    method=METHODS,
    objective=OBJECTIVES,
    optim=OPTIMIZERS,
    schedule=SCHEDULES,
    engine=ENGINES,
    formats=FORMATS,
    scores=SCORES,
    generators=GENERATORS,
    exports=EXPORTS,
    templates=tuple(BUILT_IN),
    load_plugins=PLUGINS.load,
    resolve_paths=resolve_paths,
)
