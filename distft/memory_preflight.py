"""Runs the largest micro-batch once before training, so that a lack of memory shows in the first minute.

Nothing of it stays: no update is applied, the optimizer's state is as before its first, random numbers are seeded per
micro-batch anyway. What is left is warmed-up kernels and caches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from distft.core.errors import MachineError
from distft.core.out_of_memory import held, is_out_of_memory
from distft.core.phase import PHASE
from distft.core.types import IGNORE, Batch, Engine, TrainState

if TYPE_CHECKING:
    from distft.objectives.spec import Objective

MICROS = 2
"""Gradients of an earlier micro-batch lie around while a later one runs; a third adds nothing."""


@dataclass(frozen=True, kw_only=True)
class LargestMicroBatch:
    """The largest micro-batch that the run can meet."""

    sequences: int
    """Sequences of a micro-batch."""
    longest: int
    """Tokens in the longest sequence."""
    micros: int
    """Micro-batches of a step on one rank."""
    evaluates: bool
    """Evaluations happen."""
    group_size: int = 1
    """Documents of a row, which share its tokens."""
    values: tuple[str, ...] = ()
    """Names of the numbers of each row (`FormatSpec.values`)."""

    def batch(self) -> Batch:
        """Build the micro-batch: full-length rows, all tokens but a document's first supervised."""
        longest, documents = self.longest // self.group_size, self.sequences * self.group_size
        ids_T = torch.zeros(documents * longest, dtype=torch.int64)
        labels_T = torch.zeros_like(ids_T)
        labels_T[longest - 1 :: longest] = IGNORE
        return Batch(
            input_ids_T=ids_T,
            labels_T=labels_T,
            position_ids_T=torch.arange(longest).repeat(documents),
            cu_seqlens=torch.arange(0, len(ids_T) + 1, longest, dtype=torch.int32),
            max_seqlen=longest,
            num_supervised=documents * (longest - 1),
            num_tokens=len(ids_T),
            group_sizes=(self.group_size,) * self.sequences,
            sample_ids=("the rehearsal",),
            columns={name: torch.zeros(self.sequences) for name in self.values},
        )


def run_preflight(worst: LargestMicroBatch, engine: Engine, objective: Objective, *, advice: Callable[[], str]) -> None:
    """Run one step of the worst micro-batches, an update that changes nothing, and an evaluation of one batch.

    Args:
        worst: see there.
        engine: holding the model; state is as before afterwards.
        objective: the run's.
        advice: what to change, asked for only when memory runs out.

    Raises:
        MachineError: memory ran out; says in which part, how much was held, and what to change.
    """
    micros = objective.fill([worst.batch()] * min(MICROS, worst.micros))
    denominator = sum(engine.sum_over_ranks(objective.denominator(micros)))
    for index, micro in enumerate(micros):
        with engine.accumulating(last=index == len(micros) - 1, seed=0):
            with _part("forward", worst, advice):
                terms = objective.terms(engine.place(micro))
            with _part("backward", worst, advice):
                engine.backward(terms, divide_by=denominator, samples=micro.sample_ids)
        del terms
    with _part("update", worst, advice):
        engine.step(TrainState(), denominator, lambda loss: False)
        engine.create_state()
    if worst.evaluates:
        with _part("eval", worst, advice), engine.evaluating():
            objective.terms(engine.place(micros[0]))


@contextlib.contextmanager
def _part(name: str, worst: LargestMicroBatch, advice: Callable[[], str]) -> Iterator[None]:
    PHASE.enter(name)
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        size = f"{worst.sequences} x {worst.longest:,} tokens"
        raise MachineError(
            f"the rehearsal ran out of memory in the {name} of a full micro-batch ({size}){held()}\n{advice()}"
        ) from error
