"""Tracks the best evaluation and decides about early stopping; its state is equal on all ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distft.core.types import TrainState


class BestTracker:
    """Compares every evaluation with the best one so far."""

    def __init__(
        self, *, keep: bool, patience: int | None, by: str = "eval_loss", higher_is_better: bool = False
    ) -> None:
        """Start without an evaluation.

        Args:
            keep: a best state is to be saved.
            patience: evaluations without improvement before training ends early; None: never.
            by: name of the figure that decides.
            higher_is_better: whether a higher value of that figure is better.
        """
        self._keep, self._patience, self._by, self._sign = keep, patience, by, -1.0 if higher_is_better else 1.0
        self._figure: float | None = None
        self._step = 0
        self._evals_without_improvement = 0
        """Evaluations after the best one."""
        self.last_eval_step = 0
        """Step of the last evaluation that was not broken off."""

    @property
    def should_stop(self) -> bool:
        """Whether training may end early."""
        return self._patience is not None and self._evals_without_improvement >= self._patience

    def update(self, state: TrainState, figures: dict[str, float] | None) -> dict[str, Any] | None:
        """Compare an evaluation with the best so far.

        An evaluation that was interrupted (None), or lacks the deciding figure, changes nothing.

        Returns:
            The content of best.json when this state is the best so far and is to be kept, else None. NaN is never the
            best.
        """
        if figures is None:
            return None
        self.last_eval_step = state.step
        if self._by not in figures:
            return None
        figure = figures[self._by]
        is_number = figure == figure
        if is_number and (self._figure is None or self._sign * figure < self._sign * self._figure):
            self._figure, self._step, self._evals_without_improvement = figure, state.step, 0
            return {"step": state.step, self._by: figure} if self._keep and state.step else None
        self._evals_without_improvement += 1
        return None

    @property
    def step(self) -> int:
        """Step of the best evaluation so far; 0: the base model's, or none yet."""
        return self._step

    def state(self) -> dict[str, Any]:
        """Return what a continued run must know, as JSON values."""
        return {
            "figure": self._figure,
            "step": self._step,
            "since": self._evals_without_improvement,
            "seen": self.last_eval_step,
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on from what `state()` returned."""
        self._figure, self._step, self._evals_without_improvement, self.last_eval_step = (
            saved[key] for key in ("figure", "step", "since", "seen")
        )
