"""What a source of training steps declares about itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distft.core.protocols import StepSource
from distft.core.registry import NoParams, Params
from distft.core.types import Batch, Engine, Policy

if TYPE_CHECKING:
    from distft.data.loader import Steps
    from distft.data.questions import Question
    from distft.generation.spec import CompletionGenerator
    from distft.recipe.rollout import RolloutTable


@dataclass(frozen=True, kw_only=True)
class StepSourceInputs:
    """What a source may use."""

    steps: Steps
    """The recipe's rows, cut into steps: their prompts, for a source that makes its own answers."""
    objective: Any
    """Parameters of the recipe's objective."""
    engine: Engine
    policy: Policy
    """The model as it is when it is asked."""
    fill: Callable[[list[Batch]], list[Batch]]
    """Collective: gives micro-batches the columns that the objective reads; the loop leaves those alone that they have.
    """
    generator: Callable[[str], CompletionGenerator]
    """Name -> an opened generator (see `distft.generation.GENERATORS`), with the settings of [rollout] where it is that
    table's, else with its own; collective."""
    max_length: int
    """Tokens of a document at most."""
    num_steps: int
    """Optimizer steps of the run."""
    rollout: RolloutTable
    """How many answers, and what rewards them."""
    questions: Callable[[], Sequence[Question]]
    """Reads the prompts of the rows that are trained, by `Steps.sample_ids`."""
    folder: Path
    """Where a source keeps what it has made, in the run folder; need not exist."""
    single_documents: bool
    """The model takes one document in a forward."""
    stop: Callable[[], bool]
    """Whether this rank was asked to stop: what takes long should look."""
    seed: int
    """Of the run: what a source draws follows from it and from the step's number alone."""


def _as_many(objective: Any, steps: int) -> int:
    return steps


@dataclass(frozen=True, kw_only=True)
class StepSourceSpec:
    """A named source; an objective says which it trains on (`ObjectiveSpec.source`)."""

    name: str
    open: Callable[[StepSourceInputs], StepSource]
    """Once, after the engine has its weights. The loop asks for a step after the update of the one before it, so that
    a source that generates sees the new weights."""
    params: type[Params] = NoParams
    num_steps: Callable[[Any, int], int] = _as_many
    """(the objective's parameters, steps that the rows are cut into) -> optimizer steps of the run."""
    updates: Callable[[RolloutTable], int] | None = None
    """[rollout] -> optimizer steps on each step's rows, for a source that reads that table; None: it does not."""
