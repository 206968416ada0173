"""The training loop: one optimizer step as a story, the same for every engine, method and objective."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from distft.core.phase import PHASE
from distft.core.protocols import Best, Checkpoints, Every, Guard, StepSource
from distft.core.types import Engine, TrainState
from distft.metrics import Meters
from distft.objectives.spec import Objective

T = TypeVar("T")


def fit(
    state: TrainState,
    steps: StepSource,
    *,
    engine: Engine,
    objective: Objective,
    meters: Meters,
    checkpoints: Checkpoints,
    guard: Guard,
    look: Callable[[TrainState], dict[str, float] | None],
    best: Best,
    stop: Callable[[], bool],
    every: Every,
) -> TrainState:
    """Train from `state` to the end of `steps`, or until `best.should_stop`, or until some rank's `stop` says so.

    Raises:
        NumericError: a step's numbers are such that the recipe says to stop; the weights are those of the step before.
        RollBack: they are such that the recipe says to go back to a checkpoint.
    """
    enter = PHASE.enter
    meters.start()
    enter("data", state.step + 1)
    for micros in steps.from_step(state.step):
        enter("agree")
        denominator, tokens, loss_tokens, stops = engine.sum_over_ranks(
            objective.denominator(micros),
            sum(micro.num_tokens for micro in micros),
            sum(micro.num_supervised for micro in micros),
            stop(),
        )
        if stops:
            break
        for last, micro in mark_last(objective.fill(micros)):
            enter("forward")
            with engine.accumulating(last=last, seed=micro.position):
                terms = objective.terms(engine.place(micro))  # sums and counts, never means
                enter("backward")
                engine.backward(terms, divide_by=denominator, samples=micro.sample_ids)
            meters.micro(micro, terms)
        enter("update")
        report = engine.step(state, denominator, guard.allow_update)  # finite on all ranks, and no spike? clip, update
        samples = steps.samples_in(state.step)
        state = state.after(report, samples=samples, tokens=int(tokens), tokens_loss=int(loss_tokens))
        meters.step(state, report, log=every.log(state.step))
        guard.after(state, report)
        keep = None
        if every.eval(state.step):
            figures = look(state)  # None: broken off, because some rank is to stop
            meters.evaluated(state, figures)
            keep = best.update(state, figures)
            meters.start()
        checkpoints.poll(state)
        if keep or every.save(state.step):
            enter("save")
            checkpoints.save(state, keep)
        if best.should_stop:
            break
        enter("data", state.step + 1)
    return state


def mark_last(items: Sequence[T]) -> Iterator[tuple[bool, T]]:
    """Yield (is it the last one, item) for each item."""
    for index, item in enumerate(items):
        yield index == len(items) - 1, item
