"""What an objective declares about itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pydantic import Field

from distft.core.protocols import NO_COLUMNS, BatchColumns
from distft.core.registry import Params

if TYPE_CHECKING:
    from torch import Tensor

    from distft.core.types import Batch, LossTerms, Policy


class ReferenceModelParams(Params):
    """What objectives with a reference have in common."""

    reference: str | None = Field(default=None, min_length=1)
    """Another model as the reference, of the same config and tokenizer: a folder or a hub id. Unset: the model that
    training starts from. Its log-probabilities are computed before training; it never stands beside the trained one."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveSpec:
    """A named objective."""

    name: str
    params: type[Params]
    denominator: Callable[[Any, Sequence[Batch]], float]
    """(params, micro-batches of one rank and step) -> what the step's loss sum is divided by, before summing over
    ranks: supervised tokens, or pairs."""
    terms: Callable[[Any, Policy, Batch], LossTerms]
    """(params, policy, micro-batch on the device) -> sums; the same calls of the policy whatever the batch holds,
    because ranks run the same collectives."""
    group_size: int = 1
    """Documents of a row that it trains together; the rows' format has to give as many."""
    decisive: tuple[str, ...] = ()
    """Numbers of a row that it is made for, by their names in `FormatSpec.decisive`: it takes no rows without, and no
    other objective takes rows with them."""
    head: str = "lm"
    """What stands on the model's hidden states, by its name in `distft.model.heads.HEADS`."""
    other_head: Callable[[Any], str | None] = lambda params: None
    """params -> the head in its place, where they ask for another."""
    source: str = "rows"
    """Where its micro-batches come from, by the name in `distft.step_sources.STEP_SOURCES`."""
    writes: bool = False
    """It trains on answers that the model writes meanwhile: [rollout] says how many, and what rewards them."""
    rewarded: bool = True
    """Of one that writes: it learns from what answers are worth, so [rollout] has to name rewards."""
    per_token: bool = False
    """Asks the policy for log-probabilities of tokens, not only for the sum of losses."""
    perplexity: bool = False
    """Its loss is the mean cross-entropy of tokens: evaluations show exp(loss) as well."""
    figures: Callable[[Any], Mapping[str, bool]] = lambda params: {}
    """params -> names of the figures in its terms, and whether more is better."""
    columns: Callable[[Any], tuple[str, ...]] = lambda params: ()
    """params -> names of the columns it reads; see `Batch.columns`."""
    reference: Callable[[Any], str | None] = lambda params: None
    """params -> folder or hub id of the model whose log-probabilities those columns are of; None: of the model that
    training starts from."""
    teacher: Callable[[Any], str | None] = lambda params: None
    """params -> folder or hub id of a model that stands beside the trained one, whose hidden states a column is."""

    def head_of(self, params: Any) -> str:
        """Return the name of what stands on the model's hidden states under these settings."""
        return self.other_head(params) or self.head


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A spec with its parameters, the model it trains and what fills its columns: what the loop calls."""

    spec: ObjectiveSpec
    params: Any
    policy: Policy
    columns: BatchColumns = NO_COLUMNS
    reference: Callable[[Batch], Tensor] | None = None
    """Micro-batch on the device -> [S], the reference's log-probabilities, for objectives that have one."""

    def measuring(self) -> Objective:
        """Return the objective of an evaluation, which counts what training has no use for."""
        return replace(self, policy=self.policy.measuring())

    def fill(self, micros: list[Batch]) -> list[Batch]:
        """Collective, once a step: return the micro-batches with the columns that the objective reads."""
        return self.columns.fill(micros)

    def denominator(self, micros: Sequence[Batch]) -> float:
        """See `ObjectiveSpec.denominator`."""
        return self.spec.denominator(self.params, micros)

    def terms(self, batch: Batch) -> LossTerms:
        """See `ObjectiveSpec.terms`; the batch is on the device, its columns are filled."""
        return self.spec.terms(self.params, self.policy, batch)
