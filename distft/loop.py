"""The training loop: one optimizer step as a story, the same for every engine, method and objective."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from distft.core.types import Batch, Engine, StepReport, TrainState
from distft.evaluate import evaluate
from distft.metrics import Meters
from distft.objectives.spec import Objective

T = TypeVar("T")


class StepSource(Protocol):
    """Training data cut into optimizer steps (`distft.data.loader.Steps`)."""

    def samples_in(self, step: int) -> int:
        """Sequences of a 0-based step on all ranks; the last one may be short."""
        ...

    def from_step(self, step: int) -> Iterator[list[Batch]]:
        """Micro-batches of each step from `step` on; as many per step on every rank."""
        ...


@dataclass(frozen=True, kw_only=True)
class Every:
    """When things happen between steps, as predicates of the number of steps taken."""

    log: Callable[[int], bool]
    eval: Callable[[int], bool]
    save: Callable[[int], bool]


class Checkpoints(Protocol):
    """Where the loop leaves training state (`distft.resume`)."""

    def save(self, state: TrainState) -> None:
        """Collective: write the state of this step."""
        ...

    def poll(self, state: TrainState) -> None:
        """Collective, after every step: commit what was written in the background, if it is done."""
        ...


def fit(
    state: TrainState,
    steps: StepSource,
    eval_steps: Collection[Batch],
    *,
    engine: Engine,
    objective: Objective,
    meters: Meters,
    checkpoints: Checkpoints,
    stop: Callable[[], bool],
    every: Every,
) -> TrainState:
    """Train from `state` to the end of `steps`, or to the step at which some rank's `stop` says so.

    Raises:
        NumericError: a loss or gradient norm is not finite; the weights are those of the step before.
    """
    meters.start()
    for micros in steps.from_step(state.step):
        tokens = sum(micro.num_tokens for micro in micros)
        weight, tokens, stops = engine.sum_over_ranks(objective.weight(micros), tokens, stop())
        if stops:
            break
        for last, micro in mark_last(micros):
            with engine.accumulating(last=last, seed=micro.position):
                terms = objective.terms(engine.model, engine.place(micro))  # sums and counts, never means
                engine.backward(terms.loss_sum, divide_by=weight, samples=micro.sample_ids)
            meters.micro(micro, terms)
        report: StepReport = engine.step(state, weight)  # finite on all ranks? clip, update
        state = state.after(samples=steps.samples_in(state.step), tokens=int(tokens), tokens_loss=int(weight))
        meters.step(state, report, log=every.log(state.step))
        if every.eval(state.step):
            meters.evaluated(state, evaluate(engine, objective, eval_steps))
            meters.start()
        checkpoints.poll(state)
        if every.save(state.step):
            checkpoints.save(state)
    return state


def mark_last(items: Sequence[T]) -> Iterator[tuple[bool, T]]:
    """(is it the last one, item) for each item."""
    for index, item in enumerate(items):
        yield index == len(items) - 1, item
