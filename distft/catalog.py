"""Every registry a recipe can choose from; the recipe room is handed them, because it may import none of them."""

from distft.data.formats import FORMATS
from distft.data.templates import BUILT_IN
from distft.engine import ENGINES
from distft.model.adapters import METHODS
from distft.objectives import OBJECTIVES
from distft.optim import OPTIMIZERS, SCHEDULES
from distft.recipe import Registries
from distft.scores import SCORES

REGISTRIES = Registries(
    method=METHODS,
    objective=OBJECTIVES,
    optim=OPTIMIZERS,
    schedule=SCHEDULES,
    engine=ENGINES,
    formats=FORMATS,
    scores=SCORES,
    templates=tuple(BUILT_IN),
)
