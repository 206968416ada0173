"""A job as people see it: what OpenAI's object of it has, and how far it is, which that has not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from distft.service.tables import JobRow


@dataclass(frozen=True, kw_only=True)
class JobCard:
    """A job for the pages."""

    id: str
    model: str
    suffix: str
    status: str
    wish: str
    """run | pause | cancel: what was last asked of it."""
    where: str | None
    """Where a live run stands with what runs it, in words; None: there is nothing to say."""
    is_waiting: bool
    """Whether the run is in the queue of what runs it."""
    priority: int
    step: int
    num_steps: int | None
    attempt: int
    """Starts of its process so far."""
    created_at: int
    started_at: int | None
    finished_at: int | None
    estimated_finish: int | None
    method: str
    hyperparameters: dict[str, Any]
    training_file: str
    validation_file: str | None
    seed: int
    fine_tuned_model: str | None
    """None until the job has succeeded, and after its model was deleted."""
    result_file: str | None
    trained_tokens: int | None
    error: dict[str, Any] | None

    @property
    def title(self) -> str:
        """What people call it."""
        return self.suffix or self.id

    @property
    def is_over(self) -> bool:
        """Whether nothing will happen to it any more."""
        return self.status in ("succeeded", "failed", "cancelled")

    @property
    def is_pausing(self) -> bool:
        """Whether it runs, and was asked to save and stop."""
        return self.status == "running" and self.wish == "pause"


def card_of(row: JobRow) -> JobCard:
    """Return a job's card."""
    state = row.runner_state if row.status == "running" and row.runner_state else {}
    return JobCard(
        id=row.id, model=row.model, suffix=row.suffix, status=row.status, wish=row.wish, priority=row.priority,
        where=state.get("words"), is_waiting=state.get("waits", False),
        step=row.step, num_steps=row.num_steps, attempt=row.attempt, created_at=row.created_at,
        started_at=row.started_at, finished_at=row.finished_at, estimated_finish=row.estimated_finish,
        method=row.method["type"], hyperparameters=row.hyperparameters, training_file=row.training_file,
        validation_file=row.validation_file, seed=row.seed,
        fine_tuned_model=row.fine_tuned_model if row.status == "succeeded" and row.deleted_at is None else None,
        result_file=row.result_file, trained_tokens=row.trained_tokens, error=row.error,
    )  # fmt: skip
