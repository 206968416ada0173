"""Every registry a recipe can choose from; the recipe room is handed them, because it may import none of them.

Reading a recipe loads the parts of other packages first; whoever asks the registries before that calls `PLUGINS.load`.
"""

from distft.data.formats import FORMATS
from distft.data.templates import BUILT_IN
from distft.engine import ENGINES
from distft.metrics import METRICS
from distft.model.adapters import METHODS
from distft.objectives import OBJECTIVES
from distft.optim import OPTIMIZERS, SCHEDULES
from distft.plugins import Plugins, installed
from distft.recipe import Registries
from distft.scores import SCORES

PLUGINS = Plugins((METHODS, OBJECTIVES, OPTIMIZERS, SCHEDULES, ENGINES, FORMATS, SCORES, METRICS), installed)

REGISTRIES = Registries(
    method=METHODS,
    objective=OBJECTIVES,
    optim=OPTIMIZERS,
    schedule=SCHEDULES,
    engine=ENGINES,
    formats=FORMATS,
    scores=SCORES,
    templates=tuple(BUILT_IN),
    load_plugins=PLUGINS.load,
)
